"""Coil maps, energy and noise level of scans on a trajectory, against what the scan was made from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from coil_scan import ellipsoid, misalignment
from fingerprint_scan import FingerprintScan, arms, fingerprint_scan
from spirals import scan as scan_along
from spirals import spirals
from torch import Tensor

from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient
from quantitron.recon.coefficient_basis import CoefficientBasis
from quantitron.recon.coils import energy_on_grid
from quantitron.recon.data import Basis, TrajectoryKSpace
from quantitron.recon.fingerprint_basis import fingerprint_basis
from quantitron.recon.noise import trajectory_noise_variance
from quantitron.recon.operators.fourier import centred_fft, centred_ifft
from quantitron.recon.operators.nonuniform_fourier import NonuniformFourier
from quantitron.recon.trajectory_coils import centre_block, trajectory_coil_maps
from quantitron.recon.trajectory_gram import sum_readouts
from quantitron.recon.trajectory_sums import TrajectorySums

pytestmark = pytest.mark.usefixtures("one_thread")

TISSUE = {"t1": (0.4, 4.5), "t2": (0.03, 0.5)}


def summed(scan: FingerprintScan) -> tuple[TrajectorySums, CoefficientBasis]:
    problem = scan.problem
    return (
        sum_readouts(problem.kspace, problem.basis),
        fingerprint_basis(problem.basis, problem.dictionary, TISSUE),
    )


def angles(maps: Tensor, scan: FingerprintScan) -> Tensor:
    """Angle [rad] to the true maps in each voxel of the object; a phase of the voxel's does not count."""
    found = maps.permute(1, 2, 3, 0)  # (c, z, y, x)
    torch.testing.assert_close(found.norm(dim=0), torch.ones_like(found[0].real), atol=1e-4, rtol=0)
    cosine = (found.conj() * scan.csm).sum(0).abs()[scan.mask]
    return cosine.clamp_max(1).arccos()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_maps_from_the_scan_itself(noise):
    scan = fingerprint_scan(n=48, noise=noise)
    sums, basis = summed(scan)
    found = angles(trajectory_coil_maps(sums, basis, max(noise, 1e-3) ** 2, None), scan)
    # 0.004 and 0.009 without noise, 0.007 and 0.014 with it; at most 0.026
    assert found.median() < 0.009
    assert found.quantile(0.95) < 0.019
    assert found.max() < 0.05


def test_maps_of_scans_with_much_noise():
    """At a signal-to-noise ratio of 2 in a frame, 0.6, and nothing but noise."""
    for pd, limit in ((30.0, 0.03), (10.0, 0.075)):  # 0.023 and 0.056
        scan = fingerprint_scan(pd=pd, noise=1.0)
        sums, basis = summed(scan)
        assert angles(trajectory_coil_maps(sums, basis, 1.0, None), scan).median() < limit
    scan = fingerprint_scan(pd=0.0, noise=1.0)
    sums, basis = summed(scan)
    assert angles(trajectory_coil_maps(sums, basis, 1.0, None), scan).isfinite().all()


def calibration(scan: FingerprintScan, time_points: list[int]) -> TrajectoryKSpace:
    """Spirals of low resolution with the contrast of one time point or of each in turn."""
    kspace = scan.problem.kspace
    low = arms(48, 6)[:, :200]
    number = torch.arange(len(time_points)) % len(low)
    time = torch.tensor(time_points)
    spectra = NonuniformFourier(low.flatten(0, 1), (1, 48, 48))(scan.csm[:, None] * scan.coefficients)
    spectra = spectra.unflatten(2, low.shape[:2])[:, :, number]
    samples = torch.einsum("rl,clrm->crm", scan.problem.basis.contrast[time].to(spectra), spectra)
    generator = torch.Generator().manual_seed(9)
    samples = (samples + torch.randn(samples.shape, dtype=samples.dtype, generator=generator)).flatten(1)
    return replace(
        kspace,
        samples=samples,
        trajectory=low[number].flatten(0, 1),
        readout_length=torch.full((len(time),), low.shape[1]),
        time_point=time,
        slice=torch.zeros_like(time),
        energy=float(samples.abs().square().sum()),
    )


@pytest.mark.parametrize("time_points", [[40] * 6, list(range(60))])
def test_maps_from_calibration_readouts(time_points):
    """The scan's own samples do not matter then: here they are noise."""
    scan = fingerprint_scan(n=48, pd=300.0)
    sums, basis = summed(scan)
    noise = torch.randn_like(sums.projected.groups)
    sums = replace(sums, projected=replace(sums.projected, groups=noise))
    found = angles(trajectory_coil_maps(sums, basis, 1.0, calibration(scan, time_points)), scan)
    # 0.014 and 0.032 from one contrast, whose signal is weak, 0.005 and 0.010 from all
    assert found.median() < (0.019 if len(time_points) < 60 else 0.007)
    assert found.quantile(0.95) < (0.043 if len(time_points) < 60 else 0.014)
    without = angles(trajectory_coil_maps(sums, basis, 1.0, None), scan)
    assert without.median() > 0.3


def test_a_single_coil_needs_no_maps():
    scan = fingerprint_scan(coils=1)
    sums, basis = summed(scan)
    maps = trajectory_coil_maps(sums, basis, 1.0, None)
    assert maps.shape == (32, 1, 1, 32)
    assert torch.equal(maps, torch.ones_like(maps))


def test_a_scan_without_a_centre_is_refused():
    ring = arms(64)[:, -100:]
    assert ring.norm(dim=2).min() > 0.3
    sums, basis = summed(fingerprint_scan(n=64, distinct=ring))
    with pytest.raises(ValueError, match="no sample lies near the k-space centre"):
        trajectory_coil_maps(sums, basis, 1.0, None)


@pytest.mark.parametrize("n", [32, 64])
def test_energy_of_the_centre_is_the_images(n):
    """In the units of the coefficient images, whatever the grid."""
    scan = fingerprint_scan(n=n, noise=1.0)
    sums, basis = summed(scan)
    block = centre_block(sums, basis, 1.0)
    assert block.shape[1] == 4
    assert max(block.shape[2:]) <= n
    energy = energy_on_grid(block, sums.grid)
    truth = scan.coefficients.abs().square().sum(0)
    inside = scan.mask
    # Sums 0.99 and 0.97 of the truth; medians 0.87 and 0.90, as what lies beyond the centre is left out.
    assert float(energy.sum() / truth.sum()) == pytest.approx(1, abs=0.05)
    assert float(energy[inside].median() / truth[inside].median()) == pytest.approx(1, abs=0.18)
    assert energy[~inside].mean() < 0.02 * truth[inside].mean()


@pytest.mark.parametrize("variance", [1.0, 7.3])
def test_noise_is_found_at_the_edge_of_k_space(variance):
    """Signal there, too, is taken for noise, so strong signals make it too much, but never too little."""
    scan = fingerprint_scan(n=64, pd=40.0, noise=variance**0.5)
    sums, _ = summed(scan)
    assert trajectory_noise_variance(sums) == pytest.approx(variance, rel=0.1)
    strong, _ = summed(fingerprint_scan(n=64, pd=400.0, noise=variance**0.5))
    assert trajectory_noise_variance(strong) > 0.97 * variance


def test_the_centre_of_tilted_readouts_is_that_of_every_sample_by_itself(monkeypatch):
    """A convolution in the place of transforms onto all samples, and data that are never formed."""
    grid, points, coils, rank = (6, 10, 8), 40, 2, 2
    generator = torch.Generator().manual_seed(4)
    distinct = torch.cat([spirals(points, 50), torch.zeros(points, 50, 1)], 2)
    turn = torch.linalg.qr(torch.randn(points, 3, 3, generator=generator))[0]
    kspace, basis = scan_along((distinct @ turn).clamp(-0.5, 0.5), grid, points, coils, rank)
    sums = sum_readouts(kspace, basis)
    mixing = torch.eye(rank, dtype=torch.complex64)
    shares = torch.tensor([0.7, 0.3])
    # As many steps as it takes, however much of the data noise could be.
    monkeypatch.setattr("quantitron.recon.trajectory_coils.LEAST_ITERATIONS", 100)
    noise = 1.0
    found = centre_block(sums, CoefficientBasis(mixing[None], shares, 1.0), noise)  # (k, c, z, y, x)

    near = kspace.trajectory.norm(dim=1) <= 0.5
    row = basis.contrast.repeat_interleave(50, 0)[near].to(torch.complex64)  # (n, k)
    fourier = NonuniformFourier(kspace.trajectory[near], grid)
    samples = kspace.samples[:, near]
    power = samples.abs().square().mean()
    penalty = (noise / (points * power.clamp_min(noise) * shares))[:, None, None, None]

    def normal(images: Tensor) -> Tensor:  # (c, k, z, y, x)
        signal = torch.einsum("nk,ckn->cn", row, fourier(images))
        return fourier.adjoint(row.T.conj() * signal[:, None]) + penalty * images

    right = fourier.adjoint(row.T.conj() * samples[:, None])
    images = conjugate_gradient(
        normal, right, start=None, preconditioner=lambda r: r, iterations=100, tolerance=0.0
    )
    expected = centred_fft(images, (2, 3, 4)).transpose(0, 1)
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize(("noise", "at_ends", "between"), [(0.01, 0.0125, 0.0085), (0.1, 0.045, 0.03)])
def test_maps_of_a_slab_of_tilted_spirals(noise, at_ends, between):
    """All of it: its ends, and what only the edge of a ball of k-space tells."""
    grid, shots, points = (12, 40, 40), 300, 200
    csm, kspace, mask = ellipsoid(grid, noise=0.0, slab=True)
    generator = torch.Generator().manual_seed(4)
    flat = torch.cat([spirals(shots, points, 8.0, 1.0), torch.zeros(shots, points, 1)], 2)
    turn = torch.linalg.qr(torch.randn(shots, 3, 3, generator=generator))[0]
    trajectory = (flat @ turn).clamp(-0.5, 0.5).flatten(0, 1)
    samples = NonuniformFourier(trajectory, grid)(centred_ifft(kspace, (1, 2, 3)).contiguous())
    samples = samples / samples.abs().square().mean().sqrt()
    samples = samples + noise * torch.randn(samples.shape, dtype=samples.dtype, generator=generator)
    one = torch.ones(1)
    scan = TrajectoryKSpace(
        samples=samples,
        trajectory=trajectory,
        readout_length=torch.full((shots,), points),
        time_point=torch.zeros(shots, dtype=torch.int64),
        slice=torch.zeros(shots, dtype=torch.int64),
        density=None,
        energy=float(samples.abs().double().square().sum()),
        time_points=1,
        grid=(1, *grid),
    )
    sums = sum_readouts(scan, Basis(torch.ones(1, 1), one, 1.0, "dictionary"))
    basis = CoefficientBasis(torch.ones(1, 1, 1, dtype=torch.complex64), one, 1.0)
    maps = trajectory_coil_maps(sums, basis, noise**2, None).permute(1, 2, 3, 0)  # (c, z, y, x)
    ends = torch.zeros_like(mask)
    ends[[0, -1]] = True
    assert misalignment(maps, csm, mask & ends) < at_ends  # 0.010 and 0.036
    assert misalignment(maps, csm, mask & ~ends) < between  # 0.0065 and 0.023


@pytest.mark.parametrize("pd", [40.0, 400.0, 4000.0])
def test_noise_outside_the_basis_is_that_of_the_scan_however_strong_the_signal(pd):
    """1.2 at most, where the edge of k-space alone gives a hundred times the variance."""
    scan = fingerprint_scan(n=48, pd=pd, noise=1.0, rank=10)
    kspace = scan.problem.kspace
    kspace.samples[1] = 0  # a dead channel
    sums = sum_readouts(kspace, scan.problem.dictionary.basis(5))
    assert trajectory_noise_variance(sums, kspace) == pytest.approx(1, rel=0.05 if pd < 4000 else 0.3)
    if pd == 4000:
        assert trajectory_noise_variance(sums) > 2


def test_noise_of_readouts_that_do_not_repeat_is_that_at_the_edge():
    scan = fingerprint_scan(noise=1.0, distinct=spirals(60, 100))
    sums, _ = summed(scan)
    assert trajectory_noise_variance(sums, scan.problem.kspace) == trajectory_noise_variance(sums)
