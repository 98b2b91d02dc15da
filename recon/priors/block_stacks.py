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
        offsets = list(
            itertools.product(
                *(
                    range(-min(r, s - 1), min(r, s - 1) + 1)
                    for r, s in zip(self.reach, self.grid, strict=True)
                )
            )
        )
        jumps = torch.tensor(
            [(z * self.grid[1] + y) * self.grid[2] + x for z, y, x in offsets], device=volume.device
        )
        # Blocks that reach out of the volume are infinitely different.
        around = functional.pad(
            volume, [r for reach in reversed(self.reach) for r in (reach, reach)], value=torch.inf
        )
        plane = references[1] * references[2]
        planes = max(1, _DISTANCES // (len(offsets) * plane))
        found = []
        for first in range(0, references[0], planes):
            count = min(planes, references[0] - first)
            begin = first * self.stride[0]
            depth = (count - 1) * self.stride[0] + self.block[0]
            distance = volume.new_empty((len(offsets), count * plane))
            here = volume[begin : begin + depth]
            for number, (z, y, x) in enumerate(offsets):
                z, y, x = z + self.reach[0] + begin, y + self.reach[1], x + self.reach[2]
                there = around[z : z + depth, y : y + self.grid[1], x : x + self.grid[2]]
                distance[number] = self._block_sums((there - here).square_()).flatten()
            distance[offsets.index((0, 0, 0))] = -1  # before equals
            nearest = distance.T.contiguous().topk(members, dim=1, largest=False).indices
            part = place[first * plane : (first + count) * plane]
            found.append(part[:, None] + jumps[nearest])
        return torch.cat(found)

    def _block_sums(self, values: Tensor) -> Tensor:
        """Sums over the reference blocks that lie in some planes (z, y, x) of the volume."""
        for axis, (edge, step) in enumerate(zip(self.block, self.stride, strict=True)):
            count = (values.shape[axis] - edge) // step + 1
            parts = [values.narrow(axis, k, (count - 1) * step + 1) for k in range(edge)]
            slices = tuple(slice(None, None, step if a == axis else 1) for a in range(3))
            total = parts[0][slices].clone()
            for part in parts[1:]:
                total += part[slices]
            values = total
        return values


def _flat(indices: list[Tensor], grid: Size) -> Tensor:
    z, y, x = indices
    return ((z[:, None, None] * grid[1] + y[:, None]) * grid[2] + x).flatten()
