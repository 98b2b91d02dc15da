"""Tensors over (contrast, echo, voxel): Tucker form along the contrast axes, low rank of local unfoldings.

    R(T) = weight sum_b ||T_b unfolded along one contrast axis||_*

The unfolding of a block is a matrix whose rows run along that axis and whose columns run over all else: the
block's voxels and the other axis (Tucker 1966; sum of nuclear norms as a convex measure: Liu 2013).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantitron.recon.priors.low_rank import BlockLowRank
from quantitron.recon.priors.tucker import hosvd


class TuckerBasis:
    """Coefficient images (x, k, z, y) as a core (x, m, n, z, y): m along contrasts, n along echoes."""

    def __init__(self, mixing: Tensor, coefficients: Tensor, rank: int | float) -> None:
        """Factors from a higher-order SVD of images that are there.

        Args:
            mixing: (e, l, k): the image of contrast component l at echo e is ``mixing[e, l] @ U``.
            coefficients: (v, k) U of the voxels to learn from.
            rank: of both axes, or the share of the energy to keep along each.
        """
        # The factors depend on second moments over the voxels alone: k combinations stand for all voxels.
        root = torch.linalg.qr(coefficients, mode="r").R  # (k or fewer, k)
        images = torch.einsum("elk,vk->vel", mixing, root)
        core, factors = hosvd(images, [None, images.shape[1], images.shape[2]])
        _, echo, contrast = factors
        if echo is None or contrast is None:
            raise AssertionError("factors of both contrast axes were asked for")
        energy = core.abs().square().sum(0)  # (n, m)
        echo = echo[:, : _length(energy.sum(1), rank)]
        contrast = contrast[:, : _length(energy.sum(0), rank)]
        self.lengths: tuple[int, int] = (contrast.shape[1], echo.shape[1])
        """Length of the core along contrast and echo."""
        self._analysis = torch.einsum("en,lm,elk->mnk", echo.conj(), contrast.conj(), mixing).flatten(0, 1)

    def core(self, u: Tensor) -> Tensor:
        """(x, k, z, y) -> (x, m, n, z, y)."""
        x, _, z, y = u.shape
        core = self._analysis @ u.flatten(2)  # (x, m*n, z*y)
        return core.reshape(x, *self.lengths, z, y)

    def images(self, core: Tensor) -> Tensor:
        """Adjoint of ``core``: (x, m, n, z, y) -> (x, k, z, y)."""
        x, _, _, z, y = core.shape
        images = self._analysis.mH @ core.reshape(x, -1, z * y)  # (x, k, z*y)
        return images.reshape(x, -1, z, y)


def _length(energy: Tensor, rank: int | float) -> int:
    """How many of the energies (n,), descending, make up the rank."""
    if isinstance(rank, int):
        return min(rank, len(energy))
    share = energy.double().cumsum(0) / energy.double().sum().clamp_min(1e-300)
    return min(int((share < rank).sum()) + 1, len(energy))


class UnfoldedLowRank:
    """R of the unfolding along one contrast axis, one tiling a shift, and its proximal operator."""

    def __init__(self, weight: float, block: int, axis: int) -> None:
        """Set up R.

        Args:
            weight: threshold of the singular values of a whole block, for a step of 1.
            block: edge of a block [voxels].
            axis: 0 unfolds along m, 1 along n.
        """
        self._weight, self._block, self._axis = weight, block, axis

    def random_shift(self, shape: torch.Size, generator: torch.Generator) -> tuple[int, int, int]:
        """A shift (x, z, y) [voxels] for cores (x, m, n, z, y)."""
        x, _, _, z, y = shape
        return BlockLowRank(1.0, (self._block,) * 3).random_shift((x, 1, z, y), generator)

    def proximal(self, core: Tensor, step: float, shift: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
        """The minimiser of ||T' - T||^2 / (2 step) + R(T') over T' (x, m, n, z, y)."""
        rows = core if self._axis == 0 else core.transpose(1, 2)  # (x, rows, columns, z, y)
        x, length, columns, z, y = rows.shape
        # The other axis lies beside z: a block that is ``columns`` times as thick holds all of it.
        folded = rows.permute(0, 1, 3, 2, 4).reshape(x, length, z * columns, y)
        penalty = BlockLowRank(self._weight, (self._block, self._block * columns, self._block))
        shrunk = penalty.proximal(folded, step, (shift[0], shift[1] * columns, shift[2]))
        rows = shrunk.reshape(x, length, z, columns, y).permute(0, 1, 3, 2, 4)
        return rows if self._axis == 0 else rows.transpose(1, 2)
