"""The metrics of METHODS 7 against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantitron.recon import metrics

ALL = np.ones(4, bool)
TRUTH = np.array([1.0, 2.0, 3.0, 4.0])


def test_nrmse_is_the_norm_of_the_error_over_that_of_the_reference() -> None:
    found = TRUTH + np.array([1.0, -1.0, 1.0, -1.0])
    assert metrics.nrmse(found, TRUTH, ALL) == pytest.approx(2 / math.sqrt(30))
    assert metrics.nrmse(TRUTH, TRUTH, ALL) == 0
    assert metrics.nrmse(found, TRUTH, np.array([True, False, False, False])) == pytest.approx(1)


def test_caps_hold_for_estimate_and_reference() -> None:
    assert metrics.CAPS == {"t1": 3.5, "t2": 0.2, "t2star": 0.1}
    reference = np.array([1.0, 4.5])
    found = np.array([1.0, 9.0])
    both = np.ones(2, bool)
    assert metrics.nrmse(found, reference, both, cap=3.5) == 0
    assert metrics.nrmse(np.array([1.0, 3.0]), reference, both, cap=3.5) == pytest.approx(
        0.5 / math.hypot(1, 3.5)
    )
    assert metrics.bias(found, reference, both, cap=3.5) == 0
    assert metrics.bias(found, reference, both) == pytest.approx(2.25)


@pytest.mark.parametrize("nothing", [np.nan, np.inf, -np.inf])
def test_no_value_counts_as_zero(nothing: float) -> None:
    dropped, zero = TRUTH.copy(), TRUTH.copy()
    dropped[2], zero[2] = nothing, 0
    for measure in (metrics.nrmse, metrics.rmse, metrics.mape, metrics.bias, metrics.circular_rmse):
        assert measure(dropped, TRUTH, ALL) == measure(zero, TRUTH, ALL)
        assert measure(dropped, TRUTH, ALL) != 0
    assert metrics.missing_voxels(dropped, ALL) == 1
    assert metrics.missing_voxels(dropped, TRUTH < 3) == 0


def test_dropping_a_hard_voxel_never_pays() -> None:
    bad = TRUTH.copy()
    bad[3] = 5.5
    dropped = TRUTH.copy()
    dropped[3] = np.nan
    for measure in (metrics.nrmse, metrics.mape):
        assert measure(dropped, TRUTH, ALL) > measure(bad, TRUTH, ALL)


def test_mape_leaves_out_voxels_whose_reference_is_zero() -> None:
    reference = np.array([0.0, 2.0, 4.0, -5.0])
    found = np.array([9.0, 3.0, 3.0, -4.0])
    assert metrics.mape(found, reference, ALL) == pytest.approx((0.5 + 0.25 + 0.2) / 3)


def test_phase_differences_go_round_the_circle() -> None:
    found = np.array([math.pi - 0.1, 0.2])
    reference = np.array([-math.pi + 0.1, 0.0])
    assert metrics.circular_rmse(found, reference, np.ones(2, bool)) == pytest.approx(0.2)
    assert metrics.rmse(found, reference, np.ones(2, bool)) > 4


def test_line_of_estimate_over_reference() -> None:
    line = metrics.fit_line(0.5 * TRUTH + 3, TRUTH, ALL)
    assert (line.slope, line.intercept, line.r_squared) == pytest.approx((0.5, 3, 1))
    scattered = np.array([1.0, 3.0, 2.0, 4.0])
    line = metrics.line_through(scattered, TRUTH)
    assert line.slope == pytest.approx(0.8)
    assert line.r_squared == pytest.approx(np.corrcoef(scattered, TRUTH)[0, 1] ** 2)
    constant = metrics.line_through(scattered, np.full(4, 0.08))
    assert math.isnan(constant.slope)
    assert math.isnan(constant.r_squared)


def test_proton_density_after_one_factor() -> None:
    estimate = 250 * TRUTH
    estimate[1] = np.nan
    factor = metrics.fitted_factor(estimate, TRUTH, ALL)
    assert factor == pytest.approx(1 / 250)
    noisy = TRUTH + np.array([0.3, -0.2, 0.1, 0.4])
    best = metrics.fitted_factor(noisy, TRUTH, ALL)
    error = metrics.nrmse(best * noisy, TRUTH, ALL)
    assert error < metrics.nrmse(1.01 * best * noisy, TRUTH, ALL)
    assert error < metrics.nrmse(0.99 * best * noisy, TRUTH, ALL)


def test_spheres() -> None:
    labels = np.array([0, 7, 7, 2, 2, 2])
    reference = np.array([9.0, 2, 2, 5, 5, 5])
    found = np.array([1.0, 1, 3, 5, 6, np.nan])
    second, seventh = metrics.sphere_statistics(found, reference, labels)
    assert (second.label, second.voxels, seventh.label, seventh.voxels) == (2, 3, 7, 2)
    assert (seventh.reference, seventh.mean, seventh.bias) == pytest.approx((2, 2, 0))
    assert seventh.variation == pytest.approx(0.5)
    assert second.mean == pytest.approx(11 / 3)
    assert second.bias == pytest.approx((11 / 3 - 5) / 5)


def test_what_cannot_be_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.nrmse(TRUTH[:3], TRUTH, ALL)
    with pytest.raises(ValueError, match="mask is empty"):
        metrics.nrmse(TRUTH, TRUTH, ~ALL)
    with pytest.raises(ValueError, match="reference is zero"):
        metrics.nrmse(TRUTH, 0 * TRUTH, ALL)
    with pytest.raises(ValueError, match="reference is zero"):
        metrics.mape(TRUTH, 0 * TRUTH, ALL)
    with pytest.raises(ValueError, match="estimate is zero"):
        metrics.fitted_factor(0 * TRUTH, TRUTH, ALL)
