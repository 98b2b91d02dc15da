"""Sampling patterns of simulated scans."""

import numpy as np
import pytest

from quantitron.gadgets.errors import ScanError
from quantitron.phantoms.sampling import calibration_box, random_sampling, sampling_density


def grids(sampling, frames, grid):
    """(frame, z, y) how often each point is sampled."""
    counts = np.zeros((frames, *grid), dtype=int)
    np.add.at(counts, (sampling.frame, sampling.kz, sampling.ky), 1)
    return counts


@pytest.mark.parametrize(
    ("grid", "frames", "acceleration"),
    [((16, 112), 60, 27), ((16, 112), 60, 12), ((12, 96), 640, 160), ((1, 64), 8, 3.7), ((5, 33), 7, 2)],
)
@pytest.mark.parametrize("calibration", ["embedded", "separate", "none"])
def test_acceleration_is_exact(grid, frames, acceleration, calibration):
    sampling = random_sampling(grid, frames, acceleration, 3, calibration=calibration, calibration_frame=2)
    lines = len(sampling.kz) + len(sampling.separate)
    assert lines == round(frames * grid[0] * grid[1] / acceleration)
    assert sampling.acceleration == pytest.approx(acceleration, rel=0.5 / lines * 1.01)
    counts = grids(sampling, frames, grid)
    assert counts.max() == 1  # nothing twice
    per_frame = counts.sum(axis=(1, 2))
    others = np.delete(per_frame, 2)
    assert others.min() >= 1
    assert others.max() - others.min() <= 2


def test_full_sampling_samples_everything_whatever_the_calibration():
    for calibration in ("embedded", "separate", "none"):
        sampling = random_sampling((6, 10), 5, 1.0, 0, calibration=calibration, calibration_size=(4, 6))
        assert (grids(sampling, 5, (6, 10)) == 1).all()
        assert len(sampling.separate) == (24 if calibration == "separate" else 0)


def test_calibration_box_is_central_and_complete():
    assert np.flatnonzero(calibration_box((1, 10), (8, 4))[0]).tolist() == [3, 4, 5, 6]  # k = 0 at 5
    assert np.flatnonzero(calibration_box((1, 9), (8, 4))[0]).tolist() == [2, 3, 4, 5]  # k = 0 at 4
    assert calibration_box((16, 112), (8, 24)).sum() == 192
    sampling = random_sampling((16, 112), 60, 27, 0, calibration_frame=24)
    box = calibration_box((16, 112), (8, 24))
    counts = grids(sampling, 60, (16, 112))
    assert (counts[24][box] == 1).all()
    assert sampling.calibration.sum() == 192
    assert (sampling.frame[sampling.calibration] == 24).all()
    assert box[sampling.kz[sampling.calibration], sampling.ky[sampling.calibration]].all()
    assert counts[24].sum() > 192  # it has its share of other points too


def test_frames_differ_and_seeds_reproduce():
    first, again, other = (random_sampling((16, 64), 20, 16, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.ky, again.ky)
    assert np.array_equal(first.kz, again.kz)
    assert not np.array_equal(first.ky, other.ky)
    patterns = {tuple(plane.ravel()) for plane in grids(first, 20, (16, 64))}
    assert len(patterns) == 20


def test_density_falls_as_asked():
    grid, frames = (1, 64), 4000
    sampling = random_sampling(grid, frames, 32, 5, calibration="none", power=2.0)
    counts = grids(sampling, frames, grid).sum(axis=0)[0]
    expected = sampling_density(grid, 2.0, 0.3, False)[0]
    # Two points a frame out of 64: nearly independent draws.
    measured = counts / counts.sum()
    expected = expected / expected.sum()
    assert np.abs(measured - expected).max() < 0.15 * expected.max()
    assert measured[28:36].sum() > 2 * measured[:8].sum()
    uniform = random_sampling(grid, frames, 32, 5, calibration="none", power=0.0)
    even = grids(uniform, frames, grid).sum(axis=0)[0]
    assert even.std() < 1.3 * np.sqrt(even.mean())


def test_ellipse_leaves_the_corners_out():
    sampling = random_sampling((16, 32), 6, 2.0, 0, elliptical=True, calibration_size=(4, 8))
    counts = grids(sampling, 6, (16, 32)).sum(axis=0)
    assert counts[0, 0] == counts[0, 31] == counts[15, 31] == 0
    assert counts[8, 0] > 0 or counts[0, 16] > 0
    assert len(sampling.kz) == 16 * 32 * 6 // 2
    with pytest.raises(ScanError, match=r"cannot be reached inside the ellipse; at least 1\.3"):
        random_sampling((16, 32), 6, 1.05, 0, elliptical=True, calibration_size=(4, 8))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"acceleration": 0.5}, "must be at least 1"),
        ({"acceleration": float("nan")}, "must be at least 1"),
        ({"acceleration": 1000.0}, "every frame needs one at least"),
        ({"acceleration": 2.0, "calibration": "some"}, "one of embedded, separate, none"),
    ],
)
def test_impossible_sampling_is_refused(arguments, sentence):
    with pytest.raises(ScanError, match=sentence):
        random_sampling((8, 16), 10, seed=0, **arguments)
