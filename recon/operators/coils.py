"""Multiplication with coil sensitivity maps."""

from __future__ import annotations

from torch import Tensor

from quantitron.recon.operators.linear_operator import LinearOperator


class CoilOperator(LinearOperator):
    """C: image (x, ..., z, y) -> coil images (x, c, ..., z, y), for any number of axes in between."""

    def __init__(self, csm: Tensor) -> None:
        """Keep the maps.

        Args:
            csm: coil sensitivity maps (x, c, z, y).
        """
        self._csm = csm

    def _broadcast(self, extra: int) -> Tensor:
        nx, coils, nz, ny = self._csm.shape
        return self._csm.reshape(nx, coils, *(1,) * extra, nz, ny)  # (x, c, 1.., z, y)

    def forward(self, x: Tensor) -> Tensor:
        """(x, ..., z, y) -> (x, c, ..., z, y)."""
        return x[:, None] * self._broadcast(x.ndim - 3)

    def adjoint(self, y: Tensor) -> Tensor:
        """(x, c, ..., z, y) -> (x, ..., z, y)."""
        return (y * self._broadcast(y.ndim - 4).conj()).sum(1)
