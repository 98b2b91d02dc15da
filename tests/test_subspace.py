"""The subspace solver against ground truth: noise-free limits, undersampling, and what it must refuse."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from scan_of_ellipses import PROTOCOLS, scan_of_ellipses

from quantitron.recon.data import Basis
from quantitron.recon.field_map import field_map
from quantitron.recon.masks import signal_mask
from quantitron.recon.metrics import CAPS, nrmse
from quantitron.recon.noise import noise_variance
from quantitron.recon.signal.models import signal
from quantitron.recon.solvers import Subspace


def _problem(sequence, **scan):
    return scan_of_ellipses(PROTOCOLS[sequence], **scan)


def _solve(problem, **settings):
    (maps,) = Subspace(**settings).solve(problem, lambda doing, share: None)
    return maps


@pytest.mark.parametrize("sequence", PROTOCOLS)
def test_a_full_noise_free_scan_gives_its_maps(sequence):
    problem, truth, mask = _problem(sequence)
    maps = _solve(problem)
    assert maps.failed_voxels == 0
    assert math.isnan(maps.residual_to_noise)
    inside = mask & maps.mask[0]
    assert inside.sum() > 0.98 * mask.sum()
    for name in ("t1", "t2", "t2star"):
        if name in maps.values:
            error = maps.values[name][0][inside] / truth[name][inside] - 1
            assert float(error.square().mean().sqrt()) < 0.02, name
    error = maps.values["b0"][0][inside] - truth["b0"][inside]
    assert float(error.abs().max()) < 0.5
    if sequence == "t2ir_gre":
        assert float((maps.values["inversion"][0][inside] - 0.93).abs().max()) < 0.02


@pytest.mark.parametrize(("sequence", "limits"), [("vfa_gre", (0.11, 0.11)), ("t2ir_gre", (0.14, 0.14))])
def test_undersampled_noisy_scans_come_close(sequence, limits):
    problem, truth, mask = _problem(sequence, acceleration=4, noise=0.15)
    maps = _solve(problem)
    for name, limit in zip(("t1", "t2star"), limits, strict=True):
        estimate = maps.values[name][0].numpy()
        assert nrmse(estimate, truth[name].numpy(), mask.numpy(), CAPS[name]) < limit, name
    # 1 is pure noise, of which the unknowns take up a part.
    assert 0.5 < maps.residual_to_noise < 1.15


def test_the_same_data_give_the_same_maps():
    problem, *_ = _problem("vfa_gre", acceleration=6, noise=0.3)
    first, second = _solve(problem), _solve(problem)
    for name, values in first.values.items():
        assert torch.equal(values.nan_to_num(), second.values[name].nan_to_num())


def test_taking_the_off_resonance_out_of_the_basis_pays():
    """At equal rank, a basis that must span the whole field fits far worse than one behind a field map."""
    problem, truth, mask = _problem("vfa_gre", acceleration=4, noise=0.1)
    errors = []
    for residual_field in (3.0, 60.0):
        maps = _solve(problem, rank=6, residual_field=residual_field)
        estimate = maps.values["t2star"][0].numpy()
        errors.append(nrmse(estimate, truth["t2star"].numpy(), mask.numpy(), CAPS["t2star"]))
        assert maps.rank == 6
    assert errors[0] < errors[1]


def test_rank_above_the_frames_is_refused():
    problem, *_ = _problem("megre")
    with pytest.raises(ValueError, match="rank 6 is above the 5 frames"):
        _solve(problem, rank=6)


def test_empty_data_give_an_empty_mask():
    problem, *_ = _problem("megre")
    reduced = replace(problem.reduced, projected=0 * problem.reduced.projected, energy=0.0)
    maps = _solve(replace(problem, reduced=reduced, noise_known=True))
    assert not maps.mask.any()
    assert maps.values["t2star"].isnan().all()


def test_measured_bases_serve_as_well():
    problem, truth, mask = _problem("vfa_gre")
    measured = Basis(
        problem.reduced.basis.contrast, torch.tensor([0.9, 0.08, 0.015, 0.005]), 1.0, "navigator"
    )
    maps = _solve(replace(problem, reduced=replace(problem.reduced, basis=measured)))
    inside = mask & maps.mask[0]
    assert float((maps.values["t1"][0][inside] / truth["t1"][inside] - 1).square().mean().sqrt()) < 0.02


def test_noise_level_is_found_at_the_edge_of_kspace():
    problem, *_ = _problem("megre", grid=(8, 48, 32), noise=7.0)
    assert noise_variance(problem.reduced) == pytest.approx(1, rel=0.1)


def test_field_map_resolves_whole_turns():
    """A ramp over more than one turn between echoes comes out as a ramp."""
    protocol = replace(PROTOCOLS["megre"], echo_time=(0.004, 0.009, 0.014))  # one turn: 200 Hz
    y = torch.linspace(-1, 1, 48)
    b0 = (150 * y)[None, :, None].expand(1, 48, 24)
    images = signal({"t2star": torch.full(b0.shape, 0.05), "b0": b0}, protocol).movedim(-1, 0)[
        :, None
    ]  # (e, l, z, y, x)
    found = field_map(images, protocol, torch.ones(b0.shape, dtype=torch.bool))
    shift = (found - b0).median().div(200).round() * 200  # a whole turn in common cannot be known
    inner = slice(3, -3)  # the neighbourhood is cut at the edges of the grid
    torch.testing.assert_close((found - shift)[:, inner], b0[:, inner], atol=0.5, rtol=0)


@pytest.mark.parametrize("echoes", [(1.2, 2.2, 12, 25, 37), (0.5, 1.5, 10, 20, 30), (2, 30)])
def test_field_map_of_uneven_echoes_takes_the_right_maximum(echoes):
    protocol = replace(PROTOCOLS["megre"], echo_time=tuple(1e-3 * echo for echo in echoes))
    widest = 0.45 / (min(later - former for former, later in pairwise(echoes)) * 1e-3)
    b0 = min(60.0, widest) * torch.linspace(-1, 1, 48)[None, :, None].expand(1, 48, 24)
    images = signal({"t2star": torch.full(b0.shape, 0.05), "b0": b0}, protocol).movedim(-1, 0)[:, None]
    found = field_map(images, protocol, torch.ones(b0.shape, dtype=torch.bool))
    inner = slice(3, -3)  # the neighbourhood is cut at the edges of the grid
    torch.testing.assert_close(found[:, inner], b0[:, inner], atol=0.7, rtol=0)


def test_no_standard_deviation_is_claimed_of_an_averaged_inversion_efficiency():
    problem, *_ = _problem("t2ir_gre", noise=0.5)
    maps = list(Subspace(standard_deviations=True).solve(problem, lambda *_: None))[-1]
    assert "inversion" in maps.values
    assert {"t1", "t2", "t2star"} <= set(maps.standard_deviation)
    assert "inversion" not in maps.standard_deviation


def test_mask_drops_specks_and_fills_holes():
    amplitude = torch.full((1, 20, 20), 0.01)
    amplitude[0, 4:16, 4:16] = 1.0
    amplitude[0, 9, 9] = 0.0
    amplitude[0, 0, 19] = 1.0
    expected = torch.zeros(1, 20, 20, dtype=torch.bool)
    expected[0, 4:16, 4:16] = True
    assert torch.equal(signal_mask(amplitude), expected)
    assert not signal_mask(torch.zeros(2, 3, 3)).any()
