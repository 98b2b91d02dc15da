"""Accelerated proximal gradients: FISTA (Beck and Teboulle 2009) with restart (O'Donoghue and Candes 2015).

minimise f(x) + g(x):    x_n = prox_g(y_n - step grad f(y_n)),    y_(n+1) = x_n + momentum (x_n - x_(n-1))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fista(
    gradient: Callable[[Tensor], Tensor],
    proximal: Callable[[Tensor, float | Tensor], Tensor],
    start: Tensor,
    step: float | Tensor,
    iterations: int = 100,
    tolerance: float = 1e-4,
    restart: bool = True,
    stop: Callable[[Tensor, int], bool] | None = None,
) -> Tensor:
    """Minimise f + g, f smooth and convex, g convex.

    Args:
        gradient: x -> gradient of f, shape unchanged.
        proximal: (v, step) -> minimiser of sum |x - v|^2 / (2 step) + g(x). It may change from call to call,
            as with shifted blocks; the iterates then settle near a minimiser of the mean of the g.
        start: first x.
        step: at most 1 / Lipschitz constant of the gradient; or a real tensor that broadcasts to x, the
            diagonal of a metric M with <x, A x> <= <x, M^-1 x> for the Hessian A.
        iterations: most iterations, one gradient each.
        tolerance: stop once ||x_n - x_(n-1)|| falls to this share of ||x_n||.
        restart: whether momentum is dropped when it leads back, from <y - x_n, x_n - x_(n-1)> > 0 in the
            metric. Costs nothing, and spares the ripples of ill-conditioned problems.
        stop: called with x_n and n, from 0; True ends the iterations (the discrepancy principle, say).

    Returns:
        x.

    Raises:
        ValueError: if a step is not above zero.
    """
    if not bool(torch.as_tensor(step > 0).all()):
        raise ValueError("steps must be above zero")
    x = leading = start
    momentum = 1.0
    for iteration in range(iterations):
        previous, x = x, proximal(leading - step * gradient(leading), step)
        change = x - previous
        if restart and _inner((leading - x) / step, change) > 0:
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        leading = torch.add(x, change, alpha=(momentum - 1) / following)
        momentum = following
        if stop is not None and stop(x, iteration):
            break
        if float(torch.linalg.vector_norm(change)) <= tolerance * float(torch.linalg.vector_norm(x)):
            break
    return x


def _inner(left: Tensor, right: Tensor) -> float:
    return float(torch.vdot(left.flatten(), right.flatten()).real)
