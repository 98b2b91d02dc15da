"""Protocols that the simulation plays: the published ones (METHODS 2), and changes to them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from quantitron.gadgets.errors import ScanError
from quantitron.recon.data import Protocol

PROTOCOLS = {
    # LoREIN data set 1
    "vfa_gre": Protocol(
        sequence="vfa_gre",
        echo_time=tuple(round(2.15e-3 + 3.05e-3 * e, 8) for e in range(12)),
        repetition_time=(46e-3,),
        flip_angle=tuple(math.radians(a) for a in (5, 10, 20, 30, 40)),
        field_strength=3.0,
    ),
    # SUMMIT, simulation
    "t2ir_gre": Protocol(
        sequence="t2ir_gre",
        echo_time=(4.5e-3, 11.2e-3, 17.9e-3, 24.6e-3),
        repetition_time=(30e-3,),
        flip_angle=(math.radians(10),),
        preparation_time=(25e-3, 50e-3, 70e-3, 90e-3),
        excitations=80,
        field_strength=3.0,
    ),
    "megre": Protocol(
        sequence="megre",
        echo_time=tuple(round(4e-3 * (e + 1), 8) for e in range(8)),
        repetition_time=(40e-3,),
        flip_angle=(math.radians(15),),
        field_strength=3.0,
    ),
}
"""Sequence name -> default protocol."""


def make_protocol(
    sequence: str,
    *,
    echo_times: Sequence[float] | None = None,
    repetition_time: float | None = None,
    flip_angles: Sequence[float] | None = None,
    preparation_times: Sequence[float] | None = None,
    excitations: int | None = None,
    field_strength: float | None = None,
) -> Protocol:
    """The default protocol of a sequence with some of its parameters changed.

    Args:
        sequence: ``vfa_gre``, ``t2ir_gre`` or ``megre``.
        echo_times: TE [s], ascending.
        repetition_time: TR [s].
        flip_angles: [rad]; one for ``t2ir_gre`` and ``megre``.
        preparation_times: T2-preparation times tau [s]; only ``t2ir_gre``.
        excitations: N after each preparation; only ``t2ir_gre``.
        field_strength: [T].

    Raises:
        ScanError: if the sequence is unknown, does not have the parameter, or the values make no sense.
    """
    if sequence not in PROTOCOLS:
        raise ScanError(f"no sequence '{sequence}' can be simulated; there are {', '.join(PROTOCOLS)}")
    default = PROTOCOLS[sequence]
    if sequence != "t2ir_gre":
        for name, value in (("preparation times", preparation_times), ("excitations", excitations)):
            if value is not None:
                raise ScanError(f"{sequence} has no {name}; they belong to t2ir_gre")
    protocol = Protocol(
        sequence=sequence,
        echo_time=tuple(echo_times) if echo_times is not None else default.echo_time,
        repetition_time=(repetition_time,) if repetition_time is not None else default.repetition_time,
        flip_angle=tuple(flip_angles) if flip_angles is not None else default.flip_angle,
        preparation_time=(
            tuple(preparation_times) if preparation_times is not None else default.preparation_time
        ),
        excitations=excitations if excitations is not None else default.excitations,
        field_strength=field_strength if field_strength is not None else default.field_strength,
    )
    times = protocol.echo_time
    if not times or times[0] <= 0 or any(b <= a for a, b in itertools.pairwise(times)):
        raise ScanError("echo times must be positive and ascending")
    if times[-1] >= protocol.repetition_time[0]:
        raise ScanError(
            f"the last echo time {times[-1] * 1e3:g} ms is not shorter than the TR "
            f"of {protocol.repetition_time[0] * 1e3:g} ms"
        )
    if not protocol.flip_angle or not all(0 < angle <= math.pi for angle in protocol.flip_angle):
        raise ScanError("flip angles must lie between 0 and 180 degrees")
    if sequence == "vfa_gre" and len(protocol.flip_angle) < 2:
        raise ScanError("vfa_gre needs two flip angles or more")
    if sequence != "vfa_gre" and len(protocol.flip_angle) != 1:
        raise ScanError(f"{sequence} has one flip angle, not {len(protocol.flip_angle)}")
    if sequence == "megre" and len(times) < 2:
        raise ScanError("megre needs two echo times or more")
    if sequence == "t2ir_gre" and (not protocol.preparation_time or min(protocol.preparation_time) < 0):
        raise ScanError("t2ir_gre needs T2-preparation times of zero or more")
    if protocol.excitations < 1:
        raise ScanError(f"excitations is {protocol.excitations}; it must be at least 1")
    return protocol
