"""The end of the measurement, as the lines tell it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.acquisition_kind import LAST, flagged, is_image
from quantitron.gadgets.gadget import Context


@dataclass
class MeasurementEnd:
    """Whether LAST_IN_MEASUREMENT came, and how many imaging lines came after it.

    The flag tells a scan that is complete from one that was broken off; it ends nothing. Lines that come
    after it are part of the scan all the same: of scans put together in one file each has a last line, and
    some senders flag every echo of the last excitation.
    """

    flagged: bool = False
    lines_after: int = 0
    """Imaging lines after the first that was flagged."""

    def read(self, block: AcquisitionBlock, chosen: NDArray[np.bool_]) -> None:
        """Take note of the next block, of which the lines of the scan (n,) are chosen."""
        last = flagged(block, LAST)
        after = np.concatenate(([self.flagged], np.logical_or.accumulate(last)[:-1] | self.flagged))
        self.lines_after += int(np.count_nonzero(chosen & is_image(block) & after))
        self.flagged = self.flagged or bool(last.any())

    def note(self, context: Context, amount: str, *, complete: bool) -> None:
        """Say what is odd about the end.

        Args:
            context: the note goes there.
            amount: sentence on how much came.
            complete: whether all came that the header announces.
        """
        if self.lines_after:
            lines = "1 imaging line" if self.lines_after == 1 else f"{self.lines_after} imaging lines"
            context.note(
                f"{lines} after one flagged as the last of the measurement came and were used as well; "
                f"{amount}"
            )
        elif not self.flagged and not complete:
            context.note(f"the end of the measurement was not flagged; {amount}")
