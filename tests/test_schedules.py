"""Schedules of fingerprints: ranges, smoothness, files, and how well they tell T1 and T2."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from quantitron.gadgets.errors import ScanError
from quantitron.phantoms.schedules import jiang, make_schedule, read_schedule, smooth_noise, tgas
from quantitron.recon.data import Protocol
from quantitron.recon.signal.models import CONTRAST_SIGNALS

DATA = Path(__file__).parents[2] / "shared" / "data"
TISSUES = {"white matter": (0.82, 0.065), "grey matter": (1.45, 0.080)}


@pytest.mark.parametrize("points", [2, 199, 500, 1000, 1700])
def test_jiang_stays_in_its_range_and_is_smooth(points):
    flip, repetition = jiang(points)
    assert len(flip) == len(repetition) == points
    degrees = np.degrees(flip)
    assert degrees.min() > 4
    assert degrees.max() <= 70
    if points >= 600:
        assert degrees.max() > 65
    assert np.abs(np.diff(degrees)).max(initial=0) < 5
    assert repetition.min() >= 11.7e-3
    assert repetition.max() <= 14.3e-3
    assert np.abs(np.diff(repetition)).max(initial=0) < 0.15e-3
    if points == 1000:
        assert np.ptp(repetition) > 2e-3
        assert repetition.std() > 0.4e-3


def test_a_shorter_jiang_is_the_start_of_a_longer_one():
    for short, long in zip(jiang(333, seed=4), jiang(1200, seed=4), strict=True):
        assert np.array_equal(short, long[:333])
    assert not np.array_equal(jiang(300, seed=4)[0], jiang(300, seed=5)[0])
    assert not np.array_equal(jiang(300, seed=4)[1], jiang(300, seed=5)[1])


@pytest.mark.parametrize("points", [2, 250, 500, 1000])
def test_tgas_has_a_low_a_high_and_a_flat_lobe(points):
    flip, repetition = tgas(points)
    assert len(flip) == len(repetition) == points
    assert (repetition == 12e-3).all()
    degrees = np.degrees(flip)
    assert degrees.min() > 9.99
    assert degrees.max() <= 75
    if points >= 250:
        first, second = (degrees[int(a * points) : int(b * points)] for a, b in ((0, 0.4), (0.4, 0.8)))
        assert first.max() == pytest.approx(30, abs=0.1)
        assert second.max() == pytest.approx(75, abs=0.1)
        assert np.allclose(degrees[math.ceil(0.8 * points) :], 10)
        assert np.abs(np.diff(degrees)).max() < 520 / points


def test_defaults_of_the_families():
    long, short = make_schedule("jiang"), make_schedule("tgas")
    assert (long.contrasts, short.contrasts) == (1000, 500)
    for protocol in (long, short):
        assert protocol.sequence == "fisp_mrf"
        assert protocol.echo_time == (0.7e-3,)
        assert protocol.inversion_time == (20e-3,)
        assert protocol.rf_phase == ()
    assert make_schedule("tgas", inversion_time=None).inversion_time == ()


def test_noise_is_smooth_and_goes_both_ways():
    noise = smooth_noise(2000, 50.0, [1])
    assert -0.7 < noise.min() < -0.2
    assert 0.2 < noise.max() < 0.7
    assert np.abs(np.diff(noise)).max() < 0.06
    assert np.abs(np.diff(noise, 2)).max() < 0.006  # the slope too is continuous
    assert np.array_equal(smooth_noise(100, 50.0, [1]), noise[:100])


def test_a_schedule_comes_from_a_file(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("tr_ms, phase_deg, flip_angle_deg, note\n12, 0, 10, a\n13.5, 180, 20, b\n11, 90, 30, c\n")
    protocol = make_schedule(path)
    assert np.allclose(np.degrees(protocol.flip_angle), [10, 20, 30])
    assert np.allclose(protocol.repetition_time, [12e-3, 13.5e-3, 11e-3])
    assert np.allclose(np.degrees(protocol.rf_phase), [0, 180, 90])
    assert make_schedule(path, 2).flip_angle == protocol.flip_angle[:2]
    path.write_text("\ufeffflip_angle_deg,tr_ms\n10,12\n20,12\n", encoding="utf-8")
    assert read_schedule(path)[2].size == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("flip_angle_deg\n10\n20\n", "no column 'tr_ms'"),
        ("10,12\n20,12\n", "no column 'flip_angle_deg'"),
        ("", "no column"),
        ("flip_angle_deg,tr_ms\n10,12\n", "holds 1 time points"),
        ("flip_angle_deg,tr_ms\n10,12\nx,12\n", "flip_angle_deg of time point 1 is 'x'"),
        ("flip_angle_deg,tr_ms\n10,12\n20\n", "tr_ms of time point 1 is 'None'"),
        ("flip_angle_deg,tr_ms\n10,12\n-20,12\n", "flip_angle_deg of time point 1"),
        ("flip_angle_deg,tr_ms\n10,12\n20,0\n", "tr_ms of time point 1"),
        ("flip_angle_deg,tr_ms\n10,12\n20,nan\n", "tr_ms of time point 1"),
        ("flip_angle_deg,tr_ms\n0,12\n0,12\n", "no flip angle other than 0"),
        ("flip_angle_deg,tr_ms\n10,0.5\n10,0.5\n", "echo time 0.7 ms"),
    ],
)
def test_files_that_hold_no_schedule_are_refused(tmp_path, text, sentence):
    path = tmp_path / "own.csv"
    path.write_text(text)
    with pytest.raises(ScanError, match=sentence):
        make_schedule(path)


def test_what_cannot_be_a_schedule_is_refused(tmp_path):
    with pytest.raises(ScanError, match=r"neither jiang, tgas nor a FILE\.csv"):
        make_schedule("jang")
    with pytest.raises(ScanError, match="cannot be read"):
        make_schedule(tmp_path / "absent.csv")
    (tmp_path / "raw.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ScanError, match="cannot be read"):
        make_schedule(tmp_path / "raw.csv")
    (tmp_path / "two.csv").write_text("flip_angle_deg,tr_ms\n10,12\n20,12\n")
    with pytest.raises(ScanError, match="has 2 time points, fewer than the 3"):
        make_schedule(tmp_path / "two.csv", 3)
    with pytest.raises(ScanError, match="points is 1"):
        make_schedule("tgas", 1)


def measured(name):
    if not (DATA / f"openmrf_{name}_fa.txt").exists():
        pytest.skip("the measured schedules are not here")
    degrees, milliseconds = (np.loadtxt(DATA / f"openmrf_{name}_{what}.txt") for what in ("fa", "tr"))
    return Protocol(
        sequence="fisp_mrf",
        echo_time=(0.7e-3,),
        repetition_time=tuple(milliseconds * 1e-3),
        flip_angle=tuple(np.radians(degrees)),
        inversion_time=(20e-3,),
    )


def relative_bounds(protocol, t1, t2):
    """Cramer-Rao bounds of log T1 and log T2 with unknown PD, for unit noise in a second of scan time."""
    step = 1e-3
    logs = torch.tensor([[0, 0], [step, 0], [-step, 0], [0, step], [0, -step]], dtype=torch.float64).exp()
    signal = CONTRAST_SIGNALS["fisp_mrf"]({"t1": t1 * logs[:, 0], "t2": t2 * logs[:, 1]}, protocol)
    slopes = [signal[0], (signal[1] - signal[2]) / (2 * step), (signal[3] - signal[4]) / (2 * step)]
    jacobian = torch.stack(slopes, dim=1)
    covariance = torch.linalg.inv(jacobian.T @ jacobian)
    return (covariance.diagonal()[1:] * sum(protocol.repetition_time)).sqrt().numpy()


@pytest.mark.parametrize(("family", "name"), [("jiang", "yun"), ("tgas", "cao")])
@pytest.mark.parametrize("tissue", TISSUES)
def test_schedules_tell_t1_and_t2_as_well_as_measured_ones(family, name, tissue):
    theirs = relative_bounds(measured(name), *TISSUES[tissue])
    ours = relative_bounds(make_schedule(family), *TISSUES[tissue])
    assert (ours < 1.15 * theirs).all()
    assert (ours > 0.8 * theirs).all()  # or the bound is not computed right


@pytest.mark.parametrize(("family", "name"), [("jiang", "yun"), ("tgas", "cao")])
def test_schedules_look_like_measured_ones(family, name):
    theirs, ours = measured(name), make_schedule(family)
    assert theirs.contrasts == ours.contrasts
    for protocol in (theirs, ours):
        degrees, milliseconds = np.degrees(protocol.flip_angle), 1e3 * np.array(protocol.repetition_time)
        assert 60 < degrees.max() <= 90.01
        assert 20 < degrees.mean() < 40
        assert np.abs(np.diff(degrees)).max() < 11
        assert np.median(np.abs(np.diff(degrees))) < 1.5
        assert 11.6 < milliseconds.min() <= milliseconds.max() < 14.4
        assert np.abs(np.diff(milliseconds)).max() < 0.15
    spread = [np.std(protocol.repetition_time) for protocol in (theirs, ours)]
    assert spread[1] == pytest.approx(spread[0], rel=0.3, abs=1e-9)
    assert sum(ours.repetition_time) == pytest.approx(sum(theirs.repetition_time), rel=0.05)
