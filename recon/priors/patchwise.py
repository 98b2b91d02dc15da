"""Volumes of any size through a network, patch by patch.

Patches lie side by side, beginning anywhere (shifted at random from one iteration to the next, no seam stays
where it was), or they overlap by half and are averaged, each counting most in its middle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Size = tuple[int, int, int]
"""Voxels along (z, y, x)."""


@dataclass(frozen=True)
class Tiling:
    """Patches of one size that cover a volume."""

    grid: Size
    """Of the volume."""
    padded: Size
    """Of the volume with its last planes repeated, so that whole patches fit."""
    length: Size
    """Of each patch."""
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    """First voxels of the patches along z, y and x."""

    @classmethod
    def of(cls, grid: Size, patch: Size, multiple: int, overlap: bool = False) -> Tiling:
        """Cut a volume up.

        Args:
            grid: of the volume.
            patch: most voxels of a patch along each axis, but for rounding up to the multiple.
            multiple: that the voxels of a patch come in, along each axis. A single slice stays one.
            overlap: whether patches overlap by half, rather than lie side by side.
        """
        if min(*grid, *patch, multiple) < 1:
            raise ValueError(f"patches of {patch} voxels cannot cover a volume of {grid}")
        z, y, x = (_cut(size, most, multiple, overlap) for size, most in zip(grid, patch, strict=True))
        return cls(grid, (z[0], y[0], x[0]), (z[1], y[1], x[1]), (z[2], y[2], x[2]))

    @property
    def shiftable(self) -> tuple[bool, bool, bool]:
        """Along which of (z, y, x) there are seams that a shift would move."""
        z, y, x = (len(starts) > 1 for starts in self.starts)
        return z, y, x


def patchwise(
    apply: Callable[[Tensor, Tensor], Tensor],
    volumes: Tensor,
    tiling: Tiling,
    shift: Size = (0, 0, 0),
    batch_voxels: int = 1 << 19,
) -> Tensor:
    """Push every patch of every volume through.

    Args:
        apply: patches (n, c, z, y, x) and the number (n,) int64 of the volume of each to (n, c', z, y, x).
        volumes: (m, c, z, y, x), of the tiling's grid.
        tiling: where patches lie.
        shift: voxels that the volume is moved by, round and round, before it is cut up, and back after.
        batch_voxels: most voxels of patches that are pushed through at once (but at least one patch).

    Returns:
        (m, c', z, y, x).
    """
    front = functional.pad(
        volumes,
        [side for axis in (2, 1, 0) for side in (0, tiling.padded[axis] - tiling.grid[axis])],
        mode="replicate",
    )
    front = front.roll(shift, (2, 3, 4))
    places = [
        (number, z, y, x)
        for number in range(len(volumes))
        for z in tiling.starts[0]
        for y in tiling.starts[1]
        for x in tiling.starts[2]
    ]
    window = _window(tiling).to(volumes.device)
    batch = max(1, batch_voxels // math.prod(tiling.length))
    total: Tensor | None = None
    weight = volumes.new_zeros(tiling.padded)
    for first in range(0, len(places), batch):
        part = places[first : first + batch]
        patches = torch.stack([_patch(front[n], at, tiling.length) for n, *at in part])
        out = apply(patches, torch.tensor([place[0] for place in part], device=volumes.device))
        if total is None:
            total = out.new_zeros((len(volumes), out.shape[1], *tiling.padded))
        for (number, *at), patch in zip(part, out, strict=True):
            _patch(total[number], at, tiling.length).add_(patch * window)
            if number == 0:
                _patch(weight, at, tiling.length).add_(window)
    if total is None:
        raise ValueError("there are no volumes to push through the network")
    total = (total / weight).roll([-step for step in shift], (2, 3, 4))
    return total[..., : tiling.grid[0], : tiling.grid[1], : tiling.grid[2]].contiguous()


def _patch(volume: Tensor, start: list[int], length: Size) -> Tensor:
    """A view (..., z, y, x) of a volume (..., z, y, x)."""
    for axis, (first, voxels) in enumerate(zip(start, length, strict=True)):
        volume = volume.narrow(axis - 3, first, voxels)
    return volume


def _cut(size: int, most: int, multiple: int, overlap: bool) -> tuple[int, int, tuple[int, ...]]:
    """Padded size, length of a patch and first voxels along one axis."""
    if size == 1:
        return 1, 1, (0,)
    most = _up(most, multiple)
    if size <= most:
        padded = _up(size, multiple)
        return padded, padded, (0,)
    if overlap:
        count = 1 + math.ceil((size - most) / (most // 2 or 1))
        return size, most, tuple(round(i * (size - most) / (count - 1)) for i in range(count))
    count = math.ceil(size / most)
    length = _up(math.ceil(size / count), multiple)  # as equal as can be: little is padded
    return count * length, length, tuple(range(0, count * length, length))


def _up(size: int, multiple: int) -> int:
    return multiple * math.ceil(size / multiple)


def _window(tiling: Tiling) -> Tensor:
    """(z, y, x) weight of a patch's voxels; 1 along axes whose patches lie side by side."""
    window = torch.ones(tiling.length)
    for axis, (starts, length) in enumerate(zip(tiling.starts, tiling.length, strict=True)):
        if len(starts) > 1 and starts[1] < length:
            middle = torch.arange(length) + 0.5
            ramp = torch.minimum(middle, length - middle) / length
            window = window * ramp.reshape([-1 if a == axis else 1 for a in range(3)])
    return window
