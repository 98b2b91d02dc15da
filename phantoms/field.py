"""Smooth fields of a scan: off-resonance, transmit field and receive phase, on any set of places.

All are smooth functions of place, so that they do not depend on the grid on which they are looked up.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Places = tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]
"""z, y, x [m] from the isocentre, arrays that broadcast to one shape."""

FIELD_UNIT = 0.1
"""Length [m] in which the smooth polynomials are written: about the radius of a head."""
GYROMAGNETIC_RATIO = 42.577478518
"""gamma / 2 pi of hydrogen [MHz / T]."""


def _low_order(places: Places, rng: np.random.Generator) -> NDArray[np.floating]:
    """A random field that obeys Laplace's equation (solid harmonics of first and second order)."""
    z, y, x = (place / FIELD_UNIT for place in places)
    a = rng.standard_normal(8)
    first = a[0] * x + a[1] * y + a[2] * z
    second = a[3] * x * y + a[4] * y * z + a[5] * x * z + a[6] * (x * x - y * y) / 2
    return first + second + a[7] * (2 * z * z - x * x - y * y) / 4


def off_resonance(places: Places, amplitude: float, rng: np.random.Generator) -> NDArray[np.floating]:
    """B0 map: what shimming leaves (low-order harmonics) and the dipole fields of three air cavities.

    The cavities lie outside the brain where the frontal sinus and the ear canals are; they make the steep, one-sided
    field that a brain really has there.

    Args:
        places: where, z, y, x [m]; +y is the back of the head.
        amplitude: largest absolute value within a head-sized ellipsoid, about [Hz].
        rng: source of the random shape.

    Returns:
        [Hz], broadcast shape of ``places``.
    """
    z, y, x = places
    background = _low_order(places, rng)

    def cavity(cz: float, cy: float, cx: float) -> NDArray[np.floating]:
        dz, dy, dx = z - cz, y - cy, x - cx
        square = dz * dz + dy * dy + dx * dx + 0.02**2  # softened within 2 cm of the centre
        return 0.05**3 * (2 * dz * dz - dx * dx - dy * dy) / square**2.5

    strength = rng.uniform(0.7, 1.3, 3)
    sinus = strength[0] * cavity(-0.045, -0.085, 0.0)
    ears = strength[1] * cavity(-0.05, 0.01, 0.085) + strength[2] * cavity(-0.05, 0.01, -0.085)
    field = 0.35 * background + 1.6 * (sinus + 0.7 * ears)
    head = (z / 0.08) ** 2 + (y / 0.095) ** 2 + (x / 0.075) ** 2 <= 1
    if not head.any():
        head = np.ones(head.shape, dtype=bool)
    middle = np.median(field[head])
    largest = np.abs(field[head] - middle).max()
    return (field - middle) * (amplitude / largest if largest > 0 else 0.0)


def receive_phase(places: Places, amplitude: float, rng: np.random.Generator) -> NDArray[np.floating]:
    """Phase of the object at TE = 0 [rad]: smooth, about +-``amplitude`` over a head, with a random constant."""
    field = _low_order(places, rng)
    return rng.uniform(-np.pi, np.pi) + amplitude * np.tanh(field / 3)


def transmit_field(places: Places, amplitude: float, rng: np.random.Generator) -> NDArray[np.floating]:
    """B1 map, actual over nominal flip angle: high in the centre, low at the rim, slightly tilted.

    Args:
        places: where, z, y, x [m].
        amplitude: 0.2 runs from about 1.1 in the centre to 0.9 at the rim of a head.
        rng: source of the tilt.
    """
    z, y, x = (place / FIELD_UNIT for place in places)
    tilt = rng.uniform(-0.15, 0.15, 3)
    radius = x * x + y * y + 0.5 * z * z
    profile = 1 / (1 + radius) - 0.5 + tilt[0] * x + tilt[1] * y + tilt[2] * z
    return 1 + amplitude * np.clip(profile, -0.75, 0.75)


def dipole_field(
    chi: NDArray[np.floating], voxel_size: tuple[float, float, float], field_strength: float
) -> NDArray[np.float32]:
    """Off-resonance of a susceptibility map in a field along z: gamma/2pi B0 (dipole * chi).

    ``D(k) = 1/3 - kz^2 / k^2``, with zero filling against wrap-around (Salomir 2003; Marques and Bowtell 2005).

    Args:
        chi: (z, y, x) [ppm] relative to the surroundings.
        voxel_size: [m] (z, y, x).
        field_strength: B0 [T].

    Returns:
        (z, y, x) float32 [Hz].
    """
    padded = [2 * n for n in chi.shape]
    kz, ky, kx = (np.fft.fftfreq(n, d) for n, d in zip(padded, voxel_size, strict=True))
    kx = kx[: padded[2] // 2 + 1]  # of a real transform
    square = kz[:, None, None] ** 2 + ky[None, :, None] ** 2 + kx[None, None, :] ** 2
    square[0, 0, 0] = 1
    kernel = 1 / 3 - kz[:, None, None] ** 2 / square
    kernel[0, 0, 0] = 0
    field = np.fft.irfftn(np.fft.rfftn(chi, padded, axes=(0, 1, 2)) * kernel, padded, axes=(0, 1, 2))
    nz, ny, nx = chi.shape
    return (GYROMAGNETIC_RATIO * field_strength * field[:nz, :ny, :nx]).astype(np.float32)
