"""Headers of fingerprints: grids on a trajectory, schedules, and what is wrong with them."""

from __future__ import annotations

import math

import ismrmrd.xsd as xsd
import pytest
from readout_factory import fingerprint, images

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header import make_context, make_header, parse_header
from quantitron.recon.data import Protocol


def made(protocol: Protocol | None = None, **options):
    return make_header(images(), protocol or fingerprint(), **options)


@pytest.mark.parametrize(
    ("grid", "protocol"),
    [
        (images(), fingerprint()),
        (images((1, 12, 20), slices=3, coils=5), fingerprint(7, inversion_efficiency=0.93)),
        (
            images((6, 12, 20)),
            fingerprint(12, inversion_time=(), repetition_time=(0.011, 0.013, 0.012, 0.015) * 3),
        ),
        (images(trajectory="radial"), fingerprint(5, rf_phase=(0.0, math.pi, 0.0, 1.25, 0.0))),
        (images(trajectory="other"), fingerprint(5, flip_angle=(0.0, 0.5, 0.5, 0.0, math.pi))),
    ],
)
def test_encoding_and_protocol_survive_the_header(grid, protocol):
    text = xsd.ToXML(make_header(grid, protocol, interleaves=48))
    context = make_context(parse_header(text))
    assert context.encoding == grid
    found = context.protocol
    for name in ("repetition_time", "flip_angle", "rf_phase", "echo_time", "inversion_time"):
        assert getattr(found, name) == pytest.approx(getattr(protocol, name), abs=1e-9)
    assert found.inversion_efficiency == protocol.inversion_efficiency
    assert (found.sequence, found.contrasts, found.frames) == (
        "fisp_mrf",
        protocol.contrasts,
        protocol.frames,
    )
    assert context.axes == {"ti": "repetition"}
    none = "the header gives no TI: the fingerprint is taken to begin without an inversion"
    assert context.notes == ([] if protocol.inversion_time else [none])


def test_the_written_header_has_equal_spaces_and_counts_interleaves_and_partitions():
    header = make_header(images((6, 12, 20)), fingerprint(9), interleaves=48)
    encoding = header.encoding[0]
    assert encoding.encodedSpace == encoding.reconSpace
    assert encoding.trajectory is xsd.trajectoryType.SPIRAL
    limits = encoding.encodingLimits
    assert (limits.repetition.maximum, limits.kspace_encoding_step_1.maximum) == (8, 47)
    assert (limits.kspace_encoding_step_2.maximum, limits.kspace_encoding_step_2.center) == (5, 3)


@pytest.mark.parametrize("matrix", [0, 99999, 7])
def test_what_the_encoded_space_says_does_not_matter(matrix):
    header = made()
    header.encoding[0].encodedSpace.matrixSize.x = matrix
    header.encoding[0].encodedSpace.fieldOfView_mm.y = 0.0
    context = make_context(header)
    assert context.encoding == images()
    assert context.notes == []


def test_a_reconstructed_space_that_makes_no_sense_is_named():
    header = made()
    header.encoding[0].reconSpace.matrixSize.y = 0
    with pytest.raises(ScanError, match="reconSpace matrix size along y is 0"):
        make_context(header)


def test_the_trajectory_alone_tells_the_sequence():
    header = made()
    header.sequenceParameters.sequence_type = None
    header.measurementInformation = None
    context = make_context(header)
    assert context.protocol == fingerprint()
    assert context.notes == ["sequence taken as fisp_mrf because the trajectory is 'spiral'"]


# ---- length of the schedule


def test_without_limits_there_are_as_many_time_points_as_flip_angles():
    header = made(fingerprint(8))
    header.encoding[0].encodingLimits = xsd.encodingLimitsType()
    assert make_context(header).protocol.contrasts == 8


def test_one_flip_angle_stands_for_all():
    header = made(fingerprint(8))
    header.sequenceParameters.flipAngle_deg = [30.0]
    assert make_context(header).protocol.flip_angle == pytest.approx((math.radians(30),) * 8)


@pytest.mark.parametrize("angles", [[], [30.0]])
def test_an_unknown_schedule_length_is_an_error(angles):
    header = made()
    header.encoding[0].encodingLimits = xsd.encodingLimitsType()
    header.sequenceParameters.flipAngle_deg = angles
    with pytest.raises(
        ScanError, match=r"length of the schedule is not known: .* no encodingLimits\.repetition"
    ):
        make_context(header)


def test_a_counter_that_the_header_leaves_at_one_value_gives_way_to_the_flip_angles():
    header = made(fingerprint(8))
    header.encoding[0].encodingLimits.repetition.maximum = 0
    context = make_context(header)
    assert context.protocol.contrasts == 8
    assert "allows the counter 'repetition' one value" in context.notes[0]


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("flipAngle_deg", [10.0, 20.0], r"2 flip angles \(flipAngle_deg\), fewer than the 6 time points"),
        ("TR", [12.0, 13.0, 12.0], "3 TRs, fewer than the 6 time points"),
        ("TR", [], "gives no TR, which fisp_mrf needs"),
        ("TE", [], "gives no echo time"),
        ("TE", [12.5], "echo time 12.5 ms is not shorter than the shortest TR of 12 ms"),
        ("TE", [-1.0], "TE holds values that are no time"),
        ("TI", [20.0, 30.0], "several values of TI; fisp_mrf has one"),
        ("flipAngle_deg", [10, 20, 30, 40, 50, 190], "not within 180 degrees"),
        ("flipAngle_deg", [0.0], "all 0"),
        ("flipAngle_deg", [10, 20, 30, 40, 50, math.nan], "not within 180 degrees"),
    ],
)
def test_wrong_schedules_are_one_sentence(name, values, words):
    header = made()
    setattr(header.sequenceParameters, name, values)
    with pytest.raises(ScanError, match=words):
        make_context(header)


@pytest.mark.parametrize("name", ["flipAngle_deg", "TR"])
def test_more_values_than_time_points_are_noted(name):
    header = made()
    given = [11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0, 18.0]
    setattr(header.sequenceParameters, name, given)
    context = make_context(header)
    found = context.protocol.flip_angle if name == "TR" else context.protocol.repetition_time
    assert len(context.protocol.flip_angle) == 6
    assert len(context.notes) == 1
    assert "for 6 time points; the first 6 are used" in context.notes[0]
    if name == "TR":
        assert context.protocol.repetition_time == pytest.approx([1e-3 * value for value in given[:6]])
    else:
        assert found == (0.012,)
        assert context.protocol.flip_angle == pytest.approx([math.radians(value) for value in given[:6]])


# ---- pulses


def test_a_negative_flip_angle_turns_the_phase():
    header = made()
    header.sequenceParameters.flipAngle_deg = [10.0, -10.0, 0.0, -20.0, 5.0, 5.0]
    protocol = make_context(header).protocol
    assert protocol.flip_angle == pytest.approx([math.radians(a) for a in (10, 10, 0, 20, 5, 5)])
    assert protocol.rf_phase == (0.0, math.pi, 0.0, math.pi, 0.0, 0.0)


def test_phases_and_negative_angles_add():
    header = made(fingerprint(rf_phase=(0.0, math.pi, 0.0, math.pi, 0.0, math.pi)))
    angles = header.sequenceParameters.flipAngle_deg
    header.sequenceParameters.flipAngle_deg = [a * (-1) ** w for w, a in enumerate(angles)]
    assert make_context(header).protocol.rf_phase == ()


def test_too_few_phases_are_an_error():
    header = made(fingerprint(rf_phase=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0)))
    del header.userParameters.userParameterDouble[4:]
    with pytest.raises(ScanError, match=r"4 RF phases \(RFPhase_0, \.\.\.\), fewer than the 6 time points"):
        make_context(header)


@pytest.mark.parametrize(("missing", "there"), [(0, 1), (1, 2), (4, 5)])
def test_a_phase_missing_between_others_is_named(missing, there):
    """Without the first there would be no phases, without the second one for all."""
    header = made(fingerprint(rf_phase=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0)))
    del header.userParameters.userParameterDouble[missing]
    with pytest.raises(ScanError, match=f"^the header has RFPhase_{there} but no RFPhase_{missing}$"):
        make_context(header)


def test_numbers_of_phases_may_begin_with_zeros():
    header = made(fingerprint(rf_phase=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0)))
    for number, entry in enumerate(header.userParameters.userParameterDouble):
        entry.name = f"RFPhase_{number:03d}"
    header.userParameters.userParameterDouble.reverse()
    assert make_context(header).protocol.rf_phase == pytest.approx((0.0, 1.0, 2.0, 3.0, 4.0, 5.0))


def test_a_phase_that_is_no_number_is_named():
    header = made(fingerprint(rf_phase=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0)))
    header.userParameters.userParameterDouble[2].value = math.inf
    with pytest.raises(ScanError, match="RFPhase_2 is inf"):
        make_context(header)


def test_efficiency_outside_its_range_is_an_error():
    header = made(fingerprint(inversion_efficiency=0.9))
    header.userParameters.userParameterDouble[0].value = 95.0
    with pytest.raises(ScanError, match=r"InversionEfficiency is 95; it must lie in 0\.\.1"):
        make_context(header)


# ---- times


def test_seconds_are_recognised_and_noted():
    header = made()
    parameters = header.sequenceParameters
    parameters.TR, parameters.TE, parameters.TI = [0.012], [0.0007], [0.02]
    context = make_context(header)
    assert context.protocol == fingerprint()
    assert sum("taken as seconds" in note for note in context.notes) == 3


def test_a_very_short_echo_time_in_ms_stays_ms():
    header = made()
    header.sequenceParameters.TE = [0.05]
    context = make_context(header)
    assert context.protocol.echo_time == pytest.approx((50e-6,))
    assert context.notes == []


def test_only_the_first_of_several_echo_times_counts():
    header = made()
    header.sequenceParameters.TE = [0.7, 4.0]
    context = make_context(header)
    assert context.protocol.echo_time == pytest.approx((0.7e-3,))
    assert "several values of TE" in context.notes[0]


def test_an_inversion_without_delay_is_said():
    header = made()
    header.sequenceParameters.TI = [0.0]
    context = make_context(header)
    assert context.protocol.inversion_time == (0.0,)
    assert "TI is 0" in context.notes[0]


def test_another_counter_for_the_time_points():
    header = make_header(images(), fingerprint(8), axes="time=set")
    context = make_context(header, axes="time=set")
    assert context.axes == {"ti": "set"}
    assert context.protocol.contrasts == 8
    with pytest.raises(ScanError, match="fisp_mrf has the axes ti"):
        make_context(header, axes="te=contrast")
