"""Coil sensitivity maps of a slice, from what the scan offers.

Calibration lines give them where there are some. Otherwise each coil's k-space centre is reconstructed on its
own in the temporal subspace (no coil mixes with another there: G acts on each k-space point alone) and serves
as calibration data. The maps have unit root-sum-of-squares at every voxel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from quantitron.recon.calibration_room import with_room
from quantitron.recon.coefficient_basis import CoefficientBasis
from quantitron.recon.data import Calibration, ReducedKSpace
from quantitron.recon.espirit import espirit, refer_phase
from quantitron.recon.operators.fourier import centred_fft, centred_ifft

CALIBRATION_WIDTH = 24
"""Most calibration points used along an axis."""

_MOST_KERNEL_ELEMENTS = 2200
"""Coils times window points: the eigen-decomposition grows with its cube."""


def coil_maps(
    reduced: ReducedKSpace, calibration: Calibration | None, wide: CoefficientBasis, noise: float
) -> Tensor:
    """Maps of one slice.

    Args:
        reduced: sums of the slice (s = 1).
        calibration: calibration lines of the slice, or None.
        wide: coefficient basis that spans the off-resonances, for scans without calibration lines.
        noise: noise variance of one sample.

    Returns:
        csm (x, c, z, y) complex64; ones for a single coil, all coils alike where there is no signal at all.
    """
    _, _, nz, ny, _, coils, nx = reduced.projected.shape
    if coils == 1:
        return torch.ones(nx, 1, nz, ny, dtype=torch.complex64)
    block = _calibration_block(calibration) if calibration is not None else None
    if block is None:
        block = _centre_block(reduced, wide, noise)
    return maps_of_block(block, (nz, ny, nx))


def maps_of_block(block: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Maps from the k-space centre of images of several coils.

    Args:
        block: (k, c, z, y, x) centred k-space; the images k share the coil maps.
        grid: (z, y, x) of the maps.

    Returns:
        csm (x, c, z, y) complex64 of unit root-sum-of-squares; all coils alike where there is no signal.
    """
    coils, (nz, ny, nx) = block.shape[1], grid
    if not block.abs().max() > 0:
        return torch.full((nx, coils, nz, ny), coils**-0.5, dtype=torch.complex64)
    block, wide = with_room(block, grid)
    places = tuple(
        1 if n == 1 else min(n, max(2 * b, 32)) for n, b in zip(wide, block.shape[2:], strict=True)
    )
    window = 6
    while (
        coils * (1 if nz == 1 else min(6, block.shape[2])) * window**2 > _MOST_KERNEL_ELEMENTS and window > 3
    ):
        window -= 1
    empty = 1 - math.prod(grid) / math.prod(wide)
    maps, eigenvalue = espirit(block, (places[0], places[1], places[2]), (6, window, window), empty=empty)
    maps = refer_phase(maps, eigenvalue * energy_on_grid(block, maps.shape[1:]))
    return _resample(maps, wide, grid).permute(3, 0, 1, 2).contiguous()  # (x, c, z, y)


def centred_box(sampled: Tensor) -> tuple[int, int]:
    """Largest box about the centre n // 2 that holds only sampled points.

    Args:
        sampled: (z, y) bool.

    Returns:
        lengths (z, y); 0 where even the centre is missing.
    """
    nz, ny = sampled.shape
    best = (0, 0)
    for bz in [1] if nz == 1 else range(1, nz + 1):
        for by in [1] if ny == 1 else range(1, ny + 1):
            if bz * by > best[0] * best[1] and bool(_cut(sampled, (bz, by)).all()):
                best = (bz, by)
    return best


def fills_centre(calibration: Calibration) -> bool:
    """Whether the lines of one slice fill a box about the k-space centre that tells of every axis: one plane
    of a slab tells nothing of z."""
    nz, ny = calibration.count.shape[1:]
    bz, by = centred_box(calibration.count[0] > 0)
    return by >= min(ny, 6) and bz >= min(nz, 2)


def _cut(array: Tensor, box: tuple[int, int]) -> Tensor:
    """Centred box of the two leading axes (z, y)."""
    for axis, (full, kept) in enumerate(zip(array.shape[:2], box, strict=True)):
        array = array.narrow(axis, full // 2 - kept // 2, kept)
    return array


def _readout_centre(block: Tensor) -> Tensor:
    """(..., x) hybrid to the central part of k-space along the readout."""
    spectrum = centred_fft(block, (-1,))
    nx = block.shape[-1]
    kept = min(nx, CALIBRATION_WIDTH)
    return spectrum.narrow(-1, nx // 2 - kept // 2, kept)


def _calibration_block(calibration: Calibration) -> Tensor | None:
    """(1, c, z, y, x) k-space block of the calibration lines; None where they hold no usable centre."""
    if not fills_centre(calibration):
        return None
    bz, by = centred_box(calibration.count[0] > 0)
    box = (min(bz, CALIBRATION_WIDTH), min(by, CALIBRATION_WIDTH))
    block = _cut(calibration.samples[0], box)  # (z, y, c, x)
    return _readout_centre(block).permute(2, 0, 1, 3)[None]


def _centre_block(reduced: ReducedKSpace, wide: CoefficientBasis, noise: float) -> Tensor:
    """(k, c, z, y, x) coefficient images of the densest k-space centre, coil by coil."""
    lines = reduced.count[0].sum(0)  # (z, y) over the echoes
    nz, ny = lines.shape
    # Enough lines to tell the strongest components apart; where no box has them, the densest box.
    significant = int((wide.variance > 0.01 * wide.variance[0]).sum())
    need = significant
    box = centred_box(lines >= need)
    while (box[1] < min(ny, 8) or box[0] < min(nz, 4)) and need > 1:
        need -= 1
        box = centred_box(lines >= need)
    if box[0] == 0 or (box[1] < min(ny, 4)):
        raise ValueError(
            "the scan has no calibration lines and its k-space centre is not sampled: "
            "no coil maps can be estimated"
        )
    box = (min(box[0], CALIBRATION_WIDTH), min(box[1], CALIBRATION_WIDTH))
    coefficients = centre_coefficients(reduced, wide, noise, box)  # (z, y, k, c, x)
    strongest = coefficients[:, :, : max(1, significant)]
    return _readout_centre(strongest).permute(2, 3, 0, 1, 4)


def centre_coefficients(
    reduced: ReducedKSpace, wide: CoefficientBasis, noise: float, box: tuple[int, int]
) -> Tensor:
    """Coil-by-coil subspace reconstruction of a box about the k-space centre.

    At each k-space point ``(G + noise W) u_c = b_c``, W the inverse of the expected mean square of the
    coefficients there, which is taken from the data.

    Args:
        reduced: sums of one slice.
        wide: coefficient basis.
        noise: noise variance of one sample.
        box: (z, y) lengths.

    Returns:
        (z, y, k, c, x) complex64, hybrid space.
    """
    gram = _cut(reduced.gram[0].permute(1, 2, 0, 3, 4), box).to(torch.complex64)  # (z, y, e, l, l)
    projected = _cut(reduced.projected[0].permute(1, 2, 0, 3, 4, 5), box)  # (z, y, e, l, c, x)
    mixing = wide.mixing  # (e, l, k)
    normal = torch.einsum("elk,zyelm,emn->zykn", mixing.conj(), gram, mixing)
    right = torch.einsum("elk,zyelcx->zykcx", mixing.conj(), projected)
    # Mean square signal of a sample at each point, less noise.
    lines = _cut(reduced.count[0].sum(0), box).clamp_min(1)  # (z, y)
    trace = normal.diagonal(dim1=-2, dim2=-1).real.sum(-1).clamp_min(1e-12)
    power = right.abs().square().sum(2).mean((-2, -1)) / (trace * lines.clamp_min(1))  # about |s|^2 a frame
    frames = mixing.shape[0] * reduced.basis.contrast.shape[0]
    expected = frames * power.clamp_min(noise)[..., None] * wide.variance  # (z, y, k)
    weight = torch.diag_embed(noise / expected).to(torch.complex64)
    solution: Tensor = torch.linalg.solve(normal + weight, right.flatten(3))
    return solution.reshape(right.shape)


def energy_on_grid(block: Tensor, places: Sequence[int]) -> Tensor:
    """Sum of squares (z, y, x) of the images of a k-space block, zero-filled to a grid.

    Args:
        block: (k, c, z, y, x) centred k-space.
        places: (z, y, x), none below the block's.
    """
    images = torch.zeros(*block.shape[:2], *places, dtype=block.dtype)
    inner = tuple(
        slice(n // 2 - b // 2, n // 2 - b // 2 + b) for n, b in zip(places, block.shape[2:], strict=True)
    )
    images[(slice(None), slice(None), *inner)] = block
    return centred_ifft(images, (2, 3, 4)).abs().square().sum((0, 1))


def _resample(maps: Tensor, wide: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    """Linear interpolation of smooth maps (c, z, y, x) about the centre n // 2, rescaled to unit length.

    Args:
        maps: at places that cover as much as ``wide``.
        wide: (z, y, x) voxels of the field of view that the maps were found in.
        grid: (z, y, x) voxels wanted, of the same size.
    """
    if tuple(maps.shape[1:]) == grid == wide:
        return maps
    axes = []
    for places, m, n in zip(maps.shape[1:], wide, grid, strict=True):
        index = (torch.arange(n) - n // 2) * (places / m) + places // 2
        # grid_sample runs from -1 to 1 between the first and the last place.
        axes.append(2 * index / max(places - 1, 1) - 1 if places > 1 else torch.zeros(n))
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    where = torch.stack((x, y, z), dim=-1)[None].float()
    parts = torch.view_as_real(maps).movedim(-1, 0)  # (2, c, z, y, x)
    real, imaginary = (
        grid_sample(
            part[None].contiguous(), where, mode="bilinear", padding_mode="border", align_corners=True
        )[0]
        for part in parts
    )
    fine = torch.complex(real, imaginary)
    length: Tensor = torch.linalg.vector_norm(fine, dim=0).clamp_min(1e-12)
    return fine / length
