"""Dictionary of fingerprints over a grid of T1 x T2 (x B1), kept in its own temporal basis.

A basis of the whole dictionary is first taken from a coarser grid, generously, and every fingerprint is
projected on it as it is simulated; directions that it lacks are added as they turn up. The singular value
decomposition of the normalised atoms is then exact within it. So the fingerprints themselves are never held
together: 60 000 of 1000 points take a tenth of the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantitron.recon.data import FingerprintDictionary, Protocol
from quantitron.recon.signal.fisp_mrf import contrast_signal

T1_RANGE = (0.015, 6.0)
"""T1 [s] of the grid: from doped water to beyond cerebrospinal fluid."""
T2_RANGE = (0.004, 3.0)
"""T2 [s] of the grid."""
T1_POINTS = 288
T2_POINTS = 318
"""Steps of 2.1 %: 60 000 atoms with T2 no longer than T1."""
ERROR = 1e-4
"""Largest error of a fingerprint in the basis, over its norm."""
_MARGIN = 4
"""Steps of the grid beyond T2 = T1 that are simulated, for interpolation up to there."""
_COARSE = 5
"""The first basis is made of each fifth point of either axis."""
_TOGETHER = 8192
"""Fingerprints in memory at a time."""


def fingerprint_dictionary(
    protocol: Protocol,
    t1_range: tuple[float, float] = T1_RANGE,
    t2_range: tuple[float, float] = T2_RANGE,
    t1_points: int = T1_POINTS,
    t2_points: int = T2_POINTS,
    b1: Sequence[float] = (1.0,),
    progress: Callable[[float], None] | None = None,
) -> FingerprintDictionary:
    """Simulate a dictionary and compress it.

    Args:
        protocol: a ``fisp_mrf`` sequence. No known inversion efficiency is taken as 1.
        t1_range: first and last T1 [s].
        t2_range: first and last T2 [s].
        t1_points: points of T1, evenly in the logarithm.
        t2_points: points of T2, likewise.
        b1: actual over nominal flip angles, ascending and evenly spaced.
        progress: told the share that is done, now and then, ending with 1.

    Returns:
        the dictionary in float32 (or complex64), with as many columns as make every plausible fingerprint
        right to ``ERROR`` of its norm. Beyond T2 = T1, where there is no tissue, it holds the fingerprints of
        the last simulated T2.

    Raises:
        ValueError: if a range or a number of points makes no grid, or the protocol is inconsistent.
    """
    axis_t1, axis_t2 = _axis("T1", t1_range, t1_points), _axis("T2", t2_range, t2_points)
    axis_b1 = _b1_axis(b1)
    # Beyond T2 = T1 a few more are simulated, for interpolation up to there.
    last = torch.searchsorted(axis_t2, axis_t1 * (1 + 1e-9), right=True) - 1  # (i,)
    if (last < 0).all():
        raise ValueError(f"no T2 of {t2_range} s is below a T1 of {t1_range} s")
    last = (last + _MARGIN).clamp(0, t2_points - 1)
    wanted = (torch.arange(t2_points) <= last[:, None]).expand(len(axis_b1), -1, -1)  # (b, i, j)

    def simulate(index: Tensor) -> Tensor:
        """Fingerprints (a, w) of flat indices into (b, i, j)."""
        place = index % (t1_points * t2_points)
        parameters = {
            "t1": axis_t1[place // t2_points].float(),
            "t2": axis_t2[place % t2_points].float(),
        }
        field = axis_b1[index // (t1_points * t2_points)].float()
        with torch.no_grad():
            return contrast_signal(parameters, protocol, None if bool((field == 1).all()) else field)

    coarse = torch.zeros_like(wanted)
    coarse[:, ::_COARSE, ::_COARSE] = wanted[:, ::_COARSE, ::_COARSE]
    span = _Span(simulate(coarse.flatten().nonzero()[:, 0]), wanted.numel())
    index = wanted.flatten().nonzero()[:, 0]
    # Neighbours in T2 are simulated together: short ones need few states.
    index = index[torch.argsort(index % t2_points, stable=True)]
    for start in range(0, len(index), _TOGETHER):
        part = index[start : start + _TOGETHER]
        span.add(part, simulate(part))
        if progress is not None:
            progress((start + len(part)) / len(index))
    coefficients = span.coefficients.reshape(*wanted.shape, -1)  # (b, i, j, q)
    nearest = torch.minimum(torch.arange(t2_points), last[:, None])  # (i, j)
    coefficients = coefficients[:, torch.arange(t1_points)[:, None], nearest]
    plausible = axis_t2.float() <= axis_t1.float()[:, None]
    turn, variance = _principal(coefficients[:, plausible].flatten(0, 1))  # (q, r)
    axes = span.axes.to(turn.dtype) @ turn
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    sign = largest.conj() / largest.abs()  # arbitrary: fixed, so that coefficients compare between runs
    kind = span.axes.dtype
    return FingerprintDictionary(
        t1=axis_t1.float(),
        t2=axis_t2.float(),
        b1=axis_b1.float(),
        axes=(axes * sign).to(kind).contiguous(),
        variance=variance.float(),
        coefficients=coefficients @ (turn.conj() * sign.conj()).to(kind),
    )


class _Span:
    """An orthonormal basis that grows with what it is given, and the coefficients of that."""

    def __init__(self, sample: Tensor, rows: int) -> None:
        self.axes = _leading(sample)  # (w, q)
        self.coefficients = self.axes.new_zeros(rows, self.axes.shape[1])

    def add(self, index: Tensor, signal: Tensor) -> None:
        """Put down the coefficients of signals (a, w) as rows ``index``."""
        missing = signal - (signal @ self.axes.conj()) @ self.axes.T
        norm = torch.linalg.vector_norm(signal, dim=1)
        lacking = torch.linalg.vector_norm(missing, dim=1) > ERROR / 3 * norm
        if lacking.any() and self.axes.shape[1] < self.axes.shape[0]:
            missing = missing[lacking] / norm[lacking, None]
            more = torch.cat([self.axes, _leading(missing)], dim=1)[:, : self.axes.shape[0]]
            fresh = torch.linalg.qr(more).Q[:, self.axes.shape[1] :]
            self.axes = torch.cat([self.axes, fresh], dim=1)
            self.coefficients = torch.nn.functional.pad(self.coefficients, (0, fresh.shape[1]))
        self.coefficients[index] = signal @ self.axes.conj()


def _leading(rows: Tensor) -> Tensor:
    """Orthonormal columns (w, q) that hold normalised rows (a, w) but for ``ERROR`` / 30 in the mean."""
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-20)
    double = rows.to(torch.complex128 if rows.is_complex() else torch.float64)
    values, vectors = torch.linalg.eigh(double.T @ double.conj())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    left = 1 - values.cumsum(0) / values.sum()
    columns = min(int((left > (ERROR / 30) ** 2).sum()) + 1, len(values))
    leading: Tensor = vectors[:, :columns].to(rows.dtype)
    return leading


def _principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Principal axes (q, r) of normalised rows (a, q), in double precision, and their share of the energy.

    As many as it takes for ``ERROR``, with a tenth left for what was lost before.
    """
    double = rows.to(torch.complex128 if rows.is_complex() else torch.float64)
    double = double / torch.linalg.vector_norm(double, dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(double.T @ double.conj())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    power = (double @ vectors.conj()).abs().square().flip(1)
    beyond = power.cumsum(1).amax(0).flip(0)  # (q,): the most that any row has in columns q and up
    columns = int((beyond > (0.9 * ERROR) ** 2).sum())
    return vectors[:, :columns], values[:columns] / values.sum()


def _axis(name: str, bounds: tuple[float, float], points: int) -> Tensor:
    low, high = bounds
    if not 0 < low < high < math.inf:
        raise ValueError(f"the {name} range of a dictionary is {low:g} to {high:g} s")
    if points < 2:
        raise ValueError(f"a dictionary needs at least 2 points of {name}, not {points}")
    return torch.logspace(math.log10(low), math.log10(high), points, dtype=torch.float64)


def _b1_axis(b1: Sequence[float]) -> Tensor:
    axis = torch.tensor(tuple(b1), dtype=torch.float64)
    steps = axis.diff()
    if not len(axis) or not (axis > 0).all() or not torch.isfinite(axis).all():
        raise ValueError(f"the B1 values of a dictionary are {list(b1)}; they must be positive")
    if len(steps) and (steps[0] <= 0 or (steps - steps[0]).abs().max() > 1e-6):
        raise ValueError(f"the B1 values of a dictionary, {list(b1)}, are not ascending at even steps")
    return axis
