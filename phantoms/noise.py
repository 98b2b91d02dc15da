"""Noise of the receive channels, and the noise scan that measures it."""

from __future__ import annotations

import math

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import HEADER_DTYPE
from quantitron.gadgets.image_geometry import axial_header
from quantitron.phantoms.acquisition_order import flag

NOISE_SAMPLES = 20000
"""Samples of the noise scan in each channel, at least."""


class ChannelNoise:
    """Correlated complex noise, drawn from one stream in the order of acquisition."""

    def __init__(self, covariance: NDArray[np.complex128], seed: int) -> None:
        self.coils = len(covariance)
        self.factor: NDArray[np.complexfloating] = np.zeros_like(covariance)
        if covariance.any():
            self.factor = np.linalg.cholesky(covariance)
        self.random = np.random.default_rng([seed, 4])

    def draw(self, lines: int, points: int) -> NDArray[np.complex64]:
        """(lines, c, points) with E[n n^H] = covariance."""
        parts = self.random.standard_normal((lines, self.coils, points, 2), dtype=np.float32)
        white = parts.view(np.complex64)[..., 0] * np.float32(math.sqrt(0.5))
        correlated: NDArray[np.complex64] = np.matmul(self.factor.astype(np.complex64), white)
        return correlated


def noise_headers(count: int, points: int, dwell_time: float) -> NDArray[np.void]:
    """Headers of a noise scan.

    Args:
        count: lines.
        points: samples of each.
        dwell_time: time between samples [s].
    """
    head = np.empty(count, dtype=HEADER_DTYPE)
    head[:] = axial_header()
    head["flags"] = flag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
    head["center_sample"] = points // 2
    head["sample_time_us"] = dwell_time * 1e6
    return head
