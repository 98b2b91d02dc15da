"""Conjugate gradients for Hermitian positive definite systems (Hestenes and Stiefel 1952)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    normal: Callable[[Tensor], Tensor],
    right_hand_side: Tensor,
    start: Tensor | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    iterations: int = 20,
    tolerance: float = 1e-6,
    callback: Callable[[int, float], None] | None = None,
    least: int = 0,
) -> Tensor:
    """Solve N x = b for a Hermitian positive definite N.

    Args:
        normal: x -> N x, shape unchanged.
        right_hand_side: b, any shape.
        start: first guess; zero where absent.
        preconditioner: r -> P r with P Hermitian positive definite and near N^-1.
        iterations: most iterations.
        tolerance: stop once ||b - N x|| falls below this share of ||b||.
        least: iterations before which the tolerance is not looked at: the residual does not fall evenly.
        callback: called with the iteration and the relative residual after each iteration.

    Returns:
        x, the shape of b.
    """

    def inner(left: Tensor, right: Tensor) -> float:
        return float(torch.vdot(left.flatten(), right.flatten()).real)

    scale = inner(right_hand_side, right_hand_side) ** 0.5
    if scale == 0:
        return torch.zeros_like(right_hand_side)
    x = torch.zeros_like(right_hand_side) if start is None else start.clone()
    residual = right_hand_side.clone() if start is None else right_hand_side - normal(x)
    search = conditioned = residual if preconditioner is None else preconditioner(residual)
    energy = inner(residual, conditioned)
    for iteration in range(iterations):
        size = inner(residual, residual) ** 0.5
        if size == 0 or (iteration >= least and size <= tolerance * scale):
            break
        image = normal(search)
        step = energy / inner(search, image)
        x += step * search
        residual = residual - step * image
        conditioned = residual if preconditioner is None else preconditioner(residual)
        previous, energy = energy, inner(residual, conditioned)
        search = conditioned + (energy / previous) * search
        if callback is not None:
            callback(iteration, inner(residual, residual) ** 0.5 / scale)
    return x
