from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import ismrmrd
import numpy as np
import pytest
from stand_in import GADGETS, HEADER, acquisitions, gather, scan

from quantitron.gadgets import chain as chain_module
from quantitron.gadgets import wire as protocol
from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.chain import Chain, check_configuration, deliver, make_chain
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context, Gadget
from quantitron.gadgets.wire import Wire
from quantitron.pipelines import pipeline_names, pipeline_text
from quantitron.recon.solvers import SOLVERS

pytestmark = pytest.mark.timeout(60)


def configuration(gadgets: str) -> Element:
    return ElementTree.fromstring(f"<configuration>{gadgets}</configuration>")


def make(gadgets: str, header: str = HEADER) -> Chain:
    return make_chain(configuration(gadgets), header, "test.xml", GADGETS)


def test_blocks_and_single_acquisitions_give_the_same_images():
    part = scan(300)
    one, two = (
        list(make(gather())(items))
        for items in (
            acquisitions(part),
            [
                AcquisitionBlock(part.head[:128], part.data[:128], part.trajectory[:128]),
                *acquisitions(AcquisitionBlock(part.head[128:], part.data[128:], part.trajectory[128:])),
            ],
        )
    )
    assert len(one) == len(two) == 2
    assert np.array_equal(one[0].data, two[0].data)
    assert one[0].data.any()


@pytest.mark.parametrize(
    ("gadgets", "words"),
    [
        ("", "lists no gadget"),
        ("<gadget name='gater'/>", "unknown gadget 'gater'; did you mean 'gather'?"),
        ("<gadget/>", "a <gadget> has no name"),
        ("<node name='gather'/>", "<configuration> holds <node>"),
        ("<gadget name='scale'/><gadget name='scale'/>", "'scale' is listed twice"),
        ("<gadget name='gather'/><gadget name='scale'/>", "'scale' must come before 'gather'"),
        ("<gadget name='scale'/>", "ends with gadget 'scale', giving AcquisitionBlock, no images"),
        ("<gadget name='gather'><property name='images'/></gadget>", "<property> must be <property name"),
        (gather(imags=1), "gadget gather: unknown property 'imags'; did you mean 'images'?"),
        (gather(images="two"), "property 'images' is 'two', but must be a whole number"),
        (gather(images=-1), "at least 0"),
        (
            gather(images=1).replace("/></gadget>", "/><property name='images' value='2'/></gadget>"),
            "given twice",
        ),
    ],
)
def test_a_wrong_configuration_is_an_error_before_any_data(gadgets, words):
    with pytest.raises(ScanError) as caught:
        make(gadgets)
    assert str(caught.value).startswith("test.xml")
    assert words in str(caught.value)


def test_a_missing_gadget_between_two_is_named():
    whole = pipeline_text("subspace")
    root = ElementTree.fromstring(whole)
    inner = root.find("stream/external/configuration")
    assert inner is not None
    inner.remove(next(gadget for gadget in inner if gadget.get("name") == "basis"))
    with pytest.raises(
        ScanError, match="'reconstruct' takes Problem, not ScanData; 'basis' is missing before it"
    ):
        check_configuration(inner, "here")


def test_a_header_that_is_none_is_an_error():
    with pytest.raises(ScanError, match="not an ISMRMRD header"):
        make(gather(), "<nothing/>")


def settings_file(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(chain_module, "settings_names", lambda: ["subspace"])
    monkeypatch.setattr(chain_module, "settings_text", lambda name: text)


SUBSPACE = (
    "<gadget name='accumulate'/><gadget name='basis'/>"
    "<gadget name='reconstruct'>{}</gadget><gadget name='images'/>"
)


def resolved(properties: str = "") -> dict[str, dict[str, dict[str, object]]]:
    return check_configuration(configuration(SUBSPACE.format(properties)), "x.xml")


def test_xml_overrides_the_sequence_section_overrides_all_overrides_defaults(monkeypatch):
    settings_file(
        monkeypatch,
        "all:\n  reconstruct: {linear_iterations: 11, seed: 3}\n"
        "vfa_gre:\n  reconstruct: {linear_iterations: 12}\n",
    )
    assert resolved()["megre"]["reconstruct"]["linear_iterations"] == 11
    assert resolved()["vfa_gre"]["reconstruct"]["linear_iterations"] == 12
    assert resolved()["vfa_gre"]["reconstruct"]["seed"] == 3
    in_xml = resolved("<property name='linear_iterations' value='13'/>")
    assert in_xml["vfa_gre"]["reconstruct"]["linear_iterations"] == 13
    assert in_xml["vfa_gre"]["reconstruct"]["seed"] == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("al: {}", "settings/subspace.yaml: unknown section 'al'; did you mean 'all'?"),
        ("- 3", "must hold sections"),
        ("all: [2", "settings/subspace.yaml is not YAML: expected ',' or ']'"),
        ("all:\n\treconstruct: {}", "that cannot start any token (line 2)"),
        ("all: {reconstruct: {1: 2}}", "settings/subspace.yaml: line 1 holds a key that is no name"),
        ("all: {}\nall: {}", "settings/subspace.yaml: line 2 gives 'all' a second time"),
        (
            "all:\n  reconstruct:\n    seed: 1\n    seed: 2",
            "settings/subspace.yaml: line 4 gives 'seed' a second time",
        ),
        ("all: 3", "section all: must hold gadget -> property -> value"),
        ("all: {recnstruct: {}}", "section all: unknown gadget 'recnstruct'; did you mean 'reconstruct'?"),
        (
            "megre: {reconstruct: {iteratons: 3}}",
            "settings/subspace.yaml, section megre, gadget reconstruct: unknown property 'iteratons'",
        ),
        (
            "all: {accumulate: {phase_sign: plus}}",
            "section all, gadget accumulate: property 'phase_sign' is 'plus'",
        ),
    ],
)
def test_errors_in_a_settings_file_name_the_file(monkeypatch, text, words):
    settings_file(monkeypatch, text)
    with pytest.raises(ScanError) as caught:
        resolved()
    assert words in str(caught.value)


@pytest.mark.parametrize("name", pipeline_names())
def test_every_pipeline_is_valid_and_in_gadgetrons_grammar(name):
    root = ElementTree.fromstring(pipeline_text(name))
    assert root.tag == "configuration"
    assert [node.tag for node in root] == ["version", "readers", "writers", "stream"]
    assert root.findtext("version") == "2"
    assert {node.findtext("classname") for node in root.iter("reader")} == {
        "AcquisitionReader",
        "WaveformReader",
    }
    execute = root.find("stream/external/execute")
    assert execute is not None
    assert execute.attrib == {"name": "quantitron.gadgets.chain", "target": "run", "type": "python"}
    inner = root.find("stream/external/configuration")
    assert inner is not None
    solver = next(node.get("value") for node in inner.iter("property") if node.get("name") == "solver")
    sequences = {one for kind in SOLVERS if kind.name == solver for one in kind.sequences}
    assert set(check_configuration(inner)) == sequences
    assert sequences


def test_settings_hash_is_in_the_context_and_follows_the_settings():
    hashes = [
        make(gather(**properties)).context.settings_hash for properties in ({}, {"images": 2}, {"images": 3})
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_times_from_gadgetron_are_those_of_the_file():
    rounded = HEADER.replace("<TE>4</TE>", "<TE>4.92</TE>")
    passed_on = HEADER.replace("<TE>4</TE>", "<TE>4.92000008</TE>")
    one, two = (make(gather(), header).context.protocol for header in (rounded, passed_on))
    assert one == two
    assert one.echo_time[0] == pytest.approx(4.92e-3, rel=1e-15)


# ------------------------------------------------------------------------------------------------ delivery


@dataclass
class Delivered:
    failure: str | None
    images: list[ismrmrd.Image]
    errors: list[str]
    drained: bool


def delivered(gadgets: str, stream: bytes, prepare: object = None) -> Delivered:
    """Run ``deliver`` on a socket pair; the peer reads only after it has sent everything."""
    own, other = socket.socketpair()
    with own, other:
        result: list[str | None] = []
        wire = Wire(own)

        def serve() -> None:
            result.append(
                deliver(
                    wire, lambda: make(gadgets), lambda sentence: wire.send_text(protocol.ERROR, sentence)
                )
            )
            own.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve)
        thread.start()
        other.sendall(stream)
        other.shutdown(socket.SHUT_WR)
        peer = Wire(other)
        images, errors = [], []
        try:
            while True:
                message = peer.read()
                (images if message.identifier == protocol.IMAGE else errors).append(message.payload)
        except protocol.PeerGone:
            thread.join()
        return Delivered(result[0], images, errors, wire.closed)


def stream(block: AcquisitionBlock, close: bool = True) -> bytes:
    raw = b"".join(
        struct.pack("<H", protocol.ACQUISITION) + single.to_bytes() for single in acquisitions(block)
    )
    return raw + (struct.pack("<H", protocol.CLOSE) if close else b"")


def test_images_are_delivered_and_nothing_else_where_nothing_fails():
    found = delivered(gather(), stream(scan()))
    assert found.failure is None
    assert len(found.images) == 2
    assert found.errors == []
    assert found.drained


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ("known", "the gather gadget was told to fail (2 images were delivered)"),
        ("unknown", "gather failed unexpectedly with RuntimeError: something nobody foresaw (2 images"),
        ("memory", "gather ran out of memory"),
    ],
)
def test_images_before_a_failure_are_delivered_and_then_the_failure(fail, words):
    found = delivered(gather(fail=fail), stream(scan()))
    assert len(found.images) == 2
    assert len(found.errors) == 1
    assert words in found.errors[0]
    assert "\n" not in found.errors[0]
    assert found.failure == found.errors[0]


def test_all_input_is_read_before_an_early_failure_is_reported():
    # far more than socket buffers hold: the peer could not have sent it had the input not been drained
    found = delivered(gather(imags=1), stream(scan(2000, channels=16, samples=256)))
    assert found.drained
    assert found.errors == [found.failure]
    assert "unknown property 'imags'" in found.errors[0]


def test_an_early_end_gives_images_of_what_came_and_an_error():
    found = delivered(gather(), stream(scan(), close=False)[:-100])
    assert len(found.images) == 2
    assert found.errors == ["the connection ended in the middle of acquisition 31 (2 images were delivered)"]


def test_an_early_end_with_too_little_names_the_cause_first():
    found = delivered(gather(least=32), stream(scan(), close=False)[:-100])
    assert found.images == []
    assert found.errors == ["the connection ended in the middle of acquisition 31; only 31 of 32 lines came"]


def test_a_chain_without_images_is_a_failure():
    found = delivered(gather(images=0), stream(scan()))
    assert found.errors == ["the chain ended without any image"]


@dataclass(frozen=True)
class Eager(Gadget):
    """Ends the scan at its tenth line, as LAST_IN_MEASUREMENT may."""

    name: ClassVar[str] = "gather"

    def __call__(self, items: Iterable[AcquisitionBlock], context: Context) -> Iterator[ismrmrd.Image]:
        next(iter(items))
        yield ismrmrd.Image.from_array(np.zeros((2, 2), dtype=np.float32), transpose=False)


def test_input_behind_the_end_of_the_measurement_is_read(monkeypatch):
    monkeypatch.setattr("test_chain.GADGETS", (Eager,))
    found = delivered("<gadget name='gather'/>", stream(scan(2000, channels=16, samples=256)))
    assert found.failure is None
    assert found.drained
    assert len(found.images) == 1


# --------------------------------------------------------------------------------- target of <execute>


def gadgetron_run(
    monkeypatch: pytest.MonkeyPatch, gadgets: str, data: bytes
) -> tuple[list[int], list[object], object]:
    """What Gadgetron's ``python -m gadgetron`` does with ``run``: message ids, payloads and exit status."""
    from gadgetron.external.connection import Connection

    monkeypatch.setattr(chain_module, "GADGETS", GADGETS)
    own, other = socket.socketpair()
    status: list[object] = [None]

    def module() -> None:
        try:
            with Connection(own) as connection:
                chain_module.run(connection)
        except SystemExit as end:
            status[0] = end.code

    with other:
        peer = Wire(other)
        thread = threading.Thread(target=module)
        thread.start()
        peer.send_text(protocol.CONFIG, f"<configuration>{gadgets}</configuration>")
        peer.send_text(protocol.HEADER, HEADER)
        other.sendall(data)
        messages = []
        while not messages or messages[-1].identifier != protocol.CLOSE:
            messages.append(peer.read())
        thread.join()
    return [m.identifier for m in messages], [m.payload for m in messages], status[0]


def test_run_under_gadgetrons_own_python_package(monkeypatch):
    identifiers, payloads, status = gadgetron_run(monkeypatch, gather(), stream(scan()))
    assert identifiers == [protocol.IMAGE, protocol.IMAGE, protocol.CLOSE]
    assert status is None
    expected = list(make(gather())(acquisitions(scan())))
    assert np.array_equal(payloads[0].data, expected[0].data)


def test_run_reports_a_failure_as_error_and_exits_with_one(monkeypatch):
    identifiers, payloads, status = gadgetron_run(monkeypatch, gather(fail="known"), stream(scan()))
    assert identifiers == [protocol.IMAGE, protocol.IMAGE, protocol.ERROR, protocol.CLOSE]
    assert "told to fail" in str(payloads[2])
    assert status == 1


def test_run_ends_without_another_error_where_gadgetron_is_gone(monkeypatch):
    from gadgetron.external.connection import Connection

    monkeypatch.setattr(chain_module, "GADGETS", GADGETS)
    own, other = socket.socketpair()
    with other:
        peer = Wire(other)
        peer.send_text(protocol.CONFIG, f"<configuration>{gather()}</configuration>")
        peer.send_text(protocol.HEADER, HEADER)
        other.sendall(stream(scan()))
    with pytest.raises(SystemExit, match="1"), Connection(own) as connection:
        chain_module.run(connection)
    assert own.fileno() == -1
