"""Largest eigenvalue of a Hermitian positive semidefinite operator, for step sizes (von Mises 1929)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def largest_eigenvalue(
    operator: Callable[[Tensor], Tensor],
    like: Tensor,
    generator: torch.Generator,
    iterations: int = 50,
    tolerance: float = 1e-2,
) -> float:
    """Largest eigenvalue, from below: never above the true one but for rounding, so steps want a margin.

    Args:
        operator: x -> A x, shape unchanged, Hermitian and positive semidefinite.
        like: a tensor of the shape, type and device of x; its values do not count.
        generator: where the first vector is drawn from.
        iterations: most applications of A.
        tolerance: stop once ||A x - value x|| falls below this share of the value. An eigenvalue then lies
            within that share of the value; its error is about the square of it where others are far.

    Returns:
        The Rayleigh quotient <x, A x> of the last unit vector; 0 for an operator that is zero.

    Raises:
        ValueError: if a Rayleigh quotient is negative or not finite.
    """
    x = torch.randn(like.shape, dtype=like.dtype, device=generator.device, generator=generator)
    x = x.to(like.device)
    x /= _norm(x)
    value = 0.0
    for _ in range(iterations):
        image = operator(x)
        length = _norm(image)
        value = float((x.conj() * image).real.sum(dtype=torch.float64))
        if not -1e-4 * length <= value < float("inf"):
            raise ValueError(
                f"the operator is not positive semidefinite: its Rayleigh quotient is {value:g} for a vector"
            )
        if length == 0:
            return 0.0
        if _norm(image - value * x) <= tolerance * value:
            break
        x = image / length
    return max(value, 0.0)


def _norm(values: Tensor) -> float:
    """||values||, summed in double: torch's norm of millions of single numbers is off by some 1e-3."""
    return math.sqrt(float(values.abs().square().sum(dtype=torch.float64)))
