"""Whether the contrasts of a protocol differ in what T1 and T2 are told from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header_values import listed
from quantitron.gadgets.protocol_precision import NOISE, relative_deviations, typical_tissue
from quantitron.recon.data import Protocol

ROUNDING = 1e-3
"""Values that differ by less than this share of the largest are one value, written twice."""
LEAST_NOISE = 1e-4
"""Of the whole signal of a voxel: no scan has less. Where it scatters a time by as much as its own value, the
protocol does not tell that time."""


def require_distinct_contrasts(protocol: Protocol, excitation_counter: str | None) -> None:
    """Refuse a protocol whose T1 or T2 any value of them would fit.

    After each preparation ``t2ir_gre`` has the signal s (1 - (1 + p) d^n): s and d hold T1 and the amplitude,
    p = efficiency exp(-tau / T2). Over two excitations and two preparations these are as many numbers as
    amplitude, T1, T2 and efficiency, and tell all of them, if with much noise. One preparation tells p alone,
    thus T2 where the efficiency is stated, and takes three excitations, for s, d and p.

    Args:
        protocol: of any sequence.
        excitation_counter: counter of the excitations of ``t2ir_gre``, for the sentence.

    Raises:
        ScanError: if the flip angles of ``vfa_gre``, the time points of ``fisp_mrf``, or the excitations,
            preparations or inversion efficiency of ``t2ir_gre``, leave T1 or T2 open; the sentence names the
            header's element. Or if they differ, but not in the signal (flip angles of 180 and 10 degrees).
    """
    _require_distinct_values(protocol, excitation_counter)
    for name, deviation in relative_deviations(protocol).items():
        if name in ("t1", "t2") and deviation * LEAST_NOISE / NOISE > 1:
            angles = sorted({round(math.degrees(angle), 2) for angle in protocol.flip_angle})
            raise ScanError(
                f"flip angles of {listed(angles)} degrees and the times of this {protocol.sequence} scan do "
                f"not tell {name.upper()}: even noise of {100 * LEAST_NOISE:g} % of the signal would scatter "
                f"it by more than its value in tissue of {typical_tissue()}"
            )


def _require_distinct_values(protocol: Protocol, excitation_counter: str | None) -> None:
    """The part that needs no signal: values that are missing or alike."""
    if protocol.sequence == "fisp_mrf" and protocol.contrasts < 3:
        raise ScanError(
            f"the schedule has {protocol.contrasts} time points; fisp_mrf needs three or more to tell T1, T2 "
            "and PD"
        )
    if protocol.sequence == "vfa_gre" and not _differ(protocol.flip_angle):
        angles = listed([math.degrees(angle) for angle in protocol.flip_angle])
        raise ScanError(
            f"the header's flip angles (flipAngle_deg) are {angles}; vfa_gre needs two that differ to tell T1"
        )
    if protocol.sequence != "t2ir_gre":
        return
    counted = f"encodingLimits.{excitation_counter}, else the values of TI"
    if protocol.excitations < 2:
        raise ScanError(
            f"the header gives 1 excitation after each preparation ({counted}); t2ir_gre needs two or more "
            "to tell T1"
        )
    times = "the header's T2 preparations (T2PrepDuration) are " + listed(
        [1e3 * tau for tau in protocol.preparation_time]
    )
    if not max(protocol.preparation_time) > 0:
        raise ScanError(f"{times} ms; t2ir_gre needs one above 0 to tell T2")
    if protocol.inversion_efficiency == 0:
        raise ScanError(
            "the header's InversionEfficiency is 0; without an inversion nothing in t2ir_gre tells T2"
        )
    if _differ(protocol.preparation_time):
        return
    if protocol.inversion_efficiency is None:
        raise ScanError(
            f"{times} ms; t2ir_gre needs two that differ to tell T2, unless the user parameter "
            "InversionEfficiency is given"
        )
    if protocol.excitations < 3:
        raise ScanError(
            f"the header gives {protocol.excitations} excitations after its only T2 preparation ({counted}); "
            "t2ir_gre needs three or more to tell T1 and T2, or two preparations that differ"
        )


def _differ(values: Sequence[float]) -> bool:
    """Whether there are two different values."""
    return max(values) - min(values) > ROUNDING * max(values)
