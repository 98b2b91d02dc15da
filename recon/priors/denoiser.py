"""What plug-and-play methods plug in: something that removes Gaussian noise of a given level from images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Denoiser(Protocol):
    """Images in, the same images with less noise out. Patches, shifts and the like are the denoiser's own
    business, and so is the scale: results scale with the images."""

    def __call__(
        self, images: Tensor, level: float, modalities: Sequence[str], generator: torch.Generator
    ) -> Tensor:
        """Denoise.

        Args:
            images: (m, z, y, x) real, one a modality, each in any unit.
            level: standard deviation of the noise relative to the intensity of each image (see
                ``intensity``).
            modalities: m names, ``T1w``, ``T2w``, ``PDw``; denoisers that know none take any.
            generator: the source of chance, on the CPU.

        Returns:
            (m, z, y, x), finite.

        Raises:
            ValueError: if the images are smaller than the denoiser can take, a modality is unknown to it, or
                what it returned is not finite.
        """
        ...


def check_images(images: Tensor, level: float) -> None:
    """Refuse what no denoiser can work on.

    Raises:
        ValueError: if the images are not finite, or the noise level is not a number from zero.
    """
    if not bool(images.isfinite().all()):
        raise ValueError("the images to be denoised hold values that are not finite")
    if not (math.isfinite(level) and level >= 0):
        raise ValueError(f"the noise level must be finite and not negative, not {level:g}")


def intensity(images: Tensor, quantile: float = 0.995) -> Tensor:
    """The intensity that each image is normalised by: the 99.5th percentile of its magnitude over all voxels.

    Args:
        images: (m, z, y, x).
        quantile: of the voxels.

    Returns:
        (m,) above zero, 1 for an image that is zero.
    """
    values = images.detach().abs().flatten(1)
    place = min(values.shape[1], max(1, round(quantile * values.shape[1])))
    found = values.kthvalue(place, dim=1).values
    found = torch.where(found > 0, found, values.amax(1))
    return torch.where(found > 0, found, torch.ones_like(found))


def annealed_levels(first: float, last: float, rounds: int) -> list[float]:
    """Noise levels of the rounds of a plug-and-play method, spaced evenly in the logarithm (Zhang 2021).

    Args:
        first: of the first round, relative to the intensity.
        last: of the last round, and of the only one.
        rounds: how many.

    Raises:
        ValueError: if the levels would rise.
    """
    if first < last:
        raise ValueError(f"first_level {first:g} is below last_level {last:g}; levels must fall")
    steps = torch.linspace(0, 1, rounds, dtype=torch.float64) if rounds > 1 else torch.ones(1)
    return [first ** (1 - share) * last**share for share in steps.tolist()]
