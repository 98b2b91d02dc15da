"""ISMRMRD raw files: the header, and the acquisitions in bulk as blocks.

A loop over single acquisitions is the slow part of ingest (SCANNER.md section 3): rows are read many at a
time and cut by the same rule as a stream, so that a file gives the same blocks as a socket.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import HEADER_DTYPE, AcquisitionBlock, BlockBuilder
from quantitron.gadgets.acquisition_kind import NOISE, flagged, runs
from quantitron.gadgets.errors import ScanError

ROWS = 128
"""Acquisitions read from the file at a time."""


def read_header(path: str | os.PathLike[str], group: str = "dataset") -> bytes:
    """The ISMRMRD header of a raw file, as XML.

    Raises:
        ScanError: if the file is not a readable HDF5 file, has no such group or no header.
    """
    with _opened(path, group) as dataset:
        stored = dataset.get("xml")
        # One string, alone or as the only one of a list: not all writers use the ISMRMRD library.
        if not isinstance(stored, h5py.Dataset) or not stored.size:
            raise ScanError(f"{path} has no ISMRMRD header (/{group}/xml)")
        text = stored[()] if stored.ndim == 0 else stored[(0,) * stored.ndim]
    return text if isinstance(text, bytes) else str(text).encode("utf-8")


def count_acquisitions(path: str | os.PathLike[str], group: str = "dataset") -> int:
    """How many acquisitions a raw file holds.

    Raises:
        ScanError: as ``read_blocks``.
    """
    with _opened(path, group) as dataset:
        return len(_table(dataset, path, group))


def read_blocks(path: str | os.PathLike[str], group: str = "dataset") -> Iterator[AcquisitionBlock]:
    """All acquisitions of a raw file in order.

    Raises:
        ScanError: if the file is not a readable HDF5 file, has no such group, no acquisitions, is
        truncated, or a row
            does not hold what its header says.
    """
    builder = BlockBuilder()
    with _opened(path, group) as dataset:
        table = _table(dataset, path, group)
        for start in range(0, len(table), ROWS):
            try:
                rows = table[start : start + ROWS]
            except (OSError, RuntimeError) as error:
                yield from builder.finish()
                raise ScanError(
                    f"{path} is damaged or truncated: acquisitions from {start} on cannot be read"
                ) from error
            for begin, end in _runs(rows["head"]):
                yield from builder.add(*_arrays(rows[begin:end], start + begin, path))
    yield from builder.finish()


def read_noise(path: str | os.PathLike[str], group: str = "dataset") -> list[AcquisitionBlock]:
    """The noise lines of a raw file: a noise scan often comes as a measurement, and a file, of its own.

    Raises:
        ScanError: as ``read_blocks``, and if no acquisition is flagged as noise.
    """
    noise: list[AcquisitionBlock] = []
    for block in read_blocks(path, group):
        noise.extend(runs(block, flagged(block, NOISE)))
    if not noise:
        raise ScanError(f"{path} holds no noise lines (acquisitions flagged ACQ_IS_NOISE_MEASUREMENT)")
    return noise


def _runs(head: NDArray[np.void]) -> list[tuple[int, int]]:
    """Ranges of rows of one shape."""
    shapes = np.stack(
        [head["number_of_samples"], head["active_channels"], head["trajectory_dimensions"]], axis=1
    )
    changes = np.flatnonzero((shapes[1:] != shapes[:-1]).any(axis=1)) + 1
    edges = [0, *changes.tolist(), len(head)]
    return list(pairwise(edges))


def _arrays(
    rows: NDArray[Any], number: int, path: str | os.PathLike[str]
) -> tuple[NDArray[np.void], NDArray[np.complex64], NDArray[np.float32]]:
    head = rows["head"].astype(HEADER_DTYPE)
    samples, channels, dimensions = (
        int(head[0][name]) for name in ("number_of_samples", "active_channels", "trajectory_dimensions")
    )
    arrays = []
    for name, size in (("data", 2 * channels * samples), ("traj", dimensions * samples)):
        for index, row in enumerate(rows[name]):
            if row.size != size:
                raise ScanError(
                    f"{path}: acquisition {number + index} holds {row.size} values in '{name}', but its "
                    f"header says {channels} channels x {samples} samples and {dimensions} trajectory columns"
                )
        joined = np.concatenate(rows[name]) if size else np.empty(0, dtype=np.float32)
        arrays.append(joined.astype(np.float32, copy=False))
    return (
        head,
        arrays[0].view(np.complex64).reshape(len(rows), channels, samples),
        arrays[1].reshape(len(rows), samples, dimensions),
    )


def _table(dataset: h5py.Group, path: str | os.PathLike[str], group: str) -> h5py.Dataset:
    if "data" not in dataset or not isinstance(dataset["data"], h5py.Dataset) or not len(dataset["data"]):
        raise ScanError(f"{path} holds no acquisitions (/{group}/data)")
    table = dataset["data"]
    if not _holds_acquisitions(table.dtype):
        raise ScanError(f"{path}: /{group}/data does not hold ISMRMRD acquisitions")
    return table


def _holds_acquisitions(row: np.dtype[Any]) -> bool:
    """Whether a row is a head with all fields of an acquisition's, samples, and a trajectory."""
    if not {"head", "data", "traj"} <= set(row.names or ()):
        return False
    lists = all(h5py.check_vlen_dtype(row[name]) is not None for name in ("data", "traj"))
    return lists and set(HEADER_DTYPE.names or ()) <= set(row["head"].names or ())


@contextmanager
def _opened(path: str | os.PathLike[str], group: str) -> Iterator[h5py.Group]:
    """The group of a file opened for reading; every way in which that fails has its sentence."""
    file_path = Path(path)
    if not file_path.exists():
        raise ScanError(f"{path} does not exist")
    if file_path.is_dir():
        raise ScanError(f"{path} is a folder, not a raw file")
    if not file_path.stat().st_size:
        raise ScanError(f"{path} is empty")
    try:
        file = h5py.File(file_path, "r")
    except OSError as error:
        if not os.access(file_path, os.R_OK):
            raise ScanError(f"{path} may not be read (permission denied)") from error
        if "truncated" in str(error):
            raise ScanError(f"{path} is truncated: the file ends before its data do") from error
        if not h5py.is_hdf5(file_path):
            raise ScanError(f"{path} is not an HDF5 file") from error
        raise ScanError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    with file:
        if group not in file or not isinstance(file[group], h5py.Group):
            raise ScanError(f"{path} has no group '{group}' (groups: {', '.join(sorted(file)) or 'none'})")
        yield file[group]
