"""Tucker form of a tensor by the higher-order SVD (De Lathauwer 2000).

    T = core x_1 F_1 x_2 F_2 ... ,    F_n^H F_n = 1

F_n holds the leading left singular vectors of the unfolding along axis n. The error is at most the root of
the sum of squares of all discarded singular values, and at most sqrt(axes cut) times the least possible.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hosvd(tensor: Tensor, ranks: Sequence[int | None]) -> tuple[Tensor, list[Tensor | None]]:
    """Core and factors.

    Args:
        tensor: any shape (n_1, ..., n_d).
        ranks: columns of each factor; None leaves an axis as it is, and forms no factor.

    Returns:
        Core, as long along every axis as its factor has columns, and factors (n_i, rank_i) or None.

    Raises:
        ValueError: if there is not one rank an axis, or one is below 1 or above its axis.
    """
    if len(ranks) != tensor.ndim:
        raise ValueError(f"a tensor of {tensor.ndim} axes needs as many ranks, not {len(ranks)}")
    for axis, (rank, n) in enumerate(zip(ranks, tensor.shape, strict=True)):
        if rank is not None and not 1 <= rank <= n:
            raise ValueError(f"the rank of axis {axis} must lie from 1 to {n}, not at {rank}")
    factors = [
        None if rank is None else _left_vectors(tensor, axis)[:, :rank] for axis, rank in enumerate(ranks)
    ]
    core = tensor
    for axis, factor in enumerate(factors):
        if factor is not None:
            core = _multiply(core, factor.mH, axis)
    return core, factors


def compose(core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """The tensor of a core and its factors."""
    tensor = core
    for axis, factor in enumerate(factors):
        if factor is not None:
            tensor = _multiply(tensor, factor, axis)
    return tensor


def tucker_truncate(tensor: Tensor, ranks: Sequence[int | None]) -> Tensor:
    """The tensor with its multilinear ranks cut, the same shape. Arguments and errors of `hosvd`."""
    return compose(*hosvd(tensor, ranks))


def _unfold(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def _multiply(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Every vector along an axis times a matrix."""
    product: Tensor = torch.tensordot(matrix, tensor, dims=([1], [axis]))
    return product.movedim(0, axis)


def _left_vectors(tensor: Tensor, axis: int) -> Tensor:
    """(n, n) orthonormal: left singular vectors of the unfolding along an axis, strongest first."""
    unfolded = _unfold(tensor, axis)
    if unfolded.shape[1] > unfolded.shape[0]:
        # The triangular factor has the same left vectors, in a matrix of (n, n).
        unfolded = torch.linalg.qr(unfolded.mH, mode="r").R.mH
    vectors: Tensor = torch.linalg.svd(unfolded, full_matrices=unfolded.shape[0] > unfolded.shape[1]).U
    return vectors
