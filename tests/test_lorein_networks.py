"""The networks of lorein's maps, and how maps are drawn between them and the data."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from lorein_scans import QUICK, SCANS, TINY, quiet, same, scan, solve, started

from quantitron.recon.signal.map_model import normal_blocks
from quantitron.recon.solvers import LoREIN, ModelBased
from quantitron.recon.solvers.map_networks import MapNetworks, marginal_precision
from quantitron.recon.solvers.map_objective import Attraction, MapObjective
from quantitron.recon.solvers.training import Schedule, TrainingDiverged

pytestmark = pytest.mark.usefixtures("one_thread")


def _networks(start, estimate, seed=0, shared=True):
    return MapNetworks(
        start,
        estimate.voxel_size,
        torch.Generator().manual_seed(seed),
        shared_encoder=shared,
        levels=8,
        log2_rows=12,
    )


def test_precision_is_that_of_the_inverse_of_the_normal_equations():
    _, estimate, _, start = started("t2ir_gre")
    weight = estimate.operator.mean_diagonal()
    found = marginal_precision(start, weight)
    _, jacobian = start.model.jacobian(start.theta.double())
    inverse = torch.linalg.inv(normal_blocks(jacobian, weight.double()))
    expected = 1 / inverse.diagonal(dim1=1, dim2=2)
    ratio = found / expected
    # A ridge of 1e-6 is felt only where an unknown is all but unknown.
    assert 0.99 < float(ratio.quantile(0.02)) < float(ratio.quantile(0.98)) < 1.05


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sequence", SCANS)
def test_networks_start_at_the_mean_and_come_closer(sequence, shared):
    _, estimate, _, start = started(sequence)
    networks = _networks(start, estimate, shared=shared)
    names = [start.model.names[column] for column in networks.columns]
    assert names == ["amplitude", *start.model.times]
    target = start.theta[:, networks.columns]
    torch.testing.assert_close(networks.logarithms(), target.mean(0).expand_as(target), rtol=0, atol=0.05)
    precision = marginal_precision(start, estimate.operator.mean_diagonal())
    errors, shares = [], []

    def error():
        return (networks.logarithms() - target).abs().median(0).values

    before = error()
    for _ in range(2):
        record = networks.fit(
            start.theta, precision, Schedule(40, 3e-3), lambda _doing, share: shares.append(share)
        )
        assert record.epochs_kept == 40
        errors.append(error())
    assert bool((errors[0] < 0.7 * before).all())
    assert bool((errors[1] < 0.5 * before).all())
    assert shares[39] == shares[-1] == 1.0
    assert record.losses[-1]["map networks"] < record.losses[0]["map networks"]


def test_a_voxel_of_which_nothing_is_known_is_filled_in_by_its_neighbours():
    _, estimate, _, start = started("vfa_gre", grid=(2, 20, 20))
    precision = marginal_precision(start, estimate.operator.mean_diagonal()).clone()
    smooth = start.theta.clone()
    spoilt = torch.arange(len(smooth)) % 7 == 0
    theta = smooth.clone()
    theta[spoilt, 2] += 3.0
    precision[spoilt, 2] = 0
    networks = _networks(start, estimate)
    networks.fit(theta, precision, Schedule(120, 3e-3))
    column = networks.columns.index(2)
    error = (networks.logarithms()[:, column] - smooth[:, 2])[spoilt].square().mean().sqrt()
    assert float(error) < 0.5  # of the 3 that a fit to all voxels alike would follow


def test_a_fit_that_is_not_finite_says_so():
    _, estimate, _, start = started()
    precision = marginal_precision(start, estimate.operator.mean_diagonal())
    with pytest.raises(TrainingDiverged, match="'map networks' is not finite in epoch 1"):
        _networks(start, estimate).fit(start.theta * torch.nan, precision, Schedule(3))
    with pytest.raises(TrainingDiverged, match="not finite"):
        _networks(start, estimate).fit(start.theta, precision, Schedule(3, 1e30))


def test_networks_that_diverge_are_fitted_again_and_then_left_out(monkeypatch, caplog):
    problem, *_ = scan("vfa_gre", **TINY)
    reference = solve(LoREIN, problem, network_rounds=0)
    fit, rates = MapNetworks.fit, []

    def diverging(times):
        def fails(self, theta, precision, schedule, progress=None):
            rates.append(schedule.learning_rate)
            spoilt = theta * (math.inf if len(rates) <= times else 1)
            return fit(self, spoilt, precision, schedule, progress)

        return fails

    monkeypatch.setattr(MapNetworks, "fit", diverging(1))
    with caplog.at_level(logging.WARNING, "quantitron"):
        maps = solve(LoREIN, problem, network_learning_rate=4e-3, **QUICK)
    assert rates == [4e-3, 2e-3]
    assert maps.failure == ""
    assert "training starts again at half the learning rate, 0.002" in caplog.text
    assert not same(maps, reference)

    rates.clear()
    monkeypatch.setattr(MapNetworks, "fit", diverging(2))
    maps = solve(LoREIN, problem, **QUICK)
    assert maps.failure.startswith("lorein: training diverged at learning rate 0.003 and again at half of it")
    assert maps.failure.endswith("the maps are those without networks")
    assert same(maps, reference)


# --------------------------------------------------------------------------------------------- the attraction


def test_gradient_of_the_attraction_is_that_of_differences():
    _, estimate, _, start = started()
    generator = torch.Generator().manual_seed(0)
    units = start.model.units(start.theta)
    centre = start.theta + 0.2 * units * torch.randn(start.theta.shape, generator=generator)
    strength = marginal_precision(start, estimate.operator.mean_diagonal()) * torch.rand(
        start.theta.shape, generator=generator
    )
    with_it = Attraction(centre, strength)
    variation = ModelBased().variation(estimate, start)
    objectives = [MapObjective(estimate, start, variation, term) for term in (with_it, None)]
    values = [objective(start.theta).value for objective in objectives]
    assert values[0] - values[1] == pytest.approx(with_it.value(start.theta), rel=1e-4)
    slopes = [objective(start.theta).linearise() for objective in objectives]
    torch.testing.assert_close(
        slopes[0].gradient - slopes[1].gradient,
        strength * (start.theta - centre),
        rtol=1e-3,
        atol=1e-4 * float(slopes[1].gradient.abs().max()),
    )
    step = units * torch.randn(start.theta.shape, generator=generator)
    difference = slopes[0].normal(step) - slopes[1].normal(step)
    torch.testing.assert_close(
        difference, strength * step, rtol=1e-3, atol=1e-5 * float(difference.abs().max())
    )


def test_maps_are_drawn_between_the_data_and_the_networks():
    """Strength as that of the data: half-way; far above it: all the way; the other unknowns stay free."""
    _, estimate, _, start = started(acceleration=1)
    solver = ModelBased(weight=1e-6, amplitude_weight=1e-6)
    variation = solver.variation(estimate, start)
    data = solver.descend(estimate, start, quiet, rounds=4, variation=variation).theta
    precision = marginal_precision(start, estimate.operator.mean_diagonal())
    column = start.model.names.index("t2star")
    centre = data.clone()
    centre[:, column] += 0.05
    for share, way in ((1.0, 0.5), (100.0, 0.99)):
        strength = torch.zeros_like(precision)
        strength[:, column] = share * precision[:, column]
        found = solver.descend(
            estimate, start, quiet, rounds=4, variation=variation, attraction=Attraction(centre, strength)
        )
        assert float((found.theta - data)[:, column].median()) == pytest.approx(0.05 * way, rel=0.12)
