"""Placement of readouts on their grid, and the transform to image space along the readout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.acquisition_kind import REVERSE, flagged, is_image
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.header import encoded_readout
from quantitron.gadgets.single_thread import single_thread


def _tensor(array: NDArray[np.complex64]) -> torch.Tensor:
    """The array's memory as a tensor; torch cannot hold read-only memory."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def mix(matrix: NDArray[np.complex64], data: NDArray[np.complex64]) -> NDArray[np.complex64]:
    """Mix channels: (k, c) times (n, c, x)."""
    with single_thread():
        mixed: NDArray[np.complex64] = torch.matmul(torch.from_numpy(matrix), _tensor(data)).numpy()
    return mixed


class ReadoutTransform:
    """Placement and transform of the lines of one scan."""

    def __init__(self, encoded: int, context: Context) -> None:
        """Prepare for readouts on a grid of ``encoded`` points."""
        self._encoded = encoded
        self._kept = context.encoding.matrix[2]
        self._cropped = encoded < encoded_readout(context.header)
        self._context = context
        self._forward_centre: int | None = None
        self._work = torch.empty(0, dtype=torch.complex64)
        self._image = torch.empty(0, dtype=torch.complex64)

    @classmethod
    def of_encoded(cls, context: Context) -> ReadoutTransform:
        """For readouts on the grid that the header gives."""
        return cls(encoded_readout(context.header), context)

    @classmethod
    def of_scan(cls, block: AcquisitionBlock, row: int, context: Context) -> ReadoutTransform:
        """For the scan whose first line of the images is the given one of ``block``."""
        encoded, kept = encoded_readout(context.header), context.encoding.matrix[2]
        if kept >= encoded or not _spans(block, kept)[row]:
            return cls(encoded, context)
        context.note(
            f"readouts have the {kept} samples that are left of the header's {encoded} without oversampling: "
            "taken as cropped already"
        )
        return cls(kept, context)

    def transform(self, block: AcquisitionBlock) -> AcquisitionBlock:
        """(n, c, sample) to (n, c, x).

        Raises:
            ScanError: if a line does not fit the grid.
        """
        n, c, _ = block.data.shape
        shape = (n, c, self._encoded)
        if self._work.shape != shape:
            self._work = torch.empty(shape, dtype=torch.complex64)
            self._image = torch.empty(shape, dtype=torch.complex64)
        self._place(block, self._work.numpy())
        with single_thread():
            torch.fft.ifft(self._work, norm="ortho", out=self._image)
        image = self._image.numpy()
        # The transform's zero position comes first; the delivered voxel kept/2 is that one.
        half = self._kept // 2
        data = np.empty((n, c, self._kept), dtype=np.complex64)
        data[..., :half] = image[..., self._encoded - half :]
        data[..., half:] = image[..., : self._kept - half]
        if block.mixing is not None:
            data = mix(block.mixing, data)
        return replace(block, data=data, mixing=None, hybrid=True)

    def _place(self, block: AcquisitionBlock, work: NDArray[np.complex64]) -> None:
        """Write samples where the transform wants them: k = 0 first, negative k from the end."""
        samples = block.data.shape[2]
        if self._cropped:
            self._refuse_others(block)
        if samples == 0 or samples > 1.25 * self._encoded:
            raise ScanError(
                f"acquisition {block.first} has {samples} samples, but the header's encoded matrix has "
                f"{self._encoded} along the readout"
            )
        reverse = flagged(block, REVERSE)
        layout = np.stack(
            [
                block.head["discard_pre"].astype(np.int64),
                block.head["discard_post"].astype(np.int64),
                self._centres(block, reverse),
                reverse.astype(np.int64),
            ],
            axis=1,
        )
        if (layout == layout[0]).all():
            self._place_alike(block.data, layout[0], work, block.first)
            return
        kinds, kind = np.unique(layout, axis=0, return_inverse=True)
        kind = kind.reshape(-1)
        for number, one in enumerate(kinds):
            rows = kind == number
            part = np.empty((int(rows.sum()), *work.shape[1:]), dtype=np.complex64)
            self._place_alike(block.data[rows], one, part, block.first + int(rows.argmax()))
            work[rows] = part

    def _refuse_others(self, block: AcquisitionBlock) -> None:
        """Refuse lines that an earlier step cannot have cropped to the grid as it did the first."""
        others = ~_spans(block, self._encoded)
        if block.data.shape[2] <= self._encoded:
            others &= is_image(block)  # those for calibration alone may be shorter
        if others.any():
            raise ScanError(
                f"acquisition {block.first + int(others.argmax())} has {block.data.shape[2]} samples that "
                f"are not those of a readout cropped to {self._encoded}, which the first imaging line is"
            )

    def _centres(self, block: AcquisitionBlock, reverse: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(n,) sample at k = 0, after reversed lines are turned round."""
        samples = block.data.shape[2]
        centre = block.head["center_sample"].astype(np.int64)
        centre = np.where(centre >= samples, samples // 2, centre)
        start = self._encoded // 2 - centre
        lost = np.maximum(-start, 0) + np.maximum(start + samples - self._encoded, 0)
        wrong = (lost > samples // 4) & (samples <= self._encoded)
        if wrong.any():
            self._context.note(
                f"center_sample {int(centre[wrong.argmax()])} would leave much of a readout of {samples} "
                "samples outside the encoded matrix; the echo is taken as centred"
            )
            centre = np.where(wrong, samples // 2, centre)
        forward = np.flatnonzero(~reverse)
        known_from = 0
        if self._forward_centre is None:
            known_from = int(forward[0]) if len(forward) else len(block)
            if len(forward):
                self._forward_centre = int(centre[forward[0]])
        if self._forward_centre is not None and reverse.any():
            mirrored = (samples - 1 - centre == self._forward_centre) | (
                samples - centre == self._forward_centre
            )
            from_the_end = reverse & mirrored & (np.arange(len(block)) >= known_from)
            centre = np.where(from_the_end, self._forward_centre, centre)
        return centre

    def _place_alike(
        self, data: NDArray[np.complex64], layout: NDArray[np.int64], work: NDArray[np.complex64], number: int
    ) -> None:
        """Place lines of one layout (discard_pre, discard_post, centre, reverse) in ``work`` (n, c, grid)."""
        samples = data.shape[2]
        pre, post, centre, reverse = (int(value) for value in layout)
        if reverse:
            data, pre, post = data[..., ::-1], post, pre
        first = max(pre - centre, -(self._encoded // 2))  # k of the first sample that is kept
        last = min(samples - post - centre, (self._encoded + 1) // 2)  # and one past the last
        if last <= first:
            raise ScanError(
                f"acquisition {number} keeps none of its {samples} samples (discard_pre {pre}, "
                f"discard_post {post})"
            )
        if last - first < self._encoded:
            self._context.note(
                f"readouts cover {last - first} of {self._encoded} encoded samples; the others are zero"
            )
            work[...] = 0
        split = min(max(first, 0), last)
        if first < 0:
            negative = min(last, 0)
            work[..., self._encoded + first : self._encoded + negative] = data[
                ..., first + centre : negative + centre
            ]
        if last > 0:
            work[..., split:last] = data[..., split + centre : last + centre]


def _spans(block: AcquisitionBlock, points: int) -> NDArray[np.bool_]:
    """(n,) whether the samples are those of a whole readout of ``points``: centred, and none to discard."""
    centre = block.head["center_sample"].astype(np.int64)
    middle = (centre == points // 2) | (centre >= points)  # an impossible centre counts as centred
    middle |= flagged(block, REVERSE) & (centre == points - 1 - points // 2)
    whole: NDArray[np.bool_] = middle & ((block.head["discard_pre"] | block.head["discard_post"]) == 0)
    return whole if block.data.shape[2] == points else np.zeros_like(whole)
