"""The client's side of the protocol: sends a scan to a server and yields what comes back."""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Iterable, Iterator

import ismrmrd

from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.wire import (
    CLOSE,
    CONFIG,
    ERROR,
    FILENAME,
    HEADER,
    IMAGE,
    TEXT,
    PeerGone,
    StreamBroken,
    Wire,
)

logger = logging.getLogger("quantitron")

CONNECT_TIMEOUT = 30.0
"""Seconds to wait for the connection to be accepted."""

_GADGETRON_ERROR = re.compile(r"^(?:\[.*?\] )?ERROR: (?:Errors received:)?(.*)", re.DOTALL)
"""Gadgetron reports errors to its clients as TEXT, and ``quantitron serve`` as TEXT too."""


def parse_address(address: str, default_port: int = 9002) -> tuple[str, int]:
    """``HOST:PORT`` or ``HOST``.

    Raises:
        ScanError: if the port is not a number.
    """
    host, _, port = address.rpartition(":") if ":" in address else (address, "", str(default_port))
    if not port.isdigit() or not 0 < int(port) < 65536 or not host:
        raise ScanError(f"'{address}' is not HOST:PORT")
    return host.strip("[]"), int(port)


def send_scan(
    address: tuple[str, int],
    configuration: str,
    header: bytes,
    blocks: Iterable[AcquisitionBlock],
    by_name: bool = False,
) -> Iterator[ismrmrd.Image]:
    """Send a scan and yield the images that come back, while it is still being sent.

    Args:
        address: host and port.
        configuration: the pipeline's XML, or the name under which the server knows it.
        header: the ISMRMRD header's XML.
        blocks: the acquisitions.
        by_name: whether ``configuration`` is a name.

    Raises:
        ScanError: if the server cannot be reached, reports an error, or ends without CLOSE; after the
        images that
            did come.
    """
    where = f"{address[0]}:{address[1]}"
    try:
        connection = socket.create_connection(address, CONNECT_TIMEOUT)
    except OSError as error:
        raise ScanError(f"cannot connect to {where}: {error.strerror or error}") from error
    with connection:
        wire = Wire(connection)
        trouble: list[Exception] = []

        def send() -> None:
            try:
                wire.send_text(FILENAME if by_name else CONFIG, configuration)
                wire.send_text(HEADER, header.decode("utf-8"))
                for block in blocks:
                    wire.send_block(block)
            except PeerGone as error:  # the reader tells why, if the server still could
                logger.info("sending stopped: %s", error)
                return
            except Exception as error:
                trouble.append(error)
            try:
                wire.send_close()
            except PeerGone as error:
                logger.info("sending stopped: %s", error)

        sender = threading.Thread(target=send, name="sender", daemon=True)
        sender.start()
        failures: list[str] = []
        try:
            while True:
                message = wire.read()
                if message.identifier == CLOSE:
                    break
                if message.identifier == IMAGE:
                    yield message.payload
                elif message.identifier == ERROR:
                    failures.append(message.payload)
                elif message.identifier == TEXT:
                    found = _GADGETRON_ERROR.match(message.payload)
                    if found:
                        failures.append(" ".join(found.group(1).split()))
                    else:
                        logger.info("%s: %s", where, message.payload.strip())
        except (PeerGone, StreamBroken) as error:
            failures.append(str(error))
        finally:
            wire.shut_down()  # a sender that still waits for the server is let go
            sender.join()
        if trouble:
            raise trouble[0]
        if failures:
            raise ScanError(f"{where} reports: {'; '.join(dict.fromkeys(failures))}")
