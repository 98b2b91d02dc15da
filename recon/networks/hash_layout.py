"""Which rows of its tables a multiresolution hash grid reads at a point, and with which weights.

The rules are those of tiny-cuda-nn's ``HashGrid`` with linear interpolation (Mueller 2022): level l has

    scale = base growth^l - 1,    resolution = ceil(scale) + 1 vertices an axis,    position = x scale + 1/2

and a table of resolution^d rows, rounded up to a multiple of 8, at most 2^log2_rows. Where all vertices fit,
the row is the vertex's number, first axis fastest; else the exclusive or of its indices times large primes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

_PRIMES = (1, 2654435761, 805459861)
_UINT32 = 0xFFFFFFFF
_ROW_MULTIPLE = 8
_CELLS_PER_VOXEL = 2
"""Cells of the finest level an axis, relative to the voxels of the longest axis."""
_COIL_CELLS = 16
"""Vertices an axis of the finest level for coil maps; 16^3 is all that 2^12 rows hold."""


@dataclass(frozen=True)
class HashGridLayout:
    """Shape of a multiresolution hash grid."""

    levels: int
    """Number of resolutions."""
    base_resolution: int
    """Vertices an axis of the coarsest level."""
    growth: float
    """Ratio of successive resolutions."""
    log2_rows: int
    """A level's table has at most 2^log2_rows rows."""
    features: int = 2
    """Numbers in a row."""
    dimensions: int = 3
    """Coordinates of a point: 1, 2 or 3."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: if a value is out of range.
        """
        for name, low, high in (
            ("levels", 1, 32),
            ("base_resolution", 1, 2**15),
            ("growth", 1.0, 4.0),
            ("log2_rows", 3, 24),
            ("features", 1, 8),
            ("dimensions", 1, len(_PRIMES)),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} of a hash grid lies between {low} and {high}, not at {value}")

    @classmethod
    def for_matrix(
        cls,
        matrix: tuple[int, ...],
        levels: int = 16,
        base_resolution: int = 16,
        log2_rows: int = 19,
        features: int = 2,
    ) -> HashGridLayout:
        """The layout whose finest level has about two cells a voxel along the longest axis.

        tiny-cuda-nn's own growth of 2 ends at 524 288 cells an axis: nearly every voxel would have rows of
        its own in the upper levels, which then learn nothing from one another.

        Args:
            matrix: voxels along each axis.
            levels: number of resolutions.
            base_resolution: vertices an axis of the coarsest level.
            log2_rows: a level's table has at most 2^log2_rows rows.
            features: numbers in a row.

        Raises:
            ValueError: if the matrix has no voxels, or a value is out of range.
        """
        if not matrix or min(matrix) < 1:
            raise ValueError(f"a hash grid needs a matrix of at least one voxel, not {matrix}")
        finest = max(_CELLS_PER_VOXEL * max(matrix), base_resolution)
        return cls._ending_at(finest, levels, base_resolution, log2_rows, features, len(matrix))

    @classmethod
    def for_coils(cls, dimensions: int = 3) -> HashGridLayout:
        """A coarse grid for coil maps: 8 levels from 1 to 16 vertices an axis, none of them hashed in 3D."""
        return cls._ending_at(_COIL_CELLS, 8, 1, 12, 2, dimensions)

    @classmethod
    def for_phase(cls, matrix: tuple[int, ...]) -> HashGridLayout:
        """The grid for phase maps: from one vertex up, few rows."""
        return cls.for_matrix(matrix, base_resolution=1, log2_rows=12)

    @classmethod
    def _ending_at(
        cls, finest: int, levels: int, base: int, log2_rows: int, features: int, dimensions: int
    ) -> HashGridLayout:
        # Half a cell less, so that rounding in single precision never changes the finest resolution.
        growth = max((finest - 0.5) / base, 1.0) ** (1 / (levels - 1)) if levels > 1 else 1.0
        return cls(levels, base, growth, log2_rows, features, dimensions)

    @property
    def width(self) -> int:
        """Features of a point, over all levels."""
        return self.levels * self.features

    @property
    def corners(self) -> int:
        """Rows that a point reads in each level."""
        return int(2**self.dimensions)

    @property
    def total_rows(self) -> int:
        """Rows of the tables of all levels."""
        return sum(self.rows(level) for level in range(self.levels))

    def scale(self, level: int) -> float:
        """Cells of a level an axis, less one: in single precision, as on the GPU."""
        log2_growth = torch.log2(torch.tensor(self.growth, dtype=torch.float32))
        return float(torch.exp2(level * log2_growth) * self.base_resolution - 1)

    def resolution(self, level: int) -> int:
        """Vertices of a level an axis."""
        return math.ceil(self.scale(level)) + 1

    def rows(self, level: int) -> int:
        """Rows of a level's table."""
        vertices = int(self.resolution(level) ** self.dimensions)
        return min(-(-vertices // _ROW_MULTIPLE) * _ROW_MULTIPLE, int(2**self.log2_rows))

    def first_row(self, level: int) -> int:
        """Where a level's table begins when all are joined."""
        return sum(self.rows(lower) for lower in range(level))

    def strides(self, level: int) -> tuple[int, ...] | None:
        """Row distance of neighbours along each axis; None where the level is hashed."""
        stride, strides = 1, []
        for _ in range(self.dimensions):
            # An axis beyond the table's end is left out. So are the 32 bits of the counter.
            reached = stride <= self.rows(level)
            strides.append(stride if reached else 0)
            stride = stride * self.resolution(level) & _UINT32 if reached else stride
        return None if self.rows(level) < stride else tuple(strides)


def corner_rows_and_weights(layout: HashGridLayout, coordinates: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """Rows that each point reads in one level's table, and their weights of linear interpolation.

    Args:
        layout: of the grid.
        coordinates: (v, d) in [0, 1].
        level: 0 the coarsest.

    Returns:
        Rows within the level (v, 2^d) int64 and weights (v, 2^d) float64. Corner i lies on the far side along
        axis j where bit j of i is set.

    Raises:
        ValueError: if the coordinates are not (v, d), or lie outside [0, 1].
    """
    check_coordinates(layout, coordinates)
    position = coordinates.double() * layout.scale(level) + 0.5
    cell = position.floor()
    fraction = position - cell
    near = cell.long()
    strides = layout.strides(level)
    terms, shares = [], []
    for axis in range(layout.dimensions):
        pair = torch.stack((near[:, axis], near[:, axis] + 1), dim=1)
        terms.append(pair * strides[axis] if strides else pair * _PRIMES[axis] & _UINT32)
        shares.append(torch.stack((1 - fraction[:, axis], fraction[:, axis]), dim=1))
    rows, weights = [], []
    for backwards in product((0, 1), repeat=layout.dimensions):
        sides = backwards[::-1]  # the first axis changes fastest
        row, weight = terms[0][:, sides[0]], shares[0][:, sides[0]]
        for axis in range(1, layout.dimensions):
            term = terms[axis][:, sides[axis]]
            row = row + term if strides else row ^ term
            weight = weight * shares[axis][:, sides[axis]]
        rows.append(row % layout.rows(level))
        weights.append(weight)
    return torch.stack(rows, dim=1), torch.stack(weights, dim=1)


def check_coordinates(layout: HashGridLayout, coordinates: Tensor) -> None:
    """Refuse what is no list of points inside the unit cube.

    Raises:
        ValueError: if the coordinates are not (v, d), or lie outside [0, 1].
    """
    if coordinates.ndim != 2 or coordinates.shape[1] != layout.dimensions:
        raise ValueError(
            f"coordinates of this hash grid have the shape (v, {layout.dimensions}), not"
            f" {tuple(coordinates.shape)}"
        )
    if len(coordinates) and not bool(((coordinates >= 0) & (coordinates <= 1)).all()):
        raise ValueError("coordinates of a hash grid lie between 0 and 1")


def grid_coordinates(
    matrix: tuple[int, ...], voxel_size: tuple[float, ...] | None = None, device: torch.device | None = None
) -> Tensor:
    """Voxel centres in [0, 1], cells of the hash grid being cubes.

    All axes are divided by the longest field of view: with [0, 1] along every axis, the cells of a thin slab
    would be far flatter than its voxels.

    Args:
        matrix: voxels along each axis, the first one slowest: a run of its positions is a run of voxels.
        voxel_size: edge lengths along the same axes, in any unit; None for cubes.
        device: where the result is made.

    Returns:
        (v, d) float64.

    Raises:
        ValueError: if there are no voxels, or edge lengths that are not positive or not as many as axes.
    """
    edges = voxel_size or (1.0,) * len(matrix)
    if not matrix or min(matrix) < 1 or len(edges) != len(matrix) or min(edges) <= 0:
        raise ValueError(f"no grid of voxels: matrix {matrix}, voxel size {edges}")
    extent = max(count * edge for count, edge in zip(matrix, edges, strict=True))
    axes = [
        (torch.arange(count, dtype=torch.float64, device=device) + 0.5) * (edge / extent)
        for count, edge in zip(matrix, edges, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(matrix))
