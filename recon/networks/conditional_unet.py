"""A residual U-Net in three dimensions, conditioned on noise level and modality.

The blocks are those of guided diffusion (Dhariwal and Nichol 2021), as MRI2Qmap's denoiser has them: two
convolutions whose features are scaled and shifted by an embedding of noise level and modality. Two things
differ. Features are normalised over the channels of each voxel, not over groups and patch: the statistics of
a patch change with its share of background, and so would the result with where patches begin. And a volume
of one slice is a picture in two dimensions for all layers, by the middle planes of the same kernels, so that
one network serves slices and slabs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_FLOOR = 1e-3
"""Mean square of features below which they count as none: gradients would grow without bound."""


@dataclass(frozen=True)
class UNetShape:
    """What the layers of a network are, beside their weights."""

    in_channels: int = 1
    """Images that go in together."""
    out_channels: int = 1
    """Images that come out."""
    channels: tuple[int, ...] = (32, 64, 96)
    """Features of each resolution level, the finest first."""
    blocks: int = 2
    """Residual blocks of each level, on the way down and on the way up."""
    attention: tuple[int, ...] = ()
    """Levels, 0 the finest, whose blocks are followed by self-attention over all voxels of the level."""
    heads: int = 4
    """Of the attention."""
    modalities: int = 0
    """Classes that it is conditioned on; 0: none."""
    noise: bool = True
    """Whether it is conditioned on the noise level."""
    embedding: int = 128
    """Length of the embedding."""

    def __post_init__(self) -> None:
        """Refuse layers that cannot be built.

        Raises:
            ValueError: in one sentence.
        """
        counts = (self.in_channels, self.out_channels, self.blocks, self.heads, self.embedding)
        if min(counts) < 1 or not self.channels or min(self.channels) < 1 or self.modalities < 0:
            raise ValueError(f"a U-Net needs positive numbers of channels, blocks and heads, not {self}")
        if self.embedding % 2:
            raise ValueError(f"the length of the embedding must be even, not {self.embedding}")
        for level in self.attention:
            if not 0 <= level < len(self.channels):
                raise ValueError(
                    f"attention on level {level}, but the levels are 0..{len(self.channels) - 1}"
                )
            if self.channels[level] % self.heads:
                raise ValueError(
                    f"{self.channels[level]} features cannot be shared out to {self.heads} heads"
                )

    @property
    def multiple(self) -> int:
        """Voxels along each axis come in multiples of this (but for an axis z of 1)."""
        return 1 << (len(self.channels) - 1)


class ConditionalUNet(nn.Module):
    """Images (n, in_channels, z, y, x) to images (n, out_channels, z, y, x) on the same grid, of any size."""

    def __init__(self, shape: UNetShape, generator: torch.Generator | None = None) -> None:
        """Build the layers.

        Args:
            shape: of the layers.
            generator: of the first weights.
        """
        super().__init__()
        self.shape = shape
        width, deepest = shape.channels, len(shape.channels) - 1
        conditioned = shape.noise or shape.modalities > 0
        embedded = shape.embedding if conditioned else 0
        self.noise_embedding = (
            nn.Sequential(
                nn.Linear(shape.embedding, shape.embedding),
                nn.SiLU(),
                nn.Linear(shape.embedding, shape.embedding),
            )
            if shape.noise
            else None
        )
        self.modality_embedding = (
            nn.Embedding(shape.modalities, shape.embedding) if shape.modalities else None
        )
        self.entry = _Convolution(shape.in_channels, width[0])
        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        for level, features in enumerate(width):
            self.down.append(nn.ModuleList(_Block(features, features, embedded) for _ in range(shape.blocks)))
            if level < deepest:
                self.shrink.append(_Convolution(features, width[level + 1], stride=2))
        self.up = nn.ModuleList()
        self.grow = nn.ModuleList()
        for level in range(deepest - 1, -1, -1):
            self.grow.append(_Convolution(width[level + 1], width[level]))
            self.up.append(
                nn.ModuleList(
                    _Block((2 if number == 0 else 1) * width[level], width[level], embedded)
                    for number in range(shape.blocks)
                )
            )
        self.attention = nn.ModuleDict(
            {str(level): _Attention(width[level], shape.heads) for level in shape.attention}
        )
        self.exit = _Convolution(width[0], shape.out_channels, zero=True)
        self._initialise(generator)

    def forward(self, x: Tensor, level: Tensor | None = None, modality: Tensor | None = None) -> Tensor:
        """What the network predicts.

        Args:
            x: (n, in_channels, z, y, x); z = 1 or, like y and x, a multiple of ``shape.multiple``.
            level: (n,) standard deviation of the noise, above zero.
            modality: (n,) int64 class.

        Returns:
            (n, out_channels, z, y, x).

        Raises:
            ValueError: if the size does not fit or a condition is missing.
        """
        sizes, multiple = x.shape[2:], self.shape.multiple
        if any(size % multiple for size in sizes[1:]) or (sizes[0] != 1 and sizes[0] % multiple):
            raise ValueError(f"a volume of {tuple(sizes)} voxels; each axis must be a multiple of {multiple}")
        condition = self._condition(level, modality)
        features = self.entry(x.contiguous(memory_format=torch.channels_last_3d))
        kept: list[Tensor] = []
        for number, blocks in enumerate(self.down):
            features = self._level(number, blocks, features, condition)
            if number < len(self.shrink):
                kept.append(features)
                features = self.shrink[number](features)
        for number, blocks in enumerate(self.up):
            skip = kept.pop()
            features = functional.interpolate(features, size=skip.shape[2:], mode="nearest")
            features = torch.cat([self.grow[number](features), skip], 1)
            features = self._level(len(self.shrink) - 1 - number, blocks, features, condition)
        predicted: Tensor = self.exit(functional.silu(features))
        return predicted

    def _condition(self, level: Tensor | None, modality: Tensor | None) -> Tensor | None:
        """(n, embedding) of noise level and modality."""
        parts: list[Tensor] = []
        if self.noise_embedding is not None:
            if level is None:
                raise ValueError("the network is conditioned on the noise level, which was not given")
            parts.append(self.noise_embedding(_sinusoids(level.log(), self.shape.embedding)))
        if self.modality_embedding is not None:
            if modality is None:
                raise ValueError("the network is conditioned on the modality, which was not given")
            parts.append(self.modality_embedding(modality))
        return sum(parts[1:], parts[0]) if parts else None

    def _level(self, level: int, blocks: nn.Module, features: Tensor, condition: Tensor | None) -> Tensor:
        for block in blocks.children():
            features = block(features, condition)
        name = str(level)
        return self.attention[name](features) if name in self.attention else features

    def _initialise(self, generator: torch.Generator | None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.Linear):
                gain = 0.0 if getattr(module, "zero", False) else 1.0
                fan_in = module.weight[0].numel()
                with torch.no_grad():
                    module.weight.normal_(0, gain / math.sqrt(fan_in), generator=generator)
                    if module.bias is not None:
                        module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                with torch.no_grad():
                    module.weight.normal_(0, 1, generator=generator)


class _Convolution(nn.Conv3d):
    """3 x 3 x 3, zero padding. A single slice only ever meets the middle planes of the kernels."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, zero: bool = False) -> None:
        super().__init__(inputs, outputs, 3, stride=stride, padding=1)
        self.zero = zero
        """Whether the first weights are zero, so that a block begins as the identity."""
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, z, y, x) -> (n, outputs, ceil(z / stride), ...)."""
        if x.shape[2] > 1:
            return super().forward(x)
        step = self.stride[1]
        return functional.conv3d(
            x, self.weight[:, :, 1:2], self.bias, stride=(1, step, step), padding=(0, 1, 1)
        )


class _Block(nn.Module):
    """Two convolutions beside a way past them; the condition scales and shifts the features between."""

    def __init__(self, inputs: int, outputs: int, embedded: int) -> None:
        super().__init__()
        self.first = _Convolution(inputs, outputs)
        self.second = _Convolution(outputs, outputs, zero=True)
        self.modulation = nn.Linear(embedded, 2 * outputs) if embedded else None
        self.past = nn.Conv3d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        features = self.first(functional.silu(_normalised(x)))
        if self.modulation is not None and condition is not None:
            scale, shift = self.modulation(functional.silu(condition))[:, :, None, None, None].chunk(2, 1)
            features = features * (1 + scale) + shift
        features = self.second(functional.silu(features))
        past: Tensor = x if self.past is None else self.past(x)
        total: Tensor = past + features
        return total


class _Attention(nn.Module):
    """Self-attention over the voxels of a level, added to what comes in."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)
        self.out.zero = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # (n, voxels, features)
        size = tokens.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
        parts = self.project(tokens / size).unflatten(-1, (3, self.heads, -1))  # (n, voxels, 3, heads, f)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (n, heads, voxels, f)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed = self.out(mixed.transpose(1, 2).flatten(2))  # (n, voxels, features)
        added: Tensor = x + mixed.transpose(1, 2).reshape(x.shape)
        return added


def _normalised(features: Tensor) -> Tensor:
    """(n, channels, z, y, x) of unit mean square over the channels, voxel by voxel."""
    return features * (features.square().mean(1, keepdim=True) + _FLOOR).rsqrt()


def _sinusoids(position: Tensor, length: int) -> Tensor:
    """(n, length) sines and cosines of a position (n,), of periods from well above its range to 0.1."""
    frequency = torch.logspace(-1.5, 1, length // 2, device=position.device, dtype=position.dtype)
    angle = 2 * math.pi * position[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)
