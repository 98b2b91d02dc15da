"""Training of the networks for coefficient images, and the solvers that use them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fingerprint_scan import FingerprintScan, fingerprint_scan, protocol_and_dictionary
from typer.testing import CliRunner

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.network_weights import read_network
from quantitron.host.command import app
from quantitron.host.compare import compare
from quantitron.host.replay import replay
from quantitron.phantoms.simulate import load_anatomy
from quantitron.phantoms.simulate_fingerprint import simulate_fingerprint
from quantitron.recon.canonical_series import canonical_series, protocol_checksum, tissue_axes
from quantitron.recon.coefficient_basis import CoefficientBasis
from quantitron.recon.data import Maps
from quantitron.recon.networks.conditional_unet import ConditionalUNet, UNetShape
from quantitron.recon.networks.trained_network import NetworkDescription, NetworkRequest, TrainedNetwork
from quantitron.recon.priors.block_matching_denoiser import BlockMatchingDenoiser
from quantitron.recon.priors.denoiser import annealed_levels
from quantitron.recon.priors.network_denoiser import PatchwiseNetwork
from quantitron.recon.priors.series_denoiser import (
    ImageByImage,
    NetworkSeriesDenoiser,
    as_trained,
    from_trained,
    series_intensity,
)
from quantitron.recon.priors.variation_denoiser import VariationDenoiser
from quantitron.recon.scan_conditions import (
    ScanConditions,
    conditions_card,
    differences,
    visited_share,
)
from quantitron.recon.signal.fingerprint_dictionary import fingerprint_dictionary
from quantitron.recon.solvers.arnet import ArtifactRemoval
from quantitron.recon.solvers.mrf_admm import FingerprintAdmm
from quantitron.recon.solvers.mrf_pnp import PlugAndPlay
from quantitron.recon.solvers.subspace import FingerprintSubspace
from quantitron.training.artifact_scan import ScanPlan, place_slice, simulate_slice
from quantitron.training.series_batches import PairSampler, SeriesPatches, artifact_energy, normalised
from quantitron.training.series_pairs import (
    PairPlan,
    SeriesPair,
    _drawn,
    _seed,
    reconstructed_pair,
    simulate_pairs,
)
from quantitron.training.slice_parting import part_slices

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(120)]

POINTS = 96
SCAN = ScanPlan(
    points=POINTS, interleaves=12, matrix=(48, 48), fov=(96.0, 96.0, 4.0), coils=4, supersampling=(1, 1, 1)
)


def quiet(doing: str, share: float) -> None:
    assert 0 <= share <= 1, doing


def solved(solver, problem) -> Maps:
    *_, maps = solver.solve(problem, quiet)
    return maps


def network_of(scan: FingerprintScan, kind: str, bias: float = 0.0, **changes) -> TrainedNetwork:
    """A network that predicts the same number everywhere."""
    noise = kind == "series_denoiser"
    settings = {"in_channels": 10, "out_channels": 10, "channels": (8, 8), "blocks": 1, "noise": noise}
    shape = UNetShape(**(settings | changes))
    network = ConditionalUNet(shape, torch.Generator().manual_seed(0)).requires_grad_(False).eval()
    network.exit.bias.fill_(bias)
    card = {"protocol_checksum": protocol_checksum(scan.problem.protocol), "protocol": "jiang"}
    levels = (0.005, 0.02, 0.1) if noise else ()
    return TrainedNetwork(
        NetworkDescription(kind, shape, (), levels, (1, 32, 32), (1, 32, 32), card), network
    )


@pytest.fixture(scope="module")
def noisy() -> FingerprintScan:
    return fingerprint_scan(noise=1.0)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    """Three tissues in nested ellipses that change along z, 12 voxels of 4 mm."""
    z, y, x = np.meshgrid(*[(np.arange(n) - n // 2) / (n / 2) for n in (12, 48, 48)], indexing="ij")
    outer = (y / 0.85) ** 2 + (x / 0.75) ** 2 < 1
    inner = ((y - 0.1 * z) / 0.55) ** 2 + (x / (0.45 + 0.1 * z)) ** 2 < 1
    core = ((y + 0.1) / 0.2) ** 2 + ((x - 0.2 * z) / 0.17) ** 2 < 1
    ripple = 1 + 0.05 * np.sin(9 * x + 3 * y + 8 * z) * np.cos(8 * y)

    def tissue(outside, middle, centre):
        return np.where(core, centre, np.where(inner, middle, outside))

    path = tmp_path_factory.mktemp("phantom") / "ellipses.npz"
    np.savez(
        path,
        t1=tissue(1.4, 0.85, 2.2) * ripple,
        t2=tissue(0.09, 0.06, 0.16) / ripple,
        pd=np.where(outer, tissue(0.85, 0.7, 1.0) * ripple, 0),
        labels=np.where(outer, tissue(2, 3, 1), 0),
        voxel_size=np.array([0.004, 0.002, 0.002]),
    )
    return path


# ---- the canonical form


def test_the_form_is_the_same_in_any_basis_and_comes_back(noisy):
    problem, generator = noisy.problem, torch.Generator().manual_seed(3)
    images = noisy.coefficients.permute(3, 0, 1, 2).contiguous()  # (x, l, z, y)
    axes = tissue_axes(problem.basis, problem.dictionary, 4).axes
    form = canonical_series(images, axes, (3e-3, 3e-3, 3e-3))
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.complex64, generator=generator))
    turned = torch.einsum("lk,xlzy->xkzy", turn.conj(), images)
    other = canonical_series(turned, turn.mH @ axes.to(turn), (3e-3, 3e-3, 3e-3))
    torch.testing.assert_close(other.images(turned), form.images(images), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(form.replaced(images, form.images(images)), images, rtol=1e-5, atol=1e-4)
    changed = form.images(images) + torch.randn(8, *noisy.mask.shape, generator=generator)
    torch.testing.assert_close(form.images(form.replaced(images, changed)), changed, rtol=1e-4, atol=1e-3)


def test_the_form_takes_a_smooth_phase_off(noisy):
    problem = noisy.problem
    images = noisy.coefficients.permute(3, 0, 1, 2)
    axes = tissue_axes(problem.basis, problem.dictionary, 5).axes
    phase = torch.linspace(-1.5, 1.5, images.shape[0])[:, None, None, None]
    plain, turned = (
        canonical_series(series, axes, (3e-3,) * 3).images(series)
        for series in (images, images * torch.polar(torch.ones_like(phase), phase))
    )
    assert float(plain[5:].abs().max()) < 1e-3 * float(plain[:5].abs().max())  # real signals stay real
    assert float((turned - plain).norm() / plain.norm()) < 0.05


def test_axes_do_not_depend_on_the_grid_of_the_dictionary():
    protocol, coarse = protocol_and_dictionary()
    fine = fingerprint_dictionary(protocol, (0.2, 5.0), (0.015, 2.5), 60, 50)
    one, two = (
        dictionary.basis(8).contrast @ tissue_axes(dictionary.basis(8), dictionary, 3).axes
        for dictionary in (coarse, fine)
    )
    assert float((one.mT @ two).diagonal().min()) > 0.95  # the same sign, and nearly the same axis


def test_the_checksum_is_of_the_protocol():
    protocol, _ = protocol_and_dictionary()
    rounded = replace(
        protocol,
        repetition_time=tuple(float(np.float32(1e3 * time)) / 1e3 for time in protocol.repetition_time),
    )
    assert protocol_checksum(rounded) == protocol_checksum(protocol)
    longer = replace(protocol, inversion_time=(0.025,))
    assert protocol_checksum(longer) != protocol_checksum(protocol)


# ---- arnet


def test_a_network_that_finds_nothing_leaves_the_linear_estimate(noisy):
    """It answers for all of its components: what it says is nothing there counts as nothing."""
    problem = replace(noisy.problem, network=network_of(noisy, "artifact_removal"))
    solver = ArtifactRemoval()
    maps = solved(solver, problem)
    estimate = solver.linear_estimate(problem, quiet)
    assert estimate.basis.rank < maps.rank == problem.basis.rank == 5
    images = torch.einsum("lk,xkzy->xlzy", estimate.basis.mixing[0], estimate.coefficients)
    every = CoefficientBasis(torch.eye(5, dtype=torch.complex64)[None], torch.ones(5), 1.0)
    linear = solver.matched(images, every, problem)
    for name in ("t1", "t2", "pd"):
        torch.testing.assert_close(maps.values[name], linear.values[name], rtol=1e-3, atol=0, equal_nan=True)
    wanted = estimate.residual_to_noise(estimate.coefficients)
    assert maps.residual_to_noise == pytest.approx(wanted, abs=1e-3)


def test_what_the_network_finds_is_added(noisy):
    """A constant on the strongest component's real part, in units of the intensity."""
    trained = network_of(noisy, "artifact_removal")
    trained.network.exit.bias[0] = 0.5
    problem = replace(noisy.problem, network=trained)
    maps, linear = (
        solved(ArtifactRemoval(), one)
        for one in (problem, replace(problem, network=network_of(noisy, "artifact_removal")))
    )
    brighter = maps.values["pd"][0][noisy.mask] / linear.values["pd"][0][noisy.mask]
    assert 1.4 < float(brighter.median()) < 2.2


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (lambda scan: None, "needs a trained network"),
        (
            lambda scan: network_of(scan, "series_denoiser"),
            "is for series_denoiser, not for artifact_removal",
        ),
        (lambda scan: network_of(scan, "artifact_removal", in_channels=3), "3 channels in and 10 out"),
        (
            lambda scan: network_of(scan, "artifact_removal", in_channels=12, out_channels=12),
            "wants 6 coefficient images, and basis.rank leaves 5",
        ),
        (lambda scan: network_of(scan, "artifact_removal", bias=float("nan")), "not finite"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(noisy, network, sentence):
    problem = replace(noisy.problem, network=network(noisy))
    with pytest.raises(ValueError, match=sentence):
        solved(ArtifactRemoval(), problem)


def test_a_network_of_another_protocol_is_refused(noisy):
    protocol = replace(noisy.problem.protocol, inversion_time=(0.03,))
    description = network_of(noisy, "artifact_removal").description
    ArtifactRemoval().check_network(description, noisy.problem.encoding, noisy.problem.protocol)
    with pytest.raises(
        ValueError, match="trained for jiang, another protocol than this scan's 60 time points"
    ):
        ArtifactRemoval().check_network(description, noisy.problem.encoding, protocol)
    with pytest.raises(ValueError, match="does not say which protocol"):
        ArtifactRemoval().check_network(replace(description, card={}), noisy.problem.encoding, protocol)


# ---- mrf_pnp


def percentage_error(maps: Maps, scan: FingerprintScan, name: str) -> float:
    """MAPE over the object; voxels without a value count as 0."""
    truth = getattr(scan, name)[scan.mask]
    return float(((maps.values[name][0].nan_to_num()[scan.mask] - truth).abs() / truth).mean())


def test_total_variation_plugged_in_beats_the_linear_estimate(noisy):
    linear = solved(FingerprintSubspace(), noisy.problem)
    solver = PlugAndPlay(denoiser="tv", rounds=5, iterations=6, fingerprints=False)
    maps = solved(solver, noisy.problem)
    assert percentage_error(maps, noisy, "t1") < 0.85 * percentage_error(linear, noisy, "t1")
    assert percentage_error(maps, noisy, "t2") < 0.95 * percentage_error(linear, noisy, "t2")
    assert maps.residual_to_noise == pytest.approx(1.0, abs=0.03)


def test_a_network_of_slices_takes_volumes_slice_by_slice(noisy):
    """Of its kernels the planes above and below never learned anything."""
    trained = network_of(noisy, "series_denoiser")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in trained.network.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    volume = torch.randn(10, 3, 32, 32, generator=generator)
    restored = NetworkSeriesDenoiser(trained)(volume, 0.02, torch.Generator())
    scale = series_intensity(volume)
    for number, slice_of_it in enumerate((volume / scale).split(1, dim=1)):
        alone = PatchwiseNetwork(trained).denoise(slice_of_it[None], 0.02)[0]
        torch.testing.assert_close(restored[:, number] / scale, alone[:, 0], rtol=1e-2, atol=1e-2)
        assert float((alone - slice_of_it).abs().max()) > 0.05
    assert from_trained(as_trained(volume, trained.description)).equal(volume)
    deep = replace(trained.description, patch=(16, 32, 32))
    assert as_trained(volume, deep).shape == (1, 10, 3, 32, 32)
    assert from_trained(as_trained(volume, deep)).equal(volume)


@pytest.mark.parametrize("denoiser", [VariationDenoiser(), BlockMatchingDenoiser()])
def test_denoisers_of_images_restore_a_series(noisy, denoiser):
    """Each image at the noise of all: strong ones keep their edges, weak ones lose most of their noise."""
    axes = tissue_axes(noisy.problem.basis, noisy.problem.dictionary, 2).axes
    images = noisy.coefficients.permute(3, 0, 1, 2)
    clean = canonical_series(images, axes, (3e-3,) * 3).images(images)
    noise = 0.05 * series_intensity(clean)
    series = clean + noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
    restored = ImageByImage(denoiser)(series, 0.05, torch.Generator())
    left = (restored - clean).square().mean((1, 2, 3)).sqrt() / noise
    assert float(left[:2].max()) < 0.9
    assert float(left[2:].max()) < 0.3  # nothing but noise there
    series[3] = 0
    assert not ImageByImage(denoiser)(series, 0.05, torch.Generator())[3].any()


def test_a_network_that_finds_no_noise_leaves_all_to_the_data(noisy):
    """Then each round only brings U nearer to k-space."""
    problem = replace(noisy.problem, network=network_of(noisy, "series_denoiser"))
    solver = PlugAndPlay(denoiser="network", rounds=3, field_share=0.0, fingerprints=False)
    maps = solved(solver, problem)
    estimate = solver.linear_estimate(problem, quiet)
    assert maps.residual_to_noise < estimate.residual_to_noise(estimate.coefficients)


def test_without_noise_to_find_fingerprints_alone_are_left(noisy):
    """The rounds are then those of ``mrf_admm`` at the same penalty."""
    level, rounds = 0.05, 4
    problem = replace(noisy.problem, network=network_of(noisy, "series_denoiser"))
    solver = PlugAndPlay(
        denoiser="network",
        rounds=rounds,
        first_level=level,
        last_level=level,
        fingerprints=True,
        field_share=1.0,
    )
    estimate = solver.linear_estimate(problem, quiet)
    axes = estimate.basis.mixing[0].mH @ tissue_axes(problem.basis, problem.dictionary, 5).axes.to(
        estimate.basis.mixing
    )
    scale = series_intensity(
        canonical_series(estimate.coefficients, axes, estimate.voxel_size).images(estimate.coefficients)
    )
    curvature = float(estimate.operator.mean_diagonal().mean())
    alike = FingerprintAdmm(
        rounds=rounds,
        iterations=solver.iterations,
        penalty=estimate.noise / (level * scale) ** 2 / curvature,
    )
    found = solver.refine(estimate, 0, quiet)
    expected = alike.refine(estimate, 0, quiet)
    assert float((found - expected).norm()) < 0.02 * float((expected - estimate.coefficients).norm())


def test_noise_that_a_network_finds_is_taken_off(noisy):
    """In the canonical form, in units of level and intensity."""
    trained = network_of(noisy, "series_denoiser")
    trained.network.exit.bias[1] = 2.0
    series = torch.randn(10, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    denoise = NetworkSeriesDenoiser(trained)
    restored = denoise(series, 0.02, torch.Generator())
    expected = series.clone()
    expected[1] -= 2 * 0.02 * series_intensity(series)
    torch.testing.assert_close(restored, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        denoise(3 * series, 0.02, torch.Generator()), 3 * restored, rtol=1e-3, atol=1e-3
    )
    with pytest.raises(ValueError, match="outside"):
        denoise(series, 0.5, torch.Generator())


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (lambda scan: None, "needs a trained network"),
        (
            lambda scan: network_of(scan, "artifact_removal"),
            "is for artifact_removal, not for series_denoiser",
        ),
        (lambda scan: network_of(scan, "series_denoiser", out_channels=8), "10 channels in and 8 out"),
    ],
)
def test_a_denoiser_that_does_not_fit_is_refused(noisy, network, sentence):
    with pytest.raises(ValueError, match=sentence):
        solved(PlugAndPlay(denoiser="network"), replace(noisy.problem, network=network(noisy)))


@pytest.mark.parametrize(
    ("change", "settings", "sentence"),
    [
        ({}, {"first_level": 0.3}, r"a noise level of 0\.3 lies a factor of 3 outside 0\.005\.\.0\.1"),
        ({}, {"last_level": 0.001}, r"a noise level of 0\.001 lies a factor of 5 outside"),
        ({"least": (1, 64, 64)}, {}, r"1 x 32 x 32 voxels .* smaller than 1 x 64 x 64"),
        ({"components": 6}, {}, r"wants 6 coefficient images, and basis\.rank leaves 5"),
    ],
)
def test_a_denoiser_that_does_not_suit_is_found_out_before_the_estimate(noisy, change, settings, sentence):
    channels = 2 * change.pop("components", 5)
    trained = network_of(noisy, "series_denoiser", in_channels=channels, out_channels=channels)
    trained = replace(trained, description=replace(trained.description, **change))

    def nothing(doing: str, share: float) -> None:
        raise AssertionError(f"{doing} has begun at {share}")

    solver = PlugAndPlay(denoiser="network", **settings)
    with pytest.raises(ValueError, match=sentence):
        list(solver.solve(replace(noisy.problem, network=trained), nothing))


def test_slices_that_are_too_small_for_arnet_are_refused(noisy):
    description = network_of(noisy, "artifact_removal").description
    encoding, protocol = noisy.problem.encoding, noisy.problem.protocol
    with pytest.raises(ValueError, match=r"1 x 32 x 32 voxels .* smaller than 1 x 32 x 64"):
        ArtifactRemoval().check_network(replace(description, least=(1, 32, 64)), encoding, protocol)
    # A network of single slices takes as many as there are.
    several = replace(encoding, matrix=(3, 32, 32))
    ArtifactRemoval().check_network(replace(description, least=(1, 32, 32)), several, protocol)


@pytest.mark.parametrize("last", [0.149, 0.0034])
def test_levels_that_the_rounds_lead_to_stay_within_those_of_the_network(noisy, last):
    """Images get darker or brighter on the way, and the level beside them another: that ends no scan.

    Unheld, the second round would ask for 0.194 of at most 0.15, or the last one for 0.00326 of at least
    0.00333.
    """
    trained = network_of(noisy, "series_denoiser", bias=-3.0)
    solver = PlugAndPlay(
        denoiser="network", rounds=4, iterations=4, first_level=0.149, last_level=last, fingerprints=False
    )
    maps = solved(solver, replace(noisy.problem, network=trained))
    assert bool(maps.values["t1"][0].isfinite().any())


def test_the_multiplier_is_kept_when_the_penalty_rises(noisy):
    """Against the same rounds with a multiplier that no penalty scales."""
    solver = PlugAndPlay(denoiser="tv", rounds=4, iterations=4, fingerprints=False, field_share=0.0)
    estimate = solver.linear_estimate(noisy.problem, quiet)
    u = z = estimate.coefficients
    form = canonical_series(u, torch.eye(u.shape[1]), estimate.voxel_size)
    scale = series_intensity(form.images(u))
    denoise = ImageByImage(VariationDenoiser(voxel_size=(3e-3,) * 3))
    multiplier = torch.zeros_like(u)
    for level in annealed_levels(0.1, 0.02, 4):
        penalty = estimate.noise / (level * scale) ** 2
        u = estimate.proximal(z - multiplier / penalty, penalty, u, 4, 0.0)
        images = u + multiplier / penalty
        series = form.images(images)
        clean = denoise(series, level * scale / series_intensity(series), torch.Generator())
        z = form.replaced(images, clean)
        multiplier = multiplier + penalty * (u - z)
    found = solver.refine(estimate, 0, quiet)
    assert float((found - u).norm()) < 0.01 * float((u - estimate.coefficients).norm())


def test_levels_fall():
    assert annealed_levels(0.4, 0.1, 3) == pytest.approx([0.4, 0.2, 0.1])
    assert annealed_levels(0.4, 0.1, 1) == pytest.approx([0.1])
    with pytest.raises(ValueError, match="levels must fall"):
        PlugAndPlay(first_level=0.01, last_level=0.02)
    assert PlugAndPlay().network is None  # runs without weights
    assert PlugAndPlay(denoiser="network", weights="mine").network == NetworkRequest(
        "series_denoiser", "mine"
    )


# ---- pairs


def test_the_perfect_images_are_what_a_full_scan_without_noise_gives(phantom):
    """With the phase and the scale of the coil maps of that reconstruction."""
    scan = replace(SCAN, snr=float("inf"))
    dictionary = scan.dictionary()
    placed = place_slice(load_anatomy(phantom), scan, dictionary.basis(0.9999), seed=2)
    simulated = simulate_slice(placed, scan, dictionary, seed=2)
    pair = reconstructed_pair(simulated, ArtifactRemoval(), 5)
    weak = (pair.reconstructed - pair.perfect)[:3].norm() / pair.perfect[:3].norm()
    assert float(weak) < 0.05
    assert float((pair.perfect[0] > 0).float().mean()) > 0.3


def test_pairs_are_simulated_once(phantom, tmp_path):
    plan = PairPlan((SCAN,), slices=1)
    solver = ArtifactRemoval(learning_iterations=2, linear_iterations=1, most_iterations=2)
    told: list[tuple[int, int]] = []
    ((first,),) = simulate_pairs([phantom], plan, solver, tmp_path / "pairs", lambda *step: told.append(step))
    (file,) = (tmp_path / "pairs").iterdir()
    written = file.stat().st_mtime_ns
    ((second,),) = simulate_pairs([phantom], plan, solver, tmp_path / "pairs")
    torch.testing.assert_close(second.reconstructed, first.reconstructed, rtol=0, atol=0)
    assert (told, file.stat().st_mtime_ns) == ([(1, 1)], written)
    for broken in (b"no pair", file.read_bytes()[:-200]):
        file.write_bytes(broken)
        with pytest.raises(ScanError, match="is not a pair of coefficient images"):
            simulate_pairs([phantom], plan, solver, tmp_path / "pairs")


def test_another_schedule_in_the_same_file_is_another_scan(phantom, tmp_path):
    schedule, pairs = tmp_path / "schedule.csv", tmp_path / "pairs"
    plan = PairPlan((replace(SCAN, schedule=str(schedule), points=None),), slices=1)
    solver = ArtifactRemoval(learning_iterations=2, linear_iterations=1, most_iterations=2)
    found = []
    for scale in (1.0, 1.5):
        angles = scale * (10 + 30 * np.abs(np.sin(np.arange(POINTS) / 12)))
        lines = ["flip_angle_deg,tr_ms", *(f"{angle:.3f},12" for angle in angles)]
        schedule.write_text("\n".join(lines))
        found += simulate_pairs([phantom], plan, solver, pairs)[0]
    assert len(list(pairs.iterdir())) == 2
    assert not torch.equal(found[0].perfect, found[1].perfect)


def test_patches_of_a_pair_are_of_the_same_place():
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(10, 1, 64, 64, generator=generator) + 0.5
    pair = SeriesPair(clean + 0.25, clean)
    sampler = PairSampler([pair], SeriesPatches((32, 32), 3, phase=0.0))
    scale = float((normalised(pair)[0] / pair.reconstructed).mean())
    for step in range(3):
        batch = sampler(step, torch.Generator().manual_seed(step))
        assert batch.input.shape == (3, 10, 1, 32, 32)
        factor = (batch.input - batch.target) / (0.25 * scale)
        torch.testing.assert_close(factor, factor[:, :1, :, :1, :1].expand_as(factor), rtol=1e-3, atol=1e-3)
        assert 0.69 < float(factor.min()) <= float(factor.max()) < 1.31
    assert artifact_energy([pair]).allclose(torch.full((10,), (0.25 * scale) ** 2), rtol=1e-3)


def test_scans_of_two_protocols_are_no_training():
    with pytest.raises(ScanError, match="a network is for one protocol"):
        PairPlan((SCAN, replace(SCAN, points=POINTS + 1)))


# ---- what is held out


def heights(plan: PairPlan, part) -> list[tuple[int, float]]:
    """Phantom and height [mm] of every scan of slices."""
    return [
        (number, 1e3 * _drawn(plan, place, _seed(plan.seed, number, place, scan))[0])
        for number, place in part
        for scan in range(len(plan.scans))
    ]


@pytest.mark.parametrize(("slices", "scans"), [(8, 1), (24, 1), (12, 3)])
def test_slices_held_out_show_nothing_that_was_learned_from(slices, scans):
    """Of 5 mm each, a millimetre or three apart."""
    plan = PairPlan((ScanPlan(),) * scans, slices=slices, extent=24.0)
    parting = part_slices(2, plan, 0.1)
    held = heights(plan, parting.held)
    assert len(parting.held) == 2 * max(1, round(0.1 * slices))
    assert len(parting.learned) >= slices
    for number, height in heights(plan, parting.learned):
        assert all(abs(height - other) >= 5.0 for phantom, other in held if phantom == number)
    assert "upper end of each phantom, without" in parting.by
    assert [parting.places[number] for number in parting.of(parting.held)] == list(parting.held)


def test_of_many_phantoms_whole_ones_are_held_out():
    parting = part_slices(6, PairPlan((ScanPlan(),), slices=3), 0.3)
    assert parting.by == "phantoms"
    assert len({number for number, _ in parting.held}) == 2
    assert not {number for number, _ in parting.held} & {number for number, _ in parting.learned}
    assert len(parting.places) == 18


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--held-out", "0.7"], r"a share of 0\.7 to hold out for validation is not within 0\.\.0\.5"),
        (["--slices", "1"], "one slice alone cannot be learned from and held out"),
        (["--slices", "2", "--extent", "2"], r"of 2 slices of 4 mm, 1 mm apart, none is left to learn from"),
        (["--components", "40"], "40 components are more than the 7 coefficient images"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_simulated(phantom, tmp_path, options, sentence):
    for command in ("train-arnet", "train-series-denoiser"):
        output = tmp_path / f"{command}.safetensors"
        done = CliRunner().invoke(app, [command, str(phantom), "-o", str(output), *OPTIONS, *options])
        assert re.search(sentence, str(done.exception)), command
        assert not output.with_suffix(".pairs").exists()


def test_a_file_that_is_no_phantom_is_refused_before_a_dictionary_is_simulated(tmp_path, monkeypatch):
    def simulated(_plan):
        raise AssertionError("a dictionary was simulated")

    monkeypatch.setattr(ScanPlan, "dictionary", simulated)
    other = tmp_path / "other.npz"
    np.savez(other, volume=np.ones((4, 4, 4)))
    for command in ("train-arnet", "train-series-denoiser"):
        done = CliRunner().invoke(app, [command, str(other), "-o", str(tmp_path / "w.safetensors"), *OPTIONS])
        assert isinstance(done.exception, ScanError), command
        assert "other.npz" in str(done.exception)


def test_the_same_phantom_twice_is_refused(phantom, tmp_path):
    """Of many, one of the two would be held out, and its tissue learned from all the same."""
    again = tmp_path / "again.npz"
    again.write_bytes(phantom.read_bytes())
    for command in ("train-arnet", "train-series-denoiser"):
        weights = str(tmp_path / "w.safetensors")
        done = CliRunner().invoke(app, [command, str(phantom), str(again), "-o", weights, *OPTIONS])
        assert re.search(r"the phantoms .*ellipses\.npz and .*again\.npz are the same", str(done.exception))


@pytest.mark.parametrize("levels", ["0.1,0.5,3.7", "0.1,0.5,inf"])
def test_a_number_of_levels_is_whole(phantom, tmp_path, levels):
    for command in (["train-series-denoiser", str(phantom)], ["train-denoiser", "--data", str(tmp_path)]):
        arguments = [*command, "-o", str(tmp_path / "net.safetensors"), "--levels", levels]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2
        assert "not a whole number" in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("minutes", ["0", "-1"])
def test_no_minutes_are_refused_by_all_trainings(phantom, tmp_path, minutes):
    """None at all are not meant as no limit."""
    series = [[name, str(phantom)] for name in ("train-arnet", "train-series-denoiser")]
    for command in (*series, ["train-denoiser", "--data", str(tmp_path)]):
        arguments = [*command, "-o", str(tmp_path / "net.safetensors"), "--steps", "1", "--minutes", minutes]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2, command
        assert "--minutes" in done.output


# ---- scans that the network was not trained on

CONDITIONS = ScanConditions(8, True, 0.125, 20.0, {"tolerance": 3.0, "t1_range": (0.4, 4.5)})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"coils": 4}, "8 coils, here 4"),
        ({"calibrated": False}, "with calibration readouts, here without"),
        ({"visited": 1.0}, "0.125 samples of distinct readouts a voxel, here 1"),
        ({"signal_to_noise": 60.0}, "a signal of 10..20 times the noise, here 60"),
        ({"solver": {"tolerance": 6.0}}, "tolerance 3.0, here 6.0"),
        ({"solver": {"t1_range": (0.1, 4.5)}}, "t1_range [0.4, 4.5], here [0.1, 4.5]"),
    ],
)
def test_other_scans_than_those_of_the_training_are_told_with_both_values(change, sentence):
    trained = [CONDITIONS, replace(CONDITIONS, signal_to_noise=10.0)]
    card = json.loads(json.dumps(conditions_card(trained)))
    assert differences(card, replace(CONDITIONS, signal_to_noise=14.0)) == []
    assert differences(card, replace(CONDITIONS, **change)) == [sentence]


@pytest.mark.parametrize("card", [None, [], {}, {"coils": "8", "calibrated": 1, "visited": {}, "solver": 3}])
def test_a_card_that_tells_nothing_is_said(card):
    assert differences(card, CONDITIONS)


def test_a_scan_and_its_plan_visit_as_much_of_k_space(phantom):
    scan = replace(SCAN, acquired=4, snr=float("inf"))
    dictionary = scan.dictionary()
    placed = place_slice(load_anatomy(phantom), scan, dictionary.basis(0.999), seed=2)
    kspace = simulate_slice(placed, scan, dictionary, seed=2).problem.kspace
    assert visited_share(kspace) == pytest.approx(scan.visited)
    assert scan.visited == pytest.approx(SCAN.visited / 3)
    short = replace(scan, acquired=None, points=3)
    assert short.visited == pytest.approx(scan.visited * 3 / 4), "no more readouts than time points"
    assert visited_share(kspace) < 0.1 * kspace.trajectory.shape[0] / 48**2  # played again and again


# ---- commands

OPTIONS = [
    *("--points", str(POINTS), "--matrix", "48,48", "--fov", "96,96,4", "--coils", "4", "--slices", "3"),
    *("--steps", "100", "--channels", "8,8", "--patch", "48,48", "--batch", "4", "--held-out", "0.3"),
    *("--threads", "1", "--rate", "6e-3", "--json"),
]


def test_arnet_is_trained_and_used(phantom, tmp_path, caplog):
    weights = tmp_path / "arnet.safetensors"
    own = ["--interleaves", "12", "--acquired", "4", "--calibration", "--components", "4"]
    command = ["train-arnet", str(phantom), "-o", str(weights), *own, *OPTIONS]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    card = json.loads(done.stdout)
    assert card["steps"] == 100
    losses = [
        float(line.split(",")[1]) for line in weights.with_suffix(".loss.csv").read_text().splitlines()[1:]
    ]
    assert losses[-1] < 0.9 * losses[0]  # 0.79
    assert weights.with_suffix(".loss.png").read_bytes().startswith(b"\x89PNG")
    assert card["validation"]["score"] > 0.5  # dB on the slice that was held out
    page = weights.with_suffix(".md").read_text()
    assert "artifact_removal" in page
    assert "Energy of the artifacts that were learned from over the error of held out slices in dB" in page
    assert "PSNR" not in page
    assert card["trained_on"]["coils"] == [4]
    description = read_network(weights, "artifact_removal").description
    assert description.shape.in_channels == 8
    again = CliRunner().invoke(app, command)
    assert again.exit_code != 0
    assert "is there already" in str(again.exception)

    raw, maps = tmp_path / "raw.h5", tmp_path / "maps.h5"
    simulate_fingerprint(
        output=raw,
        phantom=phantom,
        points=POINTS,
        interleaves=12,
        acquired=4,
        order="shuffled",
        matrix=(48, 48, 1),
        fov=(96.0, 96.0, 4.0),
        coils=4,
        supersampling=1,
        calibration="separate",
        seed=0,
    )
    caplog.clear()
    replay(raw, "arnet", maps, [f"reconstruct.weights={weights}"])
    assert "other scans" not in caplog.text
    loose = [f"reconstruct.weights={weights}", "reconstruct.tolerance=6"]
    replay(raw, "arnet", tmp_path / "loose.h5", loose)
    assert "other scans than this one, whose artifacts may stay: tolerance 3.0, here 6.0" in caplog.text
    assert compare(maps, raw)["maps"]["T1"]["nrmse"] < 0.6
    with pytest.raises(ScanError, match="train-arnet"):
        replay(raw, "arnet", tmp_path / "none.h5")
    other = tmp_path / "other.h5"
    simulate_fingerprint(
        output=other, phantom=phantom, points=80, matrix=(48, 48, 1), fov=(96.0, 96.0, 4.0), supersampling=1
    )
    with pytest.raises(ScanError, match="jiang of 96 time points, another protocol"):
        replay(other, "arnet", tmp_path / "none.h5", [f"reconstruct.weights={weights}"])


def test_a_denoiser_of_series_is_trained(phantom, tmp_path):
    weights = tmp_path / "series.safetensors"
    done = CliRunner().invoke(app, ["train-series-denoiser", str(phantom), "-o", str(weights), *OPTIONS])
    assert done.exit_code == 0, done.output
    card = json.loads(done.stdout)
    losses = [
        float(line.split(",")[1]) for line in weights.with_suffix(".loss.csv").read_text().splitlines()[1:]
    ]
    assert losses[-1] < 0.9 * losses[0]  # 0.81
    assert card["validation"]["score"] > 0.5  # dB on the slice that was held out
    assert weights.with_suffix(".loss.png").read_bytes().startswith(b"\x89PNG")
    description = read_network(weights, "series_denoiser").description
    assert (description.noise_levels[0], description.noise_levels[-1]) == (0.002, 0.5)
    assert len(description.noise_levels) == 16
    assert card["data"]["held_out"] == 1
    page = weights.with_suffix(".md").read_text()
    assert "PSNR of held out slices in dB, noisy -> denoised" in page
    assert "| 1 phantoms, 1 held out (by the upper end of each phantom) |" in page
