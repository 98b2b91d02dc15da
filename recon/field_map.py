"""Off-resonance map from the coefficient images of the echoes."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.restoration import unwrap_phase
from torch import Tensor

from quantitron.recon.data import Protocol
from quantitron.recon.signal.spoiled_gre import echo_signal

FloatArray = NDArray[np.floating]

_LEAST_TRIALS, _TRIALS_PER_MAXIMUM = 64, 8
"""Trial values over one turn, and over the width of a maximum; between them a parabola finds it."""


def field_map(
    echo_images: Tensor,
    protocol: Protocol,
    mask: Tensor,
    smoothing: float = 1.0,
    t2star: float = 0.045,
) -> Tensor:
    """Off-resonance that lines up the echoes best, with whole turns resolved over space.

    Maximises ``P(b0) = sum_l |sum_e V_{e,l} conj(g_e(T2*, b0))|^2``, summed over a small neighbourhood, on
    the interval that one turn between neighbouring echoes leaves, then unwraps the map.

    Args:
        echo_images: V (e, l, z, y, x) complex.
        protocol: for the echo times; one echo gives a map of zeros.
        mask: (z, y, x) bool, where there is signal; the unwrapping keeps to it.
        smoothing: standard deviation [voxels] of the neighbourhood.
        t2star: [s] decay of the matched filter; the maximum hardly depends on it.

    Returns:
        b0 (z, y, x) [Hz], zero where the mask holds nothing.
    """
    echoes = echo_images.shape[0]
    if echoes < 2 or not mask.any():
        return torch.zeros(echo_images.shape[2:])
    time = torch.tensor(protocol.echo_time, dtype=torch.float64)
    spacing = float(time.diff().min())
    interval = 1 / spacing  # [Hz], one turn
    # A maximum is as wide as one over the time from the first echo to the last. Uneven echoes have several
    # within a turn, and a grid too coarse for them takes the wrong one.
    count = max(_LEAST_TRIALS, math.ceil(_TRIALS_PER_MAXIMUM * float(time[-1] - time[0]) / spacing))
    step = interval / count
    trial = (torch.arange(count) - count // 2) * step
    decay = torch.full((count,), t2star)
    filters = echo_signal(decay, trial, time.float(), protocol.phase_sign)  # (trial, e)
    sigma = [min(smoothing, 0.3 * n) if n > 1 else 0 for n in echo_images.shape[2:]]

    def power(number: int) -> FloatArray:
        row = filters[number % count]
        plane = torch.einsum("e,elzyx->lzyx", row.conj(), echo_images).abs().square().sum(0)
        return np.asarray(gaussian_filter(plane.numpy(), sigma, mode="nearest"))

    # Plane after plane: all at once they would be the largest arrays of a reconstruction.
    before, here, after = power(-1), power(0), power(1)
    best = np.zeros(here.shape, dtype=np.int64)
    left, centre, right = before, here, after
    for number in range(1, count):
        before, here, after = here, after, power(number + 1)
        higher = here > centre
        best = np.where(higher, number, best)
        left, centre, right = (
            np.where(higher, new, old) for new, old in ((before, left), (here, centre), (after, right))
        )
    curvature = np.maximum(2 * centre - left - right, np.finfo(np.float32).tiny)
    shift = np.clip((right - left) / (2 * curvature), -0.5, 0.5)
    b0 = (best - count // 2 + shift) * step
    # Whole turns are only equivalent where all echo spacings are multiples of the smallest one.
    steps = time.diff() / spacing
    if bool(((steps - steps.round()).abs() < 0.02).all()):
        turns = np.ma.masked_array(2 * math.pi * b0 * spacing, mask=~mask.numpy())
        unwrapped = _unwrap(turns)
        unwrapped = unwrapped - 2 * math.pi * np.round(np.median(unwrapped[mask.numpy()]) / (2 * math.pi))
        b0 = np.where(mask.numpy(), unwrapped / (2 * math.pi * spacing), b0)
    return torch.from_numpy(np.asarray(b0, dtype=np.float32))


def _unwrap(
    phase: np.ma.MaskedArray[tuple[int, ...], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Spatial unwrapping in as many dimensions as the map has; shape unchanged."""
    flat = phase[0] if phase.shape[0] == 1 else phase
    unwrapped = np.ma.filled(unwrap_phase(flat, rng=0), 0.0)  # type: ignore[no-untyped-call]
    return unwrapped[None] if phase.shape[0] == 1 else unwrapped
