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


def series(seed: int, shape: tuple[int, ...] = (5, 3, 4)) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal(shape) + 1j * random.standard_normal(shape)


def test_cosine_distance_knows_no_factor() -> None:
    reference = series(0)
    factor = series(1, (3, 4))
    inside = np.ones((3, 4), bool)
    assert metrics.cosine_distance(factor * reference, reference, inside) == pytest.approx(0, abs=1e-12)
    orthogonal = np.zeros_like(reference)
    orthogonal[0], orthogonal[1] = reference[1].conj(), -reference[0].conj()
    reference[2:] = 0
    assert metrics.cosine_distance(orthogonal, reference, inside) == pytest.approx(1)
    half = np.zeros_like(reference)
    half[0] = reference[0]
    share = np.abs(reference[0]) / np.linalg.norm(reference, axis=0)
    assert metrics.cosine_distance(half, reference, inside) == pytest.approx(np.mean(1 - share))


def test_cosine_distance_is_that_of_the_coefficients() -> None:
    axes = np.linalg.qr(np.random.default_rng(2).standard_normal((40, 5)))[0]
    found, reference, inside = series(3), series(4), np.ones((3, 4), bool)
    over_time = metrics.cosine_distance(
        np.tensordot(axes, found, 1), np.tensordot(axes, reference, 1), inside
    )
    assert metrics.cosine_distance(found, reference, inside) == pytest.approx(over_time)


def test_cosine_distance_counts_a_voxel_without_estimate_in_full() -> None:
    reference = series(5)
    found = reference.copy()
    found[1, 0, 0] = np.nan
    inside = np.ones((3, 4), bool)
    assert metrics.cosine_distance(found, reference, inside) == pytest.approx(1 / 12)
    inside[0, 0] = False
    assert metrics.cosine_distance(found, reference, inside) == pytest.approx(0, abs=1e-12)
    reference[:, 2] = 0  # nothing to compare with
    found[:, 2] = 7
    assert metrics.cosine_distance(found, reference, inside) == pytest.approx(0, abs=1e-12)


def picture() -> np.ndarray:
    z, y, x = np.mgrid[:2, :40, :36].astype(float)
    return 2 + np.sin(y / 5 + z) * np.cos(x / 4)


def test_psnr_is_the_range_over_the_error() -> None:
    reference, inside = picture(), np.ones((2, 40, 36), bool)
    found = reference + 0.1 * np.where(np.arange(36) % 2, 1, -1)
    peak = np.percentile(reference, 99.5)
    assert metrics.psnr(found, reference, inside) == pytest.approx(20 * math.log10(peak / 0.1))
    assert metrics.psnr(3 * found, 3 * reference, inside) == pytest.approx(
        metrics.psnr(found, reference, inside)
    )
    assert metrics.psnr(reference, reference, inside) == math.inf


def test_contrasts_count_inside_the_mask_only() -> None:
    reference = picture()
    inside = np.zeros(reference.shape, bool)
    inside[:, 8:30, 8:30] = True
    random = np.random.default_rng(6)
    found = reference + 0.1 * random.standard_normal(reference.shape)
    other = np.where(inside, found, 50 * random.standard_normal(reference.shape))
    other[0, 0, 0] = np.nan
    for measure in (metrics.psnr, metrics.ssim):
        assert measure(other, reference, inside) == measure(found, reference, inside)
        more_air = np.pad(inside, ((0, 0), (20, 20), (20, 20)))
        padded = [np.pad(image, ((0, 0), (20, 20), (20, 20))) for image in (found, reference)]
        assert measure(*padded, more_air) == pytest.approx(measure(found, reference, inside))


def test_ssim_falls_with_noise_and_blur_and_averages_slices() -> None:
    reference, inside = picture(), np.ones((2, 40, 36), bool)
    noise = np.random.default_rng(7).standard_normal(reference.shape)
    assert metrics.ssim(reference, reference, inside) == pytest.approx(1)
    little, much = (metrics.ssim(reference + level * noise, reference, inside) for level in (0.05, 0.3))
    assert 1 > little > much > 0
    one_bad = reference.copy()
    one_bad[1] += 0.3 * noise[1]
    half = metrics.ssim(one_bad, reference, inside)
    inside[0] = False
    only_bad = metrics.ssim(one_bad, reference, inside)
    assert half == pytest.approx((1 + only_bad) / 2, rel=0.01)


def test_ssim_by_hand() -> None:
    """One window: means, variances and covariance by the formula."""
    random = np.random.default_rng(8)
    reference, found = random.random((2, 1, 7, 7)) + 1
    whole = np.ones((1, 7, 7), bool)
    peak = np.percentile(reference, 99.5)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    a, b = reference.ravel(), found.ravel()
    (va, cov), (_, vb) = np.cov(a, b)
    expected = (2 * a.mean() * b.mean() + c1) * (2 * cov + c2)
    expected /= (a.mean() ** 2 + b.mean() ** 2 + c1) * (va + vb + c2)
    _, similarity = metrics.structural_similarity(
        found[0], reference[0], win_size=7, data_range=peak, full=True
    )
    assert similarity[3, 3] == pytest.approx(expected)
    assert metrics.ssim(found, reference, whole) == pytest.approx(similarity.mean())


def test_contrasts_without_a_range_are_refused() -> None:
    zero, inside = np.zeros((1, 8, 8)), np.ones((1, 8, 8), bool)
    for measure in (metrics.psnr, metrics.ssim):
        with pytest.raises(ValueError, match="no positive values"):
            measure(zero, zero, inside)
        with pytest.raises(ValueError, match="the mask is empty"):
            measure(zero, zero, ~inside)
        with pytest.raises(ValueError, match="shapes differ"):
            measure(zero, zero[:, 1:], inside)
    with pytest.raises(ValueError, match=r"slices .* of 7 voxels or more"):
        metrics.ssim(np.ones((1, 6, 8)), np.ones((1, 6, 8)), np.ones((1, 6, 8), bool))
    with pytest.raises(ValueError, match="zero everywhere"):
        metrics.cosine_distance(np.ones((2, 3)), np.zeros((2, 3)), np.ones(3, bool))
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.cosine_distance(np.ones((2, 3)), np.ones((2, 4)), np.ones(3, bool))
