"""Spirals: gradient limits, density of the arms, rotation, and the shape of a measured one."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from quantitron.gadgets.errors import ScanError
from quantitron.phantoms.spiral import GYROMAGNETIC_RATIO, MARGIN, SpiralDesign, design_spiral, rotate

DATA = Path(__file__).parents[2] / "shared" / "data"
MEASURED = DATA / "usc_vdspiral_48arm.mat"

DESIGNS = [
    SpiralDesign(),
    SpiralDesign(matrix=64, interleaves=16, gradient=20e-3, slew=80.0),
    SpiralDesign(matrix=256, field_of_view=0.3, interleaves=96, edge=1.0, constant=0.0),
    SpiralDesign(matrix=96, interleaves=8, centre=1.5, edge=0.3, constant=0.05, dwell_time=5e-6),
    SpiralDesign(matrix=32, interleaves=48, constant=0.5),
]


def complex_positions(design):
    return design_spiral(design) @ [1, 1j]


@pytest.mark.parametrize("design", DESIGNS)
def test_gradients_stay_within_their_limits_and_use_them(design):
    k = np.concatenate([[0, 0], complex_positions(design)])  # it is at rest before
    per_metre = design.matrix / design.field_of_view
    gradient = np.abs(np.diff(k)) * per_metre / design.dwell_time / GYROMAGNETIC_RATIO
    slew = np.abs(np.diff(k, 2)) * per_metre / design.dwell_time**2 / GYROMAGNETIC_RATIO
    assert gradient.max() <= design.gradient
    assert slew.max() <= design.slew
    # At every moment one of the two limits is what holds the spiral back.
    effort = np.maximum(gradient[1:] / design.gradient, slew / design.slew)[2:-2]
    assert effort.min() > 0.93


@pytest.mark.parametrize("design", DESIGNS)
def test_spiral_runs_from_the_centre_to_the_edge(design):
    radius = np.abs(complex_positions(design))
    assert radius[0] == 0
    assert radius[-1] == pytest.approx(0.5, abs=1e-9)
    assert (np.diff(radius) > 0).all()


@pytest.mark.parametrize("design", DESIGNS)
def test_arms_support_the_field_of_view_that_was_asked_for(design):
    """Along a ray, arms of all interleaves follow each other at 1 / (N F)."""
    k = complex_positions(design)
    radius, angle = np.abs(k[1:]), np.unwrap(np.angle(k[1:]))
    fine = np.linspace(radius[2], 0.5, 4001)
    turns = np.interp(fine, radius, angle) / (2 * np.pi)
    between = np.gradient(fine, turns) / design.interleaves
    middle = fine[100:-100]
    supported = 1 / (design.matrix * between[100:-100])
    knots = ([0, design.constant, 0.5], [design.centre, design.centre, design.edge])
    assert np.abs(supported / np.interp(middle, *knots) - 1).max() < 0.05
    if design.centre >= 1:  # Nyquist at the centre
        assert between[(fine > 0.005) & (fine < design.constant)].max(initial=0) < 1.05 / design.matrix


def test_time_is_the_shortest_for_simple_limits():
    """With so few turns that it is almost straight, the way out is that of constant acceleration."""
    design = SpiralDesign(matrix=64, interleaves=2048, gradient=1.0)
    time = (len(design_spiral(design)) - 1) * design.dwell_time
    acceleration = MARGIN * GYROMAGNETIC_RATIO * design.slew * design.field_of_view / design.matrix
    assert time == pytest.approx(math.sqrt(2 * 0.5 / acceleration), rel=0.02)


def test_a_finer_path_is_the_same_spiral(monkeypatch):
    coarse = design_spiral(SpiralDesign())
    monkeypatch.setattr("quantitron.phantoms.spiral.NODES", 30000)
    fine = design_spiral(SpiralDesign())
    assert len(coarse) == pytest.approx(len(fine), abs=1)
    grid = np.linspace(0, 1, 500)
    for axis in (0, 1):
        a, b = (np.interp(grid, np.linspace(0, 1, len(s)), s[:, axis]) for s in (coarse, fine))
        assert np.abs(a - b).max() < 1e-3


def test_interleaves_are_rotated_copies():
    arm = design_spiral(SpiralDesign(matrix=32, interleaves=5))
    arms = rotate(arm, 5)
    assert arms.shape == (5, len(arm), 2)
    assert arms.dtype == np.float32
    for number in range(5):
        turned = (arm @ [1, 1j]) * np.exp(2j * np.pi * number / 5)
        assert np.abs(arms[number] @ [1, 1j] - turned).max() < 1e-6


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"matrix": 1}, "1 voxels"),
        ({"field_of_view": -0.2}, "-0.2 m"),
        ({"interleaves": 0}, "interleaves is 0"),
        ({"gradient": 0.0}, "gradient of the spiral is 0"),
        ({"slew": math.inf}, "slew of the spiral is inf"),
        ({"dwell_time": -1e-6}, "dwell_time of the spiral"),
        ({"edge": 0.0}, "edge of the spiral is 0"),
        ({"constant": 0.6}, "constant of the spiral is 0.6"),
        ({"matrix": 1024, "interleaves": 1}, "use more interleaves"),
    ],
)
def test_designs_that_make_no_spiral_are_refused(change, sentence):
    with pytest.raises(ScanError, match=sentence):
        design_spiral(dataclasses.replace(SpiralDesign(), **change))


@pytest.mark.skipif(not MEASURED.exists(), reason="the measured spiral is not here")
def test_shape_is_that_of_a_measured_spiral():
    """48 arms for 256 voxels with the gradient limits that the measured ones show (for 1 mm voxels)."""
    import scipy.io

    content = scipy.io.loadmat(MEASURED)
    arms = content["kx_GIRF"] + 1j * content["ky_GIRF"]
    measured = arms[:, 0]
    dwell = float(content["dt"].item())
    per_tesla = dwell * GYROMAGNETIC_RATIO * 1e-3
    design = SpiralDesign(
        matrix=256,
        field_of_view=0.256,
        interleaves=48,
        gradient=float(np.abs(np.diff(measured)).max()) / per_tesla / MARGIN,
        slew=float(np.abs(np.diff(measured, 2)).max()) / per_tesla / dwell / MARGIN,
        dwell_time=dwell,
    )
    own = complex_positions(design)
    assert len(own) == pytest.approx(len(measured), rel=0.03)
    radius = np.linspace(0.02, 0.49, 200)
    theirs, ours = (np.interp(radius, np.abs(k), np.abs(np.unwrap(np.angle(k)))) for k in (measured, own))
    apart = (ours - ours[0]) - (theirs - theirs[0])
    assert np.abs(apart).max() < 2 * np.pi * 0.03  # of two turns; arms are 1 / 48 turn apart
    grid = np.linspace(0, 1, 500)
    theirs, ours = (np.interp(grid, np.linspace(0, 1, len(k)), np.abs(k)) for k in (measured, own))
    assert np.abs(ours - theirs).max() < 0.015  # distance from the centre at equal times
    turns = np.angle(arms[900, 1:] / arms[900, :-1]) / (2 * np.pi)
    assert np.abs(np.abs(turns) - 1 / 48).max() < 1e-4
