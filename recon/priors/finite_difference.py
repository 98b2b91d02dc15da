"""Forward differences of coefficient images along the spatial axes.

    (D U)_a(r) = (U(r + e_a) - U(r)) / h_a,    0 where r + e_a is outside,    h_a = edge_a / smallest edge

Edges end with a zero difference (Neumann), so D^H D is the graph Laplacian of the voxel grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

AXES = (0, 2, 3)
"""(x, z, y) of (x, k, z, y)."""


class FiniteDifference:
    """D: (x, k, z, y) -> (3, x, k, z, y); the leading axis counts the directions x, z, y."""

    def __init__(self, voxel_size: tuple[float, float, float]) -> None:
        """Set up D.

        Args:
            voxel_size: edges [m] along (x, z, y). Only their ratios count.

        Raises:
            ValueError: if an edge is not above zero.
        """
        if not all(edge > 0 for edge in voxel_size):
            raise ValueError(f"voxel edges must be above zero, not {voxel_size}")
        smallest = min(voxel_size)
        self.spacing = tuple(edge / smallest for edge in voxel_size)
        """h along (x, z, y), 1 for the smallest edge."""

    def __call__(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        """D U: (x, k, z, y) -> (3, x, k, z, y), contiguous; into ``out`` where given."""
        differences = u.new_empty((len(AXES), *u.shape)) if out is None else out
        for d, axis, spacing in zip(differences, AXES, self.spacing, strict=True):
            n = u.shape[axis]
            inner = d.narrow(axis, 0, n - 1)
            torch.sub(u.narrow(axis, 1, n - 1), u.narrow(axis, 0, n - 1), out=inner)
            if spacing != 1:
                inner /= spacing
            d.narrow(axis, n - 1, 1).zero_()
        return differences

    def adjoint(self, differences: Tensor) -> Tensor:
        """D^H d: (3, x, k, z, y) -> (x, k, z, y). The last entries along each d's own axis do not count."""
        u = torch.zeros_like(differences[0])
        for d, axis, spacing in zip(differences, AXES, self.spacing, strict=True):
            n = u.shape[axis]
            inner = d.narrow(axis, 0, n - 1)
            u.narrow(axis, 1, n - 1).add_(inner, alpha=1 / spacing)
            u.narrow(axis, 0, n - 1).sub_(inner, alpha=1 / spacing)
        return u

    def norm(self, shape: tuple[int, ...] | torch.Size) -> float:
        """||D|| for images (x, k, z, y), exactly: the Laplacian's eigenvectors are cosines (Strang 1999)."""
        return math.sqrt(
            sum(
                (2 * math.cos(math.pi / (2 * shape[axis])) / spacing) ** 2
                for axis, spacing in zip(AXES, self.spacing, strict=True)
            )
        )

    def weighted_diagonal(self, weights: Tensor) -> Tensor:
        """Diagonal of D^H w D for real w.

        Args:
            weights: (x, *, z, y), shared by the directions, or (3, x, *, z, y).

        Returns:
            (x, *, z, y).
        """
        shared = weights.ndim == len(AXES) + 1
        diagonal = torch.zeros_like(weights if shared else weights[0])
        for number, (axis, spacing) in enumerate(zip(AXES, self.spacing, strict=True)):
            weight = weights if shared else weights[number]
            n = weight.shape[axis]
            inner = weight.narrow(axis, 0, n - 1)
            diagonal.narrow(axis, 1, n - 1).add_(inner, alpha=spacing**-2)
            diagonal.narrow(axis, 0, n - 1).add_(inner, alpha=spacing**-2)
        return diagonal
