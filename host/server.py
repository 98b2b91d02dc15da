"""The embedded host: Gadgetron's client protocol, for ``gadgetron_ismrmrd_client`` and FIRE clients."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from quantitron.gadgets.chain import Chain, deliver, make_chain
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.wire import CLOSE, CONFIG, ERROR, FILENAME, HEADER, TEXT, WAVEFORM, PeerGone, Wire
from quantitron.host.configuration import (
    external_configuration,
    known_pipeline,
    load_pipeline,
    parse_pipeline,
)
from quantitron.host.connections import Stopped, report_stop

logger = logging.getLogger("quantitron")

ALIAS = "openrecon"
"""Config name that every OpenRecon client sends; it stands for the default pipeline."""


NOISE_QUERY = "NoiseSummaryGadget"
"""What Gadgetron's client asks for before a scan that depends on a noise scan, on a connection of its own.

It takes an empty answer as "there is none", and aborts the scan if told anything it does not know."""


class NoiseQuery(BaseException):
    """The connection was no scan but the client's question for a stored noise scan."""


@dataclass(frozen=True)
class Server:
    """Serves one scan on one connection; called once in the process of each connection."""

    default_pipeline: str | None = None
    """Pipeline that the name ``openrecon`` stands for."""
    errors_as_text: bool = False
    """Report failures as TEXT only. Gadgetron's own client does not know ERROR: it aborts there, with a
    non-zero exit status but without closing its output, so that images which came before are lost."""

    def __call__(self, wire: Wire) -> int:
        """Serve a connection to its end; returns the exit status of its process."""
        texts = TextHandler(wire)
        logger.addHandler(texts)
        try:
            failure = deliver(wire, lambda: self._open(wire), lambda sentence: self._report(wire, sentence))
            wire.send_close()
        except NoiseQuery:
            logger.info("the client asked for a noise scan kept from before; there is none")
            wire.drain()
            wire.send_close()
            return 0
        except PeerGone as error:
            logger.error("%s", error)
            return 1
        except Stopped:
            report_stop(wire, lambda sentence: self._report(wire, sentence))
            raise
        finally:
            logger.removeHandler(texts)
        if failure is None:
            logger.info("scan of %d acquisitions is done", wire.acquisitions)
        return 0 if failure is None else 1

    def _report(self, wire: Wire, sentence: str) -> None:
        """Tell the client in both ways that clients know: Gadgetron's own prints TEXT and no ERROR."""
        wire.send_text(TEXT, f"ERROR: {sentence}\n")
        if not self.errors_as_text:
            wire.send_text(ERROR, sentence)

    def _open(self, wire: Wire) -> Chain:
        """Read config and header and make the chain."""
        configuration = self._configuration(wire)
        try:
            header = _next(wire)
        except ScanError:
            if NOISE_QUERY in configuration[0]:
                raise NoiseQuery from None
            raise
        if header[0] != HEADER:
            raise ScanError(f"a header (message id {HEADER}) was expected, not message id {header[0]}")
        text, where = configuration
        root = external_configuration(parse_pipeline(text, where), where)
        return make_chain(root, header[1].encode("utf-8"), where)

    def _configuration(self, wire: Wire) -> tuple[str, str]:
        identifier, content = _next(wire)
        if identifier == CONFIG:
            return content, "config sent by the client"
        if identifier != FILENAME:
            raise ScanError(f"a config (message id 1 or 2) was expected, not message id {identifier}")
        name = content.strip()
        if name.removesuffix(".xml") == ALIAS:
            if self.default_pipeline is None:
                raise ScanError(
                    f"the config name '{ALIAS}' stands for the default pipeline, and the server was started "
                    "without one (--default-pipeline)"
                )
            name = self.default_pipeline
        # names only: a client must not make the server read files of its choice
        return load_pipeline(known_pipeline(name))


def _next(wire: Wire) -> tuple[int, str]:
    """The next message before the data; texts (OpenRecon's parameters) are read over."""
    while True:
        message = wire.read()
        if message.identifier == CLOSE:
            raise ScanError("the client closed before it sent config and header")
        if message.identifier == TEXT:
            logger.info("the client sent a text of %d characters, which is not used", len(message.payload))
            continue
        if message.identifier != WAVEFORM:
            return message.identifier, message.payload if isinstance(message.payload, str) else ""


class TextHandler(logging.Handler):
    """Sends warnings (what was assumed about the scan) to the client as TEXT."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(logging.WARNING)
        self._wire: Wire | None = wire

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; a client that is gone gets no more."""
        if self._wire is None or record.levelno >= logging.ERROR:  # failures have a message of their own
            return
        try:
            self._wire.send_text(TEXT, f"{record.getMessage()}\n")
        except PeerGone:
            self._wire = None
