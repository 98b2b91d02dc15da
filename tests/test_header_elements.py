"""Headers whose values are not of the schema's form: understood where they have a meaning, else named."""

from __future__ import annotations

import ismrmrd.xsd as xsd
import pytest
from line_factory import encoding, megre, t2ir

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.header import make_context, make_header, parse_header


def read(*changes: tuple[str, str], protocol=None) -> Context:
    """What is known of a scan whose header's text was changed."""
    text = xsd.ToXML(make_header(encoding((1, 8, 16)), protocol or megre()))
    for before, after in changes:
        assert before in text, before
        text = text.replace(before, after, 1)
    return make_context(parse_header(text))


def user_parameter(kind: str, name: str, value: str) -> tuple[str, str]:
    entry = f"<userParameter{kind}><name>{name}</name>{value}</userParameter{kind}>"
    return "<userParameters>", f"<userParameters>{entry}"


@pytest.mark.parametrize(
    "change",
    [
        ("<x>32</x>", "<x>32.0</x>"),
        ("<x>16</x>", "<x> 1.6e1 </x>"),
        ("<maximum>7</maximum>", "<maximum>7.0</maximum>"),
        ("<receiverChannels>2<", "<receiverChannels>2.0<"),
        ("<trajectory>cartesian<", "<trajectory>Cartesian<"),
        ("<trajectory>cartesian<", "<trajectory>CARTESIAN<"),
    ],
)
def test_what_has_a_meaning_is_understood(change):
    plain, odd = read(), read(change)
    assert odd.encoding == plain.encoding
    assert odd.protocol == plain.protocol
    assert odd.header == plain.header


def test_a_frequency_need_not_be_whole():
    header = make_header(encoding(), megre())
    plain = header.experimentalConditions.H1resonanceFrequency_Hz
    context = read((f">{plain}<", ">123242774.5<"))
    assert context.protocol.field_strength == pytest.approx(2.8946, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("<x>32</x>", "<x>32.5</x>"), "encoding.encodedSpace.matrixSize.x is '32.5', not a whole number"),
        (("<x>16</x>", "<x>many</x>"), "encoding.reconSpace.matrixSize.x is 'many', not a number"),
        (
            ("<maximum>7</maximum>", "<maximum>7,0</maximum>"),
            "encoding.encodingLimits.kspace_encoding_step_1.maximum is '7,0', not a number",
        ),
        (
            ("<trajectory>cartesian<", "<trajectory>rosette<"),
            "encoding.trajectory is 'rosette', none of cartesian, epi, radial, goldenangle, spiral, other",
        ),
        (("<TE>5.0<", "<TE>5,0<"), "sequenceParameters.TE is '5,0', not a number"),
        (("<TE>5.0<", f"<TE>{'5 ' * 50}<"), f"sequenceParameters.TE is '{'5 ' * 20}...', not a number"),
        (
            ("<receiverChannels>", "<systemFieldStrength_T>3,0</systemFieldStrength_T><receiverChannels>"),
            "acquisitionSystemInformation.systemFieldStrength_T is '3,0', not a number",
        ),
    ],
)
def test_what_has_none_is_named_with_its_value(change, sentence):
    with pytest.raises(ScanError) as caught:
        read(change)
    assert str(caught.value) == f"the header's {sentence}"


@pytest.mark.parametrize(
    ("change", "element"),
    [
        (("<trajectory>cartesian</trajectory>", ""), "encoding.trajectory"),
        (("<fieldOfView_mm>", "<fieldOfView>"), "encoding.encodedSpace.fieldOfView_mm"),
    ],
)
def test_what_is_missing_is_named(change, element):
    closing = [("</fieldOfView_mm>", "</fieldOfView>")] if "fieldOfView" in element else []
    with pytest.raises(ScanError) as caught:
        read(change, *closing)
    assert str(caught.value) == f"the header is not an ISMRMRD header: it has no {element}"


@pytest.mark.parametrize("kind", ["Double", "Long"])
@pytest.mark.parametrize("value", ["<value>N/A</value>", "<value></value>", ""])
def test_user_parameters_of_others_are_left_alone(kind, value):
    context = read(user_parameter(kind, "foo", value), protocol=t2ir())
    assert context.protocol == read(protocol=t2ir()).protocol


def test_user_parameters_of_the_sequence_must_be_numbers():
    with pytest.raises(ScanError, match=r"userParameters\.InversionEfficiency\.value is 'N/A', not a number"):
        read(user_parameter("Double", "InversionEfficiency", "<value>N/A</value>"), protocol=t2ir())
    context = read(user_parameter("Long", "InversionEfficiency", "<value>0.95</value>"), protocol=t2ir())
    assert context.protocol.inversion_efficiency == 0.95


@pytest.mark.parametrize(
    "change",
    [
        ("<patientPosition>HFS</patientPosition>", ""),
        ("<patientPosition>HFS<", "<patientPosition>supine<"),
        ("<measurementInformation>", "<measurementInformation><seriesDate>20240102</seriesDate>"),
        ("<calibrationMode>other<", "<calibrationMode>Embedded<"),
        ("<kspace_encoding_step_1>1<", "<kspace_encoding_step_1>2.5<"),
    ],
)
def test_what_nothing_reads_is_no_obstacle(change):
    context = read(change)
    assert context.encoding.matrix == (1, 8, 16)
    assert context.protocol == read().protocol


def test_an_empty_element_is_an_absent_one():
    assert read(("<receiverChannels>2<", "<receiverChannels><")).encoding.coils == 1
