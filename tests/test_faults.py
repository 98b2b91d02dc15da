"""What goes wrong on real scanners: one clear sentence, exit code 1 or ERROR, and what was computed."""

from __future__ import annotations

import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from stand_in import HEADER, gather, pipeline, scan, write_raw
from test_host import CLOSE, Host, conversation, data, kinds, to_close

from quantitron.gadgets import wire as protocol
from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_file import read_images
from quantitron.gadgets.wire import Wire
from quantitron.host.replay import replay

pytestmark = pytest.mark.timeout(120)

RUN = [sys.executable, str(Path(__file__).with_name("run_command.py"))]


@pytest.fixture(scope="module")
def server() -> Iterator[Host]:
    host = Host("serve")
    yield host
    status, log = host.stop()
    assert status == 0, log


def processes_of(host: Host) -> int:
    children = Path(f"/proc/{host.process.pid}/task/{host.process.pid}/children")
    return len(children.read_text().split())


def wait_for_no_processes(host: Host, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while processes_of(host):
        assert time.monotonic() < deadline, "a connection's process did not end"
        time.sleep(0.02)


def begin(connection: socket.socket, **properties: object) -> Wire:
    wire = Wire(connection)
    wire.send_text(protocol.CONFIG, pipeline(gather(**properties)))
    wire.send_text(protocol.HEADER, HEADER)
    return wire


# ----------------------------------------------------------------------------------------------- on the wire


@pytest.mark.parametrize("cut", [1, 200, 5000])
def test_a_client_that_dies_in_the_middle_of_a_message_leaves_no_process(server, cut):
    with server.connect() as connection:
        begin(connection)
        connection.sendall(data(100)[:-cut])
    wait_for_no_processes(server)


def test_a_client_killed_in_the_middle_of_a_scan_leaves_no_process(server):
    code = (
        "import socket, sys, time\n"
        "s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "s.sendall(sys.stdin.buffer.read()); print('sent', flush=True); time.sleep(60)"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", code, str(server.address[1])], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert client.stdin is not None
    assert client.stdout is not None
    text = pipeline(gather()).encode()
    client.stdin.write(struct.pack("<HI", protocol.CONFIG, len(text)) + text)
    client.stdin.write(struct.pack("<HI", protocol.HEADER, len(HEADER)) + HEADER.encode() + data(64))
    client.stdin.close()
    assert client.stdout.readline() == b"sent\n"
    client.send_signal(signal.SIGKILL)
    client.wait()
    client.stdout.close()
    wait_for_no_processes(server)


def test_a_client_that_dies_while_images_are_sent_leaves_no_process(server):
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        begin(connection, images=2000, points=10000)
        connection.sendall(data(20) + CLOSE)
        connection.recv(10)
        # hanging up with unread data resets the connection, as a killed process does
    wait_for_no_processes(server)


def test_a_truncated_stream_gives_its_images_and_an_error(server):
    with server.connect() as connection:
        wire = begin(connection)
        connection.sendall(data(100)[:-9])
        connection.shutdown(socket.SHUT_WR)
        messages = to_close(wire)
    assert kinds(messages) == [protocol.IMAGE, protocol.IMAGE, protocol.ERROR, protocol.CLOSE]
    assert messages[-2].payload.startswith("the connection ended in the middle of acquisition 99")


@pytest.mark.parametrize(
    ("garbage", "words"),
    [
        (struct.pack("<H", 4242) + b"?" * 100, "unknown message id 4242"),
        (struct.pack("<HI", protocol.TEXT, 0xFFFFFFF0), "the text claims a length of 4294967280 bytes"),
        (struct.pack("<H", protocol.ACQUISITION) + b"\xff" * 340, "is compressed"),
        (struct.pack("<H", protocol.WAVEFORM) + b"\xff" * 40, "a waveform claims 65535 channels"),
    ],
)
def test_nonsense_among_the_data_gives_its_images_and_an_error(server, garbage, words):
    with server.connect() as connection:
        wire = begin(connection)
        connection.sendall(data(30) + garbage)
        messages = to_close(wire)
    assert kinds(messages) == [protocol.IMAGE, protocol.IMAGE, protocol.ERROR, protocol.CLOSE]
    assert words in messages[-2].payload


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "unknown message id 17735"),
        (struct.pack("<HI", protocol.CONFIG, 1 << 31), "the config claims a length of 2147483648"),
        (struct.pack("<HI", protocol.HEADER, 3) + b"abc", "a config (message id 1 or 2) was expected"),
        (struct.pack("<H", protocol.ACQUISITION), "an acquisition came before the header"),
        (struct.pack("<HI", protocol.CONFIG, 3) + b"\xff\xfe\xfd", "the config is not UTF-8"),
    ],
)
def test_a_connection_that_starts_with_nonsense_gets_an_error(server, start, words):
    with server.connect() as connection:
        messages = conversation(connection, start, CLOSE)
    assert kinds(messages) == [protocol.ERROR, protocol.CLOSE]
    assert words in messages[-2].payload


def test_a_header_that_is_none_is_an_error(server):
    with server.connect() as connection:
        messages = conversation(
            connection, (protocol.CONFIG, pipeline(gather())), (protocol.HEADER, "<x/>"), data(20), CLOSE
        )
    assert "the header is not an ISMRMRD header" in messages[-2].payload


# ------------------------------------------------------------------------- the real gadgets


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [*RUN, *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False, **options
    )


def sentence_of(raw: Path, folder: Path, *settings: str, pipeline: str = "subspace") -> str:
    """What a replay that must fail says, in this process: most of the time of the command is its imports."""
    with pytest.raises(ScanError) as caught:
        replay(raw, pipeline, folder / "maps.h5", settings)
    assert "\n" not in str(caught.value)
    assert "Doe" not in str(caught.value)
    assert not (folder / "maps.h5").exists()
    return str(caught.value)


def failed(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a command that failed."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "Doe" not in done.stderr
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("quantitron: ")
    return last


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw") / "raw.h5", real_scan())


def real_scan() -> AcquisitionBlock:
    """A disc that decays, one channel: enough for the real gadgets."""
    part = scan(channels=1)
    y, x = np.mgrid[-8:8, -16:16]
    disc = (x**2 + y**2 < 36).astype(np.complex64)
    spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(disc), norm="ortho"))
    for line in range(len(part)):
        echo = int(part.head["idx"]["contrast"][line])
        ky = int(part.head["idx"]["kspace_encode_step_1"][line])
        part.data[line, 0] = spectrum[ky] * (100 * np.exp(-0.2 * echo)) + 0.01 * part.data[line, 0]
    return part


def test_the_scan_of_these_tests_can_be_reconstructed(raw, tmp_path):
    replay(raw, "subspace", tmp_path / "maps.h5")
    assert {image.meta["GADGETRON_DataRole"] for image in read_images(tmp_path / "maps.h5")} >= {
        "T2STAR",
        "PD",
    }


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("reconstruct.rnak=3", "unknown property 'rnak'; did you mean 'rank'?"),
        ("reconstruct.linear_iterations=many", "'linear_iterations' is 'many', but must be a whole number"),
        ("recon.rank=3", "unknown gadget 'recon'; did you mean 'reconstruct'?"),
        ("basis.rank=99", "rank 99 is above"),
        ("reconstruct.rank=99", "rank 99 is above"),
        ("reconstruct.seed=-1", "'seed' is '-1', but must be at least 0"),
        ("reconstruct.seed=99999999999999999999", "must be at most 9223372036854775807"),
        ("accumulate.sequence=t3_gre", "'t3_gre'"),
        ("accumulate.sequence=vfa_gre", "vfa_gre needs two or more"),
    ],
)
def test_wrong_settings_are_one_sentence(raw, tmp_path, setting, words):
    assert words in sentence_of(raw, tmp_path, setting)


def test_the_command_fails_with_exit_code_1_and_its_sentence(raw, tmp_path):
    done = run("--quiet", "replay", raw, "-p", "lorain", "-o", tmp_path / "maps.h5")
    assert "there is no pipeline 'lorain'; pipelines are: " in failed(done)
    done = run(
        "--quiet", "replay", raw, "-p", "subspace", "--set", "basis.rank=99", "-o", tmp_path / "maps.h5"
    )
    assert "rank 99 is above" in failed(done)
    assert list(tmp_path.iterdir()) == []


def test_cuda_where_there_is_none_is_one_sentence(raw, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "cuda" in sentence_of(raw, tmp_path, "reconstruct.device=cuda").lower()


def broken(part: AcquisitionBlock, how: str) -> list[AcquisitionBlock]:
    if how == "nan":
        part.data[17, 0, 3] = np.nan
    if how == "counter":
        part.head["idx"]["kspace_encode_step_1"][17] = 400
    if how == "echo":
        part.head["idx"]["contrast"][17] = 7
    if how == "channels":
        return [part.where(np.arange(32) < 20), scan(12, channels=2)]
    return [part]


@pytest.mark.parametrize(
    ("how", "words"),
    [("nan", "acquisition 17"), ("counter", "400"), ("echo", "contrast"), ("channels", "channel")],
)
def test_bad_data_is_one_sentence_that_says_where(tmp_path, how, words):
    raw = write_raw(tmp_path / "raw.h5", *broken(real_scan(), how))
    assert words in sentence_of(raw, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<TE>4</TE><TE>9</TE>", "", "echo time"),
        ("<TE>9</TE>", "", "1 values of TE"),
        ("<encoding>", "<encoding", "not an ISMRMRD header"),
        ("<x>32</x>", "<x>0</x>", "matrix size"),
    ],
)
def test_bad_headers_are_one_sentence(tmp_path, old, new, words):
    raw = write_raw(tmp_path / "raw.h5", real_scan(), header=HEADER.replace(old, new))
    assert words in sentence_of(raw, tmp_path, "accumulate.sequence=megre")


def test_a_truncated_file_is_one_sentence(tmp_path):
    raw = write_raw(tmp_path / "raw.h5", real_scan())
    os.truncate(raw, raw.stat().st_size // 2)
    assert "truncated" in sentence_of(raw, tmp_path)


def test_a_damaged_line_is_named_where_the_lines_before_it_are_too_few(tmp_path):
    raw = write_raw(tmp_path / "raw.h5", real_scan())
    with h5py.File(raw, "r+") as file:
        row = file["dataset/data"][1]
        row["head"]["number_of_samples"] //= 2
        file["dataset/data"][1] = row
    sentence = sentence_of(raw, tmp_path)
    assert "acquisition 1 holds 64 values in 'data'" in sentence
    assert sentence.endswith("; the scan ended without a single imaging line")


@pytest.mark.parametrize("limit", [4_000, 100_000, 1_000_000])
def test_a_disk_that_is_full_while_a_scan_is_simulated_is_one_sentence(tmp_path, limit):
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = ("--matrix", "16,16,4", "--coils", "4", "-o", tmp_path / "raw.h5")
    done = run("--quiet", "simulate", "megre", *arguments, preexec_fn=small_disk)
    assert failed(done) == f"quantitron: cannot write {tmp_path / 'raw.h5'}: File too large"
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [4_000, 60_000])
def test_a_disk_that_is_full_is_one_sentence_and_what_was_written_is_kept(tmp_path, limit):
    raw = write_raw(tmp_path / "raw.h5", scan(40))
    name = tmp_path / "pipeline.xml"
    name.write_text(pipeline(gather(images=60, points=1000)))

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = ("--stand-in", "--quiet", "replay", raw, "-p", name, "-o", tmp_path / "maps.h5")
    done = run(*arguments, preexec_fn=small_disk)
    sentence = failed(done)
    assert f"cannot write {tmp_path / 'maps.h5'}: File too large" in sentence
    found = {path.name for path in tmp_path.iterdir()} - {"raw.h5", "pipeline.xml"}
    if "images that were finished before" in sentence:
        assert found == {"maps.h5"}
        assert f"({len(read_images(tmp_path / 'maps.h5'))} images" in sentence
    else:
        assert found == set()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_replay_that_is_stopped_keeps_its_images_and_leaves_no_other_file(tmp_path, number, status):
    raw = write_raw(tmp_path / "raw.h5", scan(40))
    name = tmp_path / "pipeline.xml"
    name.write_text(pipeline(gather(images=2, fail="hang")))
    with subprocess.Popen(
        [*RUN, "--stand-in", "--quiet", "replay", raw, "-p", name, "-o", tmp_path / "maps.h5"],
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background passes on that it ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not any(is_written(path, 2) for path in tmp_path.glob(".maps.h5.*.part")):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(0.5)  # until the file is closed again
            process.send_signal(number)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == status
    assert f"2 images that were finished before are in {tmp_path / 'maps.h5'}" in said
    assert "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"raw.h5", "pipeline.xml", "maps.h5"}
    assert len(read_images(tmp_path / "maps.h5")) == 2


def is_written(path: Path, images: int) -> bool:
    """Looks without a lock: one would keep the next image from being written."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            series = [one for group in file.values() for one in group.values()]
            # A link whose object is not on disk yet reads as None.
            if any(one is None or one.get("header") is None for one in series):
                return False
            return sum(len(one["header"]) for one in series) == images
    except (OSError, RuntimeError, KeyError):  # half an image, or none
        return False
