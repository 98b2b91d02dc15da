"""Means over the neighbourhood of every voxel, its neighbours weighted by a Gaussian of their distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_REACH = 4.0
"""Distance in standard deviations beyond which neighbours are left out."""


def neighbourhood_mean(images: Tensor, widths: tuple[float, float, float]) -> Tensor:
    """Weighted mean over the neighbours; beyond a border lie the voxels at the border once more.

    Args:
        images: (x, k, z, y) real.
        widths: standard deviation [voxels] along (x, z, y); 0 takes no neighbours along that axis.

    Returns:
        (x, k, z, y).
    """
    for axis, width in zip((0, 2, 3), widths, strict=True):
        n = images.shape[axis]
        if width <= 0 or n == 1:
            continue
        reach = max(1, round(_REACH * width))
        offsets = torch.arange(-reach, reach + 1)
        weights = torch.exp(-0.5 * (offsets / width).square())
        weights /= weights.sum()
        places = torch.arange(n, device=images.device)
        mean = torch.zeros_like(images)
        for offset, weight in zip(offsets.tolist(), weights.tolist(), strict=True):
            neighbours = images.index_select(axis, (places + offset).clamp(0, n - 1))
            mean.add_(neighbours, alpha=weight)
        images = mean
    return images


def neighbourhood_voxels(widths: tuple[float, float, float]) -> float:
    """How many independent voxels a mean over such a neighbourhood is worth: 1 / sum of squared weights.

    Args:
        widths: standard deviation [voxels] along the axes.
    """
    return math.prod(max(1.0, 2 * math.sqrt(math.pi) * width) for width in widths)
