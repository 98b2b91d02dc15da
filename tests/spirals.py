"""Synthetic scans along spirals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantitron.recon.data import Basis, TrajectoryKSpace


def spirals(interleaves: int, points: int, turns: float = 4.0, power: float = 1.5) -> Tensor:
    """Archimedean spirals of variable density, turned against one another: (interleaf, points, 2)."""
    time = torch.linspace(0, 1, points, dtype=torch.float64)
    angle = 2 * math.pi * turns * time
    turn = 2 * math.pi * torch.arange(interleaves, dtype=torch.float64)[:, None] / interleaves
    radius = 0.499 * time**power
    return torch.stack([radius * (angle + turn).cos(), radius * (angle + turn).sin()], -1).float()


def scan(
    distinct: Tensor,
    grid: tuple[int, int, int],
    time_points: int,
    coils: int = 3,
    rank: int = 3,
    complex_basis: bool = False,
    dtype: torch.dtype = torch.complex64,
) -> tuple[TrajectoryKSpace, Basis]:
    """Random samples; time point t is acquired along ``distinct[t % len(distinct)]`` (g, points, d)."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.full((time_points,), distinct.shape[1])
    trajectory = distinct[torch.arange(time_points) % len(distinct)].flatten(0, 1)
    samples = torch.randn(coils, len(trajectory), dtype=dtype, generator=generator)
    wanted = dtype if complex_basis else samples.real.dtype
    columns, _ = torch.linalg.qr(torch.randn(time_points, rank, dtype=wanted, generator=generator))
    kspace = TrajectoryKSpace(
        samples=samples,
        trajectory=trajectory,
        readout_length=lengths,
        time_point=torch.arange(time_points),
        slice=torch.zeros(time_points, dtype=torch.int64),
        density=None,
        energy=float(samples.abs().double().square().sum()),
        time_points=time_points,
        grid=(1, *grid),
    )
    return kspace, Basis(columns, torch.ones(rank), 1.0, "dictionary")
