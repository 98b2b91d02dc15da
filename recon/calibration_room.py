"""Room around an object that fills the field of view, for its coil maps.

An image and its k-space on a grid are periodic. Where the object reaches both edges, as every slab does
along z, its two ends are neighbours there, with coil maps that have nothing to do with each other; maps that
are found in windows of k-space are smooth across the edge and right at neither end. In a field of view twice
as wide, empty beyond the object, they have room to change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantitron.recon.operators.fourier import centred_fft, centred_ifft

FILLED = 0.05
"""Energy in the outermost plane on either side, over that of the mean plane, noise taken off both, from which
the object counts as reaching both edges. Ringing of an object that ends before them stays below."""
_AXES = (2, 3, 4)  # (z, y, x) of (k, c, z, y, x)


def with_room(block: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:
    """The k-space centre in a field of view that is twice as wide along the axes that the object fills.

    Args:
        block: (k, c, z, y, x) centred k-space; the images k share the coil maps.
        grid: (z, y, x) of the scan, none below the block's.

    Returns:
        block with twice as many points along those axes, half a step apart, over the same range of k-space;
        the grid of the wide field of view, whose centre n // 2 is that of the scan.
    """
    wide = list(grid)
    for axis in _AXES:
        n = grid[axis - 2]
        if n > 1 and _filled(block, axis, n):
            wide[axis - 2] = 2 * n
            points = 2 * block.shape[axis]
            image = _about_centre(centred_ifft(_about_centre(block, axis, n), (axis,)), axis, 2 * n)
            block = _about_centre(centred_fft(image, (axis,)), axis, points).contiguous()
    return block, (wide[0], wide[1], wide[2])


def _filled(block: Tensor, axis: int, n: int) -> bool:
    """Whether the object reaches both edges of an axis of n places."""
    image = centred_ifft(_about_centre(block, axis, n), (axis,))
    others = [number for number in range(image.ndim) if number != axis]
    energy = image.abs().square().sum(others)
    noise = _noise_energy(block) / n
    return bool(torch.minimum(energy[0], energy[-1]) - noise > FILLED * (energy.mean() - noise))


def _noise_energy(block: Tensor) -> Tensor:
    """Of the whole block, if its outermost corners hold nothing else; at least as much as there is."""
    corners = block
    for axis in _AXES:
        n = block.shape[axis]
        if n > 1:
            corners = torch.stack([corners.select(axis, 0), corners.select(axis, n - 1)], axis)
    return corners.abs().square().mean() * block.numel()


def _about_centre(values: Tensor, axis: int, n: int) -> Tensor:
    """Cut, or filled up with zeros, to n points about the centre n // 2."""
    have = values.shape[axis]
    if n <= have:
        return values.narrow(axis, have // 2 - n // 2, n)
    shape = list(values.shape)
    shape[axis] = n
    result = values.new_zeros(shape)
    result.narrow(axis, n // 2 - have // 2, have).copy_(values)
    return result
