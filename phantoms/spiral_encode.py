"""From the fine object to k-space on any trajectory, by non-uniform Fourier transforms of the fine object.

    s(k) = sum_r I(r) exp(-2 pi i k.r) / sqrt(z y x)

is summed over the fine voxels at their own places, I being such that its mean over the fine voxels of a scan
voxel is the image of that voxel; so truncation and partial volume are those of a real scan. The object does
not precess during a readout: neither off-resonance nor decay acts there.
"""

from __future__ import annotations

import math

import finufft
import numpy as np
import torch
from numpy.typing import NDArray

from quantitron.phantoms.encode import PointSpread, fourier_matrix
from quantitron.phantoms.scene import Scene

TOLERANCE = 1e-6
"""Relative accuracy of the transforms; the samples are single precision."""


def partition_spectra(
    scene: Scene,
    coefficients: torch.Tensor,
    trajectories: NDArray[np.float32],
    partition: int,
    point_spread: PointSpread = "truncation",
) -> NDArray[np.complex64]:
    """k-space of the object's components on a set of in-plane trajectories, in one partition.

    Args:
        scene: the object.
        coefficients: (l, v) components of its signal for unit pd.
        trajectories: (g, m, 2) kx, ky in cycles per scan voxel.
        partition: kz, 0..z-1 with k = 0 at z // 2.
        point_spread: see ``fourier_matrix``.

    Returns:
        (g, l, c, m)
    """
    (nz, ny, nx), (qz, qy, qx) = scene.matrix, scene.supersampling
    z, plane = np.divmod(scene.index, ny * qy * nx * qx)
    along_z = fourier_matrix(nz, nz, qz, 0, nz * qz, point_spread).numpy()  # (kz, z fine)
    if point_spread == "average":
        y, x = np.divmod(plane, nx * qx)
        plane = (y // qy) * nx + x // qx
        qy = qx = 1
        share = 1 / (scene.supersampling[1] * scene.supersampling[2])
    else:
        share = 1 / (qy * qx)
    shape = (ny * qy, nx * qx)
    kx = 2 * np.pi * trajectories[..., 0].astype(np.float64).ravel() / qx
    ky = 2 * np.pi * trajectories[..., 1].astype(np.float64).ravel() / qy
    # finufft counts fine voxels from n // 2; the origin of the scan is the centre of its voxel n // 2.
    shift_y = shape[0] // 2 - (qy * (ny // 2) + (qy - 1) / 2)
    shift_x = shape[1] // 2 - (qx * (nx // 2) + (qx - 1) / 2)
    turn = np.exp(-1j * (ky * shift_y + kx * shift_x)) * share / np.sqrt(ny * nx)
    turn = turn.astype(np.complex64)

    readouts, samples = trajectories.shape[:2]
    rank, coils = len(coefficients), len(scene.coils)
    transform = finufft.Plan(2, shape, coils, TOLERANCE, -1, "complex64", nthreads=1)
    transform.setpts(ky.astype(np.float32), kx.astype(np.float32))
    weighted = (scene.pd * scene.coils).numpy()  # (c, v)
    part = (coefficients.numpy(), weighted, plane, int(np.prod(shape)))
    found = np.empty((rank, coils, readouts * samples), dtype=np.complex64)
    for component in range(rank):
        image = _project(part, component, along_z[partition][z])
        found[component] = transform.execute(image.reshape(coils, *shape))
    found *= turn
    return found.reshape(rank, coils, readouts, samples).transpose(2, 0, 1, 3)


def volume_samples(
    scene: Scene,
    coefficients: torch.Tensor,
    weights: NDArray[np.generic],
    trajectories: NDArray[np.float32],
    point_spread: PointSpread = "truncation",
) -> NDArray[np.complex64]:
    """Samples of readouts that each have a trajectory of their own, in three dimensions.

    Args:
        scene: the object.
        coefficients: (l, v) components of its signal for unit pd.
        weights: (n, l) share of each component in each readout.
        trajectories: (n, m, 3) kx, ky, kz in cycles per scan voxel.
        point_spread: see ``fourier_matrix``.

    Returns:
        (n, c, m)
    """
    matrix, factors = scene.matrix, scene.supersampling
    voxel = np.stack(np.unravel_index(scene.index, scene.fine_matrix))
    share = 1 / math.prod(factors)
    if point_spread == "average":
        voxel = voxel // np.array(factors)[:, None]
        factors = (1, 1, 1)
    shape = tuple(n * q for n, q in zip(matrix, factors, strict=True))
    place = np.ravel_multi_index(tuple(voxel), shape)
    count, samples = trajectories.shape[:2]
    # Columns run x, y, z; grids z, y, x.
    angles = [
        2 * np.pi * trajectories[..., 2 - axis].astype(np.float64).ravel() / factors[axis]
        for axis in range(3)
    ]
    turn = np.zeros(count * samples)
    for angle, n, q, fine in zip(angles, matrix, factors, shape, strict=True):
        turn += angle * (fine // 2 - (q * (n // 2) + (q - 1) / 2))
    scale = (np.exp(-1j * turn) * share / math.sqrt(math.prod(matrix))).astype(np.complex64)
    transform = finufft.Plan(2, shape, 1, TOLERANCE, -1, "complex64", nthreads=1)
    transform.setpts(*(angle.astype(np.float32) for angle in angles))
    result = np.zeros((len(scene.coils), count, samples), dtype=np.complex64)
    for component, part in enumerate(coefficients.numpy()):
        for coil, weighted in enumerate((scene.pd * scene.coils).numpy()):
            values = weighted * part
            image = np.empty(math.prod(shape), dtype=np.complex64)
            image.real = np.bincount(place, values.real, len(image))
            image.imag = np.bincount(place, values.imag, len(image))
            spectrum = transform.execute(image.reshape(shape)) * scale
            result[coil] += weights[:, component, None] * spectrum.reshape(count, samples)
    return result.transpose(1, 0, 2)


def _project(
    part: tuple[NDArray[np.generic], NDArray[np.complex64], NDArray[np.int64], int],
    component: int,
    along_z: NDArray[np.complex64],
) -> NDArray[np.complex64]:
    """(c, y x) one component in all coils, summed along z with the weights (v,) of a partition."""
    coefficients, weighted, plane, points = part
    values = weighted * (coefficients[component] * along_z)
    image = np.empty((len(values), points), dtype=np.complex64)
    for coil, row in enumerate(values):
        image[coil].real = np.bincount(plane, row.real, points)
        image[coil].imag = np.bincount(plane, row.imag, points)
    return image
