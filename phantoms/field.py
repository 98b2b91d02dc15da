"""Smooth fields of a scan: off-resonance, transmit field and receive phase, on any set of places.

All are smooth functions of place, so that they do not depend on the grid on which they are looked up.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
Places = tuple[FloatArray, FloatArray, FloatArray]
"""z, y, x [m] from the isocentre, arrays that broadcast to one shape."""

FIELD_UNIT = 0.1
"""Length [m] in which the smooth polynomials are written: about the radius of a head."""
CAVITIES = ((-0.03, -0.10, 0.0, 2.0), (-0.05, 0.02, 0.085, 1.4), (-0.05, 0.02, -0.085, 1.4))
"""Air beside the brain: place z, y, x [m] and strength of frontal sinus and ear canals."""
GYROMAGNETIC_RATIO = 42.577478518
"""gamma / 2 pi of hydrogen [MHz / T]."""


def _low_order(places: Places, a: FloatArray) -> FloatArray:
    """A field that obeys Laplace's equation: solid harmonics of order 1 and 2, weights ``a`` (8,)."""
    z, y, x = (place / FIELD_UNIT for place in places)
    first = a[0] * x + a[1] * y + a[2] * z
    second = a[3] * x * y + a[4] * y * z + a[5] * x * z + a[6] * (x * x - y * y) / 2
    third = a[7] * (2 * z * z - x * x - y * y) / 4
    total: FloatArray = first + second + third
    return total


def off_resonance(places: Places, amplitude: float, rng: np.random.Generator) -> FloatArray:
    """B0 map: what shimming leaves (low-order harmonics) and the dipole fields of three air cavities.

    The cavities lie outside the brain where the frontal sinus and the ear canals are; they make the steep,
    one-sided field that a brain really has there.

    Args:
        places: where, z, y, x [m]; +y is the back of the head.
        amplitude: largest absolute value within the middle 8 cm of a head [Hz]; both signs reach it.
        rng: source of the random shape.

    Returns:
        [Hz], broadcast shape of ``places``.
    """
    harmonics = rng.standard_normal(8)
    strength = rng.uniform(0.7, 1.3, len(CAVITIES))

    def field(z: FloatArray, y: FloatArray, x: FloatArray) -> FloatArray:
        total = 0.4 * _low_order((z, y, x), harmonics)
        for (cz, cy, cx, size), factor in zip(CAVITIES, strength, strict=True):
            dz, dy, dx = z - cz, y - cy, x - cx
            square = dz * dz + dy * dy + dx * dx + 0.03**2  # softened within 3 cm of the centre
            total = total + size * factor * 0.07**3 * (2 * dz * dz - dx * dx - dy * dy) / square**2.5
        return total

    # The scale comes from a head of fixed size, so that it is the same for every slab and grid.
    plane = np.linspace(-0.095, 0.095, 41)
    z, y, x = np.meshgrid(np.linspace(-0.04, 0.04, 17), plane, plane, indexing="ij")
    head = ((z / 0.04) ** 2 + (y / 0.095) ** 2 + (x / 0.075) ** 2) <= 1
    reference = field(z[head], y[head], x[head])
    middle = (reference.max() + reference.min()) / 2
    scaled: FloatArray = (field(*places) - middle) * (amplitude / np.abs(reference - middle).max())
    return scaled


def receive_phase(places: Places, amplitude: float, rng: np.random.Generator) -> FloatArray:
    """Phase of the object at TE = 0 [rad]: a random constant and a smooth part of about +-``amplitude``."""
    field = _low_order(places, rng.standard_normal(8))
    return rng.uniform(-np.pi, np.pi) + amplitude * np.tanh(field / 3)


def transmit_field(places: Places, amplitude: float, rng: np.random.Generator) -> FloatArray:
    """B1 map, actual over nominal flip angle: high in the centre, low at the rim, slightly tilted.

    Args:
        places: where, z, y, x [m].
        amplitude: 0.2 runs from about 1.1 in the centre to 0.9 at the rim of a head.
        rng: source of the tilt.
    """
    z, y, x = (place / FIELD_UNIT for place in places)
    tilt = rng.uniform(-0.15, 0.15, 3)
    radius = x * x + y * y + 0.5 * z * z
    profile = 1.5 / (1 + 2.2 * radius) - 1 + tilt[0] * x + tilt[1] * y + tilt[2] * z
    factor: FloatArray = 1 + amplitude * np.clip(profile, -1, 1)
    return factor


def dipole_field(
    chi: NDArray[np.floating], voxel_size: tuple[float, float, float], field_strength: float
) -> NDArray[np.float32]:
    """Off-resonance of a susceptibility map in a field along z: gamma/2pi B0 (dipole * chi).

    ``D(k) = 1/3 - kz^2 / k^2``, with zero filling against wrap-around (Salomir 2003; Marques and Bowtell
    2005).

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
    spectrum = scipy.fft.rfftn(chi.astype(np.float32), padded)
    field = scipy.fft.irfftn(spectrum * kernel.astype(np.float32), padded)
    nz, ny, nx = chi.shape
    shift: NDArray[np.float32] = GYROMAGNETIC_RATIO * field_strength * field[:nz, :ny, :nx]
    return shift.astype(np.float32)
