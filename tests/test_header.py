"""Header <-> Encoding and Protocol, and the sequence that a header describes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import h5py
import ismrmrd.xsd as xsd
import pytest
import torch
from line_factory import encoding, megre, t2ir, vfa

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header import counter_length, make_context, make_header, parse_header, phase_encoding
from quantitron.gadgets.sequence import contrast_axes, detect_sequence
from quantitron.recon.signal.models import CONTRAST_PARAMETERS, CONTRAST_SIGNALS

SHARED = Path(__file__).parents[2] / "shared"
PRISMA = SHARED / "data" / "ismrmrd_prisma3T_20ch_2echo_gre_phantom.h5"


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


@pytest.mark.parametrize("protocol", [megre(), vfa(), t2ir(), replace(t2ir(), inversion_efficiency=0.9)])
@pytest.mark.parametrize("matrix", [(1, 8, 16), (6, 20, 31)])
def test_written_header_reads_back_as_written(protocol, matrix):
    protocol = replace(protocol, field_strength=2.89)
    grid = encoding(matrix, coils=5, slices=3, delivered=(matrix[0], 6, matrix[2]))
    text = xsd.ToXML(make_header(grid, protocol, readout_oversampling=2))
    context = make_context(parse_header(text))
    assert context.encoding.matrix == grid.matrix
    assert context.encoding.delivered_matrix == grid.delivered_matrix
    assert context.encoding.slices == 3
    assert context.encoding.coils == 5
    assert all(map(close, context.encoding.field_of_view, grid.field_of_view))
    assert all(map(close, context.protocol.echo_time, protocol.echo_time))
    assert all(map(close, context.protocol.flip_angle, protocol.flip_angle))
    assert all(map(close, context.protocol.preparation_time, protocol.preparation_time))
    assert context.protocol.contrast_shape == protocol.contrast_shape
    assert context.protocol.inversion_efficiency == protocol.inversion_efficiency
    assert context.protocol.field_strength == 2.89
    assert context.notes == []
    assert "<version>" not in text  # Gadgetron hangs where it differs from its own


def test_fractional_oversampling_keeps_the_voxel_size():
    grid = encoding((1, 8, 30))
    context = make_context(make_header(grid, megre(), readout_oversampling=1.6))
    assert context.header.encoding[0].encodedSpace.matrixSize.x == 48
    assert context.encoding.matrix == (1, 8, 30)
    assert all(map(close, context.encoding.voxel_size, grid.voxel_size))


@pytest.mark.parametrize(
    ("protocol", "counters"),
    [
        (megre(), {"te": "contrast"}),
        (vfa(), {"ti": "set", "te": "contrast"}),
        (t2ir(), {"ti": "segment", "tau": "set", "te": "contrast"}),
    ],
)
def test_default_counters(protocol, counters):
    assert make_context(make_header(encoding(), protocol)).axes == counters


def test_counters_can_be_overridden():
    header = make_header(encoding(), t2ir(), axes="ti=repetition, tau=user_3")
    context = make_context(header, axes="ti=repetition,tau=user_3")
    assert context.axes == {"ti": "repetition", "tau": "user_3", "te": "contrast"}
    assert counter_length(header, "user_3") == 3
    assert contrast_axes("vfa_gre", "fa=repetition")["ti"] == "repetition"


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ("tau=set", "megre has the axes te"),
        ("te=contrst", "nearest: contrast"),
        ("te=kspace_encode_step_1", "cannot carry a contrast"),
        ("te", "axis=counter"),
    ],
)
def test_wrong_counters_are_named(axes, words):
    with pytest.raises(ScanError, match=words):
        contrast_axes("megre", axes)


def test_one_counter_for_two_axes_is_an_error():
    with pytest.raises(ScanError, match="one counter to two axes"):
        contrast_axes("t2ir_gre", "ti=set")


# ---- which sequence it is


def anonymous(protocol):
    """A header that names no sequence."""
    header = make_header(encoding(), protocol, protocol_name="brain")
    header.sequenceParameters.sequence_type = "Flash"
    return header


@pytest.mark.parametrize("protocol", [megre(), vfa(), t2ir()])
def test_what_the_header_shows_decides_and_is_noted(protocol):
    context = make_context(anonymous(protocol))
    assert context.protocol.sequence == protocol.sequence
    assert any(f"taken as {protocol.sequence}" in note for note in context.notes)


def test_order_of_precedence():
    header = anonymous(t2ir())
    header.measurementInformation.protocolName = "VFA-GRE sagittal"
    assert detect_sequence(header)[0] == "vfa_gre"
    header.sequenceParameters.sequence_type = "megre"
    assert detect_sequence(header) == ("megre", None)
    assert detect_sequence(header, "t2ir_gre") == ("t2ir_gre", None)


def test_unknown_sequence_lists_the_known_ones():
    header = anonymous(megre())
    header.sequenceParameters.TE = [5.0]
    with pytest.raises(ScanError, match="t2ir_gre, vfa_gre, megre, fisp_mrf"):
        make_context(header)
    with pytest.raises(ScanError, match="nearest: megre"):
        make_context(header, sequence="megr")


@pytest.mark.parametrize("trajectory", [xsd.trajectoryType.SPIRAL, xsd.trajectoryType.RADIAL])
def test_other_sequences_are_cartesian(trajectory):
    header = anonymous(megre())
    header.encoding[0].trajectory = trajectory
    with pytest.raises(ScanError, match=f"trajectory is '{trajectory.value}', but megre is .* Cartesian"):
        make_context(header, sequence="megre")


def test_a_cartesian_fingerprint_is_refused():
    with pytest.raises(ScanError, match="fisp_mrf is reconstructed from data on a trajectory"):
        make_context(anonymous(megre()), sequence="fisp_mrf")


# ---- protocol


def test_seconds_are_recognised_and_noted():
    header = make_header(encoding(), t2ir())
    parameters = header.sequenceParameters
    parameters.TE, parameters.TR = [0.004, 0.008], [0.03]
    for entry in header.userParameters.userParameterDouble:
        entry.value /= 1e3
    context = make_context(header)
    assert context.protocol.echo_time == (0.004, 0.008)
    assert context.protocol.repetition_time == (0.03,)
    assert context.protocol.preparation_time == (0.025, 0.05, 0.09)
    for name in ("TE", "TR", "T2PrepDuration"):
        assert any(note.startswith(f"{name} of") and "taken as seconds" in note for note in context.notes)


@pytest.mark.parametrize(
    ("protocol", "echoes", "tr"),
    [
        (vfa(), [0.07], 8.0),
        (vfa(), [0.05, 0.1, 0.2], 8.0),
        (t2ir(), [0.25], 3.5),
        (megre(), [0.07, 0.15], 8.0),
    ],
)
def test_ultrashort_echoes_do_not_make_seconds_of_a_tr_in_ms(protocol, echoes, tr):
    """8 s between excitations of few degrees make no sense, and 70 ms do not fit into 8 ms."""
    header = make_header(encoding(), protocol)
    header.encoding[0].encodingLimits.contrast.maximum = len(echoes) - 1
    parameters = header.sequenceParameters
    parameters.TE, parameters.TR = echoes, [tr]
    parameters.flipAngle_deg = [3.0, 9.0, 18.0] if protocol.sequence == "vfa_gre" else [5.0]
    context = make_context(header)
    assert context.protocol.echo_time == pytest.approx([1e-3 * value for value in echoes])
    assert context.protocol.repetition_time == (1e-3 * tr,)
    assert not [note for note in context.notes if "seconds" in note]


@pytest.mark.parametrize(
    ("echoes", "tr", "angle", "units"),
    [
        ([0.005, 0.010], [2.5], [60.0], (1, 1)),
        ([0.005, 0.010], [0.5], [5.0], (1, 1)),
        ([0.004, 0.030], [35.0], [15.0], (1, 1e-3)),
        ([4.0, 30.0], [0.035], [15.0], (1e-3, 1)),
        ([0.004, 0.030], [], [], (1, 1)),
        ([4.0, 30.0], [], [], (1e-3, 1)),
        ([4.0, 30.0], [2500.0], [60.0], (1e-3, 1e-3)),
    ],
)
def test_times_together_tell_their_units(echoes, tr, angle, units):
    header = make_header(encoding(), megre())
    parameters = header.sequenceParameters
    parameters.TE, parameters.TR, parameters.flipAngle_deg = echoes, tr, angle
    protocol = make_context(header).protocol
    assert protocol.echo_time == pytest.approx([units[0] * value for value in echoes])
    assert protocol.repetition_time == pytest.approx([units[1] * value for value in tr])


@pytest.mark.parametrize(
    ("tr", "ti", "found"), [(0.03, [0.02], 0.02), (0.03, [3.0], 3.0), (30.0, [15.0], 0.015)]
)
def test_inversion_times_go_with_the_repetition_time(tr, ti, found):
    header = make_header(encoding(), t2ir())
    parameters = header.sequenceParameters
    scale = tr / parameters.TR[0]
    parameters.TE, parameters.TR, parameters.TI = [scale * value for value in parameters.TE], [tr], ti
    assert make_context(header).protocol.inversion_time == (found,)


def test_long_tr_in_ms_is_not_taken_for_seconds():
    header = make_header(encoding(), megre())
    header.sequenceParameters.TR = [15.0]
    assert make_context(header).protocol.repetition_time == (0.015,)


def test_short_echo_times_in_ms_stay_ms():
    header = make_header(encoding(), megre())
    header.sequenceParameters.TE = [0.07, 2.3]
    assert make_context(header).protocol.echo_time == pytest.approx((70e-6, 2.3e-3))


def test_one_value_for_all_and_one_per_index():
    header = make_header(encoding(), vfa())
    header.sequenceParameters.TR = [30.0, 30.0, 30.0]
    assert make_context(header).protocol.repetition_time == (0.03,)
    header.sequenceParameters.TR = [30.0, 40.0, 30.0]
    with pytest.raises(ScanError, match="several values of TR"):
        make_context(header)


def test_efficiency_may_come_as_an_integer():
    header = make_header(encoding(), t2ir())
    header.userParameters.userParameterLong.append(
        xsd.userParameterLongType(name="InversionEfficiency", value=1)
    )
    assert make_context(header).protocol.inversion_efficiency == 1
    header.userParameters.userParameterLong[0].value = 95
    with pytest.raises(ScanError, match=r"InversionEfficiency is 95; it must lie in 0\.\.1"):
        make_context(header)


def test_excitations_come_from_the_inversion_times_where_limits_are_absent():
    header = make_header(encoding(), t2ir())
    header.encoding[0].encodingLimits = xsd.encodingLimitsType()
    with pytest.raises(ScanError, match="how many excitations"):
        make_context(header)
    header.sequenceParameters.TI = [30.0 * n for n in range(7)]
    assert make_context(header).protocol.excitations == 7


def test_field_strength_from_the_resonance_frequency():
    header = make_header(encoding(), megre())
    header.acquisitionSystemInformation = None
    header.experimentalConditions.H1resonanceFrequency_Hz = 123_242_774
    context = make_context(header)
    assert context.protocol.field_strength == pytest.approx(2.8946, abs=1e-3)
    assert context.encoding.coils == 1


def test_phase_sign_is_kept():
    assert make_context(make_header(encoding(), megre()), phase_sign=-1).protocol.phase_sign == -1
    with pytest.raises(ScanError, match="phase_sign"):
        make_context(make_header(encoding(), megre()), phase_sign=2)


def break_no_parameters(header):
    header.sequenceParameters = None


def break_no_te(header):
    header.sequenceParameters.TE = []


def break_more_te(header):
    header.sequenceParameters.TE = [4.0, 8.0, 12.0]


def break_fewer_te(header):
    header.sequenceParameters.TE = [4.0]


def break_te_order(header):
    header.sequenceParameters.TE = [8.0, 4.0]


def break_te_nan(header):
    header.sequenceParameters.TE = [4.0, math.nan]


def break_angles(header):
    header.sequenceParameters.flipAngle_deg = [5.0, 15.0]


def break_one_angle(header):
    header.sequenceParameters.flipAngle_deg = [5.0]


def break_angle_size(header):
    header.sequenceParameters.flipAngle_deg = [5.0, 15.0, 300.0]


def break_no_tr(header):
    header.sequenceParameters.TR = []


def break_tr(header):
    header.sequenceParameters.TR = [7.0]


def break_matrix(header):
    header.encoding[0].encodedSpace.matrixSize.y = 0


def break_field(header):
    header.encoding[0].reconSpace.fieldOfView_mm.x = math.nan


def break_encoding(header):
    header.encoding = []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_no_parameters, r"no echo time \(sequenceParameters.TE\)"),
        (break_no_te, "no echo time"),
        (break_more_te, "3 values of TE, but encodingLimits allows 2 of the counter 'contrast'"),
        (break_fewer_te, "1 values of TE, but encodingLimits allows 2"),
        (break_te_order, "not positive and ascending: 8, 4"),
        (break_te_nan, "TE holds values that are no time"),
        (break_angles, "2 values of flipAngle_deg, but encodingLimits allows 3 of the counter 'set'"),
        (break_one_angle, "needs two or more"),
        (break_angle_size, r"not in 0\.\.180 degrees: 5, 15, 300"),
        (break_no_tr, "no TR, which vfa_gre needs"),
        (break_tr, "not shorter than the TR of 7 ms"),
        (break_matrix, "encodedSpace matrix size along y is 0"),
        (break_field, "reconSpace field of view along x is nan mm"),
        (break_encoding, "no <encoding>"),
    ],
)
def test_bad_headers_are_named(damage, words):
    header = make_header(encoding(), vfa())
    damage(header)
    with pytest.raises(ScanError, match=words):
        make_context(header)


def test_missing_preparations_are_named():
    header = make_header(encoding(), t2ir())
    header.userParameters = None
    with pytest.raises(ScanError, match="T2PrepDuration_0"):
        make_context(header)


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        (vfa((10, 10)), r"\(flipAngle_deg\) are 10, 10; vfa_gre needs two that differ to tell T1"),
        (vfa((10, 10, 10.001)), "needs two that differ"),
        (vfa((180, 10)), "flip angles of 10, 180 degrees .* do not tell T1"),
        (replace(t2ir(), preparation_time=(0.05,)), r"\(T2PrepDuration\) are 50 ms; .* two that differ"),
        (replace(t2ir(), preparation_time=(0.05, 0.05)), "are 50, 50 ms; .* unless .* InversionEfficiency"),
        (replace(t2ir(), preparation_time=(0.0,)), "are 0 ms; t2ir_gre needs one above 0 to tell T2"),
        (replace(t2ir(), preparation_time=(0.0,), inversion_efficiency=1.0), "needs one above 0"),
        (
            replace(t2ir(), inversion_efficiency=0.0),
            "InversionEfficiency is 0; .* nothing .* tells T2",
        ),
        (t2ir(1), r"1 excitation after .*encodingLimits\.segment.* needs two or more to tell T1"),
        (replace(t2ir(1), inversion_efficiency=0.9), "needs two or more"),
        (
            replace(t2ir(2), preparation_time=(0.05,), inversion_efficiency=0.9),
            r"2 excitations after its only .*encodingLimits\.segment.* three or more",
        ),
    ],
)
def test_contrasts_that_cannot_tell_t1_or_t2_are_refused(protocol, words):
    with pytest.raises(ScanError, match=words):
        make_context(make_header(encoding(), protocol))


@pytest.mark.parametrize(
    "protocol",
    [
        vfa((10, 10, 20)),
        t2ir(2),
        replace(t2ir(2), preparation_time=(0.0, 0.05)),
        replace(t2ir(3), preparation_time=(0.05,), inversion_efficiency=0.9),
        replace(t2ir(3), preparation_time=(0.05, 0.05), inversion_efficiency=0.9),
    ],
)
def test_contrasts_that_just_tell_t1_and_t2_are_read(protocol):
    """As many independent contrasts as unknowns: their derivatives by the unknowns have full rank."""
    found = make_context(make_header(encoding(), protocol)).protocol
    names = [
        name
        for name in CONTRAST_PARAMETERS[found.sequence]
        if name != "inversion" or found.inversion_efficiency is None
    ]
    tissue = {"t1": 0.9, "t2": 0.08, "inversion": found.inversion_efficiency or 0.95}

    def signal(unknowns: torch.Tensor) -> torch.Tensor:
        values = {name: torch.tensor(value, dtype=torch.float64) for name, value in tissue.items()}
        values |= dict(zip(names, unknowns[1:], strict=True))
        return unknowns[0] * CONTRAST_SIGNALS[found.sequence](values, found, None)

    start = torch.tensor([1.0, *(tissue[name] for name in names)], dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(signal, start)
    assert torch.linalg.matrix_rank(slopes / slopes.norm(dim=0), rtol=1e-6) == len(start)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("missing", [0, 1])
def test_a_preparation_missing_between_others_is_named(missing, named):
    """Whether the sequence is named or to be told from the preparations."""
    header = make_header(encoding(), t2ir())
    if not named:
        header.measurementInformation.protocolName = header.sequenceParameters.sequence_type = "scan"
    del header.userParameters.userParameterDouble[missing]
    words = f"^the header has T2PrepDuration_{missing + 1} but no T2PrepDuration_{missing}$"
    with pytest.raises(ScanError, match=words):
        make_context(header)


# ---- encoding and limits


def test_phase_oversampling_and_interpolation():
    grid = encoding((12, 20, 16), delivered=(8, 14, 16))
    header = make_header(grid, megre())
    header.encoding[0].reconSpace.matrixSize.y = 28  # interpolated twofold
    context = make_context(header)
    assert context.encoding.delivered_matrix == (8, 14, 16)
    assert [note for note in context.notes if "28 voxels along y where 14 were encoded" in note]


@pytest.mark.parametrize(
    ("points", "field", "delivered", "thickness"),
    [
        (3, 12.0, (3, 12.0), 4.0),  # the field of view of all slices
        (3, 2.5, (3, 2.5), 2.5),  # that of one
        (3, 2.5, (1, 2.5), 2.5),
        (3, 12.0, (1, 4.0), 4.0),
        (2, 8.0, (2, 8.0), 4.0),
    ],
)
def test_slices_that_the_header_counts_as_partitions_are_slices(points, field, delivered, thickness):
    header = make_header(encoding((1, 8, 16), slices=3), megre())
    space = header.encoding[0]
    space.encodedSpace.matrixSize.z, space.encodedSpace.fieldOfView_mm.z = points, field
    space.reconSpace.matrixSize.z, space.reconSpace.fieldOfView_mm.z = delivered
    context = make_context(header)
    assert context.encoding.matrix == context.encoding.delivered_matrix == (1, 8, 16)
    assert context.encoding.slices == 3
    assert close(context.encoding.voxel_size[0], 1e-3 * thickness)
    (note,) = context.notes
    assert note.endswith(f"3 slices are counted: taken as 2D slices of {thickness:g} mm")


@pytest.mark.parametrize(("slices", "last"), [(1, 0), (3, 1), (3, None)])
def test_partitions_that_may_come_stay(slices, last):
    header = make_header(encoding((3, 8, 16), slices=slices), megre())
    limits = header.encoding[0].encodingLimits
    limits.kspace_encoding_step_2 = None if last is None else xsd.limitType(minimum=0, maximum=last, center=0)
    assert make_context(header).encoding.matrix == (3, 8, 16)


def test_header_without_limits_or_optional_elements():
    text = """<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
      <experimentalConditions><H1resonanceFrequency_Hz>123000000</H1resonanceFrequency_Hz></experimentalConditions>
      <encoding><encodedSpace><matrixSize><x>32</x><y>16</y><z>1</z></matrixSize>
        <fieldOfView_mm><x>320</x><y>160</y><z>3</z></fieldOfView_mm></encodedSpace>
      <reconSpace><matrixSize><x>16</x><y>16</y><z>1</z></matrixSize>
        <fieldOfView_mm><x>160</x><y>160</y><z>3</z></fieldOfView_mm></reconSpace>
      <trajectory>cartesian</trajectory><vendorExtension>1</vendorExtension></encoding>
      <sequenceParameters><TE>5</TE><TE>10</TE></sequenceParameters></ismrmrdHeader>"""
    context = make_context(parse_header(text))
    assert context.protocol.sequence == "megre"
    assert context.encoding.matrix == (1, 16, 16)
    assert context.encoding.slices == 1
    assert phase_encoding(context.header, context.encoding, 1, []).centre is None


@pytest.mark.parametrize(
    "text", ["", "scan", "<a/>", "<ismrmrdHeader xmlns='http://www.ismrm.org/ISMRMRD'/>"]
)
def test_text_that_is_no_header(text):
    with pytest.raises(ScanError, match="not an ISMRMRD header"):
        parse_header(text)


def test_nothing_about_a_person_is_parsed_or_printed():
    """The tests turn warnings into errors: the parser's would hold the values."""
    text = xsd.ToXML(make_header(encoding(), megre())).replace(
        "<measurementInformation>",
        "<subjectInformation><patientName>Roe^Jane</patientName><patientWeight_kg>72,5</patientWeight_kg>"
        "<patientBirthdate>19701203</patientBirthdate></subjectInformation>"
        "<studyInformation><studyDate>2024.01.02</studyDate></studyInformation>"
        "<measurementInformation><seriesDate>20240102</seriesDate>",
    )
    header = parse_header(text)
    assert header.subjectInformation is None
    assert header.studyInformation is None
    assert make_context(header).protocol.sequence == "megre"
    for secret in ("Jane", "72,5", "1970", "2024.01.02"):
        assert secret not in repr(header)


def test_centre_that_cannot_be_is_replaced_by_the_middle():
    header = make_header(encoding((1, 8, 16)), megre(), centre=(0, 0))
    context = make_context(header)
    notes = []
    assert phase_encoding(header, context.encoding, 1, notes).centre == 4
    assert "the middle 4 is used" in notes[0]


def test_partial_fourier_centre_is_kept():
    header = make_header(encoding((1, 16, 16)), megre(), centre=(0, 3), last=(0, 10))
    notes = []
    lines = phase_encoding(header, make_context(header).encoding, 1, notes)
    assert (lines.centre, lines.first, lines.last, notes) == (3, 0, 10, [])


@pytest.mark.skipif(not PRISMA.exists(), reason="the measured scan is not here")
def test_measured_scan():
    with h5py.File(PRISMA) as file:
        context = make_context(parse_header(file["dataset/xml"][0]))
    assert context.protocol.sequence == "megre"
    assert context.protocol.echo_time == pytest.approx((4.92e-3, 7.38e-3))
    assert context.encoding.matrix == (1, 64, 64)
    assert context.encoding.field_of_view == pytest.approx((3e-3, 0.22, 0.22))
