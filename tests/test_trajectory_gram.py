"""Sums over readouts of equal trajectory are those of the frames one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from spirals import scan, spirals

from quantitron.recon.trajectory_gram import sum_readouts


@pytest.mark.parametrize("complex_basis", [False, True])
@pytest.mark.parametrize("distinct", [1, 4, 11])
@pytest.mark.parametrize("ragged", [False, True])
def test_equals_the_frames(complex_basis: bool, distinct: int, ragged: bool) -> None:
    kspace, basis = scan(spirals(distinct, 20), (1, 8, 8), 11, 3, 2, complex_basis, torch.complex128)
    kspace = replace(kspace, density=torch.rand(len(kspace.trajectory)), time_point=torch.randperm(11))
    if ragged:
        lengths = torch.tensor([20, 17, 20, 20, 5, 20, 20, 17, 20, 20, 20])
        points = torch.cat([torch.arange(n) + 20 * i for i, n in enumerate(lengths.tolist())])
        kspace = replace(
            kspace,
            samples=kspace.samples[:, points],
            trajectory=kspace.trajectory[points],
            density=kspace.density[points],
            readout_length=lengths,
        )
    sums = sum_readouts(kspace, basis)

    found: dict[bytes, int] = {}
    gram, projected, trajectory, count, density = [], [], [], [], []  # of each distinct readout
    start = 0
    for length, time_point in zip(kspace.readout_length.tolist(), kspace.time_point.tolist(), strict=True):
        part = slice(start, start + length)
        start += length
        psi = basis.contrast[time_point]
        key = kspace.trajectory[part].numpy().tobytes()
        if key not in found:
            found[key] = len(found)
            gram.append(0)
            projected.append(0)
            count.append(0)
            trajectory.append(kspace.trajectory[part])
            density.append(kspace.density[part])
        g = found[key]
        gram[g] = gram[g] + psi.conj()[:, None] * psi
        projected[g] = projected[g] + psi.conj()[:, None, None] * kspace.samples[:, part]
        count[g] += 1
    order = sorted(range(len(count)), key=lambda g: count[g] == 1)  # those that occur once come last
    gram, projected, trajectory, count, density = (
        [values[g] for g in order] for values in (gram, projected, trajectory, count, density)
    )
    assert sums.count.tolist() == count
    assert len(count) >= distinct
    assert torch.equal(sums.trajectory, torch.cat(trajectory))
    assert torch.equal(sums.density, torch.cat(density))
    lengths = torch.tensor([len(part) for part in trajectory])
    assert torch.equal(sums.readout, torch.arange(len(count)).repeat_interleave(lengths))
    assert torch.allclose(sums.gram, torch.stack(gram))
    assert sums.gram.is_complex() == complex_basis
    expected = torch.cat(projected, -1)
    assert (sums.projected.channels, sums.projected.points) == expected.shape[1:]
    assert torch.allclose(sums.projected.mixed(torch.eye(2, dtype=torch.complex128)), expected)
    mixing = torch.randn(2, 3, dtype=torch.complex128)
    some = torch.randperm(expected.shape[2])[:50]
    assert torch.allclose(
        sums.projected.mixed(mixing, slice(1, 2), some),
        torch.einsum("lk,lcn->kcn", mixing.conj(), expected)[:, 1:2, some],
    )
    assert sums.energy == kspace.energy
    assert sums.samples == kspace.samples.numel()
    assert sums.grid == (1, 8, 8)


def test_last_bit_tells_trajectories_apart() -> None:
    kspace, basis = scan(spirals(1, 20), (1, 8, 8), 3)
    trajectory = kspace.trajectory.clone()
    trajectory[30, 0] = torch.nextafter(trajectory[30, 0], torch.tensor(1.0))
    assert sum_readouts(replace(kspace, trajectory=trajectory), basis).count.tolist() == [2, 1]


def test_readouts_that_stand_alone_keep_their_samples_where_they_are() -> None:
    """No second copy of the data, let alone one for each component."""
    kspace, basis = scan(spirals(11, 20), (1, 8, 8), 11)
    data = sum_readouts(kspace, basis).projected
    assert data.groups.numel() == 0
    assert data.alone.data_ptr() == kspace.samples.data_ptr()
    kspace, basis = scan(spirals(10, 20), (1, 8, 8), 11)
    data = sum_readouts(kspace, basis).projected
    assert data.groups.shape == (3, 3, 20)
    assert data.alone.shape == (3, 180)


def test_single_precision_stays_single() -> None:
    kspace, basis = scan(spirals(2, 20), (1, 8, 8), 5)
    wide = replace(basis, contrast=basis.contrast.double())
    sums = sum_readouts(kspace, wide)
    assert sums.projected.groups.dtype == sums.projected.alone.dtype == torch.complex64
    assert sums.gram.dtype == torch.float32
    assert sums.density is None


def test_says_what_is_wrong() -> None:
    kspace, basis = scan(spirals(2, 20), (1, 8, 8), 5)
    with pytest.raises(ValueError, match="one slice"):
        sum_readouts(replace(kspace, grid=(2, 1, 8, 8)), basis)
    with pytest.raises(ValueError, match="5 time points, the scan 6"):
        sum_readouts(replace(kspace, time_points=6), basis)
    with pytest.raises(ValueError, match="no readouts"):
        sum_readouts(kspace.where(torch.zeros(5, dtype=torch.bool)), basis)
