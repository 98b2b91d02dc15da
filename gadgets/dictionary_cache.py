"""Dictionaries of fingerprints on disk, so that a protocol is simulated once.

A file's name is the hash of everything that its dictionary depends on, the simulator included. A file is an
``.npz`` archive of plain arrays, then the SHA-256 of the archive: one that was cut short or altered is found
out before anything in it is looked at, and replaced. Files come into being under another name and are renamed
when they are complete, so that any number of processes may read and write the same one. Whatever is wrong
with the disk, the dictionary is simulated and the scan goes on.

Together they take no more than a limit: beyond it, those that were not used for the longest time go. Nobody
who is reading one is disturbed: its name goes, its content stays until it is closed; and what was used within
the last minute is left alone, for file systems that several machines share.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantitron.recon.data import FingerprintDictionary, Protocol
from quantitron.recon.signal import (
    extended_phase_graph,
    fingerprint_dictionary,
    fisp_mrf,
    phase_graph_in_place,
)

logger = logging.getLogger("quantitron")

FOLDER_VARIABLE = "QUANTITRON_CACHE"
"""Environment variable that names the folder."""
SIZE_VARIABLE = "QUANTITRON_CACHE_SIZE"
"""Environment variable that holds the limit [GB]."""
DEFAULT_SIZE = 4.0
"""Limit [GB] where none is set; a usual dictionary takes some 15 MB for each B1."""

_LAYOUT = 1
"""Raised whenever the arrays of a file change their meaning."""
_NAMES = tuple(entry.name for entry in fields(FingerprintDictionary))
_ABANDONED_AFTER = 3600.0
"""Age [s] of an unfinished file from which on nobody is writing it any more."""
_IN_USE_FOR = 60.0
"""Age [s] of its last use up to which a file is not removed."""
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path | None:
    """Where dictionaries are kept: ``QUANTITRON_CACHE``, else ``quantitron`` in the user's cache directory.

    None where the user has no home.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache and Path(cache).is_absolute():  # the XDG specification has relative ones ignored
        return Path(cache) / "quantitron"
    try:
        return Path.home() / ".cache" / "quantitron"
    except RuntimeError as error:
        logger.info("dictionaries are not kept: %s", error)
        return None


def cached_dictionary(
    protocol: Protocol,
    t1_range: tuple[float, float] = fingerprint_dictionary.T1_RANGE,
    t2_range: tuple[float, float] = fingerprint_dictionary.T2_RANGE,
    t1_points: int = fingerprint_dictionary.T1_POINTS,
    t2_points: int = fingerprint_dictionary.T2_POINTS,
    b1: Sequence[float] = (1.0,),
    folder: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> FingerprintDictionary:
    """The dictionary of ``fingerprint_dictionary``, from the disk where it is there, else left there.

    Args:
        protocol: a ``fisp_mrf`` sequence.
        t1_range: first and last T1 [s].
        t2_range: first and last T2 [s].
        t1_points: points of T1.
        t2_points: points of T2.
        b1: actual over nominal flip angles.
        folder: where dictionaries are kept; ``cache_folder()`` if None.
        progress: told the share that is simulated.

    Raises:
        ValueError: if a range or a number of points makes no grid, or the protocol is inconsistent.
    """
    folder = cache_folder() if folder is None else folder
    shape = (len(b1), t1_points, t2_points)
    path = None
    if folder is not None:
        grid = [list(map(float, t1_range)), list(map(float, t2_range)), list(map(float, b1)), shape]
        path = folder / f"{_key(protocol, grid)}.npz"
        kept = _read(path, (*shape, protocol.contrasts))
        if kept is not None:
            logger.info("%s taken from the cache", _in_words(kept))
            return kept
    start = time.monotonic()
    made = fingerprint_dictionary.fingerprint_dictionary(
        protocol, t1_range, t2_range, t1_points, t2_points, b1, progress
    )
    logger.info("%s simulated in %.1f s", _in_words(made), time.monotonic() - start)
    if path is not None:
        _write(path, made)
    return made


def _in_words(dictionary: FingerprintDictionary) -> str:
    atoms = int(dictionary.plausible.sum()) * len(dictionary.b1)
    points, columns = dictionary.axes.shape
    return f"dictionary of {atoms} atoms x {points} points (rank {columns})"


def _key(protocol: Protocol, grid: list[Any]) -> str:
    """SHA-256 of all that a dictionary depends on."""
    known = protocol.inversion_efficiency
    depends = {
        "layout": _LAYOUT,
        "sequence": protocol.sequence,
        "flip_angle": protocol.flip_angle,
        "repetition_time": protocol.repetition_time,
        "rf_phase": protocol.rf_phase,
        "echo_time": protocol.echo_time,
        "inversion_time": protocol.inversion_time,
        "inversion_efficiency": 1.0 if known is None else known,
        "grid": grid,
    }
    # Numbers are written out so that they read back bit for bit.
    digest = hashlib.sha256(json.dumps(depends, default=float).encode())
    for module in (extended_phase_graph, phase_graph_in_place, fisp_mrf, fingerprint_dictionary):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def _read(path: Path, shape: tuple[int, int, int, int]) -> FingerprintDictionary | None:
    """The dictionary in a file, or None where there is no such file or it is not what it should be.

    Args:
        path: the file.
        shape: (b, i, j, w) that is asked for.
    """
    try:
        content = path.read_bytes()
        with suppress(OSError):  # another user's, or nothing can be written: used when it was written
            os.utime(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("the kept dictionary cannot be read (%s), it is simulated anew", error)
        return None
    payload, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        logger.warning("the kept dictionary %s is damaged, it is simulated anew", path.name)
        return None
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in _NAMES}
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        logger.warning("the kept dictionary %s cannot be read (%s), it is simulated anew", path.name, error)
        return None
    if not _fits(arrays, shape):
        logger.warning("the kept dictionary %s is of another size or kind, it is simulated anew", path.name)
        return None
    return FingerprintDictionary(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def _fits(arrays: dict[str, NDArray[Any]], shape: tuple[int, int, int, int]) -> bool:
    """Whether the arrays are a dictionary of (b, i, j, w)."""
    flips, atoms1, atoms2, points = shape
    columns = arrays["variance"].size
    expected = {
        "t1": (atoms1,),
        "t2": (atoms2,),
        "b1": (flips,),
        "axes": (points, columns),
        "variance": (columns,),
        "coefficients": (flips, atoms1, atoms2, columns),
    }
    kind = arrays["axes"].dtype
    return kind in (np.float32, np.complex64) and all(
        arrays[name].shape == expected[name]
        and arrays[name].dtype == (kind if name in ("axes", "coefficients") else np.float32)
        and bool(np.isfinite(arrays[name]).all())
        for name in _NAMES
    )


def _write(path: Path, dictionary: FingerprintDictionary) -> None:
    """Put a dictionary down; where that is impossible, say so in the log."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(dictionary, name).cpu().numpy() for name in _NAMES})
    payload = buffer.getbuffer()
    unfinished: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".part", dir=path.parent)
        unfinished = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.write(hashlib.sha256(payload).digest())
            file.flush()
            os.fsync(file.fileno())
        unfinished.chmod(0o644)  # a folder may serve several users
        unfinished.replace(path)
    except OSError as error:
        logger.warning("the dictionary cannot be kept (%s)", error)
        if unfinished is not None:
            _remove(unfinished)
        return
    for part in path.parent.glob("*.part"):  # of processes that were killed
        _remove(part, _ABANDONED_AFTER)
    _shrink(path.parent)


def cache_size() -> float:
    """Bytes that all dictionaries may take together: ``QUANTITRON_CACHE_SIZE`` in GB, else 4 GB."""
    given = os.environ.get(SIZE_VARIABLE, "")
    try:
        size = float(given) if given else DEFAULT_SIZE
    except ValueError:
        size = math.nan
    if not size >= 0:
        logger.warning("%s is '%s', no number of GB; %g is taken", SIZE_VARIABLE, given, DEFAULT_SIZE)
        size = DEFAULT_SIZE
    return size * 1e9


def _shrink(folder: Path) -> None:
    """Remove the dictionaries that were not used for the longest time, down to the limit."""
    kept: list[tuple[float, int, Path]] = []  # last use, bytes
    for file in folder.glob("*.npz"):
        if re.fullmatch("[0-9a-f]{64}", file.stem):  # nothing of somebody else's
            with suppress(OSError):  # another process was quicker
                state = file.stat()
                kept.append((state.st_mtime, state.st_size, file))
    total, limit = sum(size for _, size, _ in kept), cache_size()
    for used, size, file in sorted(kept):
        if total <= limit or time.time() - used <= _IN_USE_FOR:
            return
        if _remove(file, _IN_USE_FOR):
            logger.info("a dictionary that was last used %.0f h ago was removed", (time.time() - used) / 3600)
        total -= size


def _remove(file: Path, age: float = -math.inf) -> bool:
    """Delete a file if it is older than ``age`` [s]; whether it is gone by that."""
    try:
        if time.time() - file.stat().st_mtime > age:
            file.unlink()
            return True
    except FileNotFoundError:
        logger.debug("%s was already removed", file.name)
    except OSError as error:
        logger.warning("%s is left over (%s)", file.name, error)
    return False
