"""What a ``fisp_mrf`` header says about the schedule: one flip angle, phase and TR for each time point."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ismrmrd.xsd as xsd

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header_values import inversion_efficiency, listed, numbered, single
from quantitron.gadgets.scan_times import longest_repetition, scan_times
from quantitron.gadgets.sequence import preparation_parameters
from quantitron.recon.data import Protocol


def fingerprint_protocol(
    header: xsd.ismrmrdHeader, counter: str, counted: int | None, notes: list[str]
) -> Protocol:
    """Schedule of a fingerprint.

    ``flipAngle_deg`` and ``TR`` hold one value for each time point, or one for all; ``TE`` holds one; ``TI``
    one, or none where nothing is inverted. The user parameters (double) ``RFPhase_0``, ``RFPhase_1``, ... are
    the phases of the pulses in degrees, a name of this project's own; without them all pulses are alike. A
    negative flip angle is a pulse of that size with its phase turned by 180 degrees. The receiver follows the
    phase of the pulses.

    Args:
        header: the scan's header, with sequenceParameters and a TE.
        counter: ISMRMRD counter of the time points.
        counted: values that encodingLimits allows it; None where it says nothing.
        notes: sentences on what was assumed are added here.

    Raises:
        ScanError: if the length of the schedule is not known, or values are missing or make no sense.
    """
    parameters = header.sequenceParameters
    angles = [float(angle) for angle in parameters.flipAngle_deg]
    points = _time_points(len(angles), counter, counted, notes)
    angles = _for_each(angles, points, "flip angles (flipAngle_deg)", notes)
    if any(not abs(angle) <= 180 for angle in angles):
        raise ScanError(f"the header's flip angles are not within 180 degrees: {listed(angles)}")
    if not any(angles):
        raise ScanError("the header's flip angles are all 0: a fingerprint needs excitations")
    if not parameters.TR:
        raise ScanError("the header gives no TR, which fisp_mrf needs")
    echo_time, repetition, inversion = scan_times(
        parameters.TE[:1],
        parameters.TR,
        parameters.TI,
        longest_repetition("fisp_mrf", angles),
        notes,
    )
    if len(repetition) > 1:
        repetition = tuple(_for_each(repetition, points, "TRs", notes))
    if any(value != parameters.TE[0] for value in parameters.TE):
        notes.append("the header gives several values of TE; a fingerprint has one, the first is used")
    if echo_time[0] >= min(repetition):
        raise ScanError(
            f"the echo time {echo_time[0] * 1e3:g} ms is not shorter than the shortest TR of "
            f"{min(repetition) * 1e3:g} ms"
        )
    if inversion and max(inversion) > 0:
        inversion = (single(inversion, "TI", "fisp_mrf"),)
    elif inversion:
        notes.append("the header's TI is 0: taken as an inversion right before the first excitation")
        inversion = (0.0,)
    else:
        notes.append("the header gives no TI: the fingerprint is taken to begin without an inversion")
    user = preparation_parameters(header)
    return Protocol(
        sequence="fisp_mrf",
        echo_time=echo_time,
        repetition_time=repetition,
        flip_angle=tuple(math.radians(abs(angle)) for angle in angles),
        inversion_time=inversion,
        inversion_efficiency=inversion_efficiency(user),
        rf_phase=_phases(user, angles, notes),
    )


def _time_points(angles: int, counter: str, counted: int | None, notes: list[str]) -> int:
    """Length of the schedule: what the counter may reach, else the number of flip angles."""
    if counted == 1 and angles > 1:
        notes.append(
            f"encodingLimits allows the counter '{counter}' one value; the schedule is taken to have as many "
            f"time points as there are flip angles, {angles}"
        )
        counted = None
    if counted is None and angles < 2:
        raise ScanError(
            f"the length of the schedule is not known: the header has no encodingLimits.{counter} and gives "
            f"{angles or 'no'} flip angle{'' if angles == 1 else 's'}"
        )
    points = angles if counted is None else counted
    if points < 2:
        raise ScanError(
            f"the length of the schedule is not known: encodingLimits.{counter} allows {points} time point "
            f"and the header gives {angles or 'no'} flip angle{'' if angles == 1 else 's'}"
        )
    return points


def _for_each(values: Sequence[float], points: int, what: str, notes: list[str]) -> list[float]:
    """One value for each time point."""
    if len(values) == 1:
        return [values[0]] * points
    if len(values) < points:
        raise ScanError(
            f"the header gives {len(values)} {what}, fewer than the {points} time points of the schedule"
        )
    if len(values) > points:
        notes.append(
            f"the header gives {len(values)} {what} for {points} time points; the first {points} are used"
        )
    return list(values[:points])


def _phases(user: dict[str, float], angles: Sequence[float], notes: list[str]) -> tuple[float, ...]:
    """(w,) phase of each pulse [rad] in 0..2 pi; empty where all are alike."""
    given = numbered(user, "RFPhase")
    for number, value in enumerate(given):
        if not math.isfinite(value):
            raise ScanError(f"the header's RFPhase_{number} is {value}")
    degrees = _for_each(given or [0.0], len(angles), "RF phases (RFPhase_0, ...)", notes)
    turned = [(phase + (180 if angle < 0 else 0)) % 360 for phase, angle in zip(degrees, angles, strict=True)]
    if len(set(turned)) == 1:
        return ()
    return tuple(math.radians(phase) for phase in turned)
