"""What must not be replaced, a file that the same run reads, and what must not stay, an unfinished one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from quantitron.gadgets.errors import ScanError


def check_no_input(output: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> None:
    """Refuse an output that is one of the inputs, whatever it is called: links and other spellings count.

    Args:
        output: file to write; it need not exist.
        inputs: files that are read. What is no file, such as the name of a phantom, is none.

    Raises:
        ScanError: if one of them is the output.
    """
    for path in inputs:
        # os.path: a text that can be no file name, such as a long setting, is no error there
        if os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path):
            called = "" if os.fspath(path) == os.fspath(output) else f" (as {path})"
            raise ScanError(f"{output} is read{called} and cannot be the output as well")


def discard(unfinished: Path) -> None:
    """Remove a file that was not finished, if it is there and can be removed: why it was not finished is the
    error to tell."""
    with suppress(OSError):
        unfinished.unlink()
