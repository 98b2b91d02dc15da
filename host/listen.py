"""The remote end of Gadgetron's ``<connect>``: Gadgetron connects to us as to an external process."""

from __future__ import annotations

import logging

from quantitron.gadgets.chain import Chain, deliver, make_chain, parse_configuration
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.wire import CONFIG, ERROR, HEADER, PeerGone, Wire
from quantitron.host.connections import Stopped, report_stop

logger = logging.getLogger("quantitron")


def serve_gadgetron(wire: Wire) -> int:
    """Serve one scan that Gadgetron sends; returns the exit status of the process.

    Only images, ERROR and CLOSE go back: Gadgetron refuses TEXT from an external process.
    """

    def open_chain() -> Chain:
        texts = []
        for identifier, what in ((CONFIG, "config"), (HEADER, "header")):
            message = wire.read()
            if message.identifier != identifier:
                raise ScanError(
                    f"a {what} (message id {identifier}) was expected, not id {message.identifier}"
                )
            texts.append(str(message.payload))
        return make_chain(parse_configuration(texts[0], "pipeline"), texts[1].encode("utf-8"))

    try:
        failure = deliver(wire, open_chain, lambda sentence: wire.send_text(ERROR, sentence))
        wire.send_close()
    except PeerGone as error:
        logger.error("%s", error)
        return 1
    except Stopped:
        report_stop(wire, lambda sentence: wire.send_text(ERROR, sentence))
        raise
    return 0 if failure is None else 1
