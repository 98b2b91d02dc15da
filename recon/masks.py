"""Where there is signal."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def signal_mask(amplitude: Tensor, fraction: float = 0.1) -> Tensor:
    """Voxels whose amplitude exceeds a share of the brightest tissue, without specks and with holes filled.

    Args:
        amplitude: (z, y, x) non-negative.
        fraction: threshold over the 98th percentile of the voxels above the mean.

    Returns:
        (z, y, x) bool.
    """
    values = amplitude.numpy()
    if not values.max() > 0:
        return torch.zeros_like(amplitude, dtype=torch.bool)
    bright = values[values >= values.mean()]
    mask = values > fraction * np.percentile(bright, 98)
    labels, pieces = ndimage.label(mask)
    if pieces > 1:
        size = np.bincount(labels.ravel())
        # Pieces of a few voxels are noise; small true objects (spheres of a phantom) are larger.
        keep = size >= max(4, 1e-5 * values.size)
        keep[0] = False
        mask = keep[labels]
    filled = np.stack([ndimage.binary_fill_holes(plane) for plane in mask])
    return torch.from_numpy(filled)
