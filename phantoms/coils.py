"""A receive array around the object: sensitivities of loops on a cylinder, and their noise."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from quantitron.phantoms.field import Places

RADIUS = 0.55
"""Radius of the cylinder over the larger in-plane field of view."""


def loop_positions(coils: int) -> NDArray[np.float64]:
    """(c, 2) angle [rad] and height, in units of the cylinder's radius, of loops in staggered rows.

    Up to 5 coils sit in one row, up to 16 in two, up to 30 in three, more in four.
    """
    rows = 1 if coils < 6 else 2 if coils <= 16 else 3 if coils <= 30 else 4
    counts = [coils // rows + (row < coils % rows) for row in range(rows)]
    places = []
    for row, count in enumerate(counts):
        height = 0.7 * (row - (rows - 1) / 2)
        # Uneven by a fraction of a degree a coil, so that no symmetry makes two coils exactly alike.
        angles = 2 * np.pi * (np.arange(count) + 0.5 * (row % 2) + 0.02 * row) / count
        places += [(angle, height) for angle in angles]
    return np.array(places)


def coil_sensitivities(places: Places, coils: int, field_of_view: float) -> NDArray[np.complex64]:
    """Complex sensitivities with unit root-sum-of-squares at every place.

    Each loop is taken as the magnetic dipole along its axis, softened by the loop's own radius so that the
    field is finite everywhere; what it receives is the transverse field Bx - j By (reciprocity, Hoult
    1976). Rows are staggered along z, so that coils encode in all three directions.

    Args:
        places: z, y, x [m] from the isocentre, arrays of one shape (...) or that broadcast to it.
        coils: number of channels; 1 gives ones.
        field_of_view: larger in-plane field of view [m]; sets the size of the array.

    Returns:
        (c, ...) complex64.
    """
    z, y, x = (np.asarray(place, dtype=np.float32) for place in places)
    shape = np.broadcast_shapes(z.shape, y.shape, x.shape)
    if coils == 1:
        return np.ones((1, *shape), dtype=np.complex64)
    radius = RADIUS * field_of_view
    positions = loop_positions(coils)
    in_row = np.count_nonzero(positions[:, 1] == positions[0, 1])
    loop = radius * min(0.45, 1.1 * math.pi / in_row)  # neighbours in a row overlap a little
    maps = np.empty((coils, *shape), dtype=np.complex64)
    for coil, (angle, height) in enumerate(positions):
        axis = np.array([-math.cos(angle), -math.sin(angle)], dtype=np.float32)  # towards the object (x, y)
        dx = (x + radius * axis[0]) / np.float32(loop)
        dy = (y + radius * axis[1]) / np.float32(loop)
        dz = (z - radius * height) / np.float32(loop)
        square = dx * dx + dy * dy + dz * dz
        along = dx * axis[0] + dy * axis[1]
        strength = 1 / (square + 1) ** 2.5
        maps[coil].real = (3 * along * dx - square * axis[0] + 2 * axis[0]) * strength
        maps[coil].imag = -(3 * along * dy - square * axis[1] + 2 * axis[1]) * strength
    root = np.sqrt(np.sum(maps.real**2 + maps.imag**2, axis=0))
    normalised: NDArray[np.complex64] = maps / root
    return normalised


def noise_covariance(
    coils: int, rng: np.random.Generator, correlation: float = 0.3, spread: float = 0.35
) -> NDArray[np.complex128]:
    """Covariance E[n n^H] of complex noise whose average channel has variance 1.

    Neighbouring loops see the same tissue: their noise correlates with ``correlation`` at zero distance,
    falling as a Gaussian of the distance between loops, with random phases. Variances differ between
    channels.

    Args:
        coils: number of channels.
        rng: source of phases and variances.
        correlation: 0..1, of loops that would coincide; neighbours end between 0.1 and 0.3.
        spread: variances lie within 1 -+ ``spread``, before scaling to a mean of 1.

    Returns:
        (c, c) Hermitian, positive definite, mean diagonal 1.
    """
    angle, height = loop_positions(coils).T
    place = np.stack([np.cos(angle), np.sin(angle), height])
    square = np.sum((place[:, :, None] - place[:, None, :]) ** 2, axis=0)
    nearest = square[square > 0].min() if coils > 1 else 1.0
    kernel = np.exp(-square / (4 * nearest))  # positive definite; exp(-1/4) between nearest neighbours
    phase = np.exp(1j * rng.uniform(0, 2 * np.pi, coils))
    matrix = (1 - correlation) * np.eye(coils) + correlation * kernel * np.outer(phase, phase.conj())
    deviation = np.sqrt(1 + spread * rng.uniform(-1, 1, coils))
    matrix = matrix * np.outer(deviation, deviation)
    covariance: NDArray[np.complex128] = matrix * (coils / np.trace(matrix).real)
    return covariance
