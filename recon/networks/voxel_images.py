"""Values of voxels as images: of all voxels of a block, or of some of them."""

from __future__ import annotations

from torch import Tensor


def images_of(values: Tensor, shape: tuple[int, int, int], places: Tensor | None = None) -> Tensor:
    """Values (n, v) of the voxels of a block as images.

    Args:
        values: real or complex.
        shape: (x, z, y) of the block.
        places: (v,) int64, the voxels' numbers in the flat block; None for all, in order.

    Returns:
        (x, n, z, y), zero elsewhere; differentiable by the values.
    """
    x, z, y = shape
    if places is not None:
        values = values.new_zeros(len(values), x * z * y).index_copy(1, places, values)
    return values.reshape(-1, x, z, y).transpose(0, 1)


def values_of(images: Tensor, places: Tensor | None = None) -> Tensor:
    """Values (n, v) of images (x, n, z, y): the adjoint of ``images_of``."""
    values = images.transpose(0, 1).flatten(1)
    return values if places is None else values[:, places]
