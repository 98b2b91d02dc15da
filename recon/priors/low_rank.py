"""Locally low rank coefficient images: within a block of voxels only few combinations of components occur.

    R(U) = sum_b weight_b ||C_b(U)||_*,    C_b the Casorati matrix (k, voxels) of block b

Blocks tile the grid without overlap, so the proximal operator thresholds the singular values of every block
by itself (Cai 2010; Trzasko and Manduca 2011; Zhang 2015). A shift moves the tiling; blocks that a border of
the image cuts stay cut, as nothing wraps round: the first and the last partition of a slab are no neighbours.
Every shift has its own R, a convex one.

A cut block holds less noise: weight_b is the weight times the largest singular value expected of white noise
in it, sqrt(voxels) + sqrt(k) (Davidson and Szarek 2001), relative to that in a whole block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

_AXES = (0, 2, 3)  # (x, z, y) of (x, k, z, y)


class BlockLowRank:
    """R of one tiling a shift, and its proximal operator."""

    def __init__(self, weight: float, block: tuple[int, int, int]) -> None:
        """Set up R.

        Args:
            weight: threshold of the singular values of a whole block, for a step of 1.
            block: voxels of a block along (x, z, y); one longer than the image's axis spans that axis.

        Raises:
            ValueError: if the weight is negative or a block is empty.
        """
        if weight < 0:
            raise ValueError(f"the weight of low rank must not be negative, not {weight:g}")
        if min(block) < 1:
            raise ValueError(f"a block needs at least one voxel along every axis, not {block}")
        self.weight = weight
        self.block = block

    def random_shift(
        self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator
    ) -> tuple[int, int, int]:
        """A shift for images (x, k, z, y), all equally likely; 0 along axes that a block spans.

        Args:
            shape: of the images.
            generator: the source of chance.

        Returns:
            Voxels (x, z, y).
        """
        x, z, y = (
            int(torch.randint(edge, (), generator=generator, device=generator.device))
            if edge < shape[axis]
            else 0
            for edge, axis in zip(self.block, _AXES, strict=True)
        )
        return x, z, y

    def proximal(self, u: Tensor, step: float, shift: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
        """The minimiser of ||U' - U||^2 / (2 step) + R(U') over U'.

        Args:
            u: U (x, k, z, y) complex.
            step: above zero.
            shift: voxels (x, z, y) by which the first block is cut short, from 0 to its length less 1.

        Raises:
            ValueError: if the shift is none of those.
        """
        result = torch.empty_like(u)
        for region in self._regions(u.shape, shift):
            blocks = region.blocks_of(u)
            values, vectors = _left_singular(blocks)
            kept = (1 - step * self._weight_of(region, u.shape) / values).nan_to_num(nan=0.0).clamp_min(0)
            shrink = (vectors * kept[..., None, :]) @ vectors.mH
            region.write(shrink.to(u.dtype) @ blocks, result)
        return result

    def mean_proximal(self, u: Tensor, step: float, tilings: int, generator: torch.Generator) -> Tensor:
        """The mean of ``proximal`` over tilings that are shifted at random, no two alike.

        Args:
            u: U (x, k, z, y) complex.
            step: above zero.
            tilings: how many, one at least; there are no more than voxels in a block.
            generator: the source of chance.
        """
        shifts = self._different_shifts(u.shape, tilings, generator)
        total = self.proximal(u, step, shifts[0])
        for shift in shifts[1:]:
            total += self.proximal(u, step, shift)
        return total / len(shifts)

    def value(self, u: Tensor, shift: tuple[int, int, int] = (0, 0, 0)) -> float:
        """R(U) for U (x, k, z, y)."""
        return sum(
            self._weight_of(region, u.shape) * float(_left_singular(region.blocks_of(u))[0].sum())
            for region in self._regions(u.shape, shift)
        )

    def reweighting(
        self, u: Tensor, epsilon: float, shift: tuple[int, int, int] = (0, 0, 0)
    ) -> BlockPrecision:
        """W so that 1/2 <V, W V> + const touches R_eps at V = U and lies above it elsewhere.

        R_eps is the sum of weight_b tr (C C^H + epsilon^2 voxels)^(1/2): W = weight_b (C C^H + epsilon^2
        voxels)^(-1/2) in each block (Mohan and Fazel 2012).

        Args:
            u: U (x, k, z, y).
            epsilon: size of coefficients below which they cost their square; above zero.
            shift: of the tiling.
        """
        parts = []
        for region in self._regions(u.shape, shift):
            values, vectors = _left_singular(region.blocks_of(u))
            weights = (
                self._weight_of(region, u.shape) * (values.square() + epsilon**2 * region.voxels).rsqrt()
            )
            matrices = (vectors * weights[..., None, :]) @ vectors.mH  # (blocks, k, k)
            parts.append((region, matrices.to(u.dtype)))
        return BlockPrecision(parts)

    def mean_reweighting(
        self, u: Tensor, epsilon: float, tilings: int, generator: torch.Generator | None
    ) -> BlockPrecision:
        """The mean of ``reweighting`` over tilings that are shifted at random, no two alike.

        Args:
            u: U (x, k, z, y).
            epsilon: as for ``reweighting``.
            tilings: how many, one at least; there are no more than voxels in a block.
            generator: the source of chance; None: one tiling that is not shifted.
        """
        if generator is None:
            return self.reweighting(u, epsilon)
        shifts = self._different_shifts(u.shape, tilings, generator)
        return BlockPrecision.mean([self.reweighting(u, epsilon, shift) for shift in shifts])

    def _different_shifts(
        self, shape: torch.Size, wanted: int, generator: torch.Generator
    ) -> list[tuple[int, int, int]]:
        """Shifts as ``random_shift`` draws them, without one that came before."""
        x, z, y = (edge if edge < shape[axis] else 1 for edge, axis in zip(self.block, _AXES, strict=True))
        drawn = torch.randperm(x * z * y, generator=generator, device=generator.device)[:wanted].tolist()
        return [(number // (z * y), number // y % z, number % y) for number in drawn]

    def _edges(self, shape: torch.Size) -> tuple[int, ...]:
        """Voxels (x, z, y) of a whole block."""
        return tuple(min(edge, shape[axis]) for edge, axis in zip(self.block, _AXES, strict=True))

    def _regions(self, shape: torch.Size, shift: tuple[int, int, int]) -> Iterator[_Region]:
        """Together they tile the image."""
        axes = (
            _runs(shape[axis], edge, offset)
            for axis, edge, offset in zip(_AXES, self._edges(shape), shift, strict=True)
        )
        return (_Region(*runs) for runs in product(*axes))

    def _weight_of(self, region: _Region, shape: torch.Size) -> float:
        voxels, whole, components = (
            math.sqrt(region.voxels),
            math.prod(self._edges(shape)),
            math.sqrt(shape[1]),
        )
        return self.weight * (voxels + components) / (math.sqrt(whole) + components)


class BlockPrecision:
    """A Hermitian matrix (k, k) for the voxels of each block; the mean of those of several tilings."""

    def __init__(self, parts: list[tuple[_Region, Tensor]], tilings: int = 1) -> None:
        self._parts = parts
        self._tilings = tilings

    @staticmethod
    def mean(tilings: list[BlockPrecision]) -> BlockPrecision:
        """The mean of those of several tilings, one at least."""
        return BlockPrecision(
            [part for one in tilings for part in one._parts], sum(one._tilings for one in tilings)
        )

    def __call__(self, u: Tensor) -> Tensor:
        """W U: (x, k, z, y) -> (x, k, z, y)."""
        result = torch.zeros_like(u)
        for region, matrices in self._parts:
            region.add(matrices @ region.blocks_of(u), result)
        return result / self._tilings

    def diagonal(self, u: Tensor) -> Tensor:
        """Diagonal of W: (x, k, z, y) real, for images like ``u``."""
        result = torch.zeros_like(u.real)
        for region, matrices in self._parts:
            values = matrices.diagonal(dim1=1, dim2=2).real[..., None]  # (blocks, k, 1)
            region.add(values.expand(-1, -1, region.voxels), result)
        return result / self._tilings


_Run = tuple[int, int, int]
"""Blocks side by side along an axis: first voxel, number of blocks, voxels of each."""


def _runs(n: int, edge: int, offset: int) -> list[_Run]:
    """An axis of n voxels: the cut block at its start, whole blocks, the cut block at its end."""
    if not 0 <= offset < edge:
        raise ValueError(f"a shift of blocks of {edge} voxels must lie from 0 to {edge - 1}, not at {offset}")
    first = min((edge - offset) % edge, n)
    whole, last = divmod(n - first, edge)
    runs = [(0, 1, first), (first, whole, edge), (n - last, 1, last)]
    return [run for run in runs if run[1] * run[2] > 0]


class _Region:
    """Blocks of one size that fill a cuboid."""

    def __init__(self, x: _Run, z: _Run, y: _Run) -> None:
        self._runs = (x, z, y)
        self.voxels = x[2] * z[2] * y[2]

    def blocks_of(self, u: Tensor) -> Tensor:
        """Casorati matrices (blocks, k, voxels)."""
        (_, cx, ex), (_, cz, ez), (_, cy, ey) = self._runs
        split = self._part(u).reshape(cx, ex, -1, cz, ez, cy, ey)
        return split.permute(0, 3, 5, 2, 1, 4, 6).reshape(cx * cz * cy, -1, self.voxels)

    def write(self, blocks: Tensor, u: Tensor) -> None:
        """Put blocks where `blocks_of` takes them from."""
        part = self._part(u)
        part.copy_(self._joined(blocks, part.shape))

    def add(self, blocks: Tensor, u: Tensor) -> None:
        """Add blocks where `blocks_of` takes them from."""
        part = self._part(u)
        part.add_(self._joined(blocks, part.shape))

    def _joined(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        (_, cx, ex), (_, cz, ez), (_, cy, ey) = self._runs
        split = blocks.reshape(cx, cz, cy, -1, ex, ez, ey).permute(0, 4, 3, 1, 5, 2, 6)
        return split.reshape(shape)

    def _part(self, u: Tensor) -> Tensor:
        for axis, (start, count, edge) in zip(_AXES, self._runs, strict=True):
            u = u.narrow(axis, start, count * edge)
        return u


def _left_singular(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (..., k) and left vectors (..., k, k) of (..., k, voxels), in double.

    From the small Gram matrices, as components are few against voxels. Squaring costs half of the digits, so
    the Gram matrices are formed in double for single data.
    """
    double = blocks.to(torch.complex128)
    energies, vectors = torch.linalg.eigh(double @ double.mH)
    return energies.clamp_min(0).sqrt(), vectors
