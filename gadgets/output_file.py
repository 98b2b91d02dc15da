"""What an output must not replace: a file that the same run reads."""

from __future__ import annotations

import os

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
