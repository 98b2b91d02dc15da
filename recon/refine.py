"""Bounded Levenberg-Marquardt steps that take each voxel's parameters off the grid of a dictionary.

    minimise over theta and complex PD:   sum_{e,l} |V_{e,l} - PD g_e(T2*, b0) p_l(T1, T2, inversion)|^2

PD is eliminated in closed form (variable projection, Golub and Pereyra 1973). Because the model m = g p^T
is a product, every inner product that the steps need is one over the echoes times one over the basis; the
derivatives of the two factors are orthogonal to each other once PD is projected out, and so are those of T2*
and of the off-resonance: the normal equations fall apart into one small block for the contrast and two
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.algorithms.levenberg_marquardt import (
    VoxelState,
    damped_step,
    held_back,
    inverse_diagonal,
    levenberg_marquardt,
)
from quantitron.recon.data import Protocol
from quantitron.recon.signal.dictionary import PARAMETER_RANGE
from quantitron.recon.signal.models import CONTRAST_PARAMETERS
from quantitron.recon.signal.projected import projected_signal
from quantitron.recon.signal.spoiled_gre import echo_signal

LOGARITHMIC = ("t1", "t2", "t2star")
"""Parameters whose logarithm is fitted: they stay positive and their steps are relative."""
ARRIVED = 3e-5
"""Step below which a voxel has arrived: relative for times, else of the inversion efficiency or of the phase
[rad] at the last echo. Steps shrink quickly near the end, so that what is left is far smaller."""


@dataclass
class _State(VoxelState):
    pd: Tensor
    gradient: Tensor
    """(p, v) J^T r, along which the cost falls."""
    contrast_normal: Tensor
    """(c, c, v) J^T J of the contrast parameters."""
    echo_normal: Tensor
    """(p - c, v) the same of T2* and the off-resonance, where it is diagonal."""


@dataclass(frozen=True)
class Refined:
    """Outcome for each voxel, (v,)."""

    parameters: dict[str, Tensor]
    pd: Tensor
    cost: Tensor
    standard_deviation: dict[str, Tensor]
    """Root of the Cramer-Rao bound at the residual of the fit; 0 for parameters that were given."""


class Refinement:
    """The steps for one protocol and basis."""

    def __init__(self, protocol: Protocol, psi: Tensor, given: frozenset[str]) -> None:
        """Sort the parameters.

        Args:
            protocol: the sequence.
            psi: (w, l).
            given: names of parameters that are not fitted.
        """
        if protocol.inversion_efficiency is not None:
            given = given | {"inversion"}
        if protocol.echoes == 1:
            given = given | {"t2star", "b0"}
        self._protocol, self._psi = protocol, psi
        self._contrast = [name for name in CONTRAST_PARAMETERS[protocol.sequence] if name not in given]
        self._echo = [name for name in ("t2star", "b0") if name not in given]
        self._free = [*self._contrast, *self._echo]

    def run(self, measured: Tensor, start: Mapping[str, Tensor], iterations: int) -> Refined:
        """Refine until every voxel has arrived, at most ``iterations`` steps.

        Args:
            measured: V (v, e, l) complex.
            start: name -> (v,) for all parameters, those that are given included.
            iterations: steps at most.
        """
        signal = measured.permute(1, 2, 0).contiguous()  # (e, l, v)
        real = signal.real.dtype
        start = {name: values.to(real) for name, values in start.items()}
        fixed = {name: values for name, values in start.items() if name not in self._free}
        begin = [start[name].log() if name in LOGARITHMIC else start[name] for name in self._free]
        theta = torch.stack(begin) if begin else signal.real.new_zeros(0, signal.shape[2])
        low, high, arrived = (column[:, None] for column in self._limits(theta).unbind(1))
        theta = theta.clamp(low, high)
        final = levenberg_marquardt(
            self._evaluate,
            lambda state, damping: (state.theta + self._step(state, damping, low, high)).clamp(low, high),
            theta,
            {**fixed, "signal": signal},
            arrived,
            iterations if self._free else 0,
        )
        return self._outcome(final, start, measured.shape[1] * measured.shape[2])

    def _limits(self, theta: Tensor) -> Tensor:
        """(p, 3): bounds of each fitted parameter, and the step below which it has arrived."""
        rows = []
        for name in self._free:
            low, high = PARAMETER_RANGE.get(name, (-1e4, 1e4))
            step = ARRIVED / (2 * math.pi * max(self._protocol.echo_time)) if name == "b0" else ARRIVED
            rows.append([math.log(low), math.log(high), step] if name in LOGARITHMIC else [low, high, step])
        return torch.tensor(rows, dtype=theta.dtype, device=theta.device).reshape(-1, 3)

    def _values(self, theta: Tensor) -> dict[str, Tensor]:
        rows = zip(self._free, theta, strict=True)
        return {name: row.exp() if name in LOGARITHMIC else row for name, row in rows}

    def _evaluate(self, theta: Tensor, data: Mapping[str, Tensor]) -> _State:
        """PD, cost and normal equations at ``theta`` (p, v) for ``data``: V (e, l, v), and what is given."""
        protocol, signal = self._protocol, data["signal"]
        values = {name: row for name, row in data.items() if name != "signal"} | self._values(theta)
        p, slopes = projected_signal(values, protocol, self._psi)  # (l, v)
        time = torch.tensor(protocol.echo_time, dtype=theta.dtype, device=theta.device)
        g = echo_signal(values["t2star"], values["b0"], time, protocol.phase_sign).T  # (e, v)
        g_conj, p_conj = g.conj(), p.conj()
        g_power = _power(g)  # (e, v)
        g_norm = g_power.sum(0).clamp_min(torch.finfo(theta.dtype).tiny)
        p_norm = _power(p).sum(0).clamp_min(torch.finfo(theta.dtype).tiny)
        contrast_side = (g_conj[:, None] * signal).sum(0)  # (l, v) g^H V
        model_norm = (g_norm * p_norm).clamp_min(1e-30)
        pd = (p_conj * contrast_side).sum(0) / model_norm
        cost = _power(signal - (pd * g)[:, None] * p).sum((0, 1))

        gradient, normal = [], torch.zeros(0, 0, theta.shape[1], dtype=theta.dtype, device=theta.device)
        weight = _power(pd)
        if self._contrast:
            left = contrast_side - (pd * g_norm) * p  # g^H (V - PD m)
            columns = [
                slopes[name] * values[name] if name in LOGARITHMIC else slopes[name]
                for name in self._contrast
            ]
            gradient += [(pd.conj() * (column.conj() * left).sum(0)).real for column in columns]
            # What of each derivative a change of PD cannot imitate.
            columns = [column - ((p_conj * column).sum(0) / p_norm) * p for column in columns]
            normal = torch.stack(
                [torch.stack([(a.conj() * b).sum(0).real for b in columns]) for a in columns]
            ) * (weight * g_norm)
        echo_normal = []
        if self._echo:
            left = (p_conj * signal).sum(1) - (pd * p_norm) * g  # (e, v) (V - PD m) p*
            moment = pd.conj() * (time[:, None] * g_conj * left).sum(0)
            mean_time = (time[:, None] * g_power).sum(0) / g_norm
            spread = weight * p_norm * ((time[:, None] - mean_time).square() * g_power).sum(0)
            if "t2star" in self._echo:
                gradient.append(moment.real / values["t2star"])
                echo_normal.append(spread / values["t2star"].square())
            if "b0" in self._echo:
                turn = 2 * math.pi * protocol.phase_sign
                gradient.append(moment.imag * turn)
                echo_normal.append(spread * turn**2)
        empty = theta[:0]
        return _State(
            theta,
            cost,
            pd,
            torch.stack(gradient) if gradient else empty,
            normal,
            torch.stack(echo_normal) if echo_normal else empty,
        )

    def _step(self, state: _State, damping: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """(p, v) damped step; a parameter that its bound holds back leaves the others their own way."""
        gradient = state.gradient
        held = held_back(state.theta, gradient, low, high)
        count = len(self._contrast)
        steps = []
        if count:
            steps.append(damped_step(state.contrast_normal, gradient[:count], damping, held[:count]))
        if self._echo:
            tiny = torch.finfo(gradient.dtype).tiny
            slope = gradient[count:].masked_fill(held[count:], 0)
            steps.append(slope / (state.echo_normal * (1 + damping) + tiny))
        return torch.cat(steps)

    def _outcome(self, state: _State, start: Mapping[str, Tensor], elements: int) -> Refined:
        values = {**start, **self._values(state.theta)}
        degrees = 2 * elements - 2 - len(self._free)
        noise = state.cost / max(degrees, 1)  # variance of the real and of the imaginary part
        deviation = {name: torch.zeros_like(row) for name, row in values.items()}
        count, tiny = len(self._contrast), torch.finfo(noise.dtype).tiny
        contrast = inverse_diagonal(state.contrast_normal) if count else state.theta[:0]
        for number, name in enumerate(self._free):
            if number < count:
                inverse = contrast[number]
            else:
                inverse = 1 / state.echo_normal[number - count].clamp_min(tiny)
            root = (inverse * noise).sqrt()
            deviation[name] = root * values[name] if name in LOGARITHMIC else root
        return Refined(values, state.pd, state.cost, deviation)


def _power(values: Tensor) -> Tensor:
    """|x|^2 without the root that ``abs`` takes of complex numbers."""
    if not values.is_complex():
        return values.square()
    pairs = torch.view_as_real(values).square()
    return pairs[..., 0] + pairs[..., 1]
