"""Smooth deterministic patterns in -1..1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def smooth_texture(shape: tuple[int, ...], scale: float, seed: int, waves: int = 12) -> NDArray[np.float32]:
    """A sum of plane waves with random directions and phases: smooth, without preferred direction.

    Args:
        shape: (z, y, x).
        scale: shortest wavelength is about ``scale`` voxels.
        seed: pattern number.
        waves: plane waves that are summed.

    Returns:
        ``shape`` float32, between -1 and 1, root mean square about 0.35.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(shape, dtype=np.float32)
    for _ in range(waves):
        direction = rng.standard_normal(3)
        direction /= np.linalg.norm(direction)
        wave_number = 2 * np.pi / (scale * rng.uniform(1.0, 3.0)) * direction  # radians per voxel, (z, y, x)
        phase = rng.uniform(0, 2 * np.pi)
        # exp(j a) exp(j b) exp(j c) is separable: three vectors instead of a cosine per voxel.
        factors = [
            np.exp(1j * (k * np.arange(n) + (phase if axis == 0 else 0))).astype(np.complex64)
            for axis, (k, n) in enumerate(zip(wave_number, shape, strict=True))
        ]
        total += (factors[0][:, None, None] * (factors[1][:, None] * factors[2][None, :])[None]).real
    # Twelve unit waves have rms sqrt(6); two sigma is mapped to 0.7 and the rare peaks are limited.
    limited: NDArray[np.float32] = np.clip(total * np.float32(0.35 / np.sqrt(waves / 2)), -1, 1)
    return limited
