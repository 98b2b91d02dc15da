"""BM4D: blocks that look alike are denoised together (Dabov 2007, Maggioni 2013), of our own.

Blocks at the least distance from each other are stacked. A stack is sparse under a transform along the blocks
(cosines) and across them (Haar), noise is not. First, coefficients below a threshold are dropped; the volume
that comes of it serves, second, to match again and as the spectrum of a Wiener filter. Every voxel is the
average of all stacks that it is in, each weighed by how little noise is left in it. Slices (z = 1) have flat
blocks: BM3D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.priors.block_stacks import BlockGrid, Size
from quantitron.recon.priors.denoiser import check_images, intensity

_ENTRIES = 1 << 22
"""Entries of stacks held at once."""

_STRONG_NOISE = 0.15
"""Noise level above which larger blocks are better in slices."""


@dataclass(frozen=True)
class BlockMatchingDenoiser:
    """BM4D as a ``Denoiser``."""

    threshold: float = 2.7
    """Of the first stage, over the noise level."""
    members: tuple[int, int] = (16, 32)
    """Blocks in a stack of the first and of the second stage, powers of two; in slices twice as many."""
    stride: int = 3
    """Voxels from one reference block to the next."""
    reach: int = 5
    """Most voxels, along each axis, from a block to one of its stack; in slices twice as many."""

    def __post_init__(self) -> None:
        """Refuse settings that are none.

        Raises:
            ValueError: in one sentence.
        """
        if self.threshold <= 0 or self.reach < 1 or not 1 <= self.stride <= 4:
            raise ValueError(
                "block matching needs a threshold above zero, a stride of 1 to 4 and a reach of 1 or more, "
                f"not {self}"
            )
        if any(count < 1 or count & (count - 1) for count in self.members):
            raise ValueError(f"stacks hold a power of two of blocks, not {self.members}")

    def __call__(
        self,
        images: Tensor,
        level: float,
        modalities: Sequence[str],  # noqa: ARG002
        generator: torch.Generator,  # noqa: ARG002
    ) -> Tensor:
        """See ``Denoiser``. Takes any modality, and nothing of it is left to chance."""
        check_images(images, level)
        if level == 0:
            return images.clone()
        scale = intensity(images)[:, None, None, None]
        denoised = torch.stack([self._denoise(image, level) for image in (images / scale).float()])
        return denoised.to(images.dtype) * scale

    def _denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        """(z, y, x) -> (z, y, x)."""
        z, y, x = noisy.shape
        flat = z == 1
        more = 2 if flat else 1
        # Flat blocks of 4 x 4 hold too few voxels to tell tissue from noise that is as strong.
        edge = 6 if flat and sigma > _STRONG_NOISE else 4
        block = (min(4, z), min(edge, y), min(edge, x))
        stride = (min(self.stride, block[0]), min(self.stride, block[1]), min(self.stride, block[2]))
        noisy = _extend(noisy, block, stride)
        reach = (0 if flat else self.reach, more * self.reach, more * self.reach)
        grid = BlockGrid((noisy.shape[0], noisy.shape[1], noisy.shape[2]), block, stride, reach)
        first, second = (more * count for count in self.members)
        pilot = _stage(grid, noisy, None, first, lambda stacks, _: self._drop_small(stacks, sigma))
        final = _stage(grid, noisy, pilot, second, lambda stacks, pilots: _wiener(stacks, pilots, sigma))
        return final[:z, :y, :x]

    def _drop_small(self, coefficients: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Coefficients (stack, member, voxel) that are above noise, and the weight (stack,) of the rest."""
        kept = coefficients.abs() > self.threshold * sigma
        return coefficients * kept, 1 / kept.sum((1, 2)).clamp_min(1)


def _wiener(coefficients: Tensor, pilot: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Coefficients (stack, member, voxel) shrunk by the spectrum of the first estimate, and the weights."""
    energy = pilot.square()
    gain = energy / (energy + sigma**2)
    return coefficients * gain, 1 / gain.square().sum((1, 2)).clamp_min(1e-3)


def _stage(
    grid: BlockGrid,
    noisy: Tensor,
    pilot: Tensor | None,
    members: int,
    shrink: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Match, transform, shrink, transform back and average: (z, y, x) -> (z, y, x).

    Args:
        grid: of the blocks.
        noisy: (z, y, x).
        pilot: (z, y, x) to match on, and whose stacks ``shrink`` gets beside; None: ``noisy``.
        members: most blocks in a stack.
        shrink: coefficients (stack, member, voxel) of noisy and pilot to new ones and weights (stack,).
    """
    members = 1 << (min(members, grid.fewest_blocks()).bit_length() - 1)
    guide = noisy if pilot is None else pilot
    firsts = grid.match(guide, members)
    within = grid.voxels(noisy.device)
    along = _cosines(grid.block).to(noisy)
    across = _haar(members).to(noisy)
    window = _window(grid.block).to(noisy)
    total, weights = torch.zeros_like(noisy).flatten(), torch.zeros_like(noisy).flatten()
    portion = max(1, _ENTRIES // (members * len(within)))
    for begin in range(0, len(firsts), portion):
        voxel = firsts[begin : begin + portion, :, None] + within  # (stack, member, voxel)
        coefficients = across @ (noisy.flatten()[voxel] @ along.T)
        expected = coefficients if pilot is None else across @ (pilot.flatten()[voxel] @ along.T)
        coefficients, weight = shrink(coefficients, expected)
        blocks = (across.T @ coefficients) @ along
        weighed = (weight[:, None, None] * window).expand_as(blocks)
        total.index_add_(0, voxel.flatten(), (blocks * weighed).flatten())
        weights.index_add_(0, voxel.flatten(), weighed.flatten())
    return (total / weights).reshape(noisy.shape)


def _extend(volume: Tensor, block: Size, stride: Size) -> Tensor:
    """Mirrored at its ends, so that reference blocks fit without a rest."""
    missing = [-(n - edge) % step for n, edge, step in zip(volume.shape, block, stride, strict=True)]
    for axis, count in enumerate(missing):
        if count:
            last = volume.shape[axis]
            mirrored = volume.narrow(axis, last - count, count).flip(axis)
            volume = torch.cat([volume, mirrored], axis)
    return volume


def _cosines(block: Size) -> Tensor:
    """(voxel, voxel): orthonormal cosine transform of the flat voxels of a block."""
    matrix = torch.ones(1, 1)
    for edge in block:
        k, n = torch.arange(edge)[:, None], torch.arange(edge)
        basis = torch.cos(math.pi * (n + 0.5) * k / edge) * math.sqrt(2 / edge)
        basis[0] /= math.sqrt(2)
        matrix = torch.kron(matrix, basis)
    return matrix


def _haar(count: int) -> Tensor:
    """(count, count): orthonormal Haar transform, count a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < count:
        sums = torch.kron(matrix, torch.tensor([[1.0, 1.0]]))
        differences = torch.kron(torch.eye(len(matrix)), torch.tensor([[1.0, -1.0]]))
        matrix = torch.cat([sums, differences]) / math.sqrt(2)
    return matrix


def _window(block: Size) -> Tensor:
    """(voxel,): voxels in a block's middle count more than those at its faces (Kaiser)."""
    window = torch.ones(1, 1, 1)
    for axis, edge in enumerate(block):
        kaiser = torch.kaiser_window(edge, periodic=False, beta=2.0)
        window = window * kaiser.reshape([-1 if a == axis else 1 for a in range(3)])
    return window.flatten()
