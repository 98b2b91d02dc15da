"""Accepts connections on a port and gives each its own process.

A process that only accepts has imported everything but computed nothing, so forking it is safe (no CUDA
context, no worker threads of its own) and a connection is served without waiting for imports. A
reconstruction that dies takes nothing with it.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.wire import PeerGone, Wire

logger = logging.getLogger("quantitron")

GRACE = 5.0
"""Seconds that running connections have to end after the host was told to stop."""
TO_FINISH = 2.0
"""Seconds of those that a peer has to send what it is sending, before it is told."""
TO_HEAR = 1.0
"""Seconds of those that a peer has to hang up, once it has been told."""
PAUSE = 0.2
"""Seconds of silence after which a peer has sent all that it was sending."""


class Stopped(BaseException):
    """The host was told to stop while a connection was being served."""


def accept_connections(
    host: str, port: int, session: Callable[[Wire], int], ready: Callable[[int], None]
) -> None:
    """Serve connections, each in its own process, until SIGTERM or SIGINT.

    Args:
        host: address to bind.
        port: port to bind; 0 takes a free one.
        session: serves one connection and returns the exit status of its process.
        ready: told the port once connections are accepted.

    Raises:
        ScanError: if the address cannot be bound.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        known = error.errno and error.errno > 0  # those of the name service are below
        reason = os.strerror(error.errno) if known else (error.strerror or str(error)).split(" (")[0]
        raise ScanError(f"cannot listen on {host}:{port}: {reason}") from error
    # a signal writes into the pipe, so that one poll waits for connections, ended processes and the end
    wake, waker = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(waker, False)
    stopping: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        stopping.append(number)

    def child_ended(_: int, __: FrameType | None) -> None:
        """Only wakes the poll."""

    before = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGCHLD, child_ended))
    }
    waker_before = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    running: set[int] = set()
    try:
        with listener:
            listener.setblocking(False)
            ready(listener.getsockname()[1])
            poll = select.poll()
            poll.register(listener, select.POLLIN)
            poll.register(wake, select.POLLIN)
            while not stopping:
                events = dict(poll.poll())
                if wake in events:
                    os.read(wake, 4096)
                    _reap(running)
                if listener.fileno() in events and not stopping:
                    _accept(listener, session, running, (wake, waker))
        _end(running)
    finally:
        signal.set_wakeup_fd(waker_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wake)
        os.close(waker)


def _accept(
    listener: socket.socket,
    session: Callable[[Wire], int],
    running: set[int],
    pipe: tuple[int, int],
) -> None:
    try:
        connection, peer = listener.accept()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            logger.error("cannot accept a connection: %s", error.strerror)
            time.sleep(0.5)  # until one of those running ends
        return
    with connection:
        try:
            process = os.fork()
        except OSError as error:  # no memory, or as many processes as there may be: those running go on
            logger.error("no process for the connection from %s:%d: %s", peer[0], peer[1], error.strerror)
            return
        if process == 0:
            _serve(connection, listener, session, pipe)
    running.add(process)
    logger.info("connection from %s:%d is served by process %d", peer[0], peer[1], process)


def _serve(
    connection: socket.socket,
    listener: socket.socket,
    session: Callable[[Wire], int],
    pipe: tuple[int, int],
) -> None:
    """The life of the forked process; it does not return."""

    def stopped(_: int, __: FrameType | None) -> None:
        wire.interrupt()  # a thread that sits waiting for the next line would be waited for, up to GRACE
        raise Stopped

    status = 1
    try:
        wire = Wire(connection)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Ctrl-C reaches all processes of a terminal; the parent tells when to stop
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, stopped)
        listener.close()
        for end in pipe:
            os.close(end)
        status = session(wire)
    except Stopped:
        logger.error("stopped while serving a connection")
    except BaseException:
        logger.exception("serving a connection failed")
    finally:
        connection.close()
        logging.shutdown()
        os._exit(status)  # nothing of the parent's cleanup may run here


def _reap(running: set[int]) -> None:
    for process in list(running):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            running.discard(process)
            code = os.waitstatus_to_exitcode(status)
            level = logging.INFO if code == 0 else logging.WARNING
            logger.log(level, "process %d ended with status %d", process, code)


def _end(running: set[int]) -> None:
    for process in running:
        os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while running and time.monotonic() < deadline:
        _reap(running)
        time.sleep(0.02)
    for process in running:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def report_stop(wire: Wire, report: Callable[[str], None]) -> None:
    """Tell the peer that the host goes down in the middle of its scan, if that can still be said.

    What the peer is sending is read first: hanging up on a peer that sends loses it what it was told, for the
    system then resets the connection, and Gadgetron does not read on where it cannot write.
    """
    if wire.midway:
        wire.shut_down()
        return
    try:
        wire.discard(TO_FINISH, PAUSE)
        report("the reconstruction host was stopped before the scan was done")
        wire.send_close()
        wire.discard(TO_HEAR, TO_HEAR)
    except PeerGone as error:
        logger.info("%s", error)
