"""Gauss-Newton steps within bounds, for objectives whose curvature is approximated by a positive one.

    x' = x + step,    N(x) step = -gradient(x)  by conjugate gradients,    low <= x <= high

N is that of the linearised model (Gauss-Newton) or of quadratics that bound the objective from above. The
step is solved for among the unknowns that no bound holds back (Bertsekas 1982), shortened to a length that
the linearisation is trusted for, and halved as long as the objective rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient


@dataclass(frozen=True)
class Linearisation:
    """The objective about one x: 1/2 <step, N step> + <gradient, step>."""

    gradient: Tensor
    """The shape of x."""
    normal: Callable[[Tensor], Tensor]
    """step -> N step, N symmetric and positive definite."""
    preconditioner: Callable[[Tensor], Tensor]
    """r -> P r, P symmetric, positive definite and near N^-1."""


class Point(Protocol):
    """The objective at one x; what only a further step needs is made when it is asked for."""

    @property
    def value(self) -> float:
        """The objective."""

    def linearise(self) -> Linearisation:
        """The objective about x."""


@dataclass(frozen=True)
class Descent:
    """Where the steps led."""

    x: Tensor
    """The best x, the start where no step was good."""
    values: tuple[float, ...]
    """The objective at the start and after every step; never rising."""
    stopped: Literal["rounds", "settled", "no descent", "not finite"]
    """Why it ended: all rounds made; the objective hardly fell; not even a short step made it fall; the
    objective, its gradient or the step was not finite, and x is the last that gave a finite one."""


def gauss_newton(
    objective: Callable[[Tensor], Point],
    start: Tensor,
    low: Tensor,
    high: Tensor,
    longest: Tensor,
    rounds: int = 5,
    iterations: int = 10,
    tolerance: float = 1e-3,
    change: float = 0.0,
    halvings: int = 5,
    callback: Callable[[int, float], None] | None = None,
) -> Descent:
    """Minimise an objective.

    Args:
        objective: x -> the objective there.
        start: x (..., p), real: rows of p unknowns that depend on each other more than on other rows.
        low: bounds, broadcast to x; -inf for none. The start is moved within.
        high: bounds, broadcast to x; inf for none.
        longest: largest change of each unknown in one step, broadcast to x; a row is shortened as a whole.
        rounds: steps at most.
        iterations: conjugate gradient iterations for each.
        tolerance: relative residual at which they end before.
        change: fall of the objective below which a step is the last one.
        halvings: times that a step is halved before the method gives up.
        callback: called with the number of the step, from 0, and the objective after it.
    """
    x = torch.minimum(torch.maximum(start, low), high)
    point = objective(x)
    values = [point.value]
    if not math.isfinite(point.value):
        return Descent(x, tuple(values), "not finite")
    for number in range(rounds):
        about = point.linearise()
        step = _step(about, x, low, high, iterations, tolerance)
        if not bool(torch.isfinite(step).all()):
            return Descent(x, tuple(values), "not finite")
        step = _shortened(step, about.gradient, longest)
        finite = False
        for _ in range(halvings + 1):
            candidate = torch.minimum(torch.maximum(x + step, low), high)
            trial = objective(candidate)
            finite |= math.isfinite(trial.value)
            if math.isfinite(trial.value) and trial.value <= values[-1]:
                break
            step = step / 2
        else:
            return Descent(x, tuple(values), "no descent" if finite else "not finite")
        x, point = candidate, trial
        values.append(point.value)
        if callback is not None:
            callback(number, point.value)
        if values[-2] - values[-1] <= change:
            return Descent(x, tuple(values), "settled")
    return Descent(x, tuple(values), "rounds")


def _shortened(step: Tensor, gradient: Tensor, longest: Tensor) -> Tensor:
    """Rows made shorter one by one where that still leads downhill, else all alike."""
    factor = (longest / step.abs()).nan_to_num(nan=1.0).amin(-1, keepdim=True).clamp_max(1)
    shortened = factor * step
    return shortened if float((gradient * shortened).sum()) < 0 else factor.min() * step


def _step(
    about: Linearisation, x: Tensor, low: Tensor, high: Tensor, iterations: int, tolerance: float
) -> Tensor:
    """Solution of the linearised equations among the unknowns that no bound holds back."""
    held = ((x <= low) & (about.gradient > 0)) | ((x >= high) & (about.gradient < 0))
    free = (~held).to(x.dtype)
    return conjugate_gradient(
        lambda direction: free * about.normal(direction),
        -free * about.gradient,
        preconditioner=lambda residual: free * about.preconditioner(residual),
        iterations=iterations,
        tolerance=tolerance,
    )
