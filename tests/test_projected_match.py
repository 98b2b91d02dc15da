"""Images of fewer components than the basis has: matched, refined and judged in these components alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fingerprint_scan import every_point, fingerprint_scan
from test_fingerprint_match import SETTINGS, make_dictionary, measured, noise, problem_of, tissue
from torch import Tensor

from quantitron.phantoms.schedules import make_schedule
from quantitron.recon.coefficient_basis import CoefficientBasis
from quantitron.recon.data import FingerprintDictionary, Maps
from quantitron.recon.fingerprint_basis import fingerprint_basis
from quantitron.recon.fingerprint_maps import fingerprint_maps
from quantitron.recon.signal.fingerprint_dictionary import fingerprint_dictionary
from quantitron.recon.signal.fisp_mrf import contrast_signal
from quantitron.recon.signal.spin_echo import SpinEchoProtocol, spin_echo_signal
from quantitron.recon.solvers.arnet import known_components
from quantitron.recon.solvers.joint_inr import JointINR
from quantitron.recon.solvers.nearest_fingerprint import NearestFingerprint
from quantitron.recon.solvers.nearest_tissue import NearestTissue
from quantitron.recon.solvers.subspace import FingerprintSubspace

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = (1, 8, 30)  # z, y, x
VOXELS = 240


def quiet(doing: str, share: float) -> None:
    assert 0 <= share <= 1, doing


def on_grid(values: Tensor) -> Tensor:
    """(v, k) to (x, k, z, y)."""
    return values.reshape(*GRID, -1).permute(2, 3, 0, 1)


def components(dictionary: FingerprintDictionary, rank: int, kept: int) -> CoefficientBasis:
    """The strongest components of the usual tissue, T2 from 30 ms on."""
    basis = fingerprint_basis(dictionary.basis(rank), dictionary, {"t1": (0.4, 4.5), "t2": (0.03, 2.0)})
    return CoefficientBasis(basis.mixing[..., :kept], basis.variance[:kept], 1.0)


@pytest.fixture(scope="module")
def fingerprints() -> FingerprintDictionary:
    """Of 200 time points, T2 from 4 ms on."""
    return fingerprint_dictionary(make_schedule("jiang", 200), (0.06, 4.0), (0.004, 2.0), 60, 80)


def matched_after_cut(solver, dictionary: FingerprintDictionary, kept: int):
    """Maps of signals without noise, cut to some components of nine, and the truth (z, y, x)."""
    t1, t2, pd = tissue(VOXELS, t1=(0.07, 3.5), t2=(0.005, 1.0))
    t2 = torch.minimum(t2, 0.9 * t1)
    with torch.no_grad():
        signals = contrast_signal({"t1": t1, "t2": t2}, make_schedule("jiang", 200))
    whole = pd[:, None] * (signals @ dictionary.axes[:, :9].double())
    basis = components(dictionary, 9, kept)
    cut = whole @ basis.mixing[0].to(whole).conj()
    maps = solver.matched(on_grid(cut.to(torch.complex64)), basis, problem_of(dictionary, 9, GRID))
    return maps, *(part.reshape(GRID) for part in (t1, t2, pd.abs()))


@pytest.mark.parametrize("groups", [0, 256])
@pytest.mark.parametrize("kept", [4, 5, 9])
def test_signals_without_noise_give_their_tissue_whatever_was_left_out(fingerprints, kept, groups):
    """T2 from 5 ms on, where 15 % of the signal lie outside of the components that usual tissue takes."""
    solver = FingerprintSubspace(match_groups=groups, mask_threshold=0.0)
    maps, *truth = matched_after_cut(solver, fingerprints, kept)
    assert maps.failed_voxels == 0
    for name, wanted in zip(("t1", "t2", "pd"), truth, strict=True):
        assert float((maps.values[name][0] / wanted - 1).abs().max()) < 5e-3, name


def estimate_of(dictionary: FingerprintDictionary, mixing: Tensor, b1: Tensor | None = None):
    """What matching asks of an estimate."""
    return SimpleNamespace(
        problem=SimpleNamespace(dictionary=dictionary, basis=dictionary.basis(len(mixing)), b1=b1),
        coefficients=torch.zeros(1),
        basis=SimpleNamespace(mixing=mixing[None]),
        mask=torch.ones(GRID, dtype=torch.bool),
    )


@pytest.mark.parametrize("groups", [0, 40])
@pytest.mark.parametrize("kept", [3, 4, 8])
def test_the_nearest_fingerprint_is_the_nearest_point_of_the_projected_set(kept, groups):
    dictionary = make_dictionary(points=(30, 28))
    mixing = components(dictionary, 8, kept).mixing[0].to(torch.complex128)
    t1, t2, pd = tissue(VOXELS, t1=(0.2, 3.0), t2=(0.012, 0.3))
    u = measured(dictionary, t1, t2, pd) @ mixing.conj() + 0.05 * noise((VOXELS, kept))
    found = NearestFingerprint(estimate_of(dictionary, mixing), groups)(on_grid(u))
    found = found.permute(2, 3, 0, 1).reshape(VOXELS, kept)
    # By brute force: the foot of the perpendicular on the line of each atom, projected.
    atoms = dictionary.coefficients[0][dictionary.plausible].to(u) @ mixing.conj()  # (a, k)
    scale = (u @ atoms.mH) / atoms.abs().square().sum(1)  # (v, a)
    feet = scale[..., None] * atoms  # (v, a, k)
    distance = torch.linalg.vector_norm(feet - u[:, None], dim=2)
    nearest = feet[torch.arange(VOXELS), distance.argmin(1)]
    assert torch.allclose(found, nearest, atol=1e-9 * float(u.abs().max()))


def test_weighted_images_are_matched_beside_projected_fingerprints():
    dictionary = make_dictionary(points=(24, 22))
    mixing = components(dictionary, 8, 4).mixing[0].to(torch.complex128)
    t1, t2, pd = tissue(VOXELS, t1=(0.2, 3.0), t2=(0.012, 0.3))
    u = measured(dictionary, t1, t2, pd) @ mixing.conj() + 0.05 * noise((VOXELS, 4))
    protocol, weights = SpinEchoProtocol(), torch.tensor([0.7, 0.2, 1.5], dtype=torch.float64)
    q = pd.abs()[:, None] * spin_echo_signal(t1, t2, protocol)
    q = q + 0.02 * noise(q.shape, seed=3).real
    nearest = NearestTissue.of_fingerprints(estimate_of(dictionary, mixing), 40, protocol)
    found = nearest(on_grid(u), on_grid(q).permute(1, 2, 3, 0), weights)
    places = dictionary.plausible.nonzero()
    d = dictionary.coefficients[0][dictionary.plausible].to(u) @ mixing.conj()
    e = spin_echo_signal(dictionary.t1[places[:, 0]], dictionary.t2[places[:, 1]], protocol)
    inner = u @ d.mH
    size = (inner.abs() + (q * weights) @ e.T) / (d.abs().square().sum(1) + (weights * e.square()).sum(1))
    points = size[..., None] * inner.sgn()[..., None] * d
    cost = (u[:, None] - points).abs().square().sum(2)
    cost = cost + (weights * (q[:, None] - size[..., None] * e).square()).sum(2)
    best = cost.argmin(1)
    for values, axis, column in ((found.t1, dictionary.t1, 0), (found.t2, dictionary.t2, 1)):
        assert torch.equal(values.flatten(), axis[places[best, column]])
    nearest_points = points[torch.arange(VOXELS), best]
    assert torch.allclose(found.coefficients, on_grid(nearest_points), atol=1e-9)


def test_atoms_stay_real_in_the_components_of_a_scan(monkeypatch):
    """Also in those that were learnt from it: complex ones would double the time of matching."""
    scan = fingerprint_scan(noise=1.0, pd=40.0)
    kinds = []
    original = FingerprintSubspace.matched

    def seen(self, coefficients, basis, problem, *rest):
        kinds.append((basis.rank, bool(basis.mixing.imag.any())))
        return original(self, coefficients, basis, problem, *rest)

    monkeypatch.setattr(FingerprintSubspace, "matched", seen)
    *_, _ = FingerprintSubspace().solve(scan.problem, quiet)
    ((rank, is_complex),) = kinds
    assert 3 <= rank < 5
    assert not is_complex


def median_bias(maps: Maps, truth: Tensor, name: str, where: Tensor) -> float:
    """Relative."""
    ratio = maps.values[name][0][where] / truth[where]
    return float(ratio.nan_to_num().median()) - 1


@pytest.mark.parametrize("solver", [FingerprintSubspace(), JointINR(epochs=60)])
def test_short_t2_is_found_beside_usual_tissue(solver):
    """T2 of 6 to 9 ms in one half of the object, by few components. Beside whole atoms it came out a third
    too long by the linear estimate, and more than twice as long by the network."""
    scan = fingerprint_scan(noise=1.0, pd=60.0, rank=8, every=True, t2_factor=0.1)
    column = torch.arange(32)
    short, usual = scan.mask & (column < 15), scan.mask & (column > 16)
    assert float(scan.t2[short].max()) < 0.01
    *_, maps = solver.solve(scan.problem, quiet)
    assert maps.rank < scan.problem.basis.rank
    assert abs(median_bias(maps, scan.t2, "t2", short)) < 0.08  # 0.041 and 0.040
    assert abs(median_bias(maps, scan.t2, "t2", usual)) < 0.03
    for where in (short, usual):
        assert abs(median_bias(maps, scan.t1, "t1", where)) < 0.02


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kept", [4, 8])
def test_standard_deviations_are_those_of_noise_in_the_components(kept, known):
    """White noise in few components: its level by itself, or from what the fit leaves of these few."""
    dictionary = make_dictionary()
    one = torch.ones(3000, dtype=torch.float64)
    clean = measured(dictionary, 1.3 * one, 0.08 * one, (0.6 + 0.8j) * one)
    mixing = components(dictionary, 8, kept).mixing[0].to(torch.complex128)
    level = 0.01 * float(clean[0].norm())
    u = clean @ mixing.conj() + level * noise((3000, kept))
    maps = fingerprint_maps(
        u.reshape(1, 30, 100, kept).permute(2, 3, 0, 1),
        mixing,
        problem_of(dictionary, 8, (1, 30, 100)),
        noise_variance=level**2 if known else None,
        **{**SETTINGS, "mask_threshold": 0.0},
    )
    for name, said in maps.standard_deviation.items():
        root_mean_square = float(said[0].square().mean().sqrt())
        assert root_mean_square == pytest.approx(float(maps.values[name][0].std()), rel=0.1), name


def test_standard_deviations_of_a_scan_follow_from_its_noise():
    """Where nothing is expected of the images and all of k-space is sampled, those of repeated scans."""
    weak = {"regularisation": 1e-6, "dictionary_regularisation": 1e-6, "detectable": 0.5}
    solver = FingerprintSubspace(**weak, standard_deviations=True)
    found: dict[str, list[Tensor]] = {"t1": [], "t2": [], "pd": []}
    said: dict[str, list[Tensor]] = {"t1": [], "t2": [], "pd": []}
    for seed in range(12):
        scan = fingerprint_scan(16, coils=1, noise=1.0, distinct=every_point(16), seed=seed, rank=8)
        *_, maps = solver.solve(scan.problem, quiet)
        assert maps.rank in (4, 5)
        for name in found:
            found[name].append(maps.values[name][0][scan.mask])
            said[name].append(maps.standard_deviation[name][0][scan.mask])
    for name in found:
        spread = torch.stack(found[name]).var(0).mean().sqrt()
        expected = torch.stack(said[name]).square().mean().sqrt()
        assert float(expected / spread) == pytest.approx(1, abs=0.1), name


def test_a_network_s_images_are_compared_where_they_hold_the_whole_signal():
    """In its own components and, where the scan has more, in those orthogonal to them."""
    for restored, own in ((5, 3), (3, 5), (4, 4)):
        network = torch.linalg.qr(noise((8, restored), seed=1)).Q
        scan = torch.linalg.qr(noise((8, own), seed=2)).Q
        known = known_components(network, scan)
        assert known.shape == (8, max(restored, own))
        torch.testing.assert_close(known.mH @ known, torch.eye(known.shape[1], dtype=known.dtype))
        signal = noise((8,), seed=3)
        estimate = scan @ (scan.mH @ signal)
        images = estimate + network @ (network.mH @ (signal - estimate))  # all is restored that can be
        torch.testing.assert_close(known.mH @ images, known.mH @ signal)
