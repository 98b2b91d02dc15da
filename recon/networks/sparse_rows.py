"""Products of sparse matrices with narrow dense ones, in an order of summation that nothing changes.

``torch.embedding_bag`` is such a product: on every device, as fast as the sparse product of the maths
library, and every row is summed from first to last by one thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LONGEST = 64
"""Entries that one thread sums. Longer rows come in pieces, lest one thread work and the others wait."""


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix in compressed rows."""

    starts: Tensor
    """(rows + 1,) int32: where each row's entries begin."""
    columns: Tensor
    """(entries,) int32."""
    values: Tensor | None
    """(entries,) float; None where all are 1."""

    def part(self, first: int, last: int) -> SparseRows:
        """Some consecutive rows of a matrix that has as many entries in every row."""
        width = len(self.columns) // max(len(self.starts) - 1, 1)
        chosen = slice(first * width, last * width)
        values = None if self.values is None else self.values[chosen]
        return SparseRows(self.starts[: last - first + 1], self.columns[chosen], values)

    def __matmul__(self, dense: Tensor) -> Tensor:
        """Product with a dense matrix (columns, n), without gradient.

        Returns:
            (rows, n).
        """
        # (weight, indices, offsets, scale_grad_by_freq, mode 0 = sum, sparse, weights, include_last_offset)
        # Detached: the library takes a slower way for what needs a gradient, even where none is recorded.
        result: Tensor = torch.embedding_bag(
            dense.detach(), self.columns, self.starts, False, 0, False, self.values, True
        )[0]
        return result


@dataclass(frozen=True)
class FilledRows:
    """A sparse matrix of which only the rows that hold anything are kept."""

    rows: Tensor
    """(filled,) int64, ascending."""
    pieces: SparseRows
    """Each filled row in one piece or several."""
    join: SparseRows | None
    """(filled, pieces), the sum of each row's pieces; None where every row is one piece."""

    @classmethod
    def of_entries(cls, row: Tensor, column: Tensor, value: Tensor) -> FilledRows:
        """Collect entries.

        Args:
            row: (entries,) integers, ascending.
            column: (entries,) int32.
            value: (entries,) float.
        """
        rows, counts = torch.unique_consecutive(row, return_counts=True)
        cuts = (counts + _LONGEST - 1) // _LONGEST
        owner = torch.repeat_interleave(torch.arange(len(rows), device=row.device), cuts)
        begin = counts.cumsum(0) - counts
        first_piece = cuts.cumsum(0) - cuts
        number = torch.arange(len(owner), device=row.device) - first_piece[owner]
        starts = begin[owner] + number * _LONGEST
        pieces = SparseRows(_closed(starts, len(row)), column, value)
        join = None
        if len(owner) > len(rows):
            everything = torch.arange(len(owner), dtype=torch.int32, device=row.device)
            join = SparseRows(_closed(first_piece, len(owner)), everything, None)
        return cls(rows.long(), pieces, join)

    def product_into(self, result: Tensor, dense: Tensor) -> None:
        """Set the filled rows of ``result`` to the product with a dense matrix."""
        product = self.pieces @ dense
        result[self.rows] = product if self.join is None else self.join @ product


def _closed(starts: Tensor, end: int) -> Tensor:
    """Starts with the end behind them, int32."""
    return torch.cat((starts, starts.new_tensor([end]))).int()
