"""Total variation as a denoiser: the proximal operator, weighed by the noise level (Rudin 1992).

    argmin_X  ||X - Y||^2 / 2 + strength sigma TV(X)

for each image by itself. It needs no learned weights and no memory worth mentioning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.priors.denoiser import check_images, intensity
from quantitron.recon.priors.total_variation import JointTotalVariation


@dataclass(frozen=True)
class VariationDenoiser:
    """Total variation as a ``Denoiser``."""

    strength: float | None = None
    """Weight over noise level; None: ``best_strength``."""
    voxel_size: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Edges along (z, y, x) in any unit: slopes count, not differences."""
    iterations: int = 60
    """Most iterations of the proximal operator."""
    tolerance: float = 1e-3
    """Of its duality gap, relative to the objective."""

    def __call__(
        self,
        images: Tensor,
        level: float,
        modalities: Sequence[str],  # noqa: ARG002
        generator: torch.Generator,  # noqa: ARG002
    ) -> Tensor:
        """See ``Denoiser``. Takes any modality, and nothing of it is left to chance."""
        check_images(images, level)
        if level == 0:
            return images.clone()
        scale = intensity(images)[:, None, None, None]
        # (m, z, y, x) -> (x, k, z, y), complex: the layout of coefficient images
        noisy = (images / scale).permute(3, 0, 1, 2).to(torch.complex64)
        strength = self.strength
        if strength is None:
            strength = best_strength(level, flat=images.shape[1] == 1)
        z, y, x = self.voxel_size
        variation = JointTotalVariation(strength * level, (x, z, y), separable=True)
        denoised, _ = variation.proximal(noisy, 1.0, iterations=self.iterations, tolerance=self.tolerance)
        return denoised.real.permute(1, 2, 3, 0).to(images.dtype) * scale


def best_strength(level: float, flat: bool) -> float:
    """Weight over noise level of the least error on weighted images of brains, fitted over 0.01 to 0.2.

    Args:
        level: noise over intensity. What is faint beside the noise is best smoothed away with it.
        flat: whether the images are slices, whose voxels have 4 neighbours rather than 6.
    """
    strength = 0.7 + 0.15 * math.log(level / 0.1)
    return min(0.9, max(0.25, strength)) * (1.0 if flat else 0.8)
