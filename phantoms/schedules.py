"""Schedules of fingerprints: flip angle, repetition time and phase of every excitation after one inversion.

Two families, for any number of time points, and schedules from a file:

``jiang``  half-sine lobes of flip angle with varying peaks up to 70 degrees and a small random ripple; the
           repetition time wanders smoothly between 11.7 and 14.3 ms (after Jiang et al., MRM 74:1621, 2015)
``tgas``   a low, a high and a flat lobe, 10 to 75 degrees, every 12 ms; the whole train is stretched to the
           number of time points (after Cao et al., MRM 88:133, 2022)
"""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.errors import ScanError
from quantitron.recon.data import Protocol

SCHEDULES = ("jiang", "tgas")
"""Families that are generated."""
DEFAULT_POINTS = {"jiang": 1000, "tgas": 500}
ECHO_TIME = 0.7e-3
"""From an excitation to the first sample [s]."""
INVERSION_TIME = 20e-3
"""From the inversion to the first excitation [s]."""
MOST_POINTS = 65536
"""ISMRMRD counts time points in 16 bits."""

LOBE = 200
"""Time points of a lobe of ``jiang``."""
PEAKS = (36.0, 46.0, 70.0, 44.0, 28.0, 58.0, 34.0, 64.0)
"""Flip angle at the top of each lobe of ``jiang`` [degrees]; it starts again after the last."""
FLOOR = 5.0
"""Flip angle between the lobes of ``jiang`` [degrees]."""
RIPPLE = 0.02
"""Standard deviation of the ripple of ``jiang`` over the flip angle."""
JIANG_TR = (11.7e-3, 14.3e-3)
"""Range of the repetition times of ``jiang`` [s]."""
TGAS_TR = 12e-3
TGAS_LOBES = ((0.4, 30.0), (0.4, 75.0), (0.2, 10.0))
"""Share of the train and peak [degrees] of each lobe of ``tgas``."""
TGAS_FLOOR = 10.0

COLUMNS = ("flip_angle_deg", "tr_ms", "phase_deg")
"""Columns of a schedule file; the last may be left out."""


def make_schedule(
    schedule: str | os.PathLike[str] = "jiang",
    points: int | None = None,
    *,
    echo_time: float | None = None,
    inversion_time: float | None = INVERSION_TIME,
    inversion_efficiency: float | None = None,
    field_strength: float = 3.0,
    seed: int = 0,
) -> Protocol:
    """Protocol of a fingerprint.

    Args:
        schedule: ``jiang``, ``tgas`` or a file ``FILE.csv`` with the columns ``flip_angle_deg, tr_ms`` and
            perhaps ``phase_deg``, one line a time point below a line of column names.
        points: time points; None takes 1000, 500, or all of the file. Of a file the first ones are taken.
        echo_time: from an excitation to the first sample [s]; None for 0.7 ms.
        inversion_time: from the inversion to the first excitation [s]; None for no inversion.
        inversion_efficiency: stated in the protocol, 0..1.
        field_strength: [T].
        seed: of the ripple and the repetition times of ``jiang``; a shorter schedule is the start of a
            longer one with the same seed.

    Raises:
        ScanError: if the schedule is unknown, the file is none, or a value makes no sense.
    """
    if points is not None and not 2 <= points <= MOST_POINTS:
        raise ScanError(f"points is {points}; it must be in 2..{MOST_POINTS}")
    phase: NDArray[np.float64] = np.zeros(0)
    name = str(schedule)
    if name == "jiang":
        flip, repetition = jiang(points or DEFAULT_POINTS["jiang"], seed)
    elif name == "tgas":
        flip, repetition = tgas(points or DEFAULT_POINTS["tgas"])
    elif Path(name).suffix == ".csv" or Path(name).exists():
        flip, repetition, phase = read_schedule(Path(name))
        if points is not None and points > len(flip):
            raise ScanError(
                f"schedule '{name}' has {len(flip)} time points, fewer than the {points} asked for"
            )
        flip, repetition, phase = flip[:points], repetition[:points], phase[:points]
    else:
        raise ScanError(f"schedule '{name}' is neither {', '.join(SCHEDULES)} nor a FILE.csv")
    echo = ECHO_TIME if echo_time is None else echo_time
    if not 0 <= echo < repetition.min():
        raise ScanError(
            f"the echo time {echo * 1e3:g} ms does not lie within the shortest TR of "
            f"{repetition.min() * 1e3:g} ms"
        )
    if inversion_time is not None and not 0 <= inversion_time < 60:
        raise ScanError(f"the inversion time {inversion_time * 1e3:g} ms does not lie in 0..60 s")
    return Protocol(
        sequence="fisp_mrf",
        echo_time=(echo,),
        repetition_time=tuple(repetition.tolist()),
        flip_angle=tuple(flip.tolist()),
        inversion_time=() if inversion_time is None else (inversion_time,),
        inversion_efficiency=inversion_efficiency,
        field_strength=field_strength,
        rf_phase=tuple(phase.tolist()),
    )


def jiang(points: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Flip angles [rad] and repetition times [s] of the family ``jiang``, (w,) each."""
    time = np.arange(points)
    peak = np.array([PEAKS[lobe % len(PEAKS)] for lobe in range(points // LOBE + 1)])[time // LOBE]
    flip = FLOOR + (peak - FLOOR) * np.sin(np.pi * (time % LOBE + 0.5) / LOBE)
    # Each lobe has a stream of its own, so that more time points only add to the schedule.
    flip *= 1 + RIPPLE * _by_lobe(points, [seed, 10], 3.0)
    low, high = JIANG_TR
    wander = smooth_noise(points, 100.0, [seed, 11]) + 0.3 * smooth_noise(points, 40.0, [seed, 12])
    repetition = (low + high) / 2 + (high - low) / 2 * np.tanh(3.5 * wander)
    limited: NDArray[np.float64] = np.clip(repetition, low, high)
    # To 10 us, the raster of scanners.
    return np.radians(np.clip(flip, 0, max(PEAKS))), limited.round(5)


def tgas(points: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Flip angles [rad] and repetition times [s] of the family ``tgas``, (w,) each."""
    ends = np.cumsum([0.0, *(share for share, _ in TGAS_LOBES)])
    place = (np.arange(points) + 0.5) / points
    lobe = np.clip(np.searchsorted(ends, place, side="right") - 1, 0, len(TGAS_LOBES) - 1)
    peak = np.array([value for _, value in TGAS_LOBES])[lobe]
    share = np.array([value for value, _ in TGAS_LOBES])[lobe]
    flip = TGAS_FLOOR + (peak - TGAS_FLOOR) * np.sin(np.pi * (place - ends[lobe]) / share)
    return np.radians(flip), np.full(points, TGAS_TR)


def smooth_noise(points: int, scale: float, seed: list[int]) -> NDArray[np.float64]:
    """Gradient noise in one dimension (Perlin 1985), about -0.6..0.6; what comes first does not depend on how
    many points follow.

    Args:
        points: length.
        scale: points from one node to the next.
        seed: of the gradients.
    """
    slopes = np.random.default_rng(seed).uniform(-1, 1, int(MOST_POINTS / scale) + 2)
    place = np.arange(points) / scale
    node = place.astype(np.int64)
    part = place - node
    fade = part**3 * (part * (6 * part - 15) + 10)
    left, right = slopes[node] * part, slopes[node + 1] * (part - 1)
    # The largest value between slopes of +1 and -1 is 1/2; a factor of 1.25 uses more of the range.
    return np.asarray(1.25 * (left + fade * (right - left)))


def _by_lobe(points: int, seed: list[int], scale: float) -> NDArray[np.float64]:
    """Random ripple of unit standard deviation, smooth over ``scale`` points, lobe by lobe."""
    parts = []
    for lobe in range(-(-points // LOBE)):
        white = np.random.default_rng([*seed, lobe]).standard_normal(LOBE)
        reach = np.arange(-int(4 * scale), int(4 * scale) + 1)
        window = np.exp(-(reach**2) / (2 * scale**2))
        parts.append(np.convolve(white, window / np.sqrt(np.sum(window**2)), mode="same"))
    return np.concatenate(parts)[:points]


def read_schedule(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Flip angles [rad], repetition times [s] and phases [rad] from a ``FILE.csv``, (w,) each.

    The first line names the columns: ``flip_angle_deg``, ``tr_ms`` and perhaps ``phase_deg``, in any order;
    others are left alone. Without a column of phases that array is empty: all pulses alike.

    Raises:
        ScanError: if the file cannot be read, a column is missing, or a value is no number or out of range.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file, skipinitialspace=True)
            names = [name.strip() for name in lines.fieldnames or ()]
            lines.fieldnames = names
            rows = list(lines)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ScanError(f"schedule '{path}' cannot be read: {reason}") from error
    for name in COLUMNS[:2]:
        if name not in names:
            raise ScanError(
                f"schedule '{path}' has no column '{name}'; its first line must name "
                f"{', '.join(COLUMNS[:2])} and perhaps {COLUMNS[2]}"
            )
    if len(rows) < 2:
        raise ScanError(f"schedule '{path}' holds {len(rows)} time points; a fingerprint needs two or more")
    if len(rows) > MOST_POINTS:
        raise ScanError(
            f"schedule '{path}' has {len(rows)} time points; at most {MOST_POINTS} can be counted"
        )

    def column(name: str, low: float, high: float) -> NDArray[np.float64]:
        values = np.empty(len(rows))
        for number, row in enumerate(rows):
            try:
                values[number] = float(row[name])
            except (TypeError, ValueError):
                values[number] = math.nan
            if not low <= values[number] <= high:
                raise ScanError(
                    f"schedule '{path}': {name} of time point {number} is '{row[name]}'; "
                    f"it must be a number in {low:g}..{high:g}"
                )
        return values

    flip = np.radians(column("flip_angle_deg", 0.0, 180.0))
    if not flip.any():
        raise ScanError(f"schedule '{path}' has no flip angle other than 0")
    repetition = column("tr_ms", 0.1, 60000.0) * 1e-3
    phase = np.radians(column("phase_deg", -1e6, 1e6)) if "phase_deg" in names else np.zeros(0)
    return flip, repetition, phase
