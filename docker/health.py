"""Asks the server of this container whether it still answers; the exit code says so (0: it does).

usage: health.py quantitron|gadgetron [PORT]

A server whose port is open but who serves nobody any more would pass a mere connect: a question is asked in
the protocol that scanners speak, and the connection is closed in it as well.
"""

from __future__ import annotations

import socket
import struct
import sys

CONFIG, CLOSE, QUERY, RESPONSE = 2, 4, 6, 7
NOISE_QUERY = b"NoiseSummaryGadget"
"""Gadgetron's client asks quantitron so for a stored noise scan; the answer is CLOSE."""
VERSION_QUERY = b"gadgetron::version"
"""Gadgetron answers this with RESPONSE, whatever it reconstructs."""
TIMEOUT = 15.0
"""Seconds that an answer may take."""


def answers(server: str, port: int) -> bool:
    """Whether the server on this machine answers as ``quantitron`` or ``gadgetron`` does."""
    if server == "gadgetron":
        question = struct.pack("<HQQQ", QUERY, 0, 1, len(VERSION_QUERY)) + VERSION_QUERY
        expected = RESPONSE
    else:
        question = struct.pack("<HI", CONFIG, len(NOISE_QUERY)) + NOISE_QUERY
        expected = CLOSE
    try:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
            connection.settimeout(TIMEOUT)
            connection.sendall(question + struct.pack("<H", CLOSE))
            identifier = connection.recv(2, socket.MSG_WAITALL)
            while connection.recv(4096):
                continue  # to the end, so that the server is not cut off in the middle of its answer
    except OSError:
        return False
    return identifier == struct.pack("<H", expected)


if __name__ == "__main__":
    if sys.argv[1:2] not in (["quantitron"], ["gadgetron"]) or not all(a.isdigit() for a in sys.argv[2:]):
        sys.exit(str(__doc__).splitlines()[2])
    sys.exit(not answers(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 9002))
