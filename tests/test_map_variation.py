"""Total variation of maps: its value by the formula, its gradient, the quadratics that bound it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from quantitron.recon.priors.finite_difference import FiniteDifference
from quantitron.recon.priors.map_variation import MapVariation, inner_pairs, typical_differences

GRID = (5, 3, 4)  # (x, z, y)
VOXEL = (1e-3, 2.5e-3, 1e-3)
SPACING = (1.0, 2.5, 1.0)
GROUPS, WEIGHTS = ((0, 2), (1, 3)), (0.7, 1.9)
SCALE = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=torch.float64)
PHASE = 3


def _maps(seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn((GRID[0], 4, *GRID[1:]), dtype=torch.float64, generator=generator)


def _mask(seed=0):
    return torch.rand(GRID, generator=torch.Generator().manual_seed(seed)) < 0.75


def _variation(mask=None, smoothing=0.1, angles=(PHASE,)):
    return MapVariation(_mask() if mask is None else mask, VOXEL, GROUPS, WEIGHTS, SCALE, smoothing, angles)


def _by_voxels(theta, mask, smoothing):
    """The formula, one voxel after the other."""
    total = 0.0
    for place in itertools.product(*map(range, GRID)):
        if not mask[place]:
            continue
        for group, weight in zip(GROUPS, WEIGHTS, strict=True):
            typical = math.sqrt(3 * len(group))
            square = (smoothing * typical) ** 2
            for axis, spacing in enumerate(SPACING):
                other = tuple(index + (number == axis) for number, index in enumerate(place))
                if other[axis] == GRID[axis] or not mask[other]:
                    continue
                for number in group:
                    at, there = ((p[0], number, p[1], p[2]) for p in (place, other))
                    difference = float(theta[there] - theta[at])
                    if number == PHASE:
                        difference = math.remainder(difference, 2 * math.pi)
                    square += (difference / spacing / float(SCALE[number])) ** 2
            total += weight * typical * math.sqrt(square)
    return total


@pytest.mark.parametrize("smoothing", [0.02, 0.5])
def test_value_is_the_formula(smoothing):
    theta, mask = _maps(0, 3.0), _mask()
    assert _variation(smoothing=smoothing).value(theta) == pytest.approx(
        _by_voxels(theta, mask, smoothing), rel=1e-10
    )


@pytest.mark.parametrize("varying", [False, True])
def test_gradient_is_that_of_finite_differences(varying):
    weights = [weight * (_maps(30)[:, :1].abs() if varying else 1) for weight in WEIGHTS]
    variation = MapVariation(_mask(), VOXEL, GROUPS, weights, SCALE, 0.1, (PHASE,))
    theta, step = _maps(1), 1e-6
    gradient = variation.gradient(theta)
    for seed in range(5):
        direction = _maps(10 + seed)
        slope = (variation.value(theta + step * direction) - variation.value(theta - step * direction)) / (
            2 * step
        )
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)
    torch.testing.assert_close(gradient, variation.gradient(theta, variation.reweighting(theta)))


def test_the_quadratic_touches_and_lies_above():
    """Phases are small here: beyond half a turn the quadratic is of another branch."""
    variation, theta = _variation(angles=()), _maps(2)
    weights = variation.reweighting(theta)

    def bound(maps):
        return 0.5 * float((maps * variation.quadratic(maps, weights)).sum())

    offset = variation.value(theta) - bound(theta)
    torch.testing.assert_close(variation.quadratic(theta, weights), variation.gradient(theta))
    for seed, size in itertools.product(range(4), (1e-3, 0.1, 3.0)):
        other = theta + _maps(20 + seed, size)
        assert variation.value(other) <= bound(other) + offset + 1e-9


def test_the_quadratic_is_symmetric_and_its_diagonal_exact():
    variation = _variation()
    weights = variation.reweighting(_maps(3))
    units = torch.eye(_maps(0).numel(), dtype=torch.float64).reshape(-1, *_maps(0).shape)
    matrix = torch.stack([variation.quadratic(unit, weights).flatten() for unit in units])
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), variation.diagonal(weights).flatten())
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-10


def test_weights_may_vary_in_space():
    theta, mask = _maps(0), _mask()
    half = torch.zeros_like(theta[:, :1])
    half[:2] = 1

    def value(*weights):
        return MapVariation(mask, VOXEL, GROUPS, weights, SCALE, 0.1, (PHASE,)).value(theta)

    everywhere = torch.ones_like(half)
    assert value(0.7 * everywhere, 1.9 * everywhere) == pytest.approx(value(0.7, 1.9), rel=1e-12)
    parts = value(0.7 * half, 0.0) + value(0.7 * (1 - half), 0.0)
    assert parts == pytest.approx(value(0.7, 0.0), rel=1e-12)
    assert value(0.7 * half, 0.0) < value(0.7, 0.0)


def test_a_whole_turn_of_phase_costs_nothing():
    variation, theta = _variation(), _maps(4, 0.3)
    turned = theta.clone()
    turned[2:, PHASE] += 2 * math.pi
    turned[:, PHASE, 1] -= 4 * math.pi
    assert variation.value(turned) == pytest.approx(variation.value(theta), rel=1e-12)
    torch.testing.assert_close(variation.gradient(turned), variation.gradient(theta))
    turned[2:, 0] += 2 * math.pi  # no phase
    assert variation.value(turned) > 1.1 * variation.value(theta)


def test_what_lies_outside_the_mask_does_not_count():
    variation, theta, mask = _variation(), _maps(5), _mask()
    other = torch.where(mask[:, None], theta, 100 * _maps(6))
    assert variation.value(other) == variation.value(theta)
    gradient = variation.gradient(other)
    assert torch.equal(gradient, variation.gradient(theta))
    assert not gradient.permute(0, 2, 3, 1)[~mask].any()


def test_a_mask_of_single_voxels_has_no_edges():
    mask = torch.zeros(GRID, dtype=torch.bool)
    mask[0, 0, 0] = mask[2, 1, 1] = True
    assert not inner_pairs(mask).any()
    variation, theta = _variation(mask), _maps(7)
    assert variation.value(theta) == variation.value(0 * theta)
    assert not variation.gradient(theta).any()


def test_flat_maps_cost_least_and_edges_in_one_place_less_than_apart():
    everywhere = torch.ones(GRID, dtype=torch.bool)
    variation = MapVariation(everywhere, VOXEL, GROUPS, WEIGHTS, torch.ones(4).double(), 1e-3)
    flat, together, apart = (torch.zeros_like(_maps(0)) for _ in range(3))
    together[2:, [0, 2]] = 1
    apart[2:, 0], apart[3:, 2] = 1, 1
    least = variation.value(flat)
    assert least == pytest.approx(sum(w * 6 for w in WEIGHTS) * 1e-3 * math.prod(GRID))
    rise, rise_apart = variation.value(together) - least, variation.value(apart) - least
    assert rise_apart == pytest.approx(2**0.5 * rise, rel=1e-2)
    across = torch.zeros_like(flat)
    across[2:, 0], across[3:, 1] = 1, 1
    moved = torch.zeros_like(flat)
    moved[2:, 0], moved[2:, 1] = 1, 1
    assert variation.value(across) == pytest.approx(variation.value(moved))  # groups have edges of their own


def test_typical_differences_are_those_of_noise_whatever_the_edges():
    grid = (24, 6, 24)
    generator = torch.Generator().manual_seed(0)
    deviation = torch.tensor([0.1, 2.0, 0.3])
    maps = torch.randn((24, 3, 6, 24), generator=generator) * (deviation / 2**0.5)[:, None, None]
    maps[12:, 1] += 100  # an edge through the middle
    maps[:, 2, :, 12:] += 2 * math.pi  # and a whole turn
    mask = torch.ones(grid, dtype=torch.bool)
    least = torch.zeros(3)
    found = typical_differences(maps, mask, (1e-3, 1e-3, 1e-3), least, angles=(2,))
    torch.testing.assert_close(found, deviation, rtol=0.05, atol=0)
    coarse = typical_differences(maps, mask, (1e-3, 1e-3, 1e-3), torch.tensor([1.0, 1.0, 1.0]), (2,))
    torch.testing.assert_close(coarse, torch.tensor([1.0, float(found[1]), 1.0]))
    single = torch.zeros_like(mask)
    single[0, 0, 0] = True
    assert torch.equal(typical_differences(maps, single, VOXEL, deviation), deviation)


def test_a_diagonal_with_weights_of_every_direction():
    difference = FiniteDifference(VOXEL)
    weights = torch.rand(3, *_maps(0).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    units = torch.eye(_maps(0).numel(), dtype=torch.float64).reshape(-1, *_maps(0).shape)
    diagonal = torch.stack([(weights * difference(unit).square()).sum() for unit in units])
    torch.testing.assert_close(difference.weighted_diagonal(weights).flatten(), diagonal)
    shared = difference.weighted_diagonal(weights[0])
    torch.testing.assert_close(shared, difference.weighted_diagonal(weights[:1].expand_as(weights)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"groups": ((0, 1), (1, 2))}, "each map in one group"),
        ({"weights": (1.0,)}, "one weight a group"),
        ({"smoothing": 0.0}, "must be above zero"),
        ({"scale": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "must be above zero"),
    ],
)
def test_wrong_settings_are_refused(change, sentence):
    settings = {"groups": GROUPS, "weights": WEIGHTS, "scale": SCALE, **change}
    with pytest.raises(ValueError, match=sentence):
        MapVariation(_mask(), VOXEL, **settings)
