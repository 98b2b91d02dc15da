"""Rounds of the joint network between data and network, on a scan whose images are measured one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.priors.gaussian_field import GaussianField
from quantitron.recon.solvers.coefficient_solver import CoefficientEstimate
from quantitron.recon.solvers.joint_inr import JointINR

N, RANK, NOISE = 40, 3, 0.05
VOXEL = (1e-3, 5e-3, 1e-3)
SETTINGS = {
    "start": "cg",
    "epochs": 30,
    "features": 32,
    "levels": 6,
    "decay_network": 1e-2,
    "grid_features": 4,
    "consistency": 0.0,
}


@dataclass(frozen=True)
class Identity:
    """Every voxel of every component is sampled once."""

    samples: int = N * N * RANK

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def mean_diagonal(self) -> Tensor:
        return torch.ones(RANK)

    def residual_energy(self, u: Tensor, data: Tensor) -> float:
        return float((u - data).abs().square().sum())


def _truth() -> Tensor:
    """(x, k, z, y): two tissues in a disc."""
    axis = (torch.arange(N) - N // 2) / (N / 2)
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    disc, inner = x.square() + y.square() < 0.8, (x - 0.1).abs() + y.abs() < 0.5
    values = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.3, -0.1], [0.7, -0.2, 0.15]])
    tissue = disc.long() + (disc & inner).long()
    return values[tissue].permute(0, 2, 1)[:, :, None].to(torch.complex64)


def _estimate() -> CoefficientEstimate:
    truth = _truth()
    generator = torch.Generator().manual_seed(0)
    data = truth + NOISE**0.5 * torch.randn(truth.shape, dtype=truth.dtype, generator=generator)
    energy = truth.abs().square().mean((0, 2, 3)) / NOISE
    expected = energy[None, :, None, None].expand(truth.shape).contiguous()
    return CoefficientEstimate(
        operator=Identity(),
        data=data,
        coefficients=data,
        noise=NOISE,
        prior=GaussianField(expected, VOXEL, 2e-3),
        voxel_size=VOXEL,
        mask=(truth.abs().sum(1) > 0).permute(1, 2, 0),
    )


def _error(images: Tensor) -> float:
    inside = (_truth().abs().sum(1, keepdim=True) > 0).expand_as(images)
    return float((images - _truth())[inside].norm() / _truth()[inside].norm())


def _refined(**settings: object) -> Tensor:
    return JointINR(**{**SETTINGS, **settings}).refine(_estimate(), 0, lambda doing, share: None)  # type: ignore[arg-type]


def test_the_network_is_nearer_to_the_truth_than_the_data() -> None:
    assert _error(_refined(rounds=0)) < 0.5 * _error(_estimate().data)


def test_rounds_lie_between_data_and_network() -> None:
    network, data = _refined(rounds=0), _estimate().data
    alone = {"rounds": 1, "pull_epochs": SETTINGS["epochs"], "low_rank": 0.0, "field_share": 0.0}
    weak, strong = (_refined(**alone, attraction=a) for a in (0.01, 1e3))
    assert float((weak - data).norm()) < 0.2 * float((network - data).norm())
    assert float((strong - network).norm()) < 0.2 * float((network - data).norm())


def test_low_rank_helps_the_rounds() -> None:
    settings = {"rounds": 1, "pull_epochs": SETTINGS["epochs"], "field_share": 0.0, "attraction": 0.1}
    with_it, without = (_refined(**settings, low_rank=w) for w in (0.25, 0.0))
    assert _error(with_it) < 0.95 * _error(without)  # 0.264 and 0.293


def test_same_seed_same_images() -> None:
    assert torch.equal(_refined(rounds=2, pull_epochs=3), _refined(rounds=2, pull_epochs=3))
