"""Bounded Levenberg-Marquardt steps that take T1 and T2 of a fingerprint off the grid of its dictionary.

    minimise over T1, T2 and complex PD:   sum_l |V_l - PD p_l(log T1, log T2, B1)|^2

with p the dictionary's compressed coefficients, interpolated by splines; PD is eliminated in closed form
(variable projection, Golub and Pereyra 1973, with Kaufman's Jacobian). The steps stay on the grid and where
T2 is at most T1: both are linear bounds in the logarithms, and a step that would cross the second ends at the
lowest point of the linearised cost along the line T1 = T2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.algorithms.levenberg_marquardt import VoxelState, levenberg_marquardt
from quantitron.recon.data import FingerprintDictionary
from quantitron.recon.grid_spline import GridSpline

ARRIVED = 3e-5
"""Relative step of T1 and T2 below which a voxel has arrived."""


@dataclass
class _State(VoxelState):
    pd: Tensor
    """(v,) complex."""
    gradient: Tensor
    """(2, v) along which the cost falls."""
    normal: Tensor
    """(3, v) J^T J: its entries (1, 1), (1, 2), (2, 2), PD eliminated."""
    power: Tensor
    """(v,) ||p||^2."""
    share: Tensor
    """(2, v) Re p^H dp / ||p||^2: what of each derivative a change of PD imitates."""


@dataclass(frozen=True)
class RefinedFingerprints:
    """Outcome for each voxel, (v,)."""

    t1: Tensor
    """[s]."""
    t2: Tensor
    """[s]."""
    pd: Tensor
    """Complex."""
    cost: Tensor
    """Squared residual."""
    standard_deviation: dict[str, Tensor]
    """t1, t2 [s] and pd (of its modulus): root of the Cramer-Rao bound."""


class FingerprintRefinement:
    """The steps for one dictionary."""

    def __init__(self, dictionary: FingerprintDictionary, table: Tensor) -> None:
        """Make the splines.

        Args:
            dictionary: for its grid.
            table: (b, i, j, l) its coefficients in the basis of the signals.
        """
        self._spline = GridSpline(table)
        real = table.real.dtype
        axes = [axis.double().log() for axis in (dictionary.t1, dictionary.t2)]
        self._low = torch.tensor([[float(axis[0])] for axis in axes], dtype=real, device=table.device)
        self._high = torch.tensor([[float(axis[-1])] for axis in axes], dtype=real, device=table.device)
        points = [[max(len(axis) - 1, 1)] for axis in axes]
        self._spacing = (self._high - self._low) / torch.tensor(points, dtype=real, device=table.device)
        self._spacing = torch.where(self._spacing > 0, self._spacing, torch.ones_like(self._spacing))
        self._b1 = dictionary.b1

    def run(
        self,
        measured: Tensor,
        t1: Tensor,
        t2: Tensor,
        b1: Tensor | None = None,
        iterations: int = 30,
        noise_variance: Tensor | float | None = None,
        chunk: int = 16384,
    ) -> RefinedFingerprints:
        """Refine until every voxel has arrived, at most ``iterations`` steps.

        Args:
            measured: V (v, l) complex.
            t1: (v,) [s] where the steps begin.
            t2: (v,) [s] likewise, at most ``t1``.
            b1: (v,) actual over nominal flip angle; values off the grid are taken at its end. None: 1.
            iterations: steps at most.
            noise_variance: E|n|^2 of each coefficient, (v,) or one value; None: from the residual of the fit.
            chunk: voxels worked on together; bounds memory, changes no result.
        """
        if noise_variance is not None:
            noise_variance = torch.as_tensor(noise_variance, device=measured.device).expand(len(measured))
        parts = []
        for first in range(0, max(len(measured), 1), chunk):
            part = slice(first, first + chunk)
            field, noise = (None if each is None else each[part] for each in (b1, noise_variance))
            parts.append(self._run(measured[part], t1[part], t2[part], field, iterations, noise))
        t1, t2, pd, cost = (
            torch.cat([getattr(p, name) for p in parts]) for name in ("t1", "t2", "pd", "cost")
        )
        names = parts[0].standard_deviation
        deviation = {name: torch.cat([p.standard_deviation[name] for p in parts]) for name in names}
        return RefinedFingerprints(t1, t2, pd, cost, deviation)

    def _run(
        self,
        measured: Tensor,
        t1: Tensor,
        t2: Tensor,
        b1: Tensor | None,
        iterations: int,
        noise_variance: Tensor | None,
    ) -> RefinedFingerprints:
        signal = measured.T.contiguous()  # (l, v)
        real = signal.real.dtype
        data = {"signal": signal}
        if len(self._b1) > 1:
            field = torch.ones_like(signal[0].real) if b1 is None else b1.to(real)
            spacing = float(self._b1[-1] - self._b1[0]) / (len(self._b1) - 1)
            data["b1"] = ((field - float(self._b1[0])) / spacing).clamp(0, len(self._b1) - 1)
        start = torch.stack([t1.to(real).log(), t2.to(real).log()])
        start = torch.minimum(torch.maximum(start, self._low), self._high)
        start[1] = torch.minimum(start[1], start[0])
        arrived = torch.full_like(self._low, ARRIVED)
        state = levenberg_marquardt(self._evaluate, self._propose, start, data, arrived, iterations)
        if noise_variance is None:
            # PD and two times take four of the 2 l real numbers.
            noise = state.cost / max(2 * len(signal) - 4, 1)  # of the real and of the imaginary part
        else:
            noise = noise_variance.to(real) / 2
        return RefinedFingerprints(
            state.theta[0].exp(), state.theta[1].exp(), state.pd, state.cost, _deviation(state, noise)
        )

    def _evaluate(self, theta: Tensor, data: Mapping[str, Tensor]) -> _State:
        """PD, cost and normal equations at ``theta`` (2, v)."""
        signal = data["signal"]
        place = (theta - self._low) / self._spacing
        p, *slopes = self._spline(data.get("b1"), place[0], place[1])  # (l, v)
        slopes = [slope / step for slope, step in zip(slopes, self._spacing, strict=True)]
        power = _inner(p, p).real.clamp_min(torch.finfo(theta.dtype).tiny)
        pd = _inner(p, signal) / power
        left = signal - pd * p
        cost = _inner(left, left).real
        gradient = torch.stack([(pd.conj() * _inner(slope, left)).real for slope in slopes])
        shared = [_inner(p, slope) / power for slope in slopes]
        columns = [slope - part * p for slope, part in zip(slopes, shared, strict=True)]
        pairs = ((0, 0), (0, 1), (1, 1))
        weight = pd.abs().square()
        normal = torch.stack([_inner(columns[a], columns[b]).real for a, b in pairs]) * weight
        return _State(theta, cost, pd, gradient, normal, power, torch.stack([s.real for s in shared]))

    def _propose(self, state: _State, damping: Tensor) -> Tensor:
        """(2, v) theta after the damped step, within all bounds."""
        theta, (first, second) = state.theta, state.gradient
        tiny = torch.finfo(theta.dtype).tiny
        n11, n12, n22 = state.normal
        n11, n22 = (n * (1 + damping) + 1e-12 * (n11 + n22) + tiny for n in (n11, n22))
        # A parameter that its bound holds back leaves the other its own way.
        held = ((theta <= self._low) & (state.gradient < 0)) | ((theta >= self._high) & (state.gradient > 0))
        both = ~(held[0] | held[1])
        cross = torch.where(both, n12, 0)
        determinant = (n11 * n22 - cross.square()).clamp_min(tiny)
        step = torch.stack([n22 * first - cross * second, n11 * second - cross * first])
        step = torch.where(both, step / determinant, torch.stack([first / n11, second / n22]))
        trial = theta + step.masked_fill(held, 0)
        trial = torch.minimum(torch.maximum(trial, self._low), self._high)
        # Along T1 = T2 = exp(s) the linearised cost is a parabola in s.
        curvature = n11 + 2 * n12 + n22
        lowest = first + second + (n11 + n12) * theta[0] + (n12 + n22) * theta[1]
        line = (lowest / curvature.clamp_min(tiny)).clamp(float(self._low.max()), float(self._high.min()))
        return torch.where(trial[1] > trial[0], line, trial)


def _deviation(state: _State, noise: Tensor) -> dict[str, Tensor]:
    """Root of the Cramer-Rao bound for a noise variance (v,) of the real and of the imaginary part."""
    n11, n12, n22 = state.normal
    determinant = (n11 * n22 - n12.square()).clamp_min(torch.finfo(noise.dtype).tiny)
    v11, v12, v22 = n22 / determinant, -n12 / determinant, n11 / determinant
    s1, s2 = state.share
    imitated = v11 * s1.square() + 2 * v12 * s1 * s2 + v22 * s2.square()
    size = state.pd.abs().square()
    return {
        "t1": (v11 * noise).clamp_min(0).sqrt() * state.theta[0].exp(),
        "t2": (v22 * noise).clamp_min(0).sqrt() * state.theta[1].exp(),
        "pd": ((1 / state.power + size * imitated.clamp_min(0)) * noise).sqrt(),
    }


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """(v,) a^H b of (l, v)."""
    result: Tensor = (a.conj() * b).sum(0)
    return result
