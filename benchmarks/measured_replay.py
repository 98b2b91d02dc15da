"""``quantitron replay`` in a process of its own, for its seconds and its peak memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path


def measured_replay(raw: Path, pipeline: str, maps: Path, settings: Iterable[str]) -> tuple[float, float]:
    """Seconds and peak memory [GB], from raw file to map file.

    Raises:
        SystemExit: if the replay fails, with its last line.
    """
    program = shutil.which("quantitron", path=os.fspath(Path(sys.executable).parent)) or "quantitron"
    command = [program, "replay", os.fspath(raw), "-p", pipeline, "-o", os.fspath(maps), "--overwrite"]
    command += [part for setting in settings for part in ("--set", setting)]
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
        if process.returncode != 0:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines() or ["nothing was said"]
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}: {said[-1]}")
    return seconds, usage.ru_maxrss / 1e6
