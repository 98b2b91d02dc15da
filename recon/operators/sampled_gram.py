"""The matrices G(k) of the reduced data term at the k-space points that were sampled (METHODS 1).

Reading and writing arrays takes longer than the products do: points that no line passed through are left out,
and the matrices are kept in the order in which they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOSTLY = 0.8
"""Share of sampled points above which picking them out costs more than it saves."""


class SampledGram:
    """G at every sampled point: spectra (..., r, e, z, y) -> the same."""

    def __init__(self, gram: Tensor) -> None:
        """Find the sampled points.

        Args:
            gram: (e, r, r, z, y), Hermitian and positive semidefinite at each point, zero where nothing was
                sampled.
        """
        flat = gram.permute(1, 2, 0, 3, 4).flatten(2)  # (r, r, e*z*y)
        sampled = flat.diagonal().sum(-1).real > 0  # (e*z*y,): its trace
        self.points: Tensor | None = None
        """(p,) int64, the sampled points in flat (e, z, y); None: all are worked on."""
        if float(sampled.float().mean()) < _MOSTLY:
            self.points = sampled.nonzero()[:, 0]
            # Picking from one row of all components takes a third of the time that picking from each takes.
            rows = torch.arange(len(flat), device=flat.device)[:, None] * len(sampled)
            self._places = (rows + self.points).flatten()  # (r*p,) in flat (r, e, z, y)
            flat = flat[:, :, self.points]
        # A real G multiplies real and imaginary parts alike: each of its entries twice, side by side.
        self._matrices = flat.contiguous() if flat.is_complex() else flat.repeat_interleave(2, dim=-1)

    def sampled(self, spectrum: Tensor) -> Tensor:
        """Values at the sampled points: (..., r, e, z, y) -> (..., r, p)."""
        if self.points is None:
            return spectrum.flatten(-3)
        rows = spectrum.reshape(-1, spectrum[(0,) * (spectrum.ndim - 4)].numel())  # (n, r*e*z*y)
        picked = torch.stack([row.index_select(0, self._places) for row in rows])
        return picked.reshape(*spectrum.shape[:-3], -1)

    def spread(self, values: Tensor, spectrum: Tensor) -> Tensor:
        """Adjoint of ``sampled``, written into ``spectrum``, whose values are lost."""
        flat = spectrum.flatten(-3)
        if self.points is None:
            flat.copy_(values)
        else:
            flat.zero_().index_copy_(-1, self.points, values)
        return spectrum

    def __call__(self, values: Tensor) -> Tensor:
        """G u at the sampled points: (n, r, p) -> (n, r, p)."""
        result = torch.empty_like(values)
        out = result
        if not self._matrices.is_complex():
            values, out = (torch.view_as_real(part).flatten(-2) for part in (values, result))
        for row in range(len(self._matrices)):
            total = torch.mul(values[:, 0], self._matrices[row, 0], out=out[:, row])
            for column in range(1, len(self._matrices)):
                total.addcmul_(values[:, column], self._matrices[row, column])
        return result
