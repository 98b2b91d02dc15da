"""Room around a slab, for its coil maps.

An image and its k-space on a grid are periodic. A slab ends with its field of view along z, so that its two
ends are neighbours there, with coil maps that have nothing to do with each other; maps that are found in
windows of k-space are smooth across the edge and right at neither end. In a field of view twice as high,
empty beyond the slab, they have room to change. Along x and y the field of view is commonly chosen to end
outside of the object.
"""

from __future__ import annotations

from torch import Tensor

from quantitron.recon.operators.fourier import centred_fft, centred_ifft

FILLED = 0.05
"""Energy in the outermost planes on either side, over that of the mean plane, from which the object counts as
reaching both ends. Noise may pass for an object: room takes time then, and changes little."""
_Z = 2  # of (k, c, z, y, x)


def with_room(block: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:
    """The k-space centre in a field of view that is twice as high, where the object reaches both ends.

    Args:
        block: (k, c, z, y, x) centred k-space; the images k share the coil maps.
        grid: (z, y, x) of the scan, none below the block's.

    Returns:
        block with twice as many points along z, half a step apart, over the same range of k-space; the grid
        of the high field of view, whose centre n // 2 is that of the scan. Both as they are where the object
        ends before, or the block has one plane, which tells nothing of z.
    """
    (nz, ny, nx), points = grid, block.shape[_Z]
    if points < 2:
        return block, grid
    image = centred_ifft(_about_centre(block, nz), (_Z,))
    energy = image.abs().square().sum((0, 1, 3, 4))  # (z,)
    if not min(energy[0], energy[-1]) > FILLED * energy.mean():
        return block, grid
    high = centred_fft(_about_centre(image, 2 * nz), (_Z,))
    return _about_centre(high, 2 * points).contiguous(), (2 * nz, ny, nx)


def _about_centre(values: Tensor, n: int) -> Tensor:
    """Cut along z, or filled up with zeros, to n points about the centre n // 2."""
    have = values.shape[_Z]
    if n <= have:
        return values.narrow(_Z, have // 2 - n // 2, n)
    result = values.new_zeros(*values.shape[:_Z], n, *values.shape[_Z + 1 :])
    result.narrow(_Z, n // 2 - have // 2, have).copy_(values)
    return result
