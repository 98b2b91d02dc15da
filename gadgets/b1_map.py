"""A measured map of the transmit field, from a file beside the scan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.header import counter_length

PLAUSIBLE = (0.2, 2.0)
"""Actual over nominal flip angle outside of which a map is taken for something else (degrees, per cent)."""
ROUNDING = 1e-3
"""Excess of a map over the B1 of the dictionary that needs no mention."""


def read_b1_map(path: str, context: Context) -> Tensor:
    """Read and check a B1 map before any data are read.

    Args:
        path: an .npz file with the array ``b1``, or an .npy file: actual over nominal flip angle on the
            delivered grid, (z, y, x) for one slice or slab, else (s, z, y, x) with s in the order of the
            images: ascending along the slice direction.
        context: of a fingerprint scan; the dictionary need not be there yet, only its B1 values.

    Returns:
        (s, z, y, x) float32. What lies beyond the dictionary's B1 is noted.

    Raises:
        ScanError: if the file cannot be read, the map does not fit the scan or holds values that are no B1,
            or the dictionary knows only one B1.
    """
    if context.protocol.sequence != "fisp_mrf":
        raise ScanError(f"reconstruct: b1_map is for fisp_mrf, this scan is {context.protocol.sequence}")
    known = context.dictionary_b1
    if known is not None and len(known) < 2:
        raise ScanError(
            "reconstruct: b1_map needs a dictionary of several B1 values; set the properties b1_range and "
            "b1_points of the gadget basis"
        )
    values = _read(Path(path))
    grid = context.encoding.delivered_matrix
    if values.ndim == 3:
        values = values[np.newaxis]
    if values.ndim != 4 or values.shape[1:] != grid:
        shape = " x ".join(map(str, values.shape))
        raise ScanError(
            f"the B1 map {path} is {shape}, the images are {' x '.join(map(str, grid))} (z, y, x)"
        )
    announced = counter_length(context.header, "slice")
    if announced is not None:
        check_slices(values, announced)
    if np.iscomplexobj(values) or values.dtype.kind not in "fiu":
        raise ScanError(f"the B1 map {path} holds {values.dtype} values, not real numbers")
    wrong = int(np.count_nonzero(~np.isfinite(values)))
    if wrong:
        raise ScanError(f"the B1 map {path} has {wrong} voxels that are not finite numbers")
    low, high = float(values.min()), float(values.max())
    if low < PLAUSIBLE[0] or high > PLAUSIBLE[1]:
        raise ScanError(
            f"the B1 map {path} runs from {low:g} to {high:g}; actual over nominal flip angle must lie in "
            f"{PLAUSIBLE[0]:g}..{PLAUSIBLE[1]:g}"
        )
    b1 = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    if known is not None:
        first, last = known[0], known[-1]
        beyond = int(((b1 < first - ROUNDING) | (b1 > last + ROUNDING)).sum())
        if beyond:
            context.note(
                f"{beyond} of {b1.numel()} voxels of the B1 map, which runs from {low:.3g} to {high:.3g}, "
                f"lie beyond the dictionary's {first:.3g}..{last:.3g} and are taken at its ends"
            )
    return b1


def nominal_within(known: Sequence[float]) -> None:
    """Refuse a dictionary without the nominal flip angles, for a scan without a B1 map.

    Its voxels would be matched at the nearest end of the dictionary's B1, their T2 biased by as much.

    Args:
        known: B1 of the dictionary, ascending.

    Raises:
        ScanError: if 1 lies beyond them.
    """
    if not known[0] <= 1 <= known[-1]:
        raise ScanError(
            f"basis.b1_range {known[0]:g}..{known[-1]:g} does not hold 1, at which voxels are matched "
            "without a b1_map"
        )


def check_slices(b1: Tensor | NDArray[np.generic], slices: int) -> None:
    """Refuse a map (s, z, y, x) of another number of slices than the scan's.

    Raises:
        ScanError: if it is one.
    """
    if len(b1) != slices:
        raise ScanError(f"the B1 map holds {len(b1)} slices, the scan has {slices}")


def _read(path: Path) -> NDArray[np.generic]:
    if not path.is_file():
        raise ScanError(f"there is no B1 map {path}")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if "b1" not in loaded:
                held = ", ".join(loaded.files) or "nothing"
                raise ScanError(f"the B1 map {path} holds {held}, no array 'b1'")
            array: NDArray[np.generic] = loaded["b1"]
            return array
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ScanError(f"the B1 map {path} cannot be read: {str(error).splitlines()[0]}") from error
