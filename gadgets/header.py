"""ISMRMRD header <-> ``Encoding`` and ``Protocol``: the only place where ms, mm and degrees become SI.

What real headers do to the schema is in SCANNER.md section 3: units of times are only convention, and any of
``encodingLimits``, ``parallelImaging``, ``userParameters`` and ``sequenceParameters`` may be absent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from xml.etree import ElementTree

import ismrmrd.xsd as xsd
from xsdata.exceptions import ConverterWarning, ParserError
from xsdata.formats.dataclass.parsers import XmlParser
from xsdata.formats.dataclass.parsers.config import ParserConfig

from quantitron.gadgets.distinct_contrasts import require_distinct_contrasts
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.fingerprint_protocol import fingerprint_protocol
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.header_elements import convert_values, with_absent_elements
from quantitron.gadgets.header_values import inversion_efficiency, listed, numbered, single
from quantitron.gadgets.scan_times import durations, longest_repetition, scan_times
from quantitron.gadgets.sequence import (
    contrast_axes,
    detect_sequence,
    preparation_parameters,
    trajectory_of,
)
from quantitron.gadgets.slice_space import one_slice
from quantitron.recon.data import Encoding, Protocol

LARGEST_MATRIX = 4096
"""Points along one axis above which a header is taken for nonsense."""
OF_PERSONS = ("subjectInformation", "studyInformation")
"""Elements that no reconstruction needs. They are never parsed, so that no message can hold their values."""


def parse_header(document: str | bytes) -> xsd.ismrmrdHeader:
    """Read a header as scanners write it: unknown elements and absent ``encodingLimits`` are no error, nor is
    a value that means what the schema writes otherwise, or one of an element that nothing reads.

    Subject and study are left out. Whoever hands the header on hands on ``document``.

    Raises:
        ScanError: if the text is not an ISMRMRD header, or an element that matters makes no sense.
    """
    try:
        root = ElementTree.fromstring(document)
        for element in [child for child in root if child.tag.rpartition("}")[2] in OF_PERSONS]:
            root.remove(element)
        parser = XmlParser(
            config=ParserConfig(fail_on_unknown_properties=False, class_factory=with_absent_elements)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConverterWarning)  # they print values on stderr
            header = parser.from_bytes(ElementTree.tostring(root), xsd.ismrmrdHeader)
    except (ElementTree.ParseError, ParserError, TypeError, ValueError) as error:
        raise ScanError(f"the header is not an ISMRMRD header: {str(error).splitlines()[0]}") from error
    convert_values(header)
    return header


def make_context(
    header: xsd.ismrmrdHeader,
    *,
    sequence: str = "auto",
    axes: str = "",
    phase_sign: int = 1,
    pipeline: str = "",
    settings_hash: str = "",
    seed: int = 0,
) -> Context:
    """Everything that the gadgets of a chain know about the scan before its data.

    Args:
        header: the scan's header.
        sequence: property of accumulate: a sequence name, or ``auto``.
        axes: property of accumulate, see ``contrast_axes``.
        phase_sign: property of accumulate: -1 where the phase evolves with time the other way round.
        pipeline: name of the method, for provenance.
        settings_hash: hash of the resolved settings, for provenance.
        seed: of everything random.

    Raises:
        ScanError: if the header cannot describe a scan of that sequence; the sentence names the element.
    """
    if phase_sign not in (1, -1):
        raise ScanError(f"property 'phase_sign' is {phase_sign}; it must be 1 or -1")
    name, guess = detect_sequence(header, sequence)
    notes = [guess] if guess else []
    counters = contrast_axes(name, axes)
    encoding = read_encoding(header, notes)
    protocol = read_protocol(header, name, counters, phase_sign, notes)
    context = Context(
        header=header,
        encoding=encoding,
        protocol=protocol,
        axes=counters,
        pipeline=pipeline,
        settings_hash=settings_hash,
        seed=seed,
    )
    for sentence in notes:
        context.note(sentence)
    return context


# ---------------------------------------------------------------------------------------------------- limits


def counter_limit(header: xsd.ismrmrdHeader, counter: str) -> xsd.limitType | None:
    """``encodingLimits`` of a counter (``kspace_encode_step_1``, ``slice``, ...); None where absent."""
    if not header.encoding or header.encoding[0].encodingLimits is None:
        return None
    name = counter.replace("kspace_encode_step", "kspace_encoding_step")
    limit: xsd.limitType | None = getattr(header.encoding[0].encodingLimits, name)
    return limit


def counter_length(header: xsd.ismrmrdHeader, counter: str | None) -> int | None:
    """Values that ``encodingLimits`` allows a counter; None where it says nothing, 1 for no counter."""
    if counter is None:
        return 1
    limit = counter_limit(header, counter)
    return None if limit is None else int(limit.maximum) + 1


@dataclass(frozen=True)
class PhaseEncoding:
    """How one phase-encoding counter maps to grid positions: position = index - centre + points // 2."""

    counter: str
    """``kspace_encode_step_1`` or ``kspace_encode_step_2``."""
    points: int
    """Grid points."""
    centre: int | None
    """Index of k = 0; None where the header does not say."""
    first: int
    """Smallest and"""
    last: int
    """largest index that the header announces."""


def phase_encoding(
    header: xsd.ismrmrdHeader, encoding: Encoding, axis: int, notes: list[str]
) -> PhaseEncoding:
    """Where k = 0 lies along z (``axis`` 0) or y (``axis`` 1) and which indices are to come.

    A centre that would put announced lines off the grid is a converter's mistake where the middle fits.
    """
    counter = ("kspace_encode_step_2", "kspace_encode_step_1")[axis]
    points = encoding.matrix[axis]
    limit = counter_limit(header, counter)
    if limit is None:
        return PhaseEncoding(counter, points, None, 0, points - 1)
    first, last, centre = int(limit.minimum), int(limit.maximum), int(limit.center)

    def fits(middle: int) -> bool:
        return first - middle + points // 2 >= 0 and last - middle + points // 2 < points

    if not fits(centre) and fits(points // 2):
        notes.append(
            f"encodingLimits puts the centre of {counter} at {centre}, which leaves lines outside the matrix "
            f"of {points}; the middle {points // 2} is used"
        )
        centre = points // 2
    return PhaseEncoding(counter, points, centre, first, last)


# -------------------------------------------------------------------------------------------------- encoding


def readout_oversampling(header: xsd.ismrmrdHeader) -> float:
    """Encoded over delivered field of view along the readout, at least 1."""
    space = header.encoding[0]
    return max(1.0, float(space.encodedSpace.fieldOfView_mm.x) / float(space.reconSpace.fieldOfView_mm.x))


def encoded_readout(header: xsd.ismrmrdHeader) -> int:
    """Points of the encoded grid along the readout, oversampling included."""
    return int(header.encoding[0].encodedSpace.matrixSize.x)


def read_encoding(header: xsd.ismrmrdHeader, notes: list[str]) -> Encoding:
    """Grids of the scan. On a trajectory that is not Cartesian, both are those of the reconSpace.

    Args:
        header: the scan's header.
        notes: sentences on what was assumed are added here.

    Raises:
        ScanError: if matrix or field of view make no sense.
    """
    if not header.encoding:
        raise ScanError("the header has no <encoding>")
    if len(header.encoding) > 1:
        notes.append(f"the header has {len(header.encoding)} encodings; the first is reconstructed")
    spaces = {"encodedSpace": header.encoding[0].encodedSpace, "reconSpace": header.encoding[0].reconSpace}
    trajectory = trajectory_of(header)
    if trajectory != "cartesian":
        # The trajectory says where samples lie; what the encoded space says then has no meaning.
        spaces["encodedSpace"] = spaces["reconSpace"]
    for where, space in reversed(spaces.items()):
        for axis in "zyx":
            points, extent = getattr(space.matrixSize, axis), getattr(space.fieldOfView_mm, axis)
            if not 1 <= points <= LARGEST_MATRIX:
                raise ScanError(f"the header's {where} matrix size along {axis} is {points}")
            if not (math.isfinite(extent) and extent > 0):
                raise ScanError(f"the header's {where} field of view along {axis} is {extent} mm")
    slices = counter_length(header, "slice") or 1
    if trajectory == "cartesian":
        spaces = one_slice(spaces, counter_limit(header, "kspace_encode_step_2"), slices, notes)
    encoded, recon = spaces["encodedSpace"], spaces["reconSpace"]
    oversampling = readout_oversampling(header) if trajectory == "cartesian" else 1.0
    points_x = round(encoded.matrixSize.x / oversampling)
    field_x = points_x * encoded.fieldOfView_mm.x / encoded.matrixSize.x
    matrix = (encoded.matrixSize.z, encoded.matrixSize.y, points_x)
    field = (encoded.fieldOfView_mm.z, encoded.fieldOfView_mm.y, field_x)
    wanted = (recon.fieldOfView_mm.z, recon.fieldOfView_mm.y, recon.fieldOfView_mm.x)
    if points_x < 2:
        raise ScanError(f"the header's fields of view leave a readout of {points_x} points")
    delivered = []
    for axis, n, extent, kept in zip("zyx", matrix, field, wanted, strict=True):
        cut = min(n, max(1, round(kept / (extent / n))))
        asked = getattr(recon.matrixSize, axis)
        if asked != cut:
            notes.append(
                f"the header asks for {asked} voxels along {axis} where {cut} were encoded; "
                "maps come at the encoded resolution"
            )
        delivered.append(cut)
    system = header.acquisitionSystemInformation
    channels = system.receiverChannels if system is not None and system.receiverChannels else 1
    return Encoding(
        matrix=matrix,
        field_of_view=(field[0] * 1e-3, field[1] * 1e-3, field[2] * 1e-3),
        delivered_matrix=(delivered[0], delivered[1], delivered[2]),
        slices=slices,
        coils=int(channels),
        trajectory=trajectory,
    )


# -------------------------------------------------------------------------------------------------- protocol


def read_protocol(
    header: xsd.ismrmrdHeader, sequence: str, axes: Mapping[str, str], phase_sign: int, notes: list[str]
) -> Protocol:
    """What the sequence played.

    Args:
        header: the scan's header.
        sequence: ``t2ir_gre``, ``vfa_gre``, ``megre`` or ``fisp_mrf`` (see ``fingerprint_protocol``).
        axes: counter of each contrast axis.
        phase_sign: +1 or -1.
        notes: sentences on what was assumed are added here.

    Raises:
        ScanError: if times, angles or preparations are missing, do not match the counters' limits, or cannot
            tell T1 or T2.
    """
    parameters = header.sequenceParameters
    if parameters is None or not parameters.TE:
        raise ScanError("the header gives no echo time (sequenceParameters.TE)")
    if sequence == "fisp_mrf":
        protocol = fingerprint_protocol(header, axes["ti"], counter_length(header, axes["ti"]), notes)
        require_distinct_contrasts(protocol, None)
        return replace(protocol, field_strength=_field_strength(header), phase_sign=phase_sign)
    echo_time, repetition, inversion_time = scan_times(
        parameters.TE,
        parameters.TR,
        parameters.TI if sequence == "t2ir_gre" else (),
        longest_repetition(sequence, parameters.flipAngle_deg),
        notes,
    )
    _match(len(echo_time), counter_length(header, axes.get("te")), "TE", axes.get("te"))
    if min(echo_time) <= 0 or list(echo_time) != sorted(set(echo_time)):
        raise ScanError(f"the header's echo times are not positive and ascending: {listed(parameters.TE)}")
    flip_angle = tuple(math.radians(angle) for angle in parameters.flipAngle_deg)
    if any(not (0 < angle <= math.pi) for angle in flip_angle):
        raise ScanError(
            f"the header's flip angles are not in 0..180 degrees: {listed(parameters.flipAngle_deg)}"
        )

    preparation: tuple[float, ...] = ()
    efficiency: float | None = None
    excitations = 1
    if sequence == "megre":
        if len(echo_time) < 2:
            raise ScanError("the header gives one echo time; megre needs two or more")
        repetition, flip_angle = repetition[:1], flip_angle[:1]
    else:
        repetition = (single(repetition, "TR", sequence),)
        if echo_time[-1] >= repetition[0]:
            raise ScanError(
                f"the last echo time {echo_time[-1] * 1e3:g} ms is not shorter than the TR of "
                f"{repetition[0] * 1e3:g} ms"
            )
    if sequence == "vfa_gre":
        if len(flip_angle) < 2:
            raise ScanError(f"the header gives {len(flip_angle)} flip angles; vfa_gre needs two or more")
        _match(len(flip_angle), counter_length(header, axes.get("ti")), "flipAngle_deg", axes.get("ti"))
    if sequence == "t2ir_gre":
        flip_angle = (single(flip_angle, "flipAngle_deg", sequence),)
        preparation, efficiency = _preparations(header, notes)
        _match(len(preparation), counter_length(header, axes.get("tau")), "T2PrepDuration", axes.get("tau"))
        counted = counter_length(header, axes.get("ti"))
        excitations = counted if counted is not None else len(inversion_time)
        if excitations < 1:
            raise ScanError(
                f"the header does not tell how many excitations follow each preparation "
                f"(encodingLimits.{axes['ti']} is absent and there is no TI)"
            )
        if len(inversion_time) not in (0, 1, excitations):
            _match(len(inversion_time), excitations, "TI", axes["ti"])
    if len(echo_time) == 1:
        notes.append("the header gives one echo time; T2* and B0 cannot be told from it")
    protocol = Protocol(
        sequence=sequence,
        echo_time=echo_time,
        repetition_time=repetition,
        flip_angle=flip_angle,
        preparation_time=preparation,
        inversion_time=inversion_time,
        excitations=excitations,
        inversion_efficiency=efficiency,
        field_strength=_field_strength(header),
        phase_sign=phase_sign,
    )
    require_distinct_contrasts(protocol, axes.get("ti"))
    return protocol


def _field_strength(header: xsd.ismrmrdHeader) -> float | None:
    """Main field [T], from the resonance frequency where it is not given."""
    system = header.acquisitionSystemInformation
    strength = system.systemFieldStrength_T if system is not None else None
    if strength is None and header.experimentalConditions.H1resonanceFrequency_Hz > 1_000_000:
        return float(header.experimentalConditions.H1resonanceFrequency_Hz / 42.577478518e6)
    return None if strength is None else float(strength)


def _match(given: int, allowed: int | None, name: str, counter: str | None) -> None:
    """One value for each index that the counter may take."""
    if allowed is not None and given != allowed:
        raise ScanError(
            f"the header gives {given} values of {name}, but encodingLimits allows {allowed} of the counter "
            f"'{counter}'"
        )


def _preparations(header: xsd.ismrmrdHeader, notes: list[str]) -> tuple[tuple[float, ...], float | None]:
    """T2-preparation times [s] and inversion efficiency from the user parameters."""
    user = preparation_parameters(header)
    given = numbered(user, "T2PrepDuration")
    if not given:
        raise ScanError(
            "the header gives no T2 preparation (user parameter T2PrepDuration_0), which t2ir_gre needs"
        )
    return durations(given, "T2PrepDuration", 0.5, notes), inversion_efficiency(user)


# --------------------------------------------------------------------------------------------------- reverse


def make_header(
    encoding: Encoding,
    protocol: Protocol,
    *,
    readout_oversampling: float = 2,
    axes: str = "",
    averages: int = 1,
    centre: tuple[int, int] | None = None,
    last: tuple[int, int] | None = None,
    acceleration: tuple[int, int] = (1, 1),
    calibration: bool = False,
    interleaves: int = 1,
    relative_receiver_noise_bandwidth: float = 1.0,
    protocol_name: str = "",
    system_model: str = "phantom",
) -> xsd.ismrmrdHeader:
    """Header of a simulated scan; ``make_context`` reads the same encoding and protocol back.

    For a trajectory other than Cartesian both spaces are that of the images, ``kspace_encode_step_1`` is the
    number of the interleaf and ``kspace_encode_step_2`` the partition.

    Args:
        encoding: grids; ``matrix`` without the readout oversampling.
        protocol: in SI units; written in ms and degrees.
        readout_oversampling: encoded over delivered readout; the encoded matrix is rounded. Cartesian only.
        axes: as the property ``axes`` of accumulate.
        averages: values of the counter ``average``.
        centre: index of k = 0 along (z, y); the middle of the grid where None.
        last: largest index along (z, y); the end of the grid where None (smaller for partial Fourier).
            Cartesian only along y.
        acceleration: factors along (z, y), informative.
        calibration: whether calibration lines are embedded.
        interleaves: values of ``kspace_encode_step_1``; only for a trajectory other than Cartesian.
        relative_receiver_noise_bandwidth: 1 for noise lines simulated like the others.
        protocol_name: ``measurementInformation.protocolName``.
        system_model: ``acquisitionSystemInformation.systemModel``.
    """
    nz, ny, nx = encoding.matrix
    fz, fy, fx = (1e3 * extent for extent in encoding.field_of_view)
    dz, dy, dx = encoding.delivered_matrix
    gz, gy, gx = (1e3 * extent for extent in encoding.delivered_field_of_view)
    cartesian = encoding.trajectory == "cartesian"
    encoded_x = round(nx * readout_oversampling) if cartesian else nx
    counters = contrast_axes(protocol.sequence, axes)
    lengths = dict(zip(("ti", "tau", "te"), protocol.contrast_shape, strict=True))

    limits = xsd.encodingLimitsType()
    middle = centre if centre is not None else (nz // 2, ny // 2)
    top = last if last is not None else (nz - 1, ny - 1)
    if cartesian:
        limits.kspace_encoding_step_0 = xsd.limitType(minimum=0, maximum=encoded_x - 1, center=encoded_x // 2)
        limits.kspace_encoding_step_1 = xsd.limitType(minimum=0, maximum=top[1], center=middle[1])
    else:
        limits.kspace_encoding_step_1 = xsd.limitType(minimum=0, maximum=interleaves - 1, center=0)
    limits.kspace_encoding_step_2 = xsd.limitType(minimum=0, maximum=top[0], center=middle[0])
    for counter in ("average", "slice", "contrast", "phase", "repetition", "set", "segment"):
        setattr(limits, counter, xsd.limitType(minimum=0, maximum=0, center=0))
    limits.average.maximum = averages - 1
    limits.slice.maximum = encoding.slices - 1
    for axis, counter in counters.items():
        setattr(limits, counter, xsd.limitType(minimum=0, maximum=lengths[axis] - 1, center=0))

    user = [
        xsd.userParameterDoubleType(name=f"T2PrepDuration_{i}", value=round(1e3 * tau, 9))
        for i, tau in enumerate(protocol.preparation_time)
    ]
    if protocol.inversion_efficiency is not None:
        user.append(
            xsd.userParameterDoubleType(name="InversionEfficiency", value=protocol.inversion_efficiency)
        )
    user += [
        xsd.userParameterDoubleType(name=f"RFPhase_{i}", value=round(math.degrees(phase), 9))
        for i, phase in enumerate(protocol.rf_phase)
    ]
    field_strength = protocol.field_strength if protocol.field_strength is not None else 3.0
    return xsd.ismrmrdHeader(
        measurementInformation=xsd.measurementInformationType(
            patientPosition=xsd.patientPositionType.HFS, protocolName=protocol_name or protocol.sequence
        ),
        acquisitionSystemInformation=xsd.acquisitionSystemInformationType(
            systemVendor="quantitron",
            systemModel=system_model,
            systemFieldStrength_T=protocol.field_strength,
            relativeReceiverNoiseBandwidth=relative_receiver_noise_bandwidth,
            receiverChannels=encoding.coils,
        ),
        experimentalConditions=xsd.experimentalConditionsType(
            H1resonanceFrequency_Hz=round(field_strength * 42.577478518e6)
        ),
        encoding=[
            xsd.encodingType(
                encodedSpace=xsd.encodingSpaceType(
                    matrixSize=xsd.matrixSizeType(x=encoded_x, y=ny, z=nz),
                    fieldOfView_mm=xsd.fieldOfViewMm(x=fx * encoded_x / nx, y=fy, z=fz),
                ),
                reconSpace=xsd.encodingSpaceType(
                    matrixSize=xsd.matrixSizeType(x=dx, y=dy, z=dz),
                    fieldOfView_mm=xsd.fieldOfViewMm(x=gx, y=gy, z=gz),
                ),
                encodingLimits=limits,
                trajectory=xsd.trajectoryType(encoding.trajectory),
                parallelImaging=xsd.parallelImagingType(
                    accelerationFactor=xsd.accelerationFactorType(
                        kspace_encoding_step_1=acceleration[1], kspace_encoding_step_2=acceleration[0]
                    ),
                    calibrationMode=(
                        xsd.calibrationModeType.EMBEDDED if calibration else xsd.calibrationModeType.OTHER
                    ),
                ),
            )
        ],
        sequenceParameters=xsd.sequenceParametersType(
            TR=[round(1e3 * value, 9) for value in protocol.repetition_time],
            TE=[round(1e3 * value, 9) for value in protocol.echo_time],
            TI=[round(1e3 * value, 9) for value in protocol.inversion_time],
            flipAngle_deg=[round(math.degrees(value), 9) for value in protocol.flip_angle],
            sequence_type=protocol.sequence,
        ),
        userParameters=xsd.userParametersType(userParameterDouble=user) if user else None,
    )
