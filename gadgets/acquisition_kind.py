"""What an acquisition is for, from its flags (SCANNER.md section 3)."""

from __future__ import annotations

from collections.abc import Iterator

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.gadget import Context


def _bits(*flags: int) -> np.uint64:
    return np.uint64(sum(1 << (flag - 1) for flag in flags))


NOISE = _bits(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
NAVIGATOR = _bits(ismrmrd.ACQ_IS_NAVIGATION_DATA)
CALIBRATION = _bits(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION, ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
IMAGING_TOO = _bits(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
REVERSE = _bits(ismrmrd.ACQ_IS_REVERSE)
LAST = _bits(ismrmrd.ACQ_LAST_IN_MEASUREMENT)
UNUSED = _bits(
    ismrmrd.ACQ_IS_PHASECORR_DATA,
    ismrmrd.ACQ_IS_HPFEEDBACK_DATA,
    ismrmrd.ACQ_IS_DUMMYSCAN_DATA,
    ismrmrd.ACQ_IS_RTFEEDBACK_DATA,
    ismrmrd.ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA,
    ismrmrd.ACQ_IS_PHASE_STABILIZATION_REFERENCE,
    ismrmrd.ACQ_IS_PHASE_STABILIZATION,
)
"""Lines that are neither image, calibration, navigator nor noise."""


def flagged(block: AcquisitionBlock, bits: np.uint64) -> NDArray[np.bool_]:
    """(n,) whether any of ``bits`` is set."""
    chosen: NDArray[np.bool_] = (block.head["flags"] & bits) != 0
    return chosen


def is_image(block: AcquisitionBlock) -> NDArray[np.bool_]:
    """(n,) lines of the scan that belong to its images: neither navigators nor for calibration alone."""
    imaging: NDArray[np.bool_] = ~flagged(block, NAVIGATOR) & (
        ~flagged(block, CALIBRATION) | flagged(block, IMAGING_TOO)
    )
    return imaging


def of_scan(block: AcquisitionBlock, context: Context) -> NDArray[np.bool_]:
    """(n,) imaging and calibration lines of the first encoding space, and navigators where they are needed.

    Navigators may have any shape and content, which is of no concern where nothing uses them: they are left
    out and counted in the context. Lines of other encoding spaces (separate reference scans) have grids of
    their own; leaving them out is noted.
    """
    used = ~flagged(block, UNUSED | NOISE)
    if not context.needs_navigators:
        navigator = used & flagged(block, NAVIGATOR)
        if navigator.any():
            context.unused_navigators += int(np.count_nonzero(navigator))
        used &= ~navigator
    elsewhere = used & (block.head["encoding_space_ref"] != 0)
    if elsewhere.any():
        context.note("lines of other encoding spaces than the first are not used")
    chosen: NDArray[np.bool_] = used & ~elsewhere
    return chosen


def runs(block: AcquisitionBlock, chosen: NDArray[np.bool_]) -> Iterator[AcquisitionBlock]:
    """The chosen acquisitions as blocks of neighbours, so that each block's numbering stays true."""
    if chosen.all():
        yield block
        return
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False]))))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        yield AcquisitionBlock(
            block.head[start:end],
            block.data[start:end],
            block.trajectory[start:end],
            block.first + int(start),
            block.hybrid,
            block.mixing,
        )
