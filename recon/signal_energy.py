"""Expected signal energy sum_t |I_t(r)|^2 of each voxel: the scale of the prior on the coefficient images."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from quantitron.recon.coefficient_basis import CoefficientBasis
from quantitron.recon.coils import centre_coefficients
from quantitron.recon.data import ReducedKSpace
from quantitron.recon.operators.fourier import centred_ifft

FLOOR = 1e-3
"""Least energy over the largest: background keeps a finite weight and can still show what is there."""


def centre_energy(
    reduced: ReducedKSpace, wide: CoefficientBasis, noise: float, box: tuple[int, int] = (12, 24)
) -> Tensor:
    """Energy map of low resolution, from the k-space centre of each coil.

    Args:
        reduced: sums of one slice.
        wide: coefficient basis that spans the off-resonances.
        noise: noise variance of one sample.
        box: most points (z, y) of the centre that are used.

    Returns:
        (z, y, x) float, above zero everywhere.
    """
    nz, ny = reduced.projected.shape[2:4]
    size = (min(box[0], nz), min(box[1], ny))
    centre = centre_coefficients(reduced, wide, noise, size)  # (z, y, k, c, x)
    # The edge of the box is tapered: its ringing would pass for structure.
    for axis, (length, full) in enumerate(zip(size, (nz, ny), strict=True)):
        if length < full:
            window = torch.hann_window(length + 2, periodic=False)[1:-1].sqrt()
            centre = centre * window.reshape([-1 if a == axis else 1 for a in range(5)])
    padded = torch.zeros(nz, ny, *centre.shape[2:], dtype=centre.dtype)
    z, y = nz // 2 - size[0] // 2, ny // 2 - size[1] // 2
    padded[z : z + size[0], y : y + size[1]] = centre
    energy = centred_ifft(padded, (0, 1)).abs().square().sum((2, 3))  # (z, y, x)
    width = max(1, round(ny / size[1]))
    # Low resolution spreads a bright voxel over its neighbours: take the largest of them, so that no voxel is
    # expected darker than it is.
    spread = ndimage.maximum_filter(energy.numpy(), size=(1 if nz == 1 else 3, width + 1, width + 1))
    return with_floor(torch.from_numpy(spread))


def smoothed_energy(images: Tensor, width: float = 0.8) -> Tensor:
    """Energy map of a first reconstruction, smoothed against its noise.

    Args:
        images: V (e, l, z, y, x).
        width: standard deviation [voxels].

    Returns:
        (z, y, x) float, above zero everywhere.
    """
    energy = images.abs().square().sum((0, 1)).numpy()
    sigma = [width if n > 3 else 0 for n in energy.shape]
    return with_floor(torch.from_numpy(np.asarray(ndimage.gaussian_filter(energy, sigma))))


def with_floor(energy: Tensor) -> Tensor:
    """Energies no smaller than ``FLOOR`` times the largest, and 1 where there is none at all."""
    largest = float(energy.max())
    return energy.clamp_min(FLOOR * largest) if largest > 0 else torch.ones_like(energy)
