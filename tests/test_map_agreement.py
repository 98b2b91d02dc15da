"""Between the maps that penalties give and the linear estimate's: shares worked out independently."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scan_of_ellipses import PROTOCOLS

from quantitron.recon.signal.map_model import MapModel
from quantitron.recon.solvers.map_agreement import agreed, local_variance
from quantitron.recon.solvers.map_estimate import MapEstimate

GRID = (12, 3, 10)
"""(x, z, y)."""


def estimate(sequence: str, mask: torch.Tensor, **logarithms: torch.Tensor) -> MapEstimate:
    """Unknowns of zero but for the maps (x, z, y) that are given."""
    model = MapModel(PROTOCOLS[sequence], torch.zeros(1, 1), torch.zeros(1, 1, 1))
    zero = torch.zeros(GRID)
    theta = torch.stack([logarithms.get(name, zero)[mask] for name in model.names], 1)
    return MapEstimate(theta, mask, model, torch.zeros(GRID[0], 1, *GRID[1:], dtype=torch.complex64))


def column(maps: MapEstimate, name: str) -> torch.Tensor:
    """One of the unknowns as an image (x, z, y)."""
    return maps.images(maps.theta)[:, maps.model.names.index(name)]


def everywhere() -> torch.Tensor:
    return torch.ones(GRID, dtype=torch.bool)


def step(low: float, high: float) -> torch.Tensor:
    """Tissue on one side of the plane x = 6, fluid on the other."""
    return torch.where(torch.arange(GRID[0]) < 6, math.log(low), math.log(high))[:, None, None].expand(GRID)


def test_variance_is_that_of_the_gaussian_neighbourhood():
    """Against a sum over all pairs of voxels inside a mask with a ragged border."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(GRID, generator=generator) < 0.8
    values = torch.randn(GRID, generator=generator)
    found = local_variance(estimate("t2ir_gre", mask, t2=values), 3)
    places = mask.nonzero().double().numpy()
    apart = places[:, None] - places[None]
    # The Gaussian is cut off beyond 4 standard deviations, 3 voxels; borders repeat what lies at them.
    weight = np.exp(-0.5 * np.square(apart / 0.8).sum(-1)) * (np.abs(apart) <= 3).all(-1)
    inner = ((places >= 3) & (places < np.array(GRID) - 3))[:, [0, 2]].all(1)
    for n, (place, row) in enumerate(zip(places, weight, strict=True)):
        if not inner[n]:
            continue
        total = row.copy()
        for shift in (-3, -2, -1, 1, 2, 3):  # z has three planes: those beyond are the outermost once more
            beyond = place[1] + shift
            if 0 <= beyond < GRID[1]:
                continue
            edge = np.clip(beyond, 0, GRID[1] - 1)
            line = np.exp(-0.5 * np.square(apart[n] / 0.8)[:, [0, 2]].sum(-1)) * (
                np.abs(apart[n])[:, [0, 2]] <= 3
            ).all(-1)
            total += line * np.exp(-0.5 * (shift / 0.8) ** 2) * (places[:, 1] == edge)
        samples = values[mask].double().numpy()
        mean = np.average(samples, weights=total)
        expected = np.average(np.square(samples - mean), weights=total)
        assert float(found[n]) == pytest.approx(expected, rel=1e-4)
    assert inner.sum() > 20


def test_t2_between_tissue_and_fluid_is_the_linear_estimates_and_elsewhere_that_of_the_maps():
    found = estimate("t2ir_gre", everywhere(), t2=step(0.07, 1.0), t1=step(1.0, 4.0))
    linear = estimate("t2ir_gre", everywhere(), t2=step(0.08, 0.9), t1=step(1.1, 3.0))
    share = (column(agreed(found, linear, 0.0, 0.7), "t2") - column(found, "t2")) / (
        column(linear, "t2") - column(found, "t2")
    )
    jump = math.log(1.0 / 0.07)
    weights = np.exp(-0.5 * np.square(np.arange(-3, 4) / 0.8))
    part = weights[4:].sum() / weights.sum()  # of the neighbourhood, beyond the edge next door
    variance = part * (1 - part) * jump**2
    expected = variance**2 / (variance**2 + 0.7**4)
    assert expected > 0.8
    torch.testing.assert_close(share[5:7], torch.full((2, *GRID[1:]), float(expected)), rtol=1e-3, atol=0)
    assert float(share[:3].abs().max()) < 1e-3
    assert float(share[9:].abs().max()) < 1e-3
    assert torch.equal(column(agreed(found, linear, 0.0, 0.7), "t1"), column(found, "t1"))


def test_white_beside_grey_matter_is_no_edge():
    found = estimate("t2ir_gre", everywhere(), t2=step(0.065, 0.085))
    linear = estimate("t2ir_gre", everywhere(), t2=step(0.055, 0.1))
    change = column(agreed(found, linear, 0.0, 0.7), "t2") - column(found, "t2")
    assert float(change.abs().max()) < 2e-4


def test_t2_is_that_of_the_maps_where_no_spread_is_given():
    found = estimate("t2ir_gre", everywhere(), t2=step(0.07, 1.0))
    linear = estimate("t2ir_gre", everywhere(), t2=step(0.08, 0.9))
    assert torch.equal(agreed(found, linear, 3.0, 0.0).theta, found.theta)


def test_t2star_that_is_moved_much_further_than_is_typical_is_the_linear_estimates():
    found = estimate("vfa_gre", everywhere())
    distance = torch.full(GRID, 0.01)
    distance[::2] *= -1
    distance[3, 1, 4] = 0.2
    linear = estimate("vfa_gre", everywhere(), t2star=distance)
    drawn = column(agreed(found, linear, 3.0, 0.7), "t2star")
    usual = 0.455 / 9  # (distance / (3 typical))^2: the median square is 0.455 of a normal one's variance
    share = torch.full(GRID, usual / (1 + usual))
    share[3, 1, 4] = 400 * usual / (1 + 400 * usual)  # 0.95
    torch.testing.assert_close(drawn, share * distance)


@pytest.mark.parametrize("sequence", ["vfa_gre", "t2ir_gre", "megre"])
def test_estimates_that_agree_are_left_as_they_are(sequence):
    maps = estimate(sequence, everywhere(), t2star=step(0.05, 0.1), t2=step(0.07, 1.0))
    assert torch.equal(agreed(maps, maps, 3.0, 0.7).theta, maps.theta)


def test_a_value_that_is_not_finite_stays_alone():
    t2star = torch.zeros(GRID)
    t2star[3, 1, 4] = torch.nan
    found, linear = estimate("vfa_gre", everywhere(), t2star=t2star), estimate("vfa_gre", everywhere())
    drawn = column(agreed(found, linear, 1e-4, 0.7), "t2star")
    assert int(drawn.isnan().sum()) == 1
