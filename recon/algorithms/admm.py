"""Alternating direction method of multipliers in scaled form (Boyd 2011).

minimise f(x) + g(z)  subject to  L x = z

x = argmin f(x) + penalty/2 ||L x - (z - u)||^2,    z = prox_(g/penalty)(L x + u),    u = u + L x - z
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_IMBALANCE = 10.0
"""Ratio of the residuals above which the penalty changes (Boyd 2011, 3.4.1)."""
_FACTOR = 2.0
"""By how much it changes."""


@dataclass(frozen=True)
class Splitting:
    """Where the method stands; the start of the next call, too."""

    x: Tensor
    """Minimiser of f given z."""
    z: Tensor
    """Minimiser of g given L x; the shape of L x."""
    u: Tensor
    """Scaled multiplier, the shape of L x; ``penalty u`` is a subgradient of g at z."""
    penalty: float
    """Of u, and of the next iteration."""
    iterations: int
    """Iterations made."""
    primal_residual: float
    """||L x - z|| relative to the larger of ||L x|| and ||z||."""
    dual_residual: float
    """||z - previous z|| relative to the larger of ||z|| and ||u||."""


def admm(
    solve_x: Callable[[Tensor, float, Tensor], Tensor],
    proximal_z: Callable[[Tensor, float], Tensor],
    start: Tensor | Splitting,
    operator: Callable[[Tensor], Tensor] | None = None,
    penalty: float = 1.0,
    relaxation: float = 1.0,
    balance: int = 0,
    iterations: int = 50,
    tolerance: float = 1e-4,
    stop: Callable[[Tensor, int], bool] | None = None,
) -> Splitting:
    """Minimise f(x) + g(L x), f and g convex.

    Args:
        solve_x: (v, penalty, x) -> minimiser of f(x) + penalty/2 ||L x - v||^2; the x given is the last one,
            for solvers that iterate.
        proximal_z: (v, step) -> minimiser of ||z - v||^2 / (2 step) + g(z).
        start: first x, with z = L x and u = 0; or what an earlier call returned, whose penalty goes on.
        operator: x -> L x; the identity where absent. Several terms g_i(L_i x) are one with L_i x stacked.
        penalty: above zero; sets the speed, not the minimiser.
        relaxation: from 1 (none) to below 2; 1.6 is often faster (Eckstein and Bertsekas 1992).
        balance: iterations at the start during which the penalty doubles or halves to keep the relative
            residuals within a factor of ten (Wohlberg 2017). Convergence asks that this ends.
        iterations: most iterations.
        tolerance: stop once both residuals of `Splitting` have fallen to this.
        stop: called with x and the iteration, from 0; True ends the iterations.

    Returns:
        x, z, u and the residuals.

    Raises:
        ValueError: if the penalty is not above zero or the relaxation lies outside (0, 2).
    """
    apply = operator if operator is not None else _identity
    if isinstance(start, Splitting):
        x, z, u, penalty = start.x, start.z, start.u, start.penalty
    else:
        x, z = start, apply(start)
        u = torch.zeros_like(z)
    if not penalty > 0:
        raise ValueError(f"the penalty must be above zero, not {penalty:g}")
    if not 0 < relaxation < 2:
        raise ValueError(f"the relaxation must lie between 0 and 2, not at {relaxation:g}")
    primal = dual = float("inf")
    done = 0
    for iteration in range(iterations):
        x = solve_x(z - u, penalty, x)
        image = apply(x)
        relaxed = image if relaxation == 1 else relaxation * image + (1 - relaxation) * z
        previous, z = z, proximal_z(relaxed + u, 1 / penalty)
        u = u + relaxed - z
        done = iteration + 1
        lengths = _norm(image), _norm(z), _norm(u)
        gap, change = _norm(image - z), _norm(z - previous)
        primal, dual = _share(gap, max(lengths[:2])), _share(change, max(lengths[1:]))
        if (stop is not None and stop(x, iteration)) or max(primal, dual) <= tolerance:
            break
        if iteration < balance:
            # Doubling the penalty halves u, which holds multiplier / penalty.
            slow = _share(change, lengths[2])
            if primal > _IMBALANCE * slow:
                penalty, u = penalty * _FACTOR, u / _FACTOR
            elif slow > _IMBALANCE * primal:
                penalty, u = penalty / _FACTOR, u * _FACTOR
    return Splitting(x, z, u, penalty, done, primal, dual)


def _identity(x: Tensor) -> Tensor:
    return x


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def _share(part: float, whole: float) -> float:
    """0 of nothing is 0."""
    return part / whole if whole > 0 else (0.0 if part == 0 else float("inf"))
