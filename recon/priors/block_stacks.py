"""Stacks of blocks of a volume that look alike (Dabov 2007; Maggioni 2013).

Around each reference block the blocks at the least Euclidean distance are searched for, in three dimensions.
Stacks are gathered and given back in portions, since together they are many times as large as the volume.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Size = tuple[int, int, int]
"""Voxels along (z, y, x)."""

_DISTANCES = 1 << 25
"""Distances held at once."""


@dataclass(frozen=True)
class BlockGrid:
    """Which blocks of a volume there are, and which of them are references."""

    grid: Size
    """Of the volume."""
    block: Size
    """Of a block."""
    stride: Size
    """From one reference to the next. It divides ``grid - block``."""
    reach: Size
    """Most voxels from a reference to a block of its stack, along each axis."""

    @property
    def references(self) -> Size:
        """Reference blocks along (z, y, x)."""
        z, y, x = (
            (size - edge) // step + 1
            for size, edge, step in zip(self.grid, self.block, self.stride, strict=True)
        )
        return z, y, x

    def voxels(self, device: torch.device) -> Tensor:
        """(voxel of a block,) int64: flat index of each voxel of a block, counted from the block's first."""
        return _flat([torch.arange(edge, device=device) for edge in self.block], self.grid)

    def fewest_blocks(self) -> int:
        """Blocks within reach of the reference that has the fewest: that in a corner."""
        count = 1
        for size, edge, reach in zip(self.grid, self.block, self.reach, strict=True):
            count *= min(size - edge, reach) + 1
        return count

    def match(self, volume: Tensor, members: int) -> Tensor:
        """Find the blocks that look most like each reference.

        Args:
            volume: (z, y, x) real.
            members: blocks in a stack, the reference included and first; at most ``fewest_blocks``.

        Returns:
            (reference, member) int64: flat index of the first voxel of each block, the most alike first.
        """
        references = self.references
        firsts = [
            torch.arange(count, device=volume.device) * step
            for count, step in zip(references, self.stride, strict=True)
        ]
        place = _flat(firsts, self.grid)
        reach = tuple(min(r, size - 1) for r, size in zip(self.reach, self.grid, strict=True))
        jumps = _flat([torch.arange(-r, r + 1, device=volume.device) for r in reach], self.grid)
        # Blocks that reach out of the volume are infinitely different.
        around = functional.pad(
            volume, [r for each in reversed(reach) for r in (each, each)], value=torch.inf
        )
        around = around.unfold(2, self.grid[2], 1).movedim(2, 0)  # (shift along x, z, y, x), a view
        plane = references[1] * references[2]
        planes = max(1, _DISTANCES // (len(jumps) * plane))
        found = []
        for first in range(0, references[0], planes):
            count = min(planes, references[0] - first)
            begin = first * self.stride[0]
            depth = (count - 1) * self.stride[0] + self.block[0]
            here = volume[begin : begin + depth]
            distances = []
            for z, y in itertools.product(range(begin, begin + 2 * reach[0] + 1), range(2 * reach[1] + 1)):
                there = around[:, z : z + depth, y : y + self.grid[1]]
                distances.append(self._block_sums((there - here).square_()).flatten(1))
            distance = torch.cat(distances)
            distance[len(jumps) // 2] = -1  # the reference itself comes before its equals
            nearest = distance.T.contiguous().topk(members, dim=1, largest=False).indices
            part = place[first * plane : (first + count) * plane]
            found.append(part[:, None] + jumps[nearest])
        return torch.cat(found)

    def _block_sums(self, values: Tensor) -> Tensor:
        """Sums over the reference blocks that lie in some planes (..., z, y, x) of the volume."""
        for axis, edge, step in zip((-3, -2, -1), self.block, self.stride, strict=True):
            count = (values.shape[axis] - edge) // step + 1
            parts = [_every(values.narrow(axis, k, (count - 1) * step + 1), axis, step) for k in range(edge)]
            total = parts[0].clone()
            for part in parts[1:]:
                total += part
            values = total
        return values


def _flat(indices: list[Tensor], grid: Size) -> Tensor:
    z, y, x = indices
    return ((z[:, None, None] * grid[1] + y[:, None]) * grid[2] + x).flatten()


def _every(values: Tensor, axis: int, step: int) -> Tensor:
    """Every ``step``-th entry along one of the axes (z, y, x), the last three."""
    return values.transpose(axis, -1)[..., ::step].transpose(axis, -1)
