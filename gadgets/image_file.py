"""Map files: ISMRMRD images in HDF5, in the layout that ``gadgetron_ismrmrd_client`` writes.

    /<group>/image_<image_series_index>/data        (n, channel, z, y, x)
    /<group>/image_<image_series_index>/header      (n,) ISMRMRD image headers
    /<group>/image_<image_series_index>/attributes  (n,) meta attributes, XML text

The same layout holds the ground truth in group ``truth`` of a simulated raw file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from xml.etree.ElementTree import ParseError

import h5py
import ismrmrd
import numpy as np
from ismrmrd.hdf5 import image_header_dtype
from numpy.typing import NDArray

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.uninterrupted import uninterrupted

TRUTH_GROUP = "truth"
"""Group of a raw file that holds the ground truth of a simulated scan."""

_OVERHEAD = 1 << 16
"""More than HDF5 takes [byte] for the structures around what is written at once."""
_SERIES = re.compile(r"image_(\d+)")
_HEADER_DTYPE: np.dtype[np.void] = np.dtype(image_header_dtype)
_COMPLEX = {
    np.dtype(np.complex64): np.dtype([("real", "<f4"), ("imag", "<f4")]),
    np.dtype(np.complex128): np.dtype([("real", "<f8"), ("imag", "<f8")]),
}


def default_group() -> str:
    """Group name of a new run, as the Gadgetron client chooses it: local date and time."""
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")


def write_images(
    path: str | os.PathLike[str],
    group: str | None,
    images: Iterable[ismrmrd.Image],
    overwrite: bool = False,
) -> int:
    """Write images into one group of an HDF5 file; other groups of an existing file stay as they are.

    Each image is on disk before the next one is asked for: what was computed before a failure is kept, and
    the file is not held open while the next image is computed. Ctrl-C and SIGTERM wait for an image that is
    being written, which would leave a series that nobody can read.

    Args:
        path: file to create or to add to.
        group: name of the group, such as ``truth``; None takes the date and time, so that a rerun appends.
        images: images in any order; those of one series index share shape and data type.
        overwrite: replace the group if the file has it already.

    Returns:
        How many images were written.

    Raises:
        ScanError: if the group exists and ``overwrite`` is not set, if the file is not HDF5 or cannot be
            written (disk full, no such folder, ...), or if the images of a series differ in shape or type.
    """
    path = Path(path)
    name = default_group() if group is None else group
    written = 0
    try:
        reserve(path, 0)
        with h5py.File(path, "a" if path.stat().st_size else "w") as file:
            if name in file:
                if not overwrite:
                    raise ScanError(f"{path} already has a group '{name}' (overwrite replaces it)")
                del file[name]
            file.create_group(name)
        for image in images:
            with uninterrupted():
                reserve(path, image.data.nbytes + len(image.attribute_string))
                with h5py.File(path, "a") as file:
                    _append(file[name], image, path)
            written += 1
    except (OSError, RuntimeError) as error:  # h5py raises either, by where in HDF5 the write failed
        raise ScanError(f"cannot write {path}: {reason(error)}") from error
    return written


def image_groups(path: str | os.PathLike[str]) -> list[str]:
    """Groups of the file that hold image series, in alphabetical (so date-time) order.

    Raises:
        ScanError: if the file cannot be read.
    """
    with _open(Path(path)) as file:
        return _groups(file)


def read_images(path: str | os.PathLike[str], group: str | None = None) -> list[ismrmrd.Image]:
    """Read the images of one group, by ascending series index and in the order of writing within a series.

    Args:
        path: a map file, or a raw file with ground truth.
        group: the group; None takes the latest run (last by name), and ``truth`` only if there is no other.

    Raises:
        ScanError: if the file or the group does not exist, is not readable or holds no images.
    """
    path = Path(path)
    with _open(path) as file:
        groups = _groups(file)
        if group is None:
            runs = [name for name in groups if name != TRUTH_GROUP] or groups
            if not runs:
                raise ScanError(f"{path} holds no images (no group with image_<series>)")
            group = runs[-1]
        elif group not in groups:
            listed = ", ".join(f"'{name}'" for name in groups) or "none"
            raise ScanError(f"{path} has no images in a group '{group}' (groups with images: {listed})")
        images: list[ismrmrd.Image] = []
        for series in sorted(_series(file[group]), key=_series_number):
            try:
                images += _read_series(file[group][series])
            except (OSError, KeyError, ValueError, AssertionError, ParseError) as error:
                raise ScanError(f"{path}: series /{group}/{series} is damaged: {reason(error)}") from error
    return images


def _open(path: Path) -> h5py.File:
    if not path.exists():
        raise ScanError(f"{path} does not exist")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if path.is_file() and os.access(path, os.R_OK) and not h5py.is_hdf5(path):
            raise ScanError(f"{path} is not an HDF5 file") from error
        raise ScanError(f"cannot read {path}: {reason(error)}") from error


def _groups(file: h5py.File) -> list[str]:
    return sorted(name for name, item in file.items() if isinstance(item, h5py.Group) and _series(item))


def _series(group: h5py.Group) -> list[str]:
    return [name for name in group if _SERIES.fullmatch(name)]


def _series_number(name: str) -> int:
    return int(name.removeprefix("image_"))


def reserve(path: Path, size: int) -> None:
    """Make room for ``size`` more bytes and HDF5's structures around them, by writing them; HDF5 cuts off on
    closing what it did not use.

    A plain write fails cleanly on a full disk. HDF5 notices one only when it flushes, and then takes the
    process down with it. A file that is new or empty is left empty, since HDF5 would not take it for its own.
    """
    before = path.stat().st_size if path.exists() else 0
    if before and not h5py.is_hdf5(path):
        raise ScanError(f"cannot write {path}: it exists and is not an HDF5 file")
    with open(path, "ab", buffering=0) as file:
        left = size + _OVERHEAD
        try:
            while left > 0:
                left -= file.write(bytes(min(left, 1 << 20)))
        except OSError:
            file.truncate(before)
            raise
        if not before:
            file.truncate(0)


def _append(group: h5py.Group, image: ismrmrd.Image, path: Path) -> None:
    data = _to_file(image.data)
    series = group.require_group(f"image_{image.image_series_index}")
    if "header" not in series:
        series.create_dataset(
            "data", (0, *data.shape), data.dtype, maxshape=(None, *data.shape), chunks=(1, *data.shape)
        )
        series.create_dataset("header", (0,), _HEADER_DTYPE, maxshape=(None,), chunks=(1,))
        # ASCII as the client writes it: meta is XML text, where ElementTree escapes every other character
        series.create_dataset("attributes", (0,), h5py.string_dtype("ascii"), maxshape=(None,), chunks=(1,))
    stored = series["data"]
    if stored.shape[1:] != data.shape or stored.dtype != data.dtype:
        raise ScanError(
            f"{path}: images of series {image.image_series_index} differ: "
            f"{stored.shape[1:]} {stored.dtype} and {data.shape} {data.dtype}"
        )
    count = len(stored)
    for dataset in (stored, series["header"], series["attributes"]):
        dataset.resize(count + 1, axis=0)
    text = _ascii(image.attribute_string)
    header = np.frombuffer(image.getHead(), dtype=_HEADER_DTYPE).copy()
    header["attribute_string_len"] = len(text)
    stored[count] = data
    series["header"][count] = header[0]
    series["attributes"][count] = text


def _read_series(series: h5py.Group) -> list[ismrmrd.Image]:
    images = []
    for index, header in enumerate(series["header"][()]):
        text = series["attributes"][index]
        data = series["data"][index]
        if data.dtype.names:
            data = data.view(next(kind for kind, pair in _COMPLEX.items() if pair == data.dtype))
        image = ismrmrd.Image(header.tobytes(), text.decode() if isinstance(text, bytes) else str(text))
        if image.data.shape != data.shape or image.data.dtype != data.dtype:
            raise ValueError(
                f"header says {image.data.shape} {image.data.dtype}, data are {data.shape} {data.dtype}"
            )
        image.data[:] = data
        images.append(image)
    return images


def _to_file(data: NDArray[np.generic]) -> NDArray[np.generic]:
    pair = _COMPLEX.get(data.dtype)
    return data if pair is None else np.ascontiguousarray(data).view(pair)


def _ascii(text: str) -> str:
    """XML text with every non-ASCII character as a character reference, which any reader can take."""
    text = text.replace("encoding='UTF-8'", "encoding='us-ascii'", 1)
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def reason(error: BaseException) -> str:
    """The operating system's words where there are any, else the first line of the library's."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
