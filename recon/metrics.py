"""How far maps are from a reference (METHODS.md 7). A voxel without an estimate (NaN) counts as 0 everywhere,
so that dropping hard voxels never pays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

Map = NDArray[np.floating]
Series = NDArray[np.inexact]
Mask = NDArray[np.bool_]

CAPS = {"t1": 3.5, "t2": 0.2, "t2star": 0.1}
"""Largest value [s] that counts, for estimate and reference alike: beyond lies fluid that no scan
resolves."""
PEAK_PERCENTILE = 99.5
"""Of the reference inside the mask: what counts as the range of an image's intensities. The few voxels above
are vessels and fluid, whose brightness is another in every image."""
SSIM_WINDOW = 7
"""Edge in voxels of the windows of structural similarity."""


@dataclass(frozen=True)
class Line:
    """Least-squares line: estimate = slope x reference + intercept."""

    slope: float
    intercept: float
    r_squared: float
    """Squared correlation coefficient; NaN where the reference or the estimate is constant."""


@dataclass(frozen=True)
class SphereStatistics:
    """One sphere of a phantom."""

    label: int
    voxels: int
    reference: float
    """Mean of the reference, in its unit."""
    mean: float
    """Mean of the estimate."""
    variation: float
    """Coefficient of variation of the estimate (standard deviation over mean); NaN where the mean is 0."""
    bias: float
    """(mean - reference) / reference."""


def nrmse(estimate: Map, reference: Map, mask: Mask, cap: float | None = None) -> float:
    """``||estimate - reference|| / ||reference||`` inside the mask, both capped first.

    Args:
        estimate: any shape; NaN counts as 0.
        reference: same shape and unit.
        mask: same shape.
        cap: largest value that counts, in the unit of the maps.

    Raises:
        ValueError: if shapes differ, the mask is empty or the reference is zero inside it.
    """
    found, truth = _inside(estimate, reference, mask, cap)
    norm = float(np.linalg.norm(truth))
    if norm == 0:
        raise ValueError("the reference is zero everywhere inside the mask")
    return float(np.linalg.norm(found - truth)) / norm


def rmse(estimate: Map, reference: Map, mask: Mask) -> float:
    """Root mean square difference inside the mask, in the unit of the maps; NaN counts as 0."""
    found, truth = _inside(estimate, reference, mask)
    return float(np.sqrt(np.mean((found - truth) ** 2)))


def circular_rmse(estimate: Map, reference: Map, mask: Mask) -> float:
    """Root mean square of the phase difference [rad], wrapped to -pi..pi; NaN counts as 0."""
    found, truth = _inside(estimate, reference, mask)
    difference = np.angle(np.exp(1j * (found - truth)))
    return float(np.sqrt(np.mean(difference**2)))


def bias(estimate: Map, reference: Map, mask: Mask, cap: float | None = None) -> float:
    """Mean of estimate - reference inside the mask, both capped first, in the unit of the maps."""
    found, truth = _inside(estimate, reference, mask, cap)
    return float(np.mean(found - truth))


def mape(estimate: Map, reference: Map, mask: Mask) -> float:
    """Mean of ``|estimate - reference| / |reference|`` over the voxels of the mask where the reference is not
    0.

    Raises:
        ValueError: if shapes differ or there is no such voxel.
    """
    found, truth = _inside(estimate, reference, mask)
    usable = truth != 0
    if not usable.any():
        raise ValueError("the reference is zero everywhere inside the mask")
    return float(np.mean(np.abs(found[usable] - truth[usable]) / np.abs(truth[usable])))


def cosine_distance(estimate: Series, reference: Series, mask: Mask) -> float:
    """Mean of ``1 - |<x, x_ref>| / (||x|| ||x_ref||)`` over voxels of the mask whose reference is not 0.

    How far image series are from being right but for a factor in each voxel: 0 where they are, 1 where
    nothing is right, and where there is no estimate. The same for signals over time and for their
    coefficients in an orthonormal basis. MRI2Qmap, IV-A4.

    Args:
        estimate: (k, ...) real or complex; a voxel with NaN counts as 0.
        reference: (k, ...).
        mask: (...).

    Raises:
        ValueError: if shapes differ, the mask is empty or the reference is zero inside it.
    """
    if estimate.shape != reference.shape or estimate.shape[1:] != mask.shape:
        raise ValueError(
            f"shapes differ: estimate {estimate.shape}, reference {reference.shape}, mask {mask.shape}"
        )
    if not mask.any():
        raise ValueError("the mask is empty")
    found, truth = (np.asarray(values[:, mask], np.complex128) for values in (estimate, reference))
    found = np.where(np.isfinite(found).all(0), found, 0)
    product = np.abs((found.conj() * truth).sum(0))
    norm_found, norm_truth = (np.linalg.norm(values, axis=0) for values in (found, truth))
    usable = norm_truth > 0
    if not usable.any():
        raise ValueError("the reference is zero everywhere inside the mask")
    norms = norm_found[usable] * norm_truth[usable]
    cosine = np.divide(product[usable], norms, out=np.zeros_like(norms), where=norms > 0)
    return float(np.mean(1 - np.minimum(cosine, 1)))


def psnr(estimate: Map, reference: Map, mask: Mask) -> float:
    """Peak signal-to-noise ratio [dB] inside the mask: 20 log10 of the reference's range over the RMSE.

    The range is the ``PEAK_PERCENTILE`` of the reference inside the mask. Outside nothing counts: air that is
    cut off in both images would make the number larger.

    Args:
        estimate: any shape; NaN counts as 0.
        reference: same shape and unit.
        mask: same shape.

    Returns:
        infinity where both are equal.

    Raises:
        ValueError: if shapes differ, the mask is empty or the reference has no positive range inside it.
    """
    found, truth = _inside(estimate, reference, mask)
    error = float(np.sqrt(np.mean((found - truth) ** 2)))
    peak = _peak(truth)
    return 20 * float(np.log10(peak / error)) if error > 0 else float("inf")


def ssim(estimate: Map, reference: Map, mask: Mask) -> float:
    """Structural similarity (Wang 2004) of each axial slice inside the mask, averaged over the slices.

    Both images are 0 outside the mask. The range of intensities is that of ``psnr``, the same for all slices.

    Args:
        estimate: (z, y, x); NaN counts as 0.
        reference: (z, y, x), in the same unit.
        mask: (z, y, x); slices without any voxel of it do not count.

    Raises:
        ValueError: if shapes differ, the mask is empty, slices are smaller than the window or the reference
            has no positive range inside the mask.
    """
    _, truth = _inside(estimate, reference, mask)
    if mask.ndim != 3 or min(mask.shape[1:]) < SSIM_WINDOW:
        raise ValueError(
            f"structural similarity needs slices (z, y, x) of {SSIM_WINDOW} voxels or more, not {mask.shape}"
        )
    peak = _peak(truth)
    similarities = []
    for found, wanted, inside in zip(estimate, reference, mask, strict=True):
        if inside.any():
            planes = (
                np.where(inside, np.nan_to_num(plane.astype(np.float64), posinf=0.0, neginf=0.0), 0)
                for plane in (found, wanted)
            )
            _, similarity = structural_similarity(  # type: ignore[no-untyped-call]
                *planes, win_size=SSIM_WINDOW, data_range=peak, full=True
            )
            similarities.append(float(similarity[inside].mean()))
    return float(np.mean(similarities))


def fit_line(estimate: Map, reference: Map, mask: Mask, cap: float | None = None) -> Line:
    """Least-squares line of estimate over reference inside the mask, both capped first."""
    found, truth = _inside(estimate, reference, mask, cap)
    return line_through(found, truth)


def line_through(estimate: Map, reference: Map) -> Line:
    """Least-squares line through points (n,), such as the means of spheres."""
    x = reference.astype(np.float64) - np.mean(reference, dtype=np.float64)
    y = estimate.astype(np.float64) - np.mean(estimate, dtype=np.float64)
    xx, yy, xy = float(x @ x), float(y @ y), float(x @ y)
    # below this the values are constant to the rounding of their own storage
    least = (1e-6 * float(np.max(np.abs(reference), initial=0.0))) ** 2 * len(x)
    if xx <= least:
        return Line(float("nan"), float("nan"), float("nan"))
    slope = xy / xx
    intercept = float(np.mean(estimate, dtype=np.float64) - slope * np.mean(reference, dtype=np.float64))
    return Line(slope, intercept, xy * xy / (xx * yy) if yy > 0 else float("nan"))


def fitted_factor(estimate: Map, reference: Map, mask: Mask) -> float:
    """The factor on a relative estimate (proton density) that brings it closest to the reference.

    Raises:
        ValueError: if shapes differ, the mask is empty or the estimate is zero inside it.
    """
    found, truth = _inside(estimate, reference, mask)
    energy = float(found @ found)
    if energy == 0:
        raise ValueError("the estimate is zero everywhere inside the mask")
    return float(found @ truth) / energy


def missing_voxels(estimate: Map, mask: Mask) -> int:
    """Voxels inside the mask without an estimate."""
    return int(np.count_nonzero(mask & ~np.isfinite(estimate)))


def sphere_statistics(estimate: Map, reference: Map, labels: NDArray[np.integer]) -> list[SphereStatistics]:
    """Mean, bias and coefficient of variation in each sphere, by ascending label; label 0 is outside."""
    statistics = []
    for label in np.unique(labels[labels > 0]).tolist():
        found, truth = _inside(estimate, reference, labels == label)
        mean, target = float(found.mean()), float(truth.mean())
        variation = float(found.std()) / mean if mean else float("nan")
        offset = (mean - target) / target if target else float("nan")
        statistics.append(SphereStatistics(int(label), len(found), target, mean, variation, offset))
    return statistics


def _peak(reference: NDArray[np.float64]) -> float:
    """Range of intensities of the reference inside the mask (n,)."""
    peak = float(np.percentile(reference, PEAK_PERCENTILE))
    if not peak > 0:
        raise ValueError("the reference has no positive values to speak of inside the mask")
    return peak


def _inside(
    estimate: Map, reference: Map, mask: Mask, cap: float | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values inside the mask (n,) as float64, no value as 0, capped."""
    if not estimate.shape == reference.shape == mask.shape:
        raise ValueError(
            f"shapes differ: estimate {estimate.shape}, reference {reference.shape}, mask {mask.shape}"
        )
    if not mask.any():
        raise ValueError("the mask is empty")
    found, truth = (
        np.nan_to_num(values[mask].astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        for values in (estimate, reference)
    )
    if cap is not None:
        found, truth = np.minimum(found, cap), np.minimum(truth, cap)
    return found, truth
