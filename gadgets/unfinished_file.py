"""A file while it is being written: beside what it becomes, under a name that says which process writes it.

Whoever ends by an error, Ctrl-C or SIGTERM clears it away. What a process leaves that was killed is found by
the next one that writes the same file.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from contextlib import suppress
from pathlib import Path

_PROCESSES = "/proc/self/ns/pid"
"""On Linux names the space in which process numbers count: containers have their own."""


def unfinished_file(target: Path) -> Path:
    """Where this process writes what becomes ``target``: hidden, in the same folder, of no other process."""
    return target.with_name(f".{target.name}.{_machine()}-{os.getpid()}.part")


def abandoned_files(target: Path) -> list[Path]:
    """Unfinished files of ``target`` whose process has ended, by name. Those of other machines and containers
    are none, since nothing tells here whether their processes live."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{_machine()}-(\d+)\.part")
    try:
        names = sorted(os.listdir(target.parent))
    except OSError:
        return []
    found = [(match, target.with_name(name)) for name in names if (match := pattern.fullmatch(name))]
    return [path for match, path in found if not _lives(int(match.group(1)))]


def clear_abandoned(target: Path) -> None:
    """Remove the abandoned files of ``target``, as far as they can be removed."""
    for path in abandoned_files(target):
        discard(path)


def discard(unfinished: Path) -> None:
    """Remove a file that was not finished, if it is there and can be removed: why it was not finished is the
    error to tell."""
    with suppress(OSError):
        unfinished.unlink()


def _machine() -> str:
    """Two processes with the same one see each other's numbers."""
    try:
        space = os.readlink(_PROCESSES)
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks, sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or no number of a process
        return True
    return True
