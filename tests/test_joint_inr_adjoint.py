"""The joint network on a whole scan: from the adjoint, without looking at the data again, and beyond."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fingerprint_scan import FingerprintScan, every_point, fingerprint_scan
from torch import Tensor

from quantitron.recon.data import Maps
from quantitron.recon.solvers.joint_inr import JointINR
from quantitron.recon.solvers.nearest_fingerprint import NearestFingerprint
from quantitron.recon.solvers.svdmrf import SvdMrf

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = JointINR(
    unmix=0.0, adjoint_low_rank=0.0, heads="trained", phase_width=0.0, decay_encoder=1e-5, epochs=150
)
"""As in the paper; it gives no numbers for decay and steps."""


@pytest.fixture(scope="module")
def noisy() -> FingerprintScan:
    return fingerprint_scan(noise=1.0)


def quiet(doing: str, share: float) -> None:
    assert 0 <= share <= 1, doing


def solved(solver, scan: FingerprintScan) -> Maps:
    *_, maps = solver.solve(scan.problem, quiet)
    return maps


def difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


def map_error(maps: Maps, scan: FingerprintScan, name: str) -> float:
    truth = getattr(scan, name)[scan.mask]
    return difference(maps.values[name][0].nan_to_num()[scan.mask], truth)


def image_error(solver: JointINR, scan: FingerprintScan) -> float:
    """Of the images that the network is fitted to, in their own components."""
    images, basis = solver._adjoint(solver.prepare(scan.problem, quiet))
    truth = torch.einsum("lk,lzyx->xkzy", basis.mixing[0].conj(), scan.coefficients)
    inside = scan.mask.permute(2, 0, 1)[:, None].expand_as(truth)
    # Coil maps leave one phase of the whole object open.
    phase = (truth[inside].conj() * images[inside]).sum().sgn()
    return difference(images[inside], phase * truth[inside])


def test_without_unmixing_the_network_is_fitted_to_the_images_of_svdmrf(noisy):
    solver = JointINR(unmix=0.0)
    prepared = solver.prepare(noisy.problem, quiet)
    images, basis = solver._adjoint(prepared)
    assert torch.equal(images, SvdMrf().adjoint(prepared))
    assert basis is prepared.basis
    assert basis.rank == noisy.problem.basis.rank == 5


def test_unmixing_brings_the_images_nearer_to_the_truth(noisy):
    """Where each time point plays one spiral of eight; as many components as are unmixed are there."""
    plain, unmixed = (image_error(JointINR(unmix=share, adjoint_rank=3), noisy) for share in (0.0, 3e-3))
    assert unmixed < 0.85 * plain  # 0.103 and 0.131


def low_rank_error(scan: FingerprintScan, weight: float) -> float:
    """Of the unmixed images once blocks of them are of low rank."""
    solver = JointINR(adjoint_low_rank=weight)
    images, basis = solver._adjoint(solver.prepare(scan.problem, quiet))
    images = solver._low_rank(images, scan.mask, torch.Generator().manual_seed(0))
    truth = torch.einsum("lk,lzyx->xkzy", basis.mixing[0].conj(), scan.coefficients)
    inside = scan.mask.permute(2, 0, 1)[:, None].expand_as(truth)
    phase = (truth[inside].conj() * images[inside]).sum().sgn()
    return difference(images[inside], phase * truth[inside])


def test_low_rank_brings_the_images_nearer_to_the_truth(noisy):
    none, some, much = (low_rank_error(noisy, weight) for weight in (0.0, 0.2, 5.0))
    assert some < 0.97 * none
    assert much > 1.5 * none  # the signal itself goes


def test_what_is_like_the_surroundings_goes_whatever_its_size_and_colour():
    """Noise of components of very different size that depend on each other."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1e3, 0, 0, 0], [500, 20, 0, 0], [3, 2j, 1, 0], [0, 0.5, 0.1, 1e-2]])
    noise = torch.randn(40, 4, 1, 40, dtype=torch.complex64, generator=generator)
    noise = torch.einsum("ij,xjzy->xizy", mixing, noise)
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[:, 10:30, 10:30] = True

    def left(weight: float) -> Tensor:
        found = JointINR(adjoint_low_rank=weight)._low_rank(noise, mask, generator)
        return (found.abs().square().sum((0, 2, 3)) / noise.abs().square().sum((0, 2, 3))).sqrt()  # (k,)

    assert left(1.3).max() < 0.02
    assert left(0.2).min() > 0.6
    assert torch.equal(left(0.0), torch.ones(4))
    little = torch.ones_like(mask)
    little[:, 0] = False
    assert torch.equal(JointINR()._low_rank(noise, little, generator), noise)  # nothing tells the noise


def test_unmixing_changes_little_where_every_time_point_plays_all_of_k_space():
    scan = fingerprint_scan(every=True, pd=1e3)
    images, _ = JointINR(unmix=1e-6, adjoint_rank=5)._adjoint(JointINR().prepare(scan.problem, quiet))
    plain, _ = JointINR(unmix=0.0)._adjoint(JointINR().prepare(scan.problem, quiet))
    assert difference(images, plain) < 0.01


@pytest.mark.parametrize("rank", [3, 4, 9])
def test_as_many_components_are_kept_as_asked_for(noisy, rank):
    maps = solved(JointINR(adjoint_rank=rank, epochs=2), noisy)
    whole = noisy.problem.basis
    assert maps.rank == min(rank, whole.rank)
    basis = JointINR().prepare(noisy.problem, quiet).basis
    share = float(basis.variance[:rank].sum() / basis.variance.sum())
    assert maps.retained_energy == pytest.approx(whole.retained_energy * share)


@pytest.mark.parametrize("solver", [JointINR(), PUBLISHED])
def test_the_network_s_maps_are_better_than_those_of_the_adjoint(noisy, solver):
    """Also as published, where the images are those of svdmrf and heads follow the gradient."""
    adjoint, network = solved(SvdMrf(), noisy), solved(solver, noisy)
    # T1 4.6, T2 7.2 %; as published 4.6, 7.7 %; of the adjoint 6.9, 21.8 %
    assert map_error(network, noisy, "t1") < 0.8 * map_error(adjoint, noisy, "t1")
    assert map_error(network, noisy, "t2") < 0.5 * map_error(adjoint, noisy, "t2")


def fitted(noisy: FingerprintScan, **settings: object) -> tuple[Tensor, Tensor]:
    """The unmixed adjoint, and what the network makes of it."""
    solver = replace(JointINR(), **settings)
    images, _ = solver._adjoint(solver.prepare(noisy.problem, quiet))
    generator = torch.Generator().manual_seed(0)
    return images, solver._fitted(images, noisy.mask, (3e-3,) * 3, solver.epochs, generator, quiet)


def test_encoder_and_perceptron_decay_apart(noisy):
    """Either keeps the network from following the images, and each in its own way."""
    found, away = [], []
    for encoder, network in ((0.0, 2e-4), (1e-2, 2e-4), (0.0, 2e-2)):
        images, network_images = fitted(noisy, epochs=40, decay_encoder=encoder, decay_network=network)
        found.append(network_images)
        away.append(difference(network_images, images))
    assert away[1] > 1.1 * away[0]  # 0.07, 0.10 and 0.18
    assert away[2] > 1.1 * away[0]
    assert difference(found[1], found[2]) > 0.02


def test_heads_that_follow_the_gradient_take_more_steps(noisy):
    away = []
    for heads, epochs in (("exact", 20), ("trained", 20), ("trained", 80)):
        images, network_images = fitted(noisy, heads=heads, epochs=epochs)
        away.append(difference(network_images, images))
    assert away[1] > 1.5 * away[0]  # 0.08, 0.24 and 0.08
    assert away[2] < 0.6 * away[1]


@pytest.mark.parametrize("consistency", [0.3, 3.0])
def test_true_fingerprints_stay_where_they_are(consistency):
    """Data without noise, all of k-space: neither data nor fingerprints pull away from the truth."""
    scan = fingerprint_scan(coils=1, pd=1e4, distinct=every_point(32))
    weak = {"attraction": 1e-6, "field_share": 0.0, "low_rank": 0.0}
    solver = JointINR(start="cg", pull_epochs=2, reweightings=5, consistency=consistency, **weak)
    estimate = solver.linear_estimate(scan.problem, quiet)
    exact = torch.einsum("lk,lzyx->xkzy", estimate.basis.mixing[0].conj(), scan.coefficients)
    found = solver.refine(replace(estimate, coefficients=exact), 0, quiet)
    assert difference(found, exact) < 1e-3


def test_the_harder_the_pull_the_nearer_to_fingerprints(noisy):
    """What is solved for is the minimum: the pull towards the last nearest fingerprints is in it."""
    solver = JointINR(start="cg", reweightings=6)
    estimate = solver.linear_estimate(noisy.problem, quiet)
    nearest = NearestFingerprint(estimate, 0)
    apart = []
    for consistency in (0.0, 1.0, 30.0):
        found = replace(solver, consistency=consistency).refine(estimate, 0, quiet)
        apart.append(difference(found, nearest(found)))
    assert apart[0] > 1.2 * apart[1] > 1.2**2 * apart[2]  # 0.017, 0.012 and 0.003


def test_the_pull_is_the_variance_of_the_noise_over_that_of_the_mismatch():
    """It grows with the noise, falls with signal and distance, and stays finite where there is no signal."""
    fingerprints = torch.zeros(3, 2, 1, 1, dtype=torch.complex64)  # (x, k, z, y)
    fingerprints[0, :, 0, 0] = torch.tensor([3.0, 4.0j])
    fingerprints[1, :, 0, 0] = torch.tensor([30.0, 40.0j])
    solver = JointINR(start="cg", mismatch=0.1)

    def pull(noise: float, away: float = 0.0) -> list[float]:
        images = fingerprints + away * torch.tensor([0.6j, 0.8])[:, None, None]
        return solver._pull(noise, images, fingerprints).flatten().tolist()

    assert pull(0.0) == [0.0, 0.0, 0.0]
    expected = 2 * 0.01**2 / (0.1**2 * 25)
    assert pull(0.01)[0] == pytest.approx(expected, rel=1e-3)
    assert pull(0.01)[1] == pytest.approx(expected / 100, rel=1e-3)
    assert pull(0.03)[0] == pytest.approx(9 * expected, rel=2e-2)
    assert pull(0.01, away=0.5)[0] == pytest.approx(expected / 2, rel=1e-3)  # as far as expected
    assert pull(1.0)[0] < pull(1.0)[2] == pytest.approx(10.0)
