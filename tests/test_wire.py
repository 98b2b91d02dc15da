from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import ismrmrd
import numpy as np
import pytest
from stand_in import acquisitions, scan

from quantitron.gadgets import wire as protocol
from quantitron.gadgets.acquisition_block import AcquisitionBlock, blocks_of
from quantitron.gadgets.wire import PeerGone, StreamBroken, Wire

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def message(single: ismrmrd.Acquisition) -> bytes:
    return struct.pack("<H", protocol.ACQUISITION) + single.to_bytes()


CLOSE = struct.pack("<H", protocol.CLOSE)


def send(connection: socket.socket, raw: bytes, piece: int = 1 << 20, end: bool = True) -> threading.Thread:
    def work() -> None:
        for start in range(0, len(raw), piece):
            connection.sendall(raw[start : start + piece])
        if end:
            connection.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def receive(
    connection: socket.socket, raw: bytes, **options: object
) -> tuple[list[AcquisitionBlock], list[str]]:
    own, other = socket.socketpair()
    reports: list[str] = []
    with own, other:
        thread = send(other, raw, **options)
        wire = Wire(own)
        blocks = list(wire.blocks(reports.append))
        thread.join()
    return blocks, reports


def same(one: list[AcquisitionBlock], two: list[AcquisitionBlock]) -> bool:
    return len(one) == len(two) and all(
        a.first == b.first
        and a.head.tobytes() == b.head.tobytes()
        and np.array_equal(a.data, b.data)
        and np.array_equal(a.trajectory, b.trajectory)
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("piece", [1, 977, 40_000, 1 << 22])
def test_blocks_do_not_depend_on_how_the_stream_arrives(piece, pair):
    lines = 12 if piece == 1 else 300
    parts = [scan(lines), scan(5, channels=2), scan(130, samples=16, dimensions=2), scan(3, samples=20)]
    singles = [single for part in parts for single in acquisitions(part)]
    blocks, reports = receive(pair[0], b"".join(map(message, singles)) + CLOSE, piece=piece)
    assert reports == []
    assert same(blocks, list(blocks_of(singles)))
    assert max(len(block) for block in blocks) <= 128


def test_a_line_longer_than_the_buffer_is_received(pair):
    part = scan(4, channels=64, samples=40_000)
    blocks, reports = receive(pair[0], b"".join(map(message, acquisitions(part))) + CLOSE)
    assert reports == []
    assert np.array_equal(np.concatenate([block.data for block in blocks]), part.data)


def test_waveforms_and_texts_are_read_over(pair):
    singles = acquisitions(scan(40))
    waveform = ismrmrd.Waveform.from_array(np.arange(30, dtype=np.uint32).reshape(2, 15))
    between = struct.pack("<H", protocol.WAVEFORM) + waveform.to_bytes()
    text = struct.pack("<HI", protocol.TEXT, 5) + b"hello"
    raw = text.join(between.join(map(message, singles[a : a + 7])) for a in range(0, 40, 7)) + between + CLOSE
    blocks, reports = receive(pair[0], raw)
    assert reports == []
    assert same(blocks, list(blocks_of(singles)))


def test_send_block_is_what_ismrmrd_writes(pair):
    part = scan(9, dimensions=3)
    Wire(pair[0]).send_block(part)
    pair[0].shutdown(socket.SHUT_WR)
    expected = b"".join(map(message, acquisitions(part)))
    assert pair[1].recv(len(expected) + 1, socket.MSG_WAITALL) == expected


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        (b"", "ended without CLOSE after 40 acquisitions"),
        (b"\xf0", "ended without CLOSE after 40"),
        (struct.pack("<H", protocol.ACQUISITION) + b"\0" * 100, "in the middle of acquisition 40"),
        ("half", "in the middle of acquisition 40"),
        (struct.pack("<H", 4711) + b"abc", "unknown message id 4711"),
        (struct.pack("<H", protocol.HEADER) + struct.pack("<I", 3) + b"abc", "message id 3 is not expected"),
        (struct.pack("<HQ", protocol.ERROR, 4) + b"oops", "the sender reported an error: oops"),
        (struct.pack("<HI", protocol.TEXT, 0xFFFFFFFF), "the text claims a length of 4294967295 bytes"),
        (struct.pack("<HI", protocol.TEXT, 2) + b"\xff\xfe", "the text is not UTF-8"),
        ("channels", "acquisition 40 claims 2000 channels"),
        ("trajectory", "acquisition 40 claims 3 channels, 32 samples and 999 trajectory columns"),
        ("bytes", "claims 1024 channels, 65535 samples"),
        ("compressed", "acquisition 40 is compressed"),
    ],
)
def test_a_broken_stream_gives_what_came_before_and_says_why(tail, words, pair):
    part = scan(41)
    if isinstance(tail, str):
        field, value = {
            "channels": ("active_channels", 2000),
            "trajectory": ("trajectory_dimensions", 999),
            "bytes": ("number_of_samples", 65535),
            "compressed": ("flags", 1 << 52),
            "half": ("version", 1),
        }[tail]
        part.head[field][40] = value
        if tail == "bytes":
            part.head["active_channels"][40] = 1024
        body = part.data[40].tobytes()
        raw_head = struct.pack("<H", protocol.ACQUISITION) + part.head[40].tobytes()
        tail = raw_head + (body[: len(body) // 2] if tail == "half" else body)
    singles = acquisitions(scan(40))
    blocks, reports = receive(pair[0], b"".join(map(message, singles)) + tail)
    assert same(blocks, list(blocks_of(singles)))
    assert len(reports) == 1
    assert words in reports[0]


def test_texts_and_images_come_back_as_they_were_sent(pair):
    left, right = map(Wire, pair)
    image = ismrmrd.Image.from_array(np.arange(24, dtype=np.float32).reshape(2, 3, 4), transpose=False)
    image.meta = ismrmrd.Meta({"GADGETRON_DataRole": "T1", "Wörter": ["ä", "b"]})
    left.send_text(protocol.FILENAME, "subspace.xml")
    left.send_text(protocol.CONFIG, "<configuration/>")
    left.send_text(protocol.ERROR, "Größe")
    left.send_image(image)
    left.send_close()
    found = [right.read() for _ in range(5)]
    assert [m.identifier for m in found] == [1, 2, 8, 1022, 4]
    assert [m.payload for m in found[:3]] == ["subspace.xml", "<configuration/>", "Größe"]
    assert bytes(found[3].payload.getHead()) == bytes(image.getHead())
    assert np.array_equal(found[3].payload.data, image.data)
    assert found[3].payload.attribute_string == image.attribute_string
    assert right.closed
    assert not left.midway


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (struct.pack("<HI", protocol.CONFIG, 1 << 31), "the config claims a length"),
        (struct.pack("<HI", protocol.HEADER, 100) + b"short", "in the middle of the header"),
        (struct.pack("<H", protocol.FILENAME) + b"name", "in the middle of a FILENAME"),
        (b"GET / HTTP/1.1\r\n\r\n", "unknown message id 17735"),
        (struct.pack("<H", protocol.ACQUISITION), "before the header"),
        (struct.pack("<H", protocol.IMAGE) + b"\0" * 198 + struct.pack("<Q", 1 << 60), "meta attributes"),
        (struct.pack("<H", protocol.IMAGE) + b"\0" * 206, "unknown data type 0"),
    ],
)
def test_nonsense_before_the_data_is_refused(raw, words, pair):
    pair[1].sendall(raw)
    pair[1].close()
    with pytest.raises(StreamBroken, match=words):
        Wire(pair[0]).read()


def test_an_image_of_impossible_size_is_refused_before_memory_is_taken(pair):
    header = ismrmrd.ImageHeader()
    header.data_type, header.channels = ismrmrd.DATATYPE_CXDOUBLE, 65535
    header.matrix_size[:] = (65535, 65535, 65535)
    pair[1].sendall(struct.pack("<H", protocol.IMAGE) + bytes(header) + struct.pack("<Q", 0))
    with pytest.raises(StreamBroken, match="an image claims"):
        Wire(pair[0]).read()


def test_a_peer_that_is_gone_is_the_end_and_no_endless_loop(pair):
    pair[1].close()
    with pytest.raises(PeerGone, match="without CLOSE"):
        Wire(pair[0]).read()


def test_a_peer_whose_machine_is_gone_is_not_waited_for_for_ever():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        own, _ = listener.accept()
    with client, own:
        Wire(own)
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        idle, between, count = (own.getsockopt(socket.IPPROTO_TCP, option) for option in options)
        assert idle + between * count == 900


def test_who_waits_for_the_peer_can_be_let_go_and_the_connection_stays(pair):
    own, other = pair
    wire = Wire(own)
    ended = []

    def wait() -> None:
        with pytest.raises(PeerGone, match="interrupted"):
            list(wire.blocks(ended.append))
        ended.append("let go")

    thread = threading.Thread(target=wait)
    thread.start()
    wire.interrupt()
    thread.join(5)
    assert ended == ["let go"]
    wire.send_close()
    assert other.recv(2) == CLOSE


def test_what_is_thrown_away_ends_with_silence_and_with_the_connection(pair):
    own, other = pair
    wire = Wire(own)
    other.sendall(bytes(1000))
    started = time.monotonic()
    wire.discard(20, 0.1)
    other.sendall(b"more")
    other.close()
    wire.discard(20, 20)
    wire.discard(20, 20)
    assert time.monotonic() - started < 10


def test_drain_reads_to_close_and_no_further(pair):
    raw = b"".join(map(message, acquisitions(scan(20)))) + CLOSE
    pair[1].sendall(raw + b"more")
    wire = Wire(pair[0])
    wire.drain()
    assert wire.closed
    assert wire.acquisitions == 20
    wire.drain()  # a second time must not wait for anything


def test_drain_of_a_broken_stream_ends_with_silence(pair, monkeypatch):
    monkeypatch.setattr(protocol, "DRAIN_IDLE", 0.1)
    pair[1].sendall(struct.pack("<H", 999) + b"x" * 10_000)
    wire = Wire(pair[0])
    reports: list[str] = []
    assert list(wire.blocks(reports.append)) == []
    wire.drain()
    assert reports == ["unknown message id 999"]
    wire.send_text(protocol.ERROR, "told")
    assert Wire(pair[1]).read().payload == "told"


def test_sending_gives_up_on_a_peer_that_does_not_read(pair):
    wire = Wire(pair[0], send_timeout=0.2)
    image = ismrmrd.Image.from_array(np.zeros((1000, 2000), dtype=np.float32), transpose=False)
    with pytest.raises(PeerGone, match=r"has not read anything for 0\.2 s"):
        wire.send_image(image)
    assert wire.midway
    with pytest.raises(PeerGone, match="the peer is gone"):
        wire.send_close()


def test_sending_to_a_peer_that_is_gone_says_so(pair):
    pair[1].close()
    with pytest.raises(PeerGone, match="the peer is gone"):
        Wire(pair[0]).send_close()
