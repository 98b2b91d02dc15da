"""The end of the measurement, as the lines tell it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.acquisition_kind import LAST, flagged, is_image
from quantitron.gadgets.gadget import Context


@dataclass
class MeasurementEnd:
    """Whether LAST_IN_MEASUREMENT came, and what came after it.

    The flag ends a scan of which every frame has come; what follows is not looked at. Where frames are still
    missing it ends nothing: of scans put together in one file each has a last line. Flagged lines in a row
    are one end, for some senders flag every echo of the last excitation.
    """

    flagged: bool = False
    ended: bool = False
    lines_after: int = 0
    """Imaging lines that came after a flagged one and belong to the scan."""
    lines_left_out: int = 0
    """Imaging lines that came after the end."""
    _in_row: bool = False
    """Whether the last line read was flagged."""

    def before_it(
        self, block: AcquisitionBlock, chosen: NDArray[np.bool_], complete: Callable[[], bool]
    ) -> Iterator[NDArray[np.bool_]]:
        """Those of the chosen lines (n,) of the next block that belong to the scan, in pieces (n,).

        Args:
            block: as they came.
            chosen: lines of the scan, were there no end.
            complete: whether every frame has come, of all pieces before.
        """
        last = flagged(block, LAST)
        before = np.concatenate(([self._in_row], last[:-1]))
        starts = np.flatnonzero(before & ~last)  # behind flagged lines
        edges = [0, *starts[starts > 0].tolist(), len(block)]
        number = np.arange(len(block))
        images = chosen & is_image(block)
        for start, end in pairwise(edges):
            piece = (number >= start) & (number < end)
            self.ended = self.ended or (bool(before[start] and not last[start]) and complete())
            amount = int(np.count_nonzero(images & piece))
            if self.ended:
                self.lines_left_out += amount
                continue
            if self.flagged and not (before[start] and last[start]):  # not of the same row of flagged lines
                self.lines_after += amount
            yield chosen & piece
            self.flagged = self.flagged or bool(last[piece].any())
        self._in_row = bool(last[-1]) if len(last) else self._in_row

    def note(self, context: Context, amount: str, *, complete: bool) -> None:
        """Say what is odd about the end.

        Args:
            context: the note goes there.
            amount: sentence on how much came.
            complete: whether all came that the header announces.
        """
        if self.lines_left_out:
            context.note(f"{_lines(self.lines_left_out)} after the end of the measurement, left out")
        if self.lines_after:
            context.note(
                f"{_lines(self.lines_after)} after one flagged as the last of the measurement, when frames "
                f"were still missing, and used as well; {amount}"
            )
        elif not self.flagged and not complete:
            context.note(f"the end of the measurement was not flagged; {amount}")


def _lines(count: int) -> str:
    return "1 imaging line came" if count == 1 else f"{count} imaging lines came"
