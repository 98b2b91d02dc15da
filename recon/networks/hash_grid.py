"""Hash-grid encoding of points that stay where they are, as one sparse matrix (METHODS 1).

Rows and weights are worked out once. A batch of features is then the product of a sparse matrix, 2^d entries
for each point and level, with the table, in which the features of all networks stand side by side; its
gradient is the product with the stored transpose. Nothing is scattered, so that sums run in the same order
with any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quantitron.recon.networks.encoding import GridEncoding, Samples
from quantitron.recon.networks.hash_layout import HashGridLayout, check_coordinates, corner_rows_and_weights
from quantitron.recon.networks.sparse_rows import FilledRows, SparseRows

_START = 1e-4
"""Features start uniform within this range, as in tiny-cuda-nn."""
_BLOCK = 4096
"""Points whose features are worked out together on the CPU: they stay in the cache while being reordered."""
_LARGEST = 2**31 - 1
"""Entries that 32-bit indices can count."""


@dataclass(frozen=True)
class GridSamples(Samples):
    """Points as a sparse matrix over a table's rows; blocks of points, in each of them level by level."""

    matrix: SparseRows
    """(v x levels, table rows)."""
    transpose: tuple[FilledRows, ...]
    """(table rows, v x levels), one part for each level; empty where no gradient is wanted."""
    table_rows: int
    """Rows of the table that they index."""
    block: int
    """Points of a block; the last one may hold fewer."""

    def blocks(self) -> list[tuple[int, int]]:
        """First point and the one after the last, of each block."""
        return [(first, min(first + self.block, self.voxels)) for first in range(0, self.voxels, self.block)]


class HashGrid(GridEncoding):
    """N hash grids of one layout, features side by side in one table."""

    table: nn.Parameter
    """(rows, networks x features)."""
    row_of: Tensor
    """Where a row of the full tables is stored, (total rows,) int64, -1 where it is not; empty: all are."""

    def __init__(
        self,
        layout: HashGridLayout,
        networks: int,
        generator: torch.Generator,
        coordinates: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Draw the features.

        Args:
            layout: shape of the grid.
            networks: encodings that share it.
            generator: the source of chance, on the CPU: every device starts from the same features.
            coordinates: (v, d). Where given, only rows that these points touch are stored, which is what
                training at fixed points can change. The others count as 0 at any point, as good as their
                start value.
            device: where the features live.
            dtype: of the features.

        Raises:
            ValueError: if there is no network, or the coordinates are not (v, d) in [0, 1].
        """
        super().__init__(layout, networks)
        kept, tables = [], []
        for level in range(layout.levels):
            table = torch.rand(
                layout.rows(level), networks * layout.features, generator=generator, dtype=dtype
            )
            rows = torch.arange(len(table))
            if coordinates is not None:
                rows = torch.unique(corner_rows_and_weights(layout, coordinates.cpu(), level)[0])
            tables.append((2 * table[rows] - 1) * _START)
            kept.append(rows + layout.first_row(level))
        self.table = nn.Parameter(torch.cat(tables).to(device))
        row_of = torch.empty(0, dtype=torch.int64)
        if coordinates is not None:
            row_of = torch.full((layout.total_rows,), -1)
            row_of[torch.cat(kept)] = torch.arange(len(self.table))
        self.register_buffer("row_of", row_of.to(device))

    def samples(self, coordinates: Tensor, gradient: bool = True) -> GridSamples:
        """Work out the sparse matrix of some points, and its transpose.

        Args:
            coordinates: (v, d) in [0, 1].
            gradient: whether the features will be differentiated.

        Raises:
            ValueError: if the coordinates are not (v, d) in [0, 1], or too many for 32-bit indices.
        """
        layout, voxels = self.layout, len(coordinates)
        check_coordinates(layout, coordinates)
        entries = voxels * layout.levels * layout.corners
        if entries > _LARGEST:
            raise ValueError(f"{voxels} points are too many for one matrix of a hash grid: prepare batches")
        device = self.table.device
        coordinates = coordinates.to(device)
        block = max(_BLOCK if device.type == "cpu" else voxels, 1)
        shape = voxels * layout.levels, layout.corners
        columns = torch.empty(shape, dtype=torch.int32, device=device)
        values = torch.empty(shape, dtype=self.table.dtype, device=device)
        transpose = []
        first = torch.arange(voxels, device=device) // block * block
        size = (voxels - first).clamp(max=block)
        for level in range(layout.levels):
            row, value = corner_rows_and_weights(layout, coordinates, level)
            row += layout.first_row(level)
            value = value.to(self.table.dtype)
            if len(self.row_of):
                row = self.row_of[row]
                value = value * (row >= 0)
            # Row of the matrix that holds each point's features of this level.
            place = first * layout.levels + level * size + torch.arange(voxels, device=device) - first
            columns[place] = row.clamp(min=0).int()
            values[place] = value
            if gradient:
                row, order = row.flatten().int().sort(stable=True)
                absent = int((row < 0).sum())
                order = order[absent:]
                transpose.append(
                    FilledRows.of_entries(
                        row[absent:],
                        place.int()[order >> layout.dimensions],
                        value.flatten()[order],
                    )
                )
        starts = torch.arange(0, entries + 1, layout.corners, dtype=torch.int32, device=device)
        matrix = SparseRows(starts, columns.flatten(), values.flatten())
        return GridSamples(layout, voxels, matrix, tuple(transpose), len(self.table), block)

    def forward(self, samples: Samples) -> Tensor:
        """Features of the points.

        Args:
            samples: from this grid, or from another one of the same layout and rows.

        Returns:
            (networks, v, levels x features).

        Raises:
            ValueError: if the samples were prepared for another grid.
        """
        if (
            not isinstance(samples, GridSamples)
            or samples.layout != self.layout
            or samples.table_rows != len(self.table)
        ):
            raise ValueError("the samples were prepared for another hash grid")
        features: Tensor = _Interpolate.apply(self.table, samples, self.networks)  # type: ignore[no-untyped-call]
        return features


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy (..., features); the usual pairs travel as one number, which takes two thirds of the time."""
    if source.shape[-1] == 2:
        source, target = torch.view_as_complex(source), torch.view_as_complex(target)
    target.copy_(source)


class _Interpolate(torch.autograd.Function):
    """The sparse product, its result and gradient in the order that the networks want."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, samples: GridSamples, networks: int) -> Tensor:
        ctx.samples = samples
        ctx.shape = table.shape
        levels, features = samples.layout.levels, samples.layout.features
        result = table.new_empty(networks, samples.voxels, levels, features)
        for first, last in samples.blocks():
            product = samples.matrix.part(first * levels, last * levels) @ table
            product = product.view(levels, last - first, networks, features)
            _copy(product.permute(2, 1, 0, 3), result[:, first:last])
        return result.view(networks, samples.voxels, levels * features)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        samples: GridSamples = ctx.samples
        if not samples.transpose:
            raise RuntimeError("these samples were prepared without a gradient")
        levels, features = samples.layout.levels, samples.layout.features
        networks = len(gradient)
        gradient = gradient.contiguous().view(networks, samples.voxels, levels, features)
        source = gradient.new_empty(samples.voxels * levels, networks * features)
        for first, last in samples.blocks():
            target = source[first * levels : last * levels].view(levels, last - first, networks, features)
            _copy(gradient[:, first:last].permute(2, 1, 0, 3), target)
        result = gradient.new_zeros(ctx.shape)
        for part in samples.transpose:
            part.product_into(result, source)
        return result, None, None
