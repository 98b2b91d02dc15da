"""What a training loop is fed, and the chance that it is drawn with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Batch:
    """Pairs to learn from."""

    input: Tensor
    """(n, in_channels, z, y, x) float32."""
    target: Tensor
    """(n, out_channels, z, y, x) float32: what the loss compares with."""
    level: Tensor | None = None
    """(n,) standard deviation of the noise of the input."""
    modality: Tensor | None = None
    """(n,) int64."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        level = None if self.level is None else self.level.to(device)
        modality = None if self.modality is None else self.modality.to(device)
        return Batch(self.input.to(device), self.target.to(device), level, modality)


class Sampler(Protocol):
    """Draws batches. A step's batch depends on the step and its generator only, so that a training that was
    stopped goes on as if it had not been, and batches may be drawn ahead."""

    def __call__(self, step: int, generator: Generator) -> Batch:
        """The batch of a step, counted from 0."""
        ...


def step_generator(seed: int, step: int, purpose: str = "train") -> Generator:
    """The source of chance of one step, on the CPU."""
    digest = hashlib.sha256(f"{purpose} {seed} {step}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:4], "little"))
