from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
from stand_in import GADGETS, HEADER, acquisitions, gather, pipeline, scan, write_raw

from quantitron.gadgets import chain as chain_module
from quantitron.gadgets import wire as protocol
from quantitron.gadgets.acquisition_block import HEADER_DTYPE, blocks_of
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_file import read_images
from quantitron.gadgets.wire import Message, Wire
from quantitron.host.client import parse_address, send_scan
from quantitron.host.configuration import (
    external_configuration,
    known_pipeline,
    load_pipeline,
    override,
    parse_pipeline,
)
from quantitron.host.connections import accept_connections
from quantitron.host.raw_file import count_acquisitions, read_blocks, read_header
from quantitron.host.replay import replay

pytestmark = pytest.mark.timeout(60)

RUN = [sys.executable, str(Path(__file__).with_name("run_command.py"))]


# ------------------------------------------------------------------------------------------------- raw files


def test_a_file_gives_the_blocks_of_a_stream(tmp_path):
    parts = [scan(700), scan(5, channels=2), scan(130, samples=16, dimensions=2)]
    raw = write_raw(tmp_path / "raw.h5", *parts)
    expected = list(blocks_of(single for part in parts for single in acquisitions(part)))
    found = list(read_blocks(raw))
    assert count_acquisitions(raw) == 835
    assert [len(block) for block in found] == [len(block) for block in expected]
    for one, two in zip(found, expected, strict=True):
        assert one.first == two.first
        assert one.head.tobytes() == two.head.tobytes()
        assert np.array_equal(one.data, two.data)
        assert np.array_equal(one.trajectory, two.trajectory)


def test_a_file_that_ismrmrd_wrote_is_read(tmp_path):
    part = scan(20)
    with ismrmrd.Dataset(str(tmp_path / "raw.h5"), "other") as dataset:
        dataset.write_xml_header(HEADER.encode())
        for single in acquisitions(part):
            dataset.append_acquisition(single)
    (block,) = read_blocks(tmp_path / "raw.h5", "other")
    assert np.array_equal(block.data, part.data)
    assert block.head.tobytes() == part.head.tobytes()
    assert read_header(tmp_path / "raw.h5", "other") == HEADER.encode()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"not HDF5" * 100), "is not an HDF5 file"),
        (lambda path: h5py.File(path, "w").close(), "has no group 'dataset' (groups: none)"),
        (lambda path: write_raw(path, scan(2), header=None), "has no ISMRMRD header (/dataset/xml)"),
        (lambda path: os.truncate(write_raw(path, scan(50)), 9000), "is truncated"),
    ],
)
def test_a_raw_file_that_is_none_is_one_clear_sentence(tmp_path, make, words):
    path = tmp_path / "raw.h5"
    make(path)
    with pytest.raises(ScanError) as caught:
        read_header(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        np.dtype("f4"),
        np.dtype([("head", "f4"), ("other", "f4")]),
        np.dtype([("head", "f4"), ("data", "f4"), ("traj", "f4")]),
        np.dtype([("head", HEADER_DTYPE), ("data", "f4"), ("traj", "f4")]),
    ],
)
def test_a_table_of_something_else_is_no_acquisitions(tmp_path, kind):
    path = tmp_path / "raw.h5"
    with h5py.File(path, "w") as file:
        file["dataset/data"] = np.zeros(3, dtype=kind)
    with pytest.raises(ScanError, match="/dataset/data does not hold ISMRMRD acquisitions"):
        list(read_blocks(path))


def test_a_header_may_be_a_single_string(tmp_path):
    path = write_raw(tmp_path / "raw.h5", scan(2))
    with h5py.File(path, "r+") as file:
        text = file["dataset/xml"][0]
        del file["dataset/xml"]
        file["dataset/xml"] = text
    assert read_header(path) == text


def test_rows_that_are_no_acquisitions_are_errors(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["dataset/data"] = np.zeros(3)
    with pytest.raises(ScanError, match="does not hold ISMRMRD acquisitions"):
        list(read_blocks(tmp_path / "a.h5"))
    part = scan(30)
    part.head["number_of_samples"][17] = 31
    raw = write_raw(tmp_path / "b.h5", part)
    with pytest.raises(ScanError, match="acquisition 17 holds 192 values in 'data'"):
        list(read_blocks(raw))
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_group("dataset")
    with pytest.raises(ScanError, match="holds no acquisitions"):
        list(read_blocks(tmp_path / "c.h5"))


# --------------------------------------------------------------------------------------------- configuration


def inner(text: str) -> object:
    return external_configuration(parse_pipeline(text, "x.xml"), "x.xml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{'not': 'xml'}", "the configuration is not XML"),
        ("<gadgetronStreamConfiguration/>", "<gadgetronStreamConfiguration>; the embedded host runs only"),
        ("<configuration/>", "one <stream>"),
        ("<configuration><stream/></configuration>", "one <external>"),
        (
            pipeline(around="<gadget><name>FFT</name></gadget>"),
            "<gadget> (FFT) in <stream>: the embedded host",
        ),
        (pipeline(around="<parallel/>"), "needs Gadgetron itself"),
        (pipeline().replace("quantitron.gadgets.chain", "other"), "<execute name='other'> is not quantitron"),
        (pipeline(around="<external><configuration/></external>"), "2 <external> nodes"),
        (pipeline().replace("<readers>", "<storage/><readers>"), "<storage> in <configuration>"),
    ],
)
def test_what_the_embedded_host_cannot_run_is_said(text, words):
    with pytest.raises(ScanError) as caught:
        inner(text)
    assert words in str(caught.value)


def test_connect_and_bare_configurations_are_accepted():
    connect = pipeline().replace(
        '<execute name="quantitron.gadgets.chain" target="run" type="python"/>',
        '<connect address="gpuhost" port="18000"/>',
    )
    assert len(inner(connect)) == 2
    assert len(inner("<configuration><gadget name='gather'/></configuration>")) == 1


def test_overrides_replace_and_add_properties():
    root = inner(pipeline(gather(images=1)))
    override(root, ["gather.images=3", "scale.factor=2=2"], "x")
    assert [(p.get("name"), p.get("value")) for p in root.iter("property")] == [
        ("factor", "2=2"),
        ("images", "3"),
    ]
    for wrong, words in (
        ("gather.images", "write gadget.property=value"),
        ("images=3", "write gadget.property=value"),
        ("gathr.images=3", "unknown gadget 'gathr'; did you mean 'gather'?"),
    ):
        with pytest.raises(ScanError) as caught:
            override(root, [wrong], "x")
        assert words in str(caught.value)


def test_pipelines_are_found_by_name_and_by_path(tmp_path):
    assert load_pipeline("subspace") == load_pipeline("subspace.xml")
    (tmp_path / "own.xml").write_text("<configuration/>")
    assert load_pipeline(str(tmp_path / "own.xml"))[0] == "<configuration/>"
    with pytest.raises(ScanError, match=r"no pipeline 'lorain'; pipelines are: .*subspace.* or the path of"):
        load_pipeline("lorain")
    with pytest.raises(ScanError, match=r"no pipeline '.*own\.xml'; pipelines are: .*svdmrf$"):
        known_pipeline(str(tmp_path / "own.xml"))  # as servers do: a client must not name files


def test_addresses():
    assert parse_address("gpu:18000") == ("gpu", 18000)
    assert parse_address("gpu") == ("gpu", 9002)
    assert parse_address("[::1]:80") == ("::1", 80)
    for wrong in ("gpu:", "gpu:x", ":9", "gpu:70000"):
        with pytest.raises(ScanError, match="is not HOST:PORT"):
            parse_address(wrong)


# ---------------------------------------------------------------------------------------------------- replay


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "GADGETS", GADGETS)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "raw.h5", scan(300))


def write_pipeline(folder: Path, **properties: object) -> str:
    path = folder / "pipeline.xml"
    path.write_text(pipeline(gather(**properties)))
    return str(path)


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"raw.h5", "pipeline.xml"}


@pytest.mark.usefixtures("stand_ins")
def test_replay_writes_images_and_never_by_accident_over_others(tmp_path, raw):
    name = write_pipeline(tmp_path)
    seen = []
    result = replay(raw, name, tmp_path / "maps.h5", progress=lambda done, total: seen.append((done, total)))
    assert result.images == 2
    assert result.series == {101: "T1", 102: "T1"}
    assert seen[-1] == (300, 300)
    assert left_in(tmp_path) == {"maps.h5"}
    assert len(read_images(tmp_path / "maps.h5")) == 2
    with pytest.raises(ScanError, match="exists already"):
        replay(raw, name, tmp_path / "maps.h5")
    replay(raw, name, tmp_path / "maps.h5", ["gather.images=1"], overwrite=True)
    assert len(read_images(tmp_path / "maps.h5")) == 1


@pytest.mark.usefixtures("stand_ins")
def test_replay_keeps_what_was_computed_before_a_failure(tmp_path, raw):
    name = write_pipeline(tmp_path, fail="known")
    with pytest.raises(
        ScanError, match=r"told to fail \(2 images that were finished before are in .*maps.h5\)"
    ):
        replay(raw, name, tmp_path / "maps.h5")
    assert len(read_images(tmp_path / "maps.h5")) == 2
    assert left_in(tmp_path) == {"maps.h5"}


@pytest.mark.usefixtures("stand_ins")
def test_a_failure_without_images_leaves_no_file_and_no_other_lost(tmp_path, raw):
    name = write_pipeline(tmp_path, least=301)
    (tmp_path / "maps.h5").write_bytes(b"precious")
    with pytest.raises(ScanError, match=r"only 300 of 301 lines came$"):
        replay(raw, name, tmp_path / "maps.h5", overwrite=True)
    assert (tmp_path / "maps.h5").read_bytes() == b"precious"
    assert left_in(tmp_path) == {"maps.h5"}


@pytest.mark.usefixtures("stand_ins")
def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path, raw, monkeypatch):
    name = write_pipeline(tmp_path)
    for output, words in (
        (tmp_path / "no" / "maps.h5", "does not exist"),
        (Path("/dev/full"), "not a regular file"),
    ):
        with pytest.raises(ScanError, match=words):
            replay(raw, name, output, overwrite=True)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ScanError, match="is full"):
        replay(raw, name, tmp_path / "maps.h5")


# ---------------------------------------------------------------------------------------------------- server


class Host:
    """``serve`` or ``listen`` in a process of its own, with the stand-in gadgets."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*RUN, "--stand-in", *arguments, "--port", "0"], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        while " on 127.0.0.1:" not in (line := self.process.stderr.readline()):
            assert line, f"the host ended: {self.lines}"
            self.lines.append(line)
        self.address = ("127.0.0.1", int(line.strip().rsplit(":", 1)[1]))

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, 10)  # also the longest that a read may wait

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=20)
        return self.process.returncode, "".join(self.lines) + rest


@pytest.fixture(scope="module")
def server() -> Iterator[Host]:
    host = Host("serve", "--default-pipeline", "subspace")
    yield host
    status, log = host.stop()
    assert status == 0, log
    assert "Doe" not in log
    assert "4711" not in log


def conversation(connection: socket.socket, *sent: tuple[int, str] | bytes) -> list[Message]:
    """Send messages and read to CLOSE."""
    wire = Wire(connection)
    for part in sent:
        if isinstance(part, bytes):
            connection.sendall(part)
        else:
            wire.send_text(*part)
    return to_close(wire)


def to_close(wire: Wire) -> list[Message]:
    messages: list[Message] = []
    while not messages or messages[-1].identifier != protocol.CLOSE:
        messages.append(wire.read())
    return messages


def data(lines: int = 300) -> bytes:
    singles = acquisitions(scan(lines))
    return b"".join(struct.pack("<H", protocol.ACQUISITION) + single.to_bytes() for single in singles)


CLOSE = struct.pack("<H", protocol.CLOSE)


def kinds(messages: list[Message]) -> list[int]:
    return [message.identifier for message in messages if message.identifier != protocol.TEXT]


def test_server_and_replay_give_the_same_bits(server, tmp_path, raw, monkeypatch):
    monkeypatch.setattr(chain_module, "GADGETS", GADGETS)
    name = write_pipeline(tmp_path)
    here = replay(raw, name, tmp_path / "file.h5")
    there = replay(raw, name, tmp_path / "socket.h5", gadgetron=f"127.0.0.1:{server.address[1]}")
    assert here.notes == there.notes != []
    one, two = (read_images(tmp_path / f"{source}.h5") for source in ("file", "socket"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert bytes(a.getHead()) == bytes(b.getHead())
        assert np.array_equal(a.data, b.data)
        assert dict(a.meta) == dict(b.meta)


def test_server_takes_config_header_waveforms_and_data(server):
    waveform = (
        struct.pack("<H", protocol.WAVEFORM)
        + ismrmrd.Waveform.from_array(np.zeros((1, 7), dtype=np.uint32)).to_bytes()
    )
    with server.connect() as connection:
        messages = conversation(
            connection,
            (protocol.CONFIG, pipeline(gather())),
            (protocol.TEXT, '{"parameters": "of OpenRecon"}'),
            (protocol.HEADER, HEADER),
            waveform,
            data(40),
            waveform,
            CLOSE,
        )
    assert kinds(messages) == [protocol.IMAGE, protocol.IMAGE, protocol.CLOSE]
    texts = [message.payload for message in messages if message.identifier == protocol.TEXT]
    assert any("sequence taken as megre" in text for text in texts)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ((protocol.FILENAME, "lorain.xml"), "there is no pipeline 'lorain.xml'; pipelines are: "),
        ((protocol.FILENAME, "/etc/passwd"), "there is no pipeline '/etc/passwd'"),
        # known names, but the stand-in gadgets are not those of the pipeline
        ((protocol.FILENAME, "subspace"), "unknown gadget 'noise_adjust'"),
        ((protocol.FILENAME, "openrecon"), "pipeline subspace: unknown gadget 'noise_adjust'"),
        ((protocol.CONFIG, "subspace"), "the configuration is not XML"),
        ((protocol.CONFIG, pipeline(gather(imags=3))), "unknown property 'imags'"),
        ((protocol.CONFIG, pipeline(gather(images="x"))), "must be a whole number"),
        ((protocol.CONFIG, pipeline(around="<gadget/>")), "needs Gadgetron itself"),
        ((protocol.CONFIG, pipeline(gather(fail="unknown"))), "gather failed unexpectedly with RuntimeError"),
    ],
)
def test_server_reports_failures_as_text_and_as_error_after_all_input(server, config, words):
    with server.connect() as connection:
        messages = conversation(connection, config, (protocol.HEADER, HEADER), data(2000), CLOSE)
    assert kinds(messages)[-2:] == [protocol.ERROR, protocol.CLOSE]
    assert words in messages[-2].payload
    assert messages[-3].identifier == protocol.TEXT
    assert messages[-3].payload == f"ERROR: {messages[-2].payload}\n"


def test_client_raises_what_the_server_reports_after_the_images(server):
    images = send_scan(server.address, pipeline(gather(fail="known")), HEADER.encode(), [scan(50)])
    assert next(images).data.any()
    assert next(images).data.any()
    with pytest.raises(ScanError, match=r"127.0.0.1:\d+ reports: the gather gadget was told to fail"):
        next(images)


def test_client_knows_a_failure_that_comes_as_text_only():
    host = Host("serve", "--text-errors")
    with host.connect() as connection:
        config = (protocol.CONFIG, pipeline(gather(fail="known")))
        messages = conversation(connection, config, (protocol.HEADER, HEADER), data(9), CLOSE)
    assert kinds(messages) == [protocol.IMAGE, protocol.IMAGE, protocol.CLOSE]
    with pytest.raises(ScanError, match="reports: the gather gadget was told to fail"):
        list(send_scan(host.address, pipeline(gather(fail="known")), HEADER.encode(), [scan(50)]))
    assert host.stop()[0] == 0


def test_client_says_that_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = unused.getsockname()
    with pytest.raises(ScanError, match=r"cannot connect to 127\.0\.0\.1"):
        next(send_scan(address, "x", b"", []))


def test_question_for_a_stored_noise_scan_gets_an_empty_answer(server):
    config = (
        "<gadgetronStreamConfiguration><gadget>NoiseSummaryGadget</gadget></gadgetronStreamConfiguration>"
    )
    with server.connect() as connection:
        assert kinds(conversation(connection, (protocol.CONFIG, config), CLOSE)) == [protocol.CLOSE]


def test_connections_are_served_side_by_side(server):
    with server.connect() as slow, server.connect() as fast:
        waiting = Wire(slow)
        waiting.send_text(protocol.CONFIG, pipeline(gather()))
        waiting.send_text(protocol.HEADER, HEADER)
        slow.sendall(data(10))
        messages = conversation(
            fast, (protocol.CONFIG, pipeline(gather())), (protocol.HEADER, HEADER), data(20), CLOSE
        )
        assert protocol.IMAGE in kinds(messages)
        slow.sendall(data(10) + CLOSE)
        others = to_close(waiting)
    assert kinds(others) == kinds(messages)


def test_listen_is_the_far_end_of_connect_and_sends_no_text():
    host = Host("listen")
    with host.connect() as connection:
        configuration = f"<configuration>{gather()}</configuration>"
        messages = conversation(
            connection, (protocol.CONFIG, configuration), (protocol.HEADER, HEADER), data(20), CLOSE
        )
    assert [message.identifier for message in messages] == [protocol.IMAGE, protocol.IMAGE, protocol.CLOSE]
    with host.connect() as connection:
        messages = conversation(
            connection, (protocol.CONFIG, "nonsense"), (protocol.HEADER, HEADER), data(20), CLOSE
        )
    assert [message.identifier for message in messages] == [protocol.ERROR, protocol.CLOSE]
    assert "the configuration is not XML" in messages[0].payload
    assert host.stop(signal.SIGINT)[0] == 0


def test_a_stopped_server_tells_its_clients_and_leaves_no_process():
    host = Host("serve")
    with host.connect() as connection:
        wire = Wire(connection)
        wire.send_text(protocol.CONFIG, pipeline(gather()))
        wire.send_text(protocol.HEADER, HEADER)
        connection.sendall(data(10))
        assert wire.read().identifier == protocol.TEXT  # the scan has begun
        time.sleep(0.5)  # a server that is stopped in the middle of a message can only hang up
        started = time.monotonic()
        status, log = host.stop()
        assert status == 0, log
        assert time.monotonic() - started < 10
        messages = to_close(wire)
    assert "stopped before the scan was done" in messages[-2].payload
    with pytest.raises(OSError, match="refused"):
        host.connect()


class CannotWrite(Exception):
    """Gadgetron reads nothing more on a connection on which it could not write."""


def texts_in(raw: bytes) -> list[tuple[int, str]]:
    """Complete messages at the beginning of what was received: TEXT, ERROR and CLOSE."""
    found = []
    while len(raw) >= 2:
        (identifier,) = struct.unpack_from("<H", raw)
        length = {protocol.TEXT: "<I", protocol.ERROR: "<Q", protocol.CLOSE: ""}[identifier]
        start = 2 + struct.calcsize(length)
        if len(raw) < start:
            break
        end = start + (struct.unpack_from(length, raw, 2)[0] if length else 0)
        if len(raw) < end:
            break
        found.append((identifier, raw[start:end].decode()))
        raw = raw[end:]
    return found


def as_gadgetron(connection: socket.socket, lines: bytes, begun: Callable[[], None]) -> list[tuple[int, str]]:
    """Send lines for as long as it takes, as Gadgetron does to an external process: at an ERROR it says CLOSE
    and reads on to CLOSE."""
    received = b""
    sending = True
    while not (found := texts_in(received)) or found[-1][0] != protocol.CLOSE:
        if sending and any(identifier == protocol.ERROR for identifier, _ in found):
            connection.sendall(CLOSE)
            sending = False
        if sending:
            try:
                connection.sendall(lines)
            except OSError as error:
                raise CannotWrite from error
            begun()
        if not sending or select.select([connection], [], [], 0)[0]:
            received += connection.recv(1 << 16)
    return found


@pytest.mark.parametrize("kind", ["serve", "listen"])
def test_a_stopped_host_tells_one_that_goes_on_sending(kind):
    host = Host(kind)
    started = time.monotonic()
    stopped: list[float] = []

    def stop() -> None:
        if not stopped and time.monotonic() - started > 0.5:
            stopped.append(time.monotonic())
            host.process.send_signal(signal.SIGTERM)

    with host.connect() as connection:
        wire = Wire(connection)
        configuration = (
            pipeline(gather()) if kind == "serve" else f"<configuration>{gather()}</configuration>"
        )
        wire.send_text(protocol.CONFIG, configuration)
        wire.send_text(protocol.HEADER, HEADER)
        messages = as_gadgetron(connection, data(300), stop)
    host.process.communicate(timeout=20)
    assert host.process.returncode == 0
    assert time.monotonic() - stopped[0] < 10
    assert messages[-2][0] == protocol.ERROR
    assert "stopped before the scan was done" in messages[-2][1]


NO_PROCESS = """import os
fork, calls = os.fork, []
def once_in_vain():
    calls.append(None)
    if len(calls) == 1:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()
os.fork = once_in_vain
"""


def test_a_connection_for_which_there_is_no_process_does_not_end_the_server(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(NO_PROCESS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    host = Host("serve")
    with host.connect() as connection:
        assert connection.recv(1) == b""
    with host.connect() as connection:
        messages = conversation(
            connection, (protocol.CONFIG, pipeline(gather())), (protocol.HEADER, HEADER), data() + CLOSE
        )
    assert protocol.IMAGE in kinds(messages)
    status, log = host.stop()
    assert status == 0, log
    assert "no process for the connection from 127.0.0.1" in log


def test_a_port_that_is_taken_is_one_sentence(server):
    done = subprocess.run(
        [*RUN, "serve", "--port", str(server.address[1])],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        f"cannot listen on 127.0.0.1:{server.address[1]}: Address already in use"
    )


def test_an_address_that_is_none_is_one_sentence():
    with pytest.raises(ScanError, match=r"^cannot listen on 300\.1\.1\.1:0: (?!Unknown)[^\[(]+$"):
        accept_connections("300.1.1.1", 0, lambda _: 0, lambda _: None)


def test_a_peer_that_is_gone_before_config_is_no_disaster(server):
    server.connect().close()
    with server.connect() as connection:
        connection.shutdown(socket.SHUT_WR)
        assert Wire(connection).read().identifier == protocol.CLOSE
