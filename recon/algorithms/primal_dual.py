"""Primal-dual splitting of Condat (2013) and Vu (2013); without f that of Chambolle and Pock (2011).

minimise f(x) + g(x) + h(K x)

x' = prox_g(x - t (grad f(x) + K^H p)),    p' = prox_h*(p + s K (2 x' - x))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def primal_dual_steps(
    lipschitz: float, operator_norm: float, dual_step: float | None = None
) -> tuple[float, float]:
    """Steps (t, s), t the largest for which the iteration converges: 1/t = lipschitz/2 + s ||K||^2.

    Args:
        lipschitz: constant of the gradient of f; 0 without f.
        operator_norm: ||K||, or a bound on it.
        dual_step: s; where absent, what gives both terms of 1/t the same share. It has the unit of p / K x:
            the ratio of their sizes, where known, is the better choice.

    Raises:
        ValueError: if nothing bounds the steps, or a number is negative.
    """
    if operator_norm <= 0 or lipschitz < 0 or (dual_step is not None and dual_step <= 0):
        raise ValueError(
            "steps need ||K|| and a dual step above zero and a Lipschitz constant that is not negative, not "
            f"{operator_norm:g}, {dual_step} and {lipschitz:g}"
        )
    if dual_step is None:
        dual_step = lipschitz / (2 * operator_norm**2) if lipschitz > 0 else 1 / operator_norm
    return 1 / (lipschitz / 2 + dual_step * operator_norm**2), dual_step


def primal_dual(
    operator: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    operator_norm: float,
    dual_proximal: Callable[[Tensor, float], Tensor],
    start: Tensor,
    steps: tuple[float, float],
    gradient: Callable[[Tensor], Tensor] | None = None,
    lipschitz: float = 0.0,
    proximal: Callable[[Tensor, float], Tensor] | None = None,
    dual_start: Tensor | None = None,
    iterations: int = 200,
    tolerance: float = 1e-4,
    stop: Callable[[Tensor, int], bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """Minimise f(x) + g(x) + h(K x), all convex, f smooth.

    Args:
        operator: x -> K x.
        adjoint: p -> K^H p.
        operator_norm: ||K||, or a bound on it.
        dual_proximal: (p, s) -> proximal operator of s h*, h* the conjugate of h; for a weighted norm the
            projection onto the ball of the dual norm, whatever s.
        start: first x.
        steps: (t, s), as of `primal_dual_steps`.
        gradient: x -> gradient of f; f is zero where absent.
        lipschitz: constant of that gradient, or a bound on it.
        proximal: (v, t) -> minimiser of ||x - v||^2 / (2 t) + g(x); g is zero where absent.
        dual_start: first p; zero where absent.
        iterations: most iterations, one of each callable.
        tolerance: stop once both x and p change by no more than this share of themselves.
        stop: called with x and the iteration, from 0; True ends the iterations.

    Returns:
        x and p.

    Raises:
        ValueError: if the steps are too long: 1/t - s ||K||^2 must be at least lipschitz/2.
    """
    primal_step, dual_step = steps
    bound = lipschitz / 2 + dual_step * operator_norm**2
    if min(steps) <= 0 or 1 / primal_step < bound * (1 - 1e-6):
        raise ValueError(
            f"primal step {primal_step:g} is not between 0 and {1 / bound:g}, the longest with dual step "
            f"{dual_step:g}, Lipschitz constant {lipschitz:g} and ||K|| {operator_norm:g}"
        )
    x = start
    image = operator(x)
    p = torch.zeros_like(image) if dual_start is None else dual_start
    for iteration in range(iterations):
        slope = adjoint(p) if gradient is None else adjoint(p) + gradient(x)
        previous, x = x, x - primal_step * slope
        if proximal is not None:
            x = proximal(x, primal_step)
        previous_image, image = image, operator(x)
        previous_p, p = p, dual_proximal(p + dual_step * (2 * image - previous_image), dual_step)
        if stop is not None and stop(x, iteration):
            break
        if _settled(x, previous, tolerance) and _settled(p, previous_p, tolerance):
            break
    return x, p


def _settled(new: Tensor, old: Tensor, tolerance: float) -> bool:
    change, size = torch.linalg.vector_norm(new - old), torch.linalg.vector_norm(new)
    return bool(change <= tolerance * size)
