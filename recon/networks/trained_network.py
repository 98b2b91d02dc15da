"""A network with its trained weights, and what has to be known to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantitron.recon.networks.conditional_unet import ConditionalUNet, UNetShape

KINDS = ("contrast_denoiser", "series_denoiser", "artifact_removal")
"""What networks are trained for: noise on weighted images, noise on coefficient images, and undersampling
artifacts on coefficient images."""


@dataclass(frozen=True)
class NetworkDescription:
    """All but the weights."""

    kind: str
    """One of ``KINDS``."""
    shape: UNetShape
    """Of the layers."""
    modalities: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers: ``T1w``, ``T2w``, ``PDw``."""
    noise_levels: tuple[float, ...] = ()
    """Standard deviations that it was trained on, ascending, relative to normalised intensities."""
    patch: tuple[int, int, int] = (32, 32, 32)
    """Voxels (z, y, x) of the patches that it was trained on."""
    least: tuple[int, int, int] = (1, 32, 32)
    """Voxels (z, y, x) below which a volume is smaller than any it was trained on."""
    card: Mapping[str, object] = field(default_factory=dict)
    """Data, seeds, versions, figures of merit: for people."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ValueError: in one sentence.
        """
        if self.kind not in KINDS:
            raise ValueError(f"a network of kind '{self.kind}'; there are {', '.join(KINDS)}")
        if len(self.modalities) != self.shape.modalities:
            raise ValueError(
                f"{len(self.modalities)} modalities are named, the network knows {self.shape.modalities}"
            )
        if self.shape.noise != bool(self.noise_levels):
            raise ValueError("noise levels belong to a network that is conditioned on them, and only to that")
        if any(level <= 0 for level in self.noise_levels) or list(self.noise_levels) != sorted(
            set(self.noise_levels)
        ):
            raise ValueError("noise levels must ascend and be above zero")


@dataclass(frozen=True)
class TrainedNetwork:
    """A network that is ready for use: weights loaded, no gradients."""

    description: NetworkDescription
    network: ConditionalUNet
    checksum: str = ""
    """SHA-256 of description and weights, hexadecimal, for provenance; empty if it never was in a file."""


@dataclass(frozen=True)
class NetworkRequest:
    """Which network a solver wants to be given."""

    kind: str
    """One of ``KINDS``."""
    weights: str = ""
    """File of its weights; empty: the one that comes with the package."""
