"""Which sequence a header describes, and which ISMRMRD counter carries each contrast axis."""

from __future__ import annotations

import difflib
import re

import ismrmrd

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header_values import numbered

SEQUENCE_NAMES = ("t2ir_gre", "vfa_gre", "megre", "fisp_mrf")
"""Sequences that the contract knows."""

SUPPORTED = SEQUENCE_NAMES
"""Sequences that this version reconstructs."""

DEFAULT_AXES: dict[str, dict[str, str]] = {
    "t2ir_gre": {"ti": "segment", "tau": "set", "te": "contrast"},
    "vfa_gre": {"ti": "set", "te": "contrast"},
    "megre": {"te": "contrast"},
    "fisp_mrf": {"ti": "repetition"},
}
"""ISMRMRD counter of each contrast axis. The axis ``ti`` of ``vfa_gre`` runs over the flip angles, that of
``fisp_mrf`` over the time points."""

CONTRAST_COUNTERS = (
    "average",
    "contrast",
    "phase",
    "repetition",
    "set",
    "segment",
    *(f"user_{i}" for i in range(8)),
)
"""Counters that may carry a contrast axis."""
_SEQUENCE_PARAMETER = re.compile(r"(T2PrepDuration|RFPhase)_[0-9]{1,9}|InversionEfficiency")


def is_sequence_parameter(name: str | None) -> bool:
    """Whether a user parameter of that name describes one of the sequences; others are somebody else's."""
    return name is not None and _SEQUENCE_PARAMETER.fullmatch(name) is not None


def preparation_parameters(header: ismrmrd.xsd.ismrmrdHeader) -> dict[str, float]:
    """User parameters of the sequences by name, doubles and longs alike (converters send either)."""
    if header.userParameters is None:
        return {}
    parameters = header.userParameters
    return {
        entry.name: float(entry.value)
        for entry in (*parameters.userParameterLong, *parameters.userParameterDouble)
        if is_sequence_parameter(entry.name)
    }


def trajectory_of(header: ismrmrd.xsd.ismrmrdHeader) -> str:
    """The trajectory as the header names it; Cartesian where it does not."""
    trajectory = header.encoding[0].trajectory if header.encoding else None
    return "cartesian" if trajectory is None else str(trajectory.value)


def detect_sequence(header: ismrmrd.xsd.ismrmrdHeader, wanted: str = "auto") -> tuple[str, str | None]:
    """Name the sequence by the contract of DESIGN.md.

    The property comes first, then ``sequence_type``, then ``protocolName`` where they contain a known name,
    then what the header shows: trajectory other than Cartesian, T2 preparations, several flip angles, several
    echoes.

    Args:
        header: the scan's header.
        wanted: the XML's ``sequence`` property; ``auto`` or empty to look at the header.

    Returns:
        The name, and a sentence for the log where the name was guessed from what the header shows.

    Raises:
        ScanError: if nothing identifies the sequence, it does not go with the header's trajectory, or a T2
            preparation is missing between others.
    """
    name, note = _named(header, wanted)
    trajectory = trajectory_of(header)
    if name == "fisp_mrf" and trajectory == "cartesian":
        raise ScanError(
            "fisp_mrf is reconstructed from data on a trajectory (spiral or any other), but the header's "
            "trajectory is 'cartesian'"
        )
    if name != "fisp_mrf" and trajectory != "cartesian":
        raise ScanError(
            f"the header's trajectory is '{trajectory}', but {name} is reconstructed from Cartesian data only"
        )
    return name, note


def _named(header: ismrmrd.xsd.ismrmrdHeader, wanted: str) -> tuple[str, str | None]:
    wanted = wanted.strip()
    if wanted not in ("", "auto"):
        if wanted not in SEQUENCE_NAMES:
            near = difflib.get_close_matches(wanted, (*SEQUENCE_NAMES, "auto"), n=1, cutoff=0)
            raise ScanError(
                f"property 'sequence' is '{wanted}', which is none of auto, {', '.join(SEQUENCE_NAMES)}"
                f" (nearest: {near[0]})"
            )
        return wanted, None
    parameters, measurement = header.sequenceParameters, header.measurementInformation
    for text in (
        parameters.sequence_type if parameters else None,
        measurement.protocolName if measurement else None,
    ):
        spelled = (text or "").lower().replace("-", "_").replace(" ", "_")
        for name in SEQUENCE_NAMES:
            if name in spelled:
                return name, None
    trajectory = trajectory_of(header)
    if trajectory != "cartesian":
        return "fisp_mrf", f"sequence taken as fisp_mrf because the trajectory is '{trajectory}'"
    if numbered(preparation_parameters(header), "T2PrepDuration"):
        return "t2ir_gre", "sequence taken as t2ir_gre because the header lists T2 preparations"
    if parameters is not None:
        if len(set(parameters.flipAngle_deg)) > 1:
            return "vfa_gre", "sequence taken as vfa_gre because the header lists several flip angles"
        if len(set(parameters.TE)) > 1:
            return "megre", "sequence taken as megre because the header lists several echo times"
    raise ScanError(
        "the header does not tell which sequence this is; set the property 'sequence' to one of "
        f"{', '.join(SEQUENCE_NAMES)}"
    )


def contrast_axes(sequence: str, override: str = "") -> dict[str, str]:
    """Counter of each contrast axis: keys among ``ti``, ``tau``, ``te``; an absent axis has length one.

    Args:
        sequence: a supported sequence.
        override: the XML's ``axes`` property, such as ``"ti=segment,tau=set,te=contrast"``; axes that it does
            not list keep their default. ``fa`` is accepted for the flip-angle axis of ``vfa_gre``, ``time``
            for the time points of ``fisp_mrf``.

    Raises:
        ScanError: if an axis or a counter does not exist, or one counter is given to two axes.
    """
    axes = dict(DEFAULT_AXES[sequence])
    for part in filter(None, (piece.strip() for piece in override.split(","))):
        axis, equals, counter = (word.strip() for word in part.partition("="))
        if (axis, sequence) in (("fa", "vfa_gre"), ("time", "fisp_mrf")):
            axis = "ti"
        if not equals or axis not in axes:
            raise ScanError(
                f"property 'axes' has '{part}', but {sequence} has the axes {', '.join(axes)} "
                "(write axis=counter)"
            )
        if counter not in CONTRAST_COUNTERS:
            near = difflib.get_close_matches(counter, CONTRAST_COUNTERS, n=1, cutoff=0)
            raise ScanError(
                f"property 'axes' names the counter '{counter}', which cannot carry a contrast "
                f"(nearest: {near[0]})"
            )
        axes[axis] = counter
    if len(set(axes.values())) < len(axes):
        raise ScanError(f"property 'axes' gives one counter to two axes: {override}")
    return axes
