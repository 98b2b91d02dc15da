"""ESPIRiT coil maps from a block of calibration data of any shape (Uecker et al. 2014, MRM 71:990).

Windows of the calibration block span a space in which all k-space windows of the scan lie. In image space
the projection onto it becomes one (c, c) matrix at each place, whose dominant eigenvector is the sensitivity
there.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAIR_PART = 0.1
"""Weight in the array's dominant combination, in units of the largest, of a coil whose phase can be told."""
NOISE_SPREAD = 8.0
"""Largest eigenvalue of noise over its smallest, for about five windows a column (Marchenko and Pastur 1967).

Where noise is strong it passes the threshold, all is signal, and the maps come out alike for all coils: at a
signal-to-noise ratio of 2 in a frame 1.3 rad off, with this 0.02."""


def espirit(
    calibration: Tensor,
    grid: tuple[int, int, int],
    kernel: tuple[int, int, int] = (6, 5, 5),
    threshold: float = 0.03,
    power_iterations: int = 40,
    empty: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Maps on a grid of any size that covers the field of view.

    Args:
        calibration: (n, c, z, y, x) k-space blocks, centred, fully sampled; the n images share the coil maps.
        grid: (z, y, x) places at which the maps are evaluated; at least twice the kernel in each direction.
        kernel: (z, y, x) size of the windows; cut to the block where that is smaller.
        threshold: singular values below this share of the largest belong to noise, as do those that are
            about as small as the smallest of noise.
        power_iterations: steps of the power method for the dominant eigenvector.
        empty: share of the field of view that nothing was measured of, noise neither: as large a share of the
            singular values tells nothing of the noise.

    Returns:
        maps (c, z, y, x) of unit root-sum-of-squares, phase referred to the array's dominant combination;
        eigenvalue (z, y, x), near 1 inside the object.

    Raises:
        ValueError: if the block is smaller than 2 points in a direction of the grid longer than 1.
    """
    _, coils, *block = calibration.shape
    if any(b < 2 <= g for b, g in zip(block, grid, strict=True)):
        raise ValueError(f"a calibration block of {tuple(block)} points (z, y, x) is too small for coil maps")
    size = [1 if g == 1 else min(k, b) for k, b, g in zip(kernel, block, grid, strict=True)]
    # A block that is short along one axis has few windows there. Zeros around it cost less than smaller
    # windows: 24x24x8 points of 8 coils gave maps 3.3 % off with them and 6 % without.
    margin = [s - 1 if g > 1 and b < 3 * s else 0 for s, b, g in zip(size, block, grid, strict=True)]
    windows = _with_margin(calibration, margin)
    for axis, s in enumerate(size):
        windows = windows.unfold(2 + axis, s, 1)  # (n, c, wz, wy, wx, kz, ky, kx)
    rows = windows.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, coils * size[0] * size[1] * size[2])
    normal = rows.mH @ rows  # of the calibration matrix
    values, vectors = torch.linalg.eigh(normal)
    least = torch.maximum(threshold**2 * values[-1], NOISE_SPREAD * values[int(empty * len(values))])
    signal = vectors[:, (values > least) | (values == values[-1])]
    # The windows are rows: as columns they lie in the conjugate space.
    projector = (signal.conj() @ signal.mT).reshape(coils, *size, coils, *size)
    # Sum over window positions of equal difference: a small (c, c) kernel, whose transform is the matrix.
    spread = [2 * s - 1 for s in size]
    kernel_sum = projector.new_zeros(coils, coils, *spread)
    for a in range(size[0]):
        for b in range(size[1]):
            for c in range(size[2]):
                corner = [size[0] - 1 - a, size[1] - 1 - b, size[2] - 1 - c]
                kernel_sum[
                    :,
                    :,
                    corner[0] : corner[0] + size[0],
                    corner[1] : corner[1] + size[1],
                    corner[2] : corner[2] + size[2],
                ] += projector[:, a, b, c]
    matrices = _at_places(kernel_sum / (size[0] * size[1] * size[2]), grid)  # (z, y, x, c, c)
    vector = matrices.sum(-1, keepdim=True)
    vector = vector + 1e-6  # never the zero vector
    for _ in range(power_iterations):
        vector = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
        vector = matrices @ vector
    eigenvalue = torch.linalg.vector_norm(vector, dim=-2)[..., 0]
    maps = (vector / eigenvalue.clamp_min(1e-20)[..., None, None])[..., 0].movedim(-1, 0)  # (c, z, y, x)
    return refer_phase(maps, eigenvalue), eigenvalue


def _with_margin(calibration: Tensor, margin: list[int]) -> Tensor:
    """(n, c, z, y, x) with zeros on both sides of z, y and x."""
    images, coils, *block = calibration.shape
    padded = calibration.new_zeros(images, coils, *(b + 2 * m for b, m in zip(block, margin, strict=True)))
    inner = tuple(slice(m, m + b) for b, m in zip(block, margin, strict=True))
    padded[(slice(None), slice(None), *inner)] = calibration
    return padded


def _at_places(kernel_sum: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Fourier transform of a small kernel, zero difference in its middle, at the places of a grid.

    Args:
        kernel_sum: (c, c', dz, dy, dx), difference = second window position less first.
        grid: (z, y, x).

    Returns:
        (z, y, x, c, c') Hermitian.
    """
    result = kernel_sum
    for axis, places in enumerate(grid):
        width = result.shape[2 + axis]
        difference = torch.arange(width, device=kernel_sum.device) - (width - 1) // 2
        place = torch.arange(places, device=kernel_sum.device) - places // 2
        angle = -2 * torch.pi * place[:, None] * difference / places
        wave = torch.polar(torch.ones_like(angle), angle).to(kernel_sum.dtype)  # (place, difference)
        result = (result.movedim(2 + axis, -1) @ wave.T).movedim(-1, 2 + axis)
    return result.permute(2, 3, 4, 0, 1)


def refer_phase(maps: Tensor, weight: Tensor) -> Tensor:
    """Fix the phase that the maps leave free: real and positive along the array's dominant combination.

    The combination's own phase is free too, and what a library makes of it differs from one to the next and
    from slice to slice. Here the first coil that receives a fair part of the signal has a negative real
    weight: a loop's field points away from it, as that of ``phantoms.coils`` does, so that simulated phases
    are those of their truth.

    Args:
        maps: (c, ...) complex.
        weight: (...) importance of each place.

    Returns:
        maps (c, ...) times a phase at each place.
    """
    flat = (maps * weight.clamp_min(0).sqrt()).flatten(1)
    _, vectors = torch.linalg.eigh(flat @ flat.mH)
    dominant = vectors[:, -1]
    size = dominant.abs()
    first = dominant[(size >= FAIR_PART * size.max()).nonzero()[0, 0]]
    dominant = dominant * (-first.conj() / first.abs())
    combination = torch.einsum("c,c...->...", dominant.conj(), maps)
    return maps * torch.exp(-1j * combination.angle())
