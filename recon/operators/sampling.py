"""Which points of each frame's k-space were acquired."""

from __future__ import annotations

from torch import Tensor

from quantitron.recon.operators.linear_operator import LinearOperator


class SamplingOperator(LinearOperator):
    """M: keeps the acquired points of each frame and sets the others to zero.

    A point that was acquired n times carries the weight sqrt(n), so that M^H M counts acquisitions.
    """

    def __init__(self, weight: Tensor) -> None:
        """Keep the weights.

        Args:
            weight: real, broadcast against k-space, for example (t, z, y) against (x, c, t, z, y).
        """
        self._weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Weight, shape unchanged."""
        return x * self._weight

    def adjoint(self, y: Tensor) -> Tensor:
        """Weight, shape unchanged."""
        return y * self._weight
