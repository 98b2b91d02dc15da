"""The noise level of scans without a noise scan, where channels are dead or nothing was measured."""

import pytest
import torch

from quantitron.recon.data import Basis, ReducedKSpace, TrajectoryKSpace
from quantitron.recon.noise import noise_variance, trajectory_noise_variance
from quantitron.recon.trajectory_gram import sum_readouts

COILS, READOUTS, LENGTH, RANK = 6, 40, 50, 3


def basis():
    generator = torch.Generator().manual_seed(0)
    columns, _ = torch.linalg.qr(torch.randn(READOUTS, RANK, generator=generator))
    return Basis(columns, torch.ones(RANK) / RANK, 1.0, "dictionary")


def spiral_sums(samples):
    """Sums of a scan of noise: radial readouts, no two alike."""
    angle = torch.arange(READOUTS)[:, None] * 2.4
    radius = torch.linspace(0, 0.5, LENGTH)
    trajectory = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).reshape(-1, 2)
    kspace = TrajectoryKSpace(
        samples=samples,
        trajectory=trajectory,
        readout_length=torch.full((READOUTS,), LENGTH),
        time_point=torch.arange(READOUTS),
        slice=torch.zeros(READOUTS, dtype=torch.int64),
        density=None,
        energy=float(samples.abs().square().sum()),
        time_points=READOUTS,
        grid=(1, 1, 16, 16),
    )
    return sum_readouts(kspace, basis())


def noise(*shape):
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))


def reduced(projected, gram):
    return ReducedKSpace(
        gram=gram, projected=projected, count=torch.ones(1, 1, 1, 64), energy=1.0, samples=1, basis=basis()
    )


@pytest.mark.parametrize("dead", [0, 1, COILS // 2])
def test_dead_channels_do_not_hide_the_noise_of_the_others(dead):
    samples = 3 * noise(COILS, READOUTS * LENGTH)
    samples[:dead] = 0
    assert trajectory_noise_variance(spiral_sums(samples)) == pytest.approx(9, rel=0.15)
    lines = 3 * noise(1, 1, 1, 64, 1, COILS, 200)
    lines[..., :dead, :] = 0
    found = noise_variance(reduced(lines, torch.ones(1, 1, 1, 64, 1, 1)))
    assert found == pytest.approx(9, rel=0.15)


def test_where_nothing_was_measured_the_level_is_still_one_to_divide_by():
    assert trajectory_noise_variance(spiral_sums(torch.zeros(COILS, READOUTS * LENGTH) + 0j)) == 1
    lines = torch.zeros(1, 1, 1, 64, 1, COILS, 200) + 0j
    assert noise_variance(reduced(lines, torch.ones(1, 1, 1, 64, 1, 1))) == 1
