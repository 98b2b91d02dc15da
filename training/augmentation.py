"""Variations of a volume that a denoiser should not care about: place, side, size, brightness, shading."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

_TRIES = 8
"""Patches that are looked at until one is not mostly air."""
_FILLED = 0.15
"""Share of a patch that must not be air, if it can be had."""
_AIR = 0.05


@dataclass(frozen=True)
class Augmentation:
    """How far patches are varied."""

    flips: tuple[int, ...] = (1, 2)
    """Axes (0 is z) along which half of the patches are turned round."""
    bias: float = 0.3
    """Standard deviation of the logarithm of the shading over a volume, at its corners about twice that."""
    intensity: tuple[float, float] = (0.5, 1.5)
    """Range of the factor on all values."""
    turned: float = 0.5
    """Share of the patches that are turned and zoomed in plane; interpolation takes detail from these."""
    angle: float = 12.0
    """Largest angle of these, degrees."""
    zoom: float = 1.15
    """Largest factor of these, up and down."""

    def __post_init__(self) -> None:
        """Refuse ranges that are none.

        Raises:
            ValueError: in one sentence.
        """
        low, high = self.intensity
        if not 0 < low <= high or self.bias < 0 or self.zoom < 1 or not 0 <= self.turned <= 1:
            raise ValueError("intensity must ascend from above zero, bias not be negative, zoom at least 1")

    def patch(self, volume: Tensor, size: tuple[int, int, int], generator: Generator) -> Tensor:
        """Cut a patch at random and vary it.

        Args:
            volume: (z, y, x) real.
            size: of the patch (z, y, x); in plane it may be larger than the volume, zeros fill it.
            generator: the source of chance, on the CPU.

        Returns:
            (z, y, x) float32.

        Raises:
            ValueError: if the volume has fewer slices than the patch.
        """
        turn = self.turned > 0 and _uniform(generator) < self.turned
        cut = size
        if turn:
            reach = self.zoom * math.sqrt(2) * math.sin(math.radians(45 + min(45.0, self.angle)))
            cut = (size[0], math.ceil(reach * size[1]), math.ceil(reach * size[2]))
        part, place = random_crop(volume, cut, generator)
        if turn:
            angle = math.radians(self.angle) * (2 * _uniform(generator) - 1)
            factor = self.zoom ** (2 * _uniform(generator) - 1)
            part = turned(part, size[1:], angle, factor)
            place = (
                place[0],
                place[1] + (cut[1] - size[1]) // 2,
                place[2] + (cut[2] - size[2]) // 2,
            )
        if self.bias:
            coefficients = self.bias * torch.randn(9, generator=generator)
            part = part * shading(coefficients, place, tuple(volume.shape), tuple(part.shape))
        low, high = self.intensity
        part = part * (low + (high - low) * _uniform(generator))
        flipped = [axis for axis in self.flips if _uniform(generator) < 0.5]
        return part.flip(flipped) if flipped else part


UNCHANGED = Augmentation(flips=(), bias=0, intensity=(1, 1), turned=0)
"""Cuts patches, no more."""


def random_crop(
    volume: Tensor, size: tuple[int, int, int], generator: Generator
) -> tuple[Tensor, tuple[int, int, int]]:
    """A patch that is not mostly air.

    Args:
        volume: (z, y, x).
        size: of the patch.
        generator: the source of chance, on the CPU.

    Returns:
        (z, y, x) float32, and its first voxel in the volume, negative where zeros were put before.

    Raises:
        ValueError: if the volume has fewer slices than the patch.
    """
    if volume.shape[0] < size[0]:
        raise ValueError(f"a volume of {volume.shape[0]} slices, patches of {size[0]}")
    best, most, where = volume, -1.0, (0, 0, 0)
    for _ in range(_TRIES):
        begin = [
            int(torch.randint(min(0, have - want), max(0, have - want) + 1, (), generator=generator))
            for have, want in zip(volume.shape, size, strict=True)
        ]
        kept = [
            slice(max(0, first), min(have, first + want))
            for first, have, want in zip(begin, volume.shape, size, strict=True)
        ]
        part = volume[kept[0], kept[1], kept[2]]
        filled = float((part.abs() > _AIR).sum()) / math.prod(size)
        if filled > most:
            best, most, where = part, filled, (begin[0], begin[1], begin[2])
        if filled >= _FILLED:
            break
    pad: list[int] = []
    for first, want, have in zip(where[::-1], size[::-1], best.shape[::-1], strict=True):
        before = max(0, -first)
        pad += [before, want - have - before]
    return functional.pad(best.float(), pad), where


def turned(patch: Tensor, size: tuple[int, ...], angle: float, factor: float) -> Tensor:
    """A patch turned and magnified about its middle, in plane.

    Args:
        patch: (z, y, x).
        size: (y, x) of what is cut from its middle afterwards.
        angle: radians.
        factor: above 1 magnifies.

    Returns:
        (z, y, x) of the size.
    """
    rows = torch.arange(size[0]) - (size[0] - 1) / 2
    columns = torch.arange(size[1]) - (size[1] - 1) / 2
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    c, s = math.cos(angle) / factor, math.sin(angle) / factor
    height, width = patch.shape[1:]
    place = torch.stack([2 * (c * x - s * y) / width, 2 * (s * x + c * y) / height], -1)
    return functional.grid_sample(
        patch[None].float(), place[None].float(), mode="bicubic", padding_mode="zeros", align_corners=False
    )[0]


def shading(
    coefficients: Tensor, place: tuple[int, int, int], volume: tuple[int, ...], size: tuple[int, ...]
) -> Tensor:
    """What a receive coil does to a patch: the exponential of a polynomial of second order.

    Args:
        coefficients: (9,) of z, y, x, zz, yy, xx, zy, zx, yx, each coordinate within -1..1 over the volume.
        place: first voxel of the patch in the volume.
        volume: voxels (z, y, x).
        size: of the patch.

    Returns:
        (z, y, x), above zero.
    """
    axes = [
        ((torch.arange(n) + first + 0.5) / whole * 2 - 1).clamp(-1, 1)
        for n, first, whole in zip(size, place, volume, strict=True)
    ]
    z, y, x = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    terms = (z, y, x, z * z, y * y, x * x, z * y, z * x, y * x)
    logarithm = torch.zeros(size)
    for coefficient, term in zip(coefficients, terms, strict=True):
        logarithm = logarithm + 0.5 * coefficient * term
    return logarithm.clamp(-1.5, 1.5).exp()


def _uniform(generator: Generator) -> float:
    return float(torch.rand((), generator=generator))
