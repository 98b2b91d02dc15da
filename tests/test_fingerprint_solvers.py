"""Solvers of fingerprints on scans whose coefficient images are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fingerprint_scan import POINTS, FingerprintScan, every_point, fingerprint_scan
from torch import Tensor

from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient
from quantitron.recon.data import FingerprintProblem, Maps
from quantitron.recon.operators.density_compensation import density_weights
from quantitron.recon.operators.toeplitz import ToeplitzSense
from quantitron.recon.solvers.fingerprint import FingerprintEstimate, FingerprintSolver
from quantitron.recon.solvers.joint_inr import JointINR
from quantitron.recon.solvers.llr import FingerprintLocallyLowRank
from quantitron.recon.solvers.lrtv import FingerprintTotalVariation
from quantitron.recon.solvers.mrf_admm import FingerprintAdmm
from quantitron.recon.solvers.nearest_fingerprint import NearestFingerprint
from quantitron.recon.solvers.subspace import FingerprintSubspace
from quantitron.recon.solvers.svdmrf import SvdMrf
from quantitron.recon.trajectory_gram import sum_readouts

pytestmark = pytest.mark.usefixtures("one_thread")


def quiet(doing: str, share: float) -> None:
    assert 0 <= share <= 1, doing


def solved(solver, problem: FingerprintProblem) -> Maps:
    *_, maps = solver.solve(problem, quiet)
    return maps


def estimated(solver: FingerprintSolver, scan: FingerprintScan) -> FingerprintEstimate:
    return solver.linear_estimate(scan.problem, quiet)


def in_basis(scan: FingerprintScan, estimate: FingerprintEstimate) -> Tensor:
    """True images (x, k, z, y) in the basis of an estimate."""
    mixing = estimate.basis.mixing[0]
    return torch.einsum("lk,lzyx->xkzy", mixing.conj(), scan.coefficients)


def whole(images: Tensor, estimate: FingerprintEstimate) -> Tensor:
    """Images (l, z, y, x) in the dictionary's basis."""
    return torch.einsum("lk,xkzy->lzyx", estimate.basis.mixing[0], images)


def difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


def map_error(maps: Maps, scan: FingerprintScan, name: str) -> float:
    """Relative root-mean-square error inside the object; voxels without a value count as 0."""
    truth = getattr(scan, name)[scan.mask]
    return difference(maps.values[name][0].nan_to_num()[scan.mask], truth)


@pytest.fixture(scope="module")
def noisy() -> FingerprintScan:
    return fingerprint_scan(noise=1.0)


# ---- the linear estimate


def test_a_full_scan_without_noise_gives_the_true_images():
    scan = fingerprint_scan(coils=1, pd=1e4, distinct=every_point(32))
    estimate = estimated(FingerprintSubspace(), scan)
    assert estimate.basis.rank == scan.problem.basis.rank
    assert difference(whole(estimate.coefficients, estimate), scan.coefficients) < 2e-4  # 5e-5
    maps = solved(FingerprintSubspace(), scan.problem)
    for name in ("t1", "t2", "pd"):  # 8e-6, 9e-5 and 9e-6
        assert map_error(maps, scan, name) < 3e-4


def test_coil_images_are_the_true_ones():
    """Whatever the phase of the coil maps, maps times images are what the coils saw."""
    scan = fingerprint_scan(pd=1e4, distinct=every_point(32))
    solver = FingerprintSubspace()
    estimate = estimated(solver, scan)
    csm = solver.prepare(scan.problem, quiet).csm.permute(1, 2, 3, 0)  # (c, z, y, x)
    found = csm[:, None] * whole(estimate.coefficients, estimate)
    assert difference(found, scan.csm[:, None] * scan.coefficients) < 0.006  # 0.004


@pytest.mark.parametrize(
    "solver",
    [
        FingerprintSubspace(),
        FingerprintLocallyLowRank(),
        FingerprintTotalVariation(),
        FingerprintAdmm(),
    ],
)
def test_the_residual_is_the_noise(noisy, solver):
    """Less what the images' degrees of freedom take of it, 2 %; in units of what is said to be the noise."""
    assert solved(solver, noisy.problem).residual_to_noise == pytest.approx(0.983, abs=0.006)
    louder = solved(solver, fingerprint_scan(noise=1.5).problem)
    assert louder.residual_to_noise == pytest.approx(0.983 * 1.5**2, rel=0.03)
    unknown = replace(noisy.problem, noise_known=False)
    assert math.isnan(solved(solver, unknown).residual_to_noise)


def test_components_below_the_noise_are_left_out():
    """Those that stand out stay, and the maps hardly miss the others."""
    solver, ranks = FingerprintSubspace(), []
    for pd in (30.0, 100.0, 1e3):
        scan = fingerprint_scan(pd=pd, noise=1.0)
        maps = solved(solver, scan.problem)
        ranks.append(maps.rank)
        every = solved(replace(solver, detectable=0.0), scan.problem)
        assert every.rank == 5
        assert maps.retained_energy <= every.retained_energy
        assert maps.retained_energy > 0.997
        if maps.rank == every.rank:
            assert map_error(maps, scan, "t2") == pytest.approx(map_error(every, scan, "t2"), rel=1e-3)
        for name in ("t1", "t2", "pd"):
            assert map_error(maps, scan, name) < 1.05 * map_error(every, scan, name), (pd, name)
    assert ranks[0] < ranks[1] < ranks[2] == 5


def test_the_operator_of_fewer_components_is_the_restriction(noisy):
    sums = sum_readouts(noisy.problem.kspace, noisy.problem.basis)
    csm = noisy.csm.permute(3, 0, 1, 2).contiguous()
    generator = torch.Generator().manual_seed(2)
    mixing, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.complex64, generator=generator))
    every, fewer = ToeplitzSense(sums, csm, mixing), ToeplitzSense(sums, csm, mixing[:, :3])
    u = torch.randn(32, 3, 1, 32, dtype=torch.complex64, generator=generator)
    padded = torch.cat([u, torch.zeros(32, 2, 1, 32, dtype=u.dtype)], 1)
    assert difference(fewer(u), every(padded)[:, :3]) < 2e-6
    assert difference(fewer.adjoint_data(), every.adjoint_data()[:, :3]) < 2e-6
    assert fewer.residual_energy(u) == pytest.approx(every.residual_energy(padded), rel=1e-6)
    torch.testing.assert_close(fewer.mean_diagonal(), every.mean_diagonal()[:3], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FingerprintSubspace(t1_range=(3.0, 0.5)), "t1_range runs from 3 to 0.5 s; its end must be"),
        (lambda: SvdMrf(t2_range=(0.1, 0.1)), "t2_range runs from 0.1 to 0.1 s"),
        (lambda: FingerprintLocallyLowRank(algorithm="fista"), "set field_share to 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_low_rank_helps_by_either_algorithm(noisy):
    linear = solved(FingerprintSubspace(), noisy.problem)
    for solver in (
        FingerprintLocallyLowRank(algorithm="fista", field_share=0.0, weight=0.6),
        FingerprintLocallyLowRank(weight=0.6, tilings=4, rounds=8, tolerance=2.0),
    ):
        maps = solved(solver, noisy.problem)
        # T1 3.4 and T2 5.4 % by fista, 3.7 and 6.6 % reweighted, 5.1 and 7.6 % by the linear estimate
        for name in ("t1", "t2"):
            assert map_error(maps, noisy, name) < 0.93 * map_error(linear, noisy, name), solver.algorithm


# ---- svdmrf


def test_the_adjoint_of_a_full_scan_has_the_right_scale():
    """On the Cartesian grid it is the inverse; on spirals PD is right but for the corners of k-space."""
    grid = fingerprint_scan(coils=1, distinct=every_point(32))
    maps = solved(SvdMrf(), grid.problem)
    for name in ("t1", "t2", "pd"):  # 1.4e-6, 1.2e-6 and 3.3e-6
        assert map_error(maps, grid, name) < 2e-5
    for every, limit in ((True, 0.042), (False, 0.15)):  # T2 3.2 %, 11 % from one spiral in eight
        scan = fingerprint_scan(coils=1, every=every)
        maps = solved(SvdMrf(), scan.problem)
        ratio = (maps.values["pd"][0] / scan.pd)[scan.mask]
        assert float(ratio.nanmedian()) == pytest.approx(1, abs=0.015)  # 0.994 and 0.995
        assert map_error(maps, scan, "t2") < limit


def test_the_residual_of_the_adjoint_is_reported():
    """Of a full Cartesian scan it is the noise, less the share that the images take; aliasing adds to it."""
    full = fingerprint_scan(coils=1, noise=1.0, distinct=every_point(32))
    assert solved(SvdMrf(), full.problem).residual_to_noise == pytest.approx(1 - 5 / POINTS, abs=0.01)
    louder = fingerprint_scan(coils=1, noise=2.0, distinct=every_point(32))
    assert solved(SvdMrf(), louder.problem).residual_to_noise == pytest.approx(4 * (1 - 5 / POINTS), abs=0.04)
    spirals = fingerprint_scan(noise=1.0)
    for solver in (SvdMrf(), JointINR(epochs=5), JointINR(epochs=5, unmix=0.0)):
        assert 1.0 < solved(solver, spirals.problem).residual_to_noise < 2, solver
    assert math.isnan(solved(SvdMrf(), replace(spirals.problem, noise_known=False)).residual_to_noise)


def test_density_weights_of_the_scan_are_used_whatever_their_scale():
    """Unless the setting names others."""
    scan = fingerprint_scan(coils=1, every=True)
    kspace = scan.problem.kspace
    sums = sum_readouts(kspace, scan.problem.basis)
    weights = density_weights(sums.trajectory, sums.grid)
    own = solved(SvdMrf(), scan.problem)

    def ratio(density: str, given: Tensor) -> Tensor:
        with_weights = replace(scan.problem, kspace=replace(kspace, density=given.repeat(POINTS)))
        maps = solved(SvdMrf(density=density), with_weights)
        return (maps.values["pd"] / own.values["pd"])[0][scan.mask]

    same = ratio("auto", 1e6 * weights)
    torch.testing.assert_close(same, torch.ones_like(same), rtol=1e-3, atol=0)
    others = weights * (1 + sums.trajectory.square().sum(1))
    found = ratio("auto", others)
    assert (found / same - 1).abs().max() > 0.01
    torch.testing.assert_close(ratio("auto", 1e-6 * others), found, rtol=1e-4, atol=0)
    torch.testing.assert_close(ratio("pipe", others), torch.ones_like(same), rtol=1e-4, atol=0)
    voronoi = ratio("voronoi", others)
    assert 1 < voronoi.median() < 1.06  # 1.04: other weights, the same scale


# ---- mrf_admm


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_admm_stays_at_the_truth_and_finds_it(share):
    """Data without noise, of fingerprints of the dictionary: nothing pulls away from them."""
    scan = fingerprint_scan(coils=1, pd=1e4, distinct=every_point(32))
    solver = FingerprintAdmm(field_share=share)
    estimate = estimated(solver, scan)
    exact = in_basis(scan, estimate)
    assert difference(solver.refine(replace(estimate, coefficients=exact), 0, quiet), exact) < 1e-4
    error = torch.randn(exact.shape, dtype=exact.dtype, generator=torch.Generator().manual_seed(4))
    start = exact + 0.02 * exact.abs().max() * error
    assert difference(start, exact) > 0.05
    found = solver.refine(replace(estimate, coefficients=start), 0, quiet)
    assert difference(found, exact) < 1e-3  # 4e-4


def test_admm_without_pull_is_the_linear_estimate(noisy):
    solver = FingerprintAdmm(penalty=1e-7, rounds=2, iterations=60)
    estimate = estimated(solver, noisy)
    diagonal = estimate.operator.mean_diagonal()[:, None, None] + 0.3 * estimate.prior.diagonal()
    wanted = conjugate_gradient(
        lambda u: estimate.operator(u) + estimate.prior.precision(u),
        estimate.data,
        start=estimate.coefficients,
        preconditioner=lambda residual: residual / diagonal,
        iterations=150,
        tolerance=1e-6,
    )
    nearest = NearestFingerprint(estimate, 0)
    away, apart = [], []
    for penalty in (1e-7, 0.2, 5.0):
        found = replace(solver, penalty=penalty, rounds=5).refine(estimate, 0, quiet)
        away.append(difference(found, wanted))
        apart.append(difference(found, nearest(found)))
    assert away[0] < 3e-3  # 0.0008, 0.034 and 0.053
    assert away[0] < 0.1 * away[1]
    assert away[1] < away[2]
    assert apart[0] > apart[1] > apart[2]  # the harder the pull, the nearer to fingerprints


def test_admm_needs_the_prior_where_noise_is_strong(noisy):
    """As published it fits the noise: the residual falls, and T2 is four times as far from the truth."""
    kept, published = (solved(FingerprintAdmm(field_share=share), noisy.problem) for share in (1.0, 0.0))
    assert published.residual_to_noise < kept.residual_to_noise - 0.01
    assert map_error(kept, noisy, "t2") < 0.1  # 0.076 and 0.32
    assert 0.15 < map_error(published, noisy, "t2") < 0.45
    assert published.failed_voxels == 0


@pytest.mark.parametrize("solver", [SvdMrf(), FingerprintSubspace(), FingerprintAdmm()])
def test_groups_change_no_map(noisy, solver):
    """But for atoms that are as good as one another within rounding; rounds carry those to all voxels."""
    fast, every = (solved(replace(solver, match_groups=groups), noisy.problem) for groups in (256, 0))
    inside = noisy.mask[None]
    for name in ("t1", "t2", "pd"):
        one, two = (maps.values[name][inside] for maps in (fast, every))
        if isinstance(solver, FingerprintAdmm):
            assert map_error(fast, noisy, name) == pytest.approx(map_error(every, noisy, name), rel=0.05)
        else:
            assert ((one - two).abs() > 1e-4 * two).float().mean() < 0.01, name
