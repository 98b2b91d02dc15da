"""A trained network as a denoiser: images normalised, cut into patches, pushed through, put together again.

    D(x) = x - sigma net( x / sqrt(sigma^2 + s^2), sigma, modality )

The network predicts the noise in units of its standard deviation, from an input whose size hardly depends on
it (s is the typical size of normalised images; the scalings of Karras 2022 for the residual
parameterisation of MRI2Qmap). Where the network is not sure it returns little, and the image stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantitron.recon.networks.conditional_unet import ConditionalUNet
from quantitron.recon.networks.precision import autocast
from quantitron.recon.networks.trained_network import NetworkDescription, TrainedNetwork
from quantitron.recon.priors.denoiser import intensity
from quantitron.recon.priors.patchwise import Size, Tiling, patchwise

INPUT_SCALE = 0.3
"""s: rms of images whose 99.5th percentile is 1."""

BEYOND = 1.5
"""Factor by which a noise level may lie outside those that a network was trained on."""

_BATCH_VOXELS = 1 << 19
"""Voxels pushed through at once: about half a gigabyte of features in 32 channels.

No setting: libraries choose their kernels by the size of what they get, so that the last bits depend on it.
"""


def predicted_noise(
    network: ConditionalUNet, noisy: Tensor, level: Tensor, modality: Tensor | None = None
) -> Tensor:
    """The noise in images, in units of its standard deviation, as a network sees it.

    Args:
        network: conditioned on the noise level.
        noisy: (n, c, z, y, x), intensities normalised; sized as the network wants it.
        level: (n,) standard deviation of the noise.
        modality: (n,) int64 class, where the network is conditioned on it.

    Returns:
        (n, c, z, y, x) float32.
    """
    scale = (level.square() + INPUT_SCALE**2).rsqrt()
    predicted: Tensor = network(noisy * scale[:, None, None, None, None], level, modality)
    return predicted.float()


def nearest_level(levels: Sequence[float], level: float) -> float:
    """The noise level, of those that a network was trained on, that is nearest in ratio.

    Args:
        levels: ascending, above zero.
        level: wanted.

    Raises:
        ValueError: if it is not above zero or lies outside by more than a factor of ``BEYOND``.
    """
    if not (math.isfinite(level) and level > 0):
        raise ValueError(f"the noise level must be finite and above zero, not {level:g}")
    if not levels[0] / BEYOND <= level <= levels[-1] * BEYOND:
        away = max(levels[0] / level, level / levels[-1])
        raise ValueError(
            f"a noise level of {level:g} lies a factor of {away:.3g} outside {levels[0]:g}..{levels[-1]:g}, "
            "the levels that the denoising network was trained on"
        )
    return min(levels, key=lambda trained: abs(math.log(trained / level)))


def patch_size(description: NetworkDescription) -> Size:
    """Patches as large as is cheap: the fewer seams, the better.

    MRI2Qmap cuts every volume into patches side by side, after a random shift that keeps their borders from
    staying; what fits into one of these patches has no borders.

    Attention over more voxels than in training would be another network, so that one with attention gets
    patches of the size that it was trained on.
    """
    if description.shape.attention:
        return description.patch
    depth, *plane = description.patch
    return depth, max(64, plane[0]), max(64, plane[1])


@dataclass(frozen=True)
class PatchwiseNetwork:
    """A trained network on volumes of any number of channels and any size."""

    trained: TrainedNetwork
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    patch: Size | None = None
    """Most voxels of a patch along (z, y, x); None: ``patch_size``, and slices up to 256 x 256 whole."""
    precision: str = "auto"
    """One of ``networks.precision.PRECISIONS``."""

    def tiling(self, grid: Size, overlap: bool = False) -> Tiling:
        """How a volume is cut up.

        Raises:
            ValueError: if it is smaller than any that the network was trained on.
        """
        description = self.trained.description
        check_grid(description, grid)
        patch = self.patch
        if patch is None:
            patch = patch_size(description)
            if grid[0] == 1 and not description.shape.attention:
                patch = (1, max(256, patch[1]), max(256, patch[2]))
        return Tiling.of(grid, patch, description.shape.multiple, overlap)

    def denoise(
        self,
        volumes: Tensor,
        level: float,
        modality: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """D(x), of patches side by side that are shifted at random.

        Args:
            volumes: (m, c, z, y, x) real, intensities normalised as in training.
            level: standard deviation of the noise; the nearest one of the training is taken.
            modality: (m,) int64 class, where the network is conditioned on it.
            generator: source of the shift, on the CPU; None: no shift.

        Returns:
            (m, c, z, y, x) float32, finite.

        Raises:
            ValueError: if the volumes or the result are not finite, the volumes too small, or the level too
                far from those of the training.
        """
        sigma = nearest_level(self.trained.description.noise_levels, level)
        tiling = self.tiling(_grid(volumes))
        shift = _draw_shift(tiling, generator) if generator is not None else (0, 0, 0)
        classes = None if modality is None else modality.to(self.device)

        def apply(patches: Tensor, number: Tensor) -> Tensor:
            levels = torch.full((len(patches),), sigma, device=patches.device)
            which = None if classes is None else classes[number]
            return patches - sigma * predicted_noise(self.trained.network, patches, levels, which)

        return self._push(apply, volumes, tiling, shift)

    def map(self, volumes: Tensor) -> Tensor:
        """What a network without conditions makes of volumes, of patches that overlap by half.

        Args:
            volumes: (m, c, z, y, x) real, normalised as in training.

        Returns:
            (m, c', z, y, x) float32, finite.

        Raises:
            ValueError: if the volumes or the result are not finite, or the volumes too small.
        """
        tiling = self.tiling(_grid(volumes), overlap=True)
        return self._push(lambda patches, _: self.trained.network(patches).float(), volumes, tiling)

    def _push(
        self,
        apply: Callable[[Tensor, Tensor], Tensor],
        volumes: Tensor,
        tiling: Tiling,
        shift: Size = (0, 0, 0),
    ) -> Tensor:
        volumes = volumes.to(self.device, torch.float32)
        if not bool(volumes.isfinite().all()):
            raise ValueError("the images that a network is to restore hold values that are not finite")
        self.trained.network.to(self.device)
        with torch.inference_mode(), autocast(self.device, self.precision):
            restored = patchwise(apply, volumes, tiling, shift, _BATCH_VOXELS)
        if not bool(restored.isfinite().all()):
            spoken = _spoken(self.trained.description)
            raise ValueError(f"the {spoken} returned values that are not finite")
        return restored.clone()  # no inference tensor: it may enter calculations with gradients


def check_contrasts(
    description: NetworkDescription, modalities: Sequence[str], levels: Sequence[float], grid: Size
) -> None:
    """Refuse a network that cannot denoise certain images, before there are any.

    Args:
        description: of the network.
        modalities: of the images.
        levels: of the noise.
        grid: voxels (z, y, x).

    Raises:
        ValueError: if a modality or level is unknown to it, or the grid is smaller than it takes.
    """
    if description.modalities:
        for modality in modalities:
            _class_of(modality, description.modalities)
    for level in levels:
        nearest_level(description.noise_levels, level)
    check_grid(description, grid)


def check_grid(description: NetworkDescription, grid: Size) -> None:
    """Refuse volumes smaller than any that a network was trained on.

    Args:
        description: of the network.
        grid: voxels (z, y, x).

    Raises:
        ValueError: in one sentence.
    """
    if any(size < least for size, least in zip(grid, description.least, strict=True)):
        raise ValueError(
            f"a volume of {_size(grid)} voxels (z, y, x) is smaller than {_size(description.least)}, the "
            f"least that the {_spoken(description)} takes"
        )


@dataclass(frozen=True)
class NetworkDenoiser:
    """A network that was trained on weighted images, as a ``Denoiser``."""

    trained: TrainedNetwork
    patch: Size | None = None
    """Most voxels of a patch along (z, y, x); None: as large as is cheap."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "auto"
    """One of ``networks.precision.PRECISIONS``."""

    def __post_init__(self) -> None:
        """Refuse a network for something else.

        Raises:
            ValueError: in one sentence.
        """
        description = self.trained.description
        shape = description.shape
        if description.kind != "contrast_denoiser" or (shape.in_channels, shape.out_channels) != (1, 1):
            raise ValueError(
                f"weighted images need a contrast denoiser of one channel, not a {_spoken(description)} of "
                f"{shape.in_channels}"
            )

    def __call__(
        self, images: Tensor, level: float, modalities: Sequence[str], generator: torch.Generator
    ) -> Tensor:
        """See ``Denoiser``. Also raises ValueError for a level far from those of the training."""
        known = self.trained.description.modalities
        classes = None
        if known:
            classes = torch.tensor([_class_of(name, known) for name in modalities])
        scale = intensity(images)[:, None, None, None]
        network = PatchwiseNetwork(self.trained, self.device, self.patch, self.precision)
        denoised = network.denoise((images / scale)[:, None], level, classes, generator)[:, 0]
        return denoised.to(images.device, images.dtype) * scale


def _class_of(modality: str, known: Sequence[str]) -> int:
    if modality not in known:
        raise ValueError(
            f"the denoising network does not know the modality '{modality}'; it was trained on "
            f"{', '.join(known)}"
        )
    return list(known).index(modality)


def _draw_shift(tiling: Tiling, generator: torch.Generator) -> Size:
    """Anywhere within a patch; along an axis that is one patch there is no seam to move, but one to make.

    MRI2Qmap shifts every volume in every round, which it calls an augmentation too. Along an axis that one
    patch covers that is left out here: opposite edges would meet in its middle.
    """
    drawn = torch.rand(3, generator=generator).tolist()
    z, y, x = (
        int(share * length) if moves else 0
        for share, length, moves in zip(drawn, tiling.length, tiling.shiftable, strict=True)
    )
    return z, y, x


def _grid(volumes: Tensor) -> Size:
    z, y, x = volumes.shape[2:]
    return z, y, x


def _size(grid: Sequence[int]) -> str:
    return " x ".join(str(size) for size in grid)


def _spoken(description: NetworkDescription) -> str:
    return f"network '{description.kind}'"
