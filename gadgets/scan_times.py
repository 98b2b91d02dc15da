"""Times of a header in seconds. The schema gives them no unit: ms by convention, s in some files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header_values import listed

MS, S = 1e-3, 1.0
SHORTEST_TR = 1e-3
"""s; pulse, readout and spoiler are not played in less."""
SHORTEST_TE = 20e-6
"""s; of a single echo."""
SHORTEST_TRAIN = 0.3e-3
"""s; the last of several echoes."""
LONGEST_TE = 0.3
"""s"""
SHORTEST_TI = 0.3e-3
"""s; an inversion alone takes longer."""
LONGEST_TI = 10.0
"""s; by then all has recovered."""
SMALL_ANGLE = 10.0
"""Degrees; such excitations are repeated within a second, for the signal gains nothing from waiting."""


class Times(NamedTuple):
    """What ``sequenceParameters`` say, in s."""

    echo: tuple[float, ...]
    repetition: tuple[float, ...]
    inversion: tuple[float, ...]


def scan_times(
    echo: Sequence[float],
    repetition: Sequence[float],
    inversion: Sequence[float],
    longest: float,
    notes: list[str],
) -> Times:
    """TE, TR and TI in s.

    All of them together tell the unit: a TE of 0.07 is 70 us beside a TR of 8, and 70 ms beside one of 0.1.
    Of the units in which TE and TR are possible and fit each other the first is taken: both in ms, both in s,
    one of each; ms where there are none. TI goes with TR.

    Args:
        echo: values of TE, at least one.
        repetition: values of TR, if any.
        inversion: values of TI, if any.
        longest: what a TR in s must be below, see ``longest_repetition``.
        notes: sentences on what was assumed are added here.

    Raises:
        ScanError: if a time is negative or not finite.
    """
    for name, values in (("TE", echo), ("TR", repetition), ("TI", inversion)):
        _check(values, name)
    units = ((MS, MS), (S, S), (S, MS), (MS, S))
    echo_unit, repetition_unit = next(
        (pair for pair in units if _fit(echo, repetition, *pair, longest)), units[0]
    )
    last = max(inversion, default=0.0)
    in_seconds = 0 < last < (LONGEST_TI if repetition_unit == S else SHORTEST_TI / MS)
    return Times(
        _in_seconds(echo, echo_unit, "TE", notes),
        _in_seconds(repetition, repetition_unit, "TR", notes),
        _in_seconds(inversion, S if in_seconds else MS, "TI", notes),
    )


def longest_repetition(sequence: str, flip_angles: Sequence[float]) -> float:
    """TR [s] above which it makes no sense: trains of excitations and small angles do not wait, others may.

    Args:
        sequence: name of the sequence.
        flip_angles: of the header [degrees].
    """
    waits = sequence == "megre" and all(abs(angle) >= SMALL_ANGLE for angle in flip_angles)
    return 20.0 if waits else 1.0


def durations(values: Sequence[float], name: str, smallest: float, notes: list[str]) -> tuple[float, ...]:
    """Other times in s: ms by convention, s where even the longest is below ``smallest`` ms.

    Raises:
        ScanError: if one is negative or not finite.
    """
    _check(values, name)
    return _in_seconds(values, S if 0 < max(values, default=0.0) < smallest else MS, name, notes)


def _fit(
    echo: Sequence[float],
    repetition: Sequence[float],
    echo_unit: float,
    repetition_unit: float,
    longest: float,
) -> bool:
    """Whether TE and TR are possible in these units, and the last echo comes within TR."""
    last = max(echo) * echo_unit
    if 0 < last < (SHORTEST_TRAIN if len(set(echo)) > 1 else SHORTEST_TE):
        return False
    if echo_unit == S and last >= LONGEST_TE:
        return False
    if not repetition:
        return echo_unit == repetition_unit
    if repetition_unit == S and max(repetition) >= longest:
        return False
    return max(repetition) * repetition_unit >= SHORTEST_TR and last < min(repetition) * repetition_unit


def _check(values: Sequence[float], name: str) -> None:
    if any(not math.isfinite(value) or value < 0 for value in values):
        raise ScanError(f"the header's {name} holds values that are no time: {listed(values)}")


def _in_seconds(values: Sequence[float], unit: float, name: str, notes: list[str]) -> tuple[float, ...]:
    if unit == S and values:
        notes.append(f"{name} of {listed(values)} makes no sense in ms; taken as seconds")
        return tuple(float(value) for value in values)
    return tuple(float(value) / 1e3 for value in values)
