"""Guarded connection that speaks Gadgetron's message protocol on a socket, in either direction.

What it guards against was seen on the real thing (SCANNER.md section 1): a peer that is gone reads as end,
not as an endless loop; sizes are bounded before memory is allocated; a stream that breaks still delivers
what came before the break; sending gives up where the peer stopped reading; and an ERROR is sent only after
all input was read, because Gadgetron loses or chokes on an earlier one.
"""

from __future__ import annotations

import logging
import math
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ismrmrd
import numpy as np
from ismrmrd.image import get_dtype_from_data_type
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import HEADER_DTYPE, AcquisitionBlock, BlockBuilder
from quantitron.gadgets.errors import ScanError

logger = logging.getLogger("quantitron")

FILENAME, CONFIG, HEADER, CLOSE, TEXT, ERROR = 1, 2, 3, 4, 5, 8
ACQUISITION, IMAGE, WAVEFORM = 1008, 1022, 1026
"""Message ids, little-endian uint16 before each message."""

FILENAME_LENGTH = 1024
"""Bytes of a FILENAME message, padded with zeros."""
MAXIMUM_TEXT = 64 << 20
"""Longest config, header or text taken [bytes]."""
MAXIMUM_CHANNELS = 1024
"""Channels that an ISMRMRD channel mask can name."""
MAXIMUM_TRAJECTORY = 16
"""Most trajectory columns: three of k-space, one of density, and some to spare."""
MAXIMUM_ACQUISITION = 256 << 20
"""Longest acquisition taken [bytes]."""
MAXIMUM_IMAGE = 4 << 30
"""Longest image taken [bytes]."""
SEND_TIMEOUT = 120.0
"""Seconds without any progress after which a peer that does not read is given up."""
DRAIN_IDLE = 2.0
"""Seconds of silence that end the draining of a stream whose message boundaries are lost."""
PATIENCE = 0.2
"""Seconds after which a thread that waits for the peer looks whether it still has to."""

SILENT_FOR = 300
"""Seconds without anything from the peer after which its machine is asked whether it is still there, and"""
ASKED_EVERY = 60
"""seconds between questions, of which"""
UNANSWERED = 10
"""end the connection where nobody answers: after the 15 minutes for which the peer, too, would try to get its
lines through a network that is down. One that only has nothing to send answers without knowing."""

_NAMES = {CONFIG: "config", HEADER: "header", TEXT: "text"}
_ID = struct.Struct("<H")
_LENGTH = struct.Struct("<I")
_LONG_LENGTH = struct.Struct("<Q")
_ACQUISITION_HEADER = HEADER_DTYPE.itemsize
_WAVEFORM_HEADER = 40  # 8-byte aligned C struct
_WAVEFORM_SHAPE = struct.Struct("<HH")  # samples and channels,
_WAVEFORM_SHAPE_AT = 28  # at this offset
_IMAGE_HEADER = 198
_RECEIVE = 8 << 20
# flags 53..56: samples compressed by the Gadgetron client; their length is not what the header says
_COMPRESSED = sum(1 << (bit - 1) for bit in (53, 54, 55, 56))


def _offset(field: str) -> int:
    return int(HEADER_DTYPE.fields[field][1])  # type: ignore[index]


_SAMPLES_AT, _CHANNELS_AT = _offset("number_of_samples"), _offset("active_channels")
_TRAJECTORY_AT, _FLAGS_AT = _offset("trajectory_dimensions"), _offset("flags")


class PeerGone(Exception):
    """The other side closed the connection, or stopped reading for longer than the send timeout."""


class StreamBroken(ScanError):
    """The stream cannot be followed any further: unknown message, impossible size, or an early end."""


@dataclass(frozen=True)
class Message:
    """One message that is not an acquisition."""

    identifier: int
    payload: Any
    """An ``ismrmrd.Image`` for IMAGE, None for CLOSE and WAVEFORM, else the text."""


def _keep_alive(connection: socket.socket) -> None:
    """Have the system notice a peer whose machine or network is gone: it would be waited for, for ever."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", SILENT_FOR),
        ("TCP_KEEPINTVL", ASKED_EVERY),
        ("TCP_KEEPCNT", UNANSWERED),
    ):
        if hasattr(socket, option):  # else the system's own times
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class Wire:
    """Messages over one connected stream socket. Reads are buffered: nothing else may read the socket."""

    def __init__(self, connection: socket.socket, send_timeout: float = SEND_TIMEOUT) -> None:
        connection.settimeout(None)
        _keep_alive(connection)
        self._socket = connection
        self._send_timeout = send_timeout
        self._buffer = bytearray(1 << 16)
        self._start = self._end = 0
        self._broken = False
        self._peer_gone = False
        self._interrupted = False
        self.closed = False
        """Whether CLOSE has come."""
        self.acquisitions = 0
        """Acquisitions received."""
        self.midway = False
        """Whether a message was begun but not sent to its end, so that nothing else can be said."""

    # ------------------------------------------------------------------------------------------------ receive

    def read(self) -> Message:
        """The next message; acquisitions are not expected here.

        Raises:
            StreamBroken: as ``blocks`` says.
            PeerGone: if the connection ended before the message began, or reading was interrupted.
        """
        if not self._fill(_ID.size):
            self._peer_gone = True
            raise PeerGone("the connection ended without CLOSE")
        (identifier,) = _ID.unpack_from(self._buffer, self._start)
        self._start += _ID.size
        if identifier == CLOSE:
            self.closed = True
            return Message(identifier, None)
        if identifier == FILENAME:
            raw = self._take(FILENAME_LENGTH, "a FILENAME message")
            return Message(identifier, self._text(raw.split(b"\0", 1)[0], "file name"))
        if identifier in (CONFIG, HEADER, TEXT):
            return Message(identifier, self._string(_LENGTH, _NAMES[identifier]))
        if identifier == ERROR:
            return Message(identifier, self._string(_LONG_LENGTH, "error text"))
        if identifier == IMAGE:
            return Message(identifier, self._image())
        if identifier == WAVEFORM:
            self._waveform()
            return Message(identifier, None)
        if identifier == ACQUISITION:
            raise self._break("an acquisition came before the header")
        raise self._break(f"unknown message id {identifier}")

    def blocks(self, report: Callable[[str], None]) -> Iterator[AcquisitionBlock]:
        """Acquisitions up to CLOSE, cut into blocks by the rule of ``blocks_of``. Waveforms and texts are
        read over.

        Where the stream breaks, what came before is still yielded; the sentence on what happened goes to
        ``report`` and the iteration ends.
        """
        builder = BlockBuilder()
        try:
            while not self.closed:
                if not self._fill(_ID.size):
                    self._peer_gone = True
                    raise StreamBroken(
                        f"the connection ended without CLOSE after {self.acquisitions} acquisitions"
                    )
                (identifier,) = _ID.unpack_from(self._buffer, self._start)
                if identifier == ACQUISITION:
                    yield from builder.add(*self._run_of_acquisitions())
                    continue
                message = self.read()
                if message.identifier == ERROR:
                    raise self._break(f"the sender reported an error: {message.payload}")
                if message.identifier not in (CLOSE, WAVEFORM, TEXT):
                    raise self._break(f"message id {message.identifier} is not expected among acquisitions")
        except StreamBroken as error:
            yield from builder.finish()
            report(str(error))
            return
        yield from builder.finish()

    def drain(self) -> None:
        """Read all input to its end: CLOSE, the end of the connection, or silence after a broken stream."""
        while not (self.closed or self._broken or self._peer_gone):
            try:
                if not self._fill(_ID.size):
                    self._peer_gone = True
                    return
                (identifier,) = _ID.unpack_from(self._buffer, self._start)
                if identifier == ACQUISITION:
                    self._run_of_acquisitions()
                else:
                    self.read()
            except StreamBroken as error:
                logger.info("while draining: %s", error)
        self._start = self._end = 0
        if self._broken:
            # boundaries are lost, so CLOSE cannot be told from data: silence is the only end there is
            self.discard(math.inf, DRAIN_IDLE)

    def discard(self, seconds: float, silence: float) -> None:
        """Throw away what comes, whatever it is, until the peer ends the connection.

        Args:
            seconds: after which the peer may go on sending.
            silence: seconds without anything that count as the end.
        """
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while not self._peer_gone and (left := deadline - time.monotonic()) > 0:
            if not poll.poll(1000 * min(left, silence)):
                return
            try:
                self._peer_gone = self._socket.recv_into(self._buffer) == 0
            except OSError:
                self._peer_gone = True

    def interrupt(self) -> None:
        """Have whoever waits for messages, in any thread, give up; the connection itself stays as it is."""
        self._interrupted = True

    def _receive(self, target: memoryview) -> int:
        """Bytes received; 0 where the connection ended."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while not poll.poll(1000 * PATIENCE) and not self._interrupted:
            pass
        if self._interrupted:
            raise PeerGone("reading was interrupted")
        try:
            return self._socket.recv_into(target)
        except OSError as error:
            logger.info("the connection was lost: %s", error)
            return 0

    def _fill(self, size: int) -> bool:
        """Have at least ``size`` bytes in the buffer; False where the connection ended before."""
        held = self._end - self._start
        if held >= size:
            return True
        if held == 0:
            self._start = self._end = 0
        if self._start + size > len(self._buffer) or self._start > len(self._buffer) // 2:
            larger = len(self._buffer)
            while larger < size:
                larger *= 2
            target = self._buffer if larger == len(self._buffer) else bytearray(larger)
            target[:held] = self._buffer[self._start : self._end]
            self._buffer, self._start, self._end = target, 0, held
        view = memoryview(self._buffer)
        while self._end - self._start < size:
            received = self._receive(view[self._end :])
            if received == 0:
                return False
            self._end += received
        return True

    def _take(self, size: int, what: str) -> bytes:
        if not self._fill(size):
            self._peer_gone = True
            raise StreamBroken(f"the connection ended in the middle of {what}")
        self._start += size
        return bytes(memoryview(self._buffer)[self._start - size : self._start])

    def _break(self, sentence: str) -> StreamBroken:
        self._broken = True
        return StreamBroken(sentence)

    def _text(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode("utf-8").rstrip("\0")
        except UnicodeDecodeError:
            raise self._break(f"the {what} is not UTF-8 text") from None

    def _string(self, length: struct.Struct, what: str) -> str:
        (size,) = length.unpack(self._take(length.size, f"the {what}"))
        if size > MAXIMUM_TEXT:
            raise self._break(f"the {what} claims a length of {size} bytes; at most {MAXIMUM_TEXT} are taken")
        return self._text(self._take(size, f"the {what}"), what)

    def _waveform(self) -> None:
        head = self._take(_WAVEFORM_HEADER, "a waveform")
        samples, channels = _WAVEFORM_SHAPE.unpack_from(head, _WAVEFORM_SHAPE_AT)
        if samples * channels * 4 > MAXIMUM_ACQUISITION:
            raise self._break(f"a waveform claims {channels} channels x {samples} samples")
        self._take(samples * channels * 4, "a waveform")

    def _image(self) -> ismrmrd.Image:
        head = self._take(_IMAGE_HEADER, "an image")
        (attributes,) = _LONG_LENGTH.unpack(self._take(_LONG_LENGTH.size, "an image"))
        if attributes > MAXIMUM_TEXT:
            raise self._break(f"an image claims {attributes} bytes of meta attributes")
        header = ismrmrd.ImageHeader.from_buffer_copy(head)
        try:
            itemsize = get_dtype_from_data_type(header.data_type).itemsize
        except TypeError:
            raise self._break(f"an image has the unknown data type {header.data_type}") from None
        size = header.channels * math.prod(header.matrix_size) * itemsize
        if size > MAXIMUM_IMAGE:
            raise self._break(f"an image claims {size} bytes; at most {MAXIMUM_IMAGE} are taken")
        text = self._text(self._take(attributes, "an image"), "meta attributes of an image")
        image = ismrmrd.Image(head, text) if text else ismrmrd.Image(head)
        for key, value in image.meta.items():
            if value is None:  # how ismrmrd reads an empty text; it would write "None"
                image.meta[key] = ""
        data = np.frombuffer(self._take(size, "an image"), dtype=image.data.dtype)
        image.data[:] = data.reshape(image.data.shape)
        return image

    def _run_of_acquisitions(
        self,
    ) -> tuple[NDArray[np.void], NDArray[np.complex64], NDArray[np.float32]]:
        """As many acquisitions of one shape as lie complete in the buffer, at least one.

        Messages of one shape are equally long, so that a run of them is one structured array: no loop over
        lines.
        """
        what = f"acquisition {self.acquisitions}"
        if not self._fill(_ID.size + _ACQUISITION_HEADER):
            self._peer_gone = True
            raise StreamBroken(f"the connection ended in the middle of {what}")
        at = self._start + _ID.size
        samples, channels, dimensions = (
            _ID.unpack_from(self._buffer, at + offset)[0]
            for offset in (_SAMPLES_AT, _CHANNELS_AT, _TRAJECTORY_AT)
        )
        (flags,) = _LONG_LENGTH.unpack_from(self._buffer, at + _FLAGS_AT)
        if flags & _COMPRESSED:
            raise self._break(
                f"{what} is compressed, which nothing has undone: let the client send without -P, -T and -Z, "
                "or let GadgetIsmrmrdAcquisitionMessageReader of gadgetron_mricore be the pipeline's reader"
            )
        size = samples * dimensions * 4 + samples * channels * 8
        if channels > MAXIMUM_CHANNELS or dimensions > MAXIMUM_TRAJECTORY or size > MAXIMUM_ACQUISITION:
            raise self._break(
                f"{what} claims {channels} channels, {samples} samples and {dimensions} trajectory columns; "
                f"at most {MAXIMUM_CHANNELS} channels, {MAXIMUM_TRAJECTORY} columns and "
                f"{MAXIMUM_ACQUISITION} bytes are taken"
            )
        record = np.dtype(
            [
                ("id", "<u2"),
                ("head", HEADER_DTYPE),
                ("trajectory", "<f4", (samples, dimensions)),
                ("data", "<c8", (channels, samples)),
            ]
        )
        if record.itemsize * 2 > len(self._buffer) or len(self._buffer) < _RECEIVE:
            # the first acquisition decides how much is received at a time
            self._grow(max(_RECEIVE, 4 * record.itemsize))
        if not self._fill(record.itemsize):
            self._peer_gone = True
            raise StreamBroken(f"the connection ended in the middle of {what}")
        count = (self._end - self._start) // record.itemsize
        run = np.frombuffer(self._buffer, record, count, self._start)
        head = run["head"]
        same = (
            (run["id"] == ACQUISITION)
            & (head["number_of_samples"] == samples)
            & (head["active_channels"] == channels)
            & (head["trajectory_dimensions"] == dimensions)
            & ((head["flags"] & np.uint64(_COMPRESSED)) == 0)
        )
        count = count if same.all() else int(same.argmin())
        run = run[:count]
        self._start += count * record.itemsize
        self.acquisitions += count
        # copies: the buffer is filled again
        return run["head"].copy(), run["data"].copy(), run["trajectory"].copy()

    def _grow(self, size: int) -> None:
        larger = bytearray(size)
        held = self._end - self._start
        larger[:held] = self._buffer[self._start : self._end]
        self._buffer, self._start, self._end = larger, 0, held

    # --------------------------------------------------------------------------------------------------- send

    def send_image(self, image: ismrmrd.Image) -> None:
        """Send an image.

        Raises:
            PeerGone: if the peer is gone or does not read for the send timeout.
        """
        parts: list[Any] = [_ID.pack(IMAGE)]
        image.serialize_into(parts.append)
        for part in parts:
            self._send(part, last=part is parts[-1])

    def send_text(self, identifier: int, text: str) -> None:
        """Send CONFIG, HEADER, TEXT, ERROR or FILENAME."""
        raw = text.encode("utf-8")
        if identifier == FILENAME:
            if len(raw) >= FILENAME_LENGTH:
                raise ScanError(f"the config name is longer than {FILENAME_LENGTH - 1} bytes")
            self._send(_ID.pack(identifier) + raw.ljust(FILENAME_LENGTH, b"\0"))
            return
        length = _LONG_LENGTH if identifier == ERROR else _LENGTH
        self._send(_ID.pack(identifier) + length.pack(len(raw)) + raw)

    def send_block(self, block: AcquisitionBlock) -> None:
        """Send the acquisitions of a block."""
        count, channels, samples = block.data.shape
        record = np.dtype(
            [
                ("id", "<u2"),
                ("head", HEADER_DTYPE),
                ("trajectory", "<f4", (samples, block.trajectory.shape[2])),
                ("data", "<c8", (channels, samples)),
            ]
        )
        run = np.empty(count, dtype=record)
        run["id"] = ACQUISITION
        run["head"], run["trajectory"], run["data"] = block.head, block.trajectory, block.data
        self._send(run.tobytes())

    def send_close(self) -> None:
        """Send CLOSE: nothing more will come."""
        self._send(_ID.pack(CLOSE))

    def _send(self, data: Any, last: bool = True) -> None:
        self.midway = True
        view = memoryview(bytes(data))  # ctypes headers too; bytes are not copied
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        while view:
            if not poll.poll(self._send_timeout * 1000):
                self.shut_down()
                raise PeerGone(f"the peer has not read anything for {self._send_timeout:g} s")
            try:
                view = view[self._socket.send(view, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise PeerGone(f"the peer is gone ({error.strerror})") from error
        self.midway = not last

    def shut_down(self) -> None:
        """End the connection in both directions, so that nobody can wait for it."""
        self._peer_gone = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            logger.debug("shutting down: %s", error)
