"""Denoisers of a series of coefficient images, which share one scale and are restored together.

The images stand in the canonical form of ``canonical_series``: real parts of all components, then imaginary
parts. Noise is equally strong in all of them, and its level is relative to the intensity of the first image,
the strongest component: a weak component may well lie below the noise, and only what it has in common with
the strong ones tells where it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quantitron.recon.networks.trained_network import NetworkDescription, TrainedNetwork
from quantitron.recon.priors.denoiser import Denoiser, intensity
from quantitron.recon.priors.network_denoiser import PatchwiseNetwork, check_grid


class SeriesDenoiser(Protocol):
    """A series in, the same series with less noise out."""

    def __call__(self, images: Tensor, level: float, generator: torch.Generator) -> Tensor:
        """Denoise.

        Args:
            images: (2K, z, y, x) real, the strongest component first, in any unit.
            level: standard deviation of the noise relative to ``series_intensity``.
            generator: the source of chance, on the CPU.

        Returns:
            (2K, z, y, x), finite.

        Raises:
            ValueError: in one sentence, if that is not possible.
        """
        ...


def series_intensity(images: Tensor) -> float:
    """What a series (2K, z, y, x) is normalised by: the intensity of its strongest component's modulus."""
    components = len(images) // 2
    return float(intensity(torch.hypot(images[:1], images[components : components + 1]))[0])


@dataclass(frozen=True)
class NetworkSeriesDenoiser:
    """A network of kind ``series_denoiser``."""

    trained: TrainedNetwork
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        """Refuse a network for something else.

        Raises:
            ValueError: in one sentence.
        """
        check_series_network(self.trained.description, "series_denoiser")

    def __call__(self, images: Tensor, level: float, generator: torch.Generator) -> Tensor:
        """See ``SeriesDenoiser``. Also raises ValueError for a level far from those of the training."""
        scale = series_intensity(images)
        network = PatchwiseNetwork(self.trained, self.device)
        volumes = as_trained(images / scale, self.trained.description)
        denoised = from_trained(network.denoise(volumes, level, None, generator))
        return denoised.to(images.device, images.dtype) * scale


@dataclass(frozen=True)
class ImageByImage:
    """A denoiser of single images, which needs no training, on each image of a series."""

    denoiser: Denoiser

    def __call__(self, images: Tensor, level: float, generator: torch.Generator) -> Tensor:
        """See ``SeriesDenoiser``."""
        noise = level * series_intensity(images)
        restored = torch.empty_like(images)
        for number, (image, own) in enumerate(zip(images, intensity(images).tolist(), strict=True)):
            if not bool(image.any()):
                restored[number] = 0
                continue
            restored[number] = self.denoiser(image[None], noise / own, ("",), generator)[0]
        return restored


def as_trained(images: Tensor, description: NetworkDescription) -> Tensor:
    """A series as volumes (m, 2K, z, y, x): slice by slice for a network that never saw more than one.

    Args:
        images: (2K, z, y, x).
        description: of the network.
    """
    return images.transpose(0, 1)[:, :, None] if description.patch[0] == 1 else images[None]


def from_trained(volumes: Tensor) -> Tensor:
    """The series (2K, z, y, x) of volumes as ``as_trained`` makes them."""
    return volumes[:, :, 0].transpose(0, 1) if volumes.shape[2] == 1 else volumes[0]


def check_series_grid(description: NetworkDescription, grid: tuple[int, int, int]) -> None:
    """Refuse a series of images smaller than any that a network was trained on.

    Args:
        description: of the network; one that never saw more than single slices takes any number of them.
        grid: voxels (z, y, x).

    Raises:
        ValueError: in one sentence.
    """
    check_grid(description, (1, *grid[1:]) if description.patch[0] == 1 else grid)


def check_series_network(description: NetworkDescription, kind: str) -> int:
    """Refuse a network that does not take and give series of complex images.

    Args:
        description: of the network.
        kind: wanted.

    Returns:
        K, the components that it takes.

    Raises:
        ValueError: in one sentence.
    """
    shape = description.shape
    if description.kind != kind:
        raise ValueError(f"the network is for {description.kind}, not for {kind}")
    if shape.in_channels != shape.out_channels or shape.in_channels % 2:
        raise ValueError(
            f"the network has {shape.in_channels} channels in and {shape.out_channels} out; a series of "
            "complex coefficient images needs as many out as in, and an even number"
        )
    if shape.modalities:
        raise ValueError("the network is conditioned on modalities; a series of coefficient images has none")
    return shape.in_channels // 2
