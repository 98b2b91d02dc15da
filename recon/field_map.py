"""Off-resonance map from the coefficient images of the echoes."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from skimage.restoration import unwrap_phase
from torch import Tensor

from quantitron.recon.data import Protocol
from quantitron.recon.signal.spoiled_gre import echo_signal


def field_map(
    echo_images: Tensor,
    protocol: Protocol,
    mask: Tensor,
    smoothing: float = 1.0,
    t2star: float = 0.045,
    grid_points: int = 64,
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
        grid_points: trial values over the interval; the maximum is refined between them by a parabola.

    Returns:
        b0 (z, y, x) [Hz], zero where the mask holds nothing.
    """
    echoes = echo_images.shape[0]
    if echoes < 2 or not mask.any():
        return torch.zeros(echo_images.shape[2:])
    time = torch.tensor(protocol.echo_time, dtype=torch.float64)
    spacing = float(time.diff().min())
    interval = 1 / spacing  # [Hz], one turn
    trial = (torch.arange(grid_points) - grid_points // 2) * (interval / grid_points)
    filters = echo_signal(torch.full((grid_points,), t2star), trial, time.float(), protocol.phase_sign)
    power = torch.stack(
        [torch.einsum("e,elzyx->lzyx", row.conj(), echo_images).abs().square().sum(0) for row in filters]
    ).numpy()  # (trial, z, y, x)
    sigma = [min(smoothing, 0.3 * n) if n > 1 else 0 for n in power.shape[1:]]
    power = np.stack([gaussian_filter(plane, sigma, mode="nearest") for plane in power])
    best = power.argmax(0)

    def at(offset: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return np.take_along_axis(power, ((best + offset) % grid_points)[None], 0)[0]  # type: ignore[no-any-return]

    left, centre, right = at(-1), at(0), at(1)
    curvature = np.maximum(2 * centre - left - right, np.finfo(np.float32).tiny)
    shift = np.clip((right - left) / (2 * curvature), -0.5, 0.5)
    b0 = (best - grid_points // 2 + shift) * (interval / grid_points)
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
