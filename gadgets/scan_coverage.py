"""How much of a scan came, against what its header announced, and whether that is enough."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.header import PhaseEncoding
from quantitron.gadgets.line_position import Positions
from quantitron.gadgets.measurement_end import MeasurementEnd
from quantitron.recon.data import Encoding, Protocol


class ScanCoverage:
    """Which points of which frames have come."""

    def __init__(self, protocol: Protocol, encoding: Encoding) -> None:
        self._shape = protocol.contrast_shape
        self._matrix = encoding.matrix
        self._slices = encoding.slices
        self._came: NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self._reach(encoding.slices)
        self.lines = 0

    def _reach(self, slices: int) -> None:
        missing = slices * self._points - len(self._came)
        if missing > 0:
            self._came = np.concatenate([self._came, np.zeros(missing, dtype=bool)])
            self._slices = slices

    @property
    def _points(self) -> int:
        """Points of one slice over all frames."""
        return int(np.prod(self._shape)) * self._matrix[0] * self._matrix[1]

    def add(self, at: Positions) -> None:
        """Count imaging lines."""
        self._reach(int(at.slice.max()) + 1)
        nz, ny, _ = self._matrix
        contrasts = self._shape[0] * self._shape[1]
        frame = (at.slice * contrasts + at.contrast) * self._shape[2] + at.echo
        self._came[(frame * nz + at.kz) * ny + at.ky] = True
        self.lines += len(at.slice)

    def every_frame(self) -> bool:
        """Whether lines of every frame of every slice have come."""
        frames = self._came.reshape(-1, self._matrix[0] * self._matrix[1])
        return bool(frames.any(1).all())

    def judge(
        self,
        context: Context,
        axes: tuple[PhaseEncoding, PhaseEncoding],
        *,
        end: MeasurementEnd,
        minimum_fraction: float,
    ) -> None:
        """Say how much is missing where the scan ended early.

        A scan is enough if each slice has its k-space centre and lines of every value of every contrast axis.
        If the end of the measurement was flagged, contrast values that never came are the header's mistake
        and only noted, as long as there are two of those that it announces: of a single flip angle,
        excitation or preparation no relaxation time can be told.

        Args:
            context: notes go there.
            axes: what the header announces along (z, y).
            end: what was told of the end of the measurement.
            minimum_fraction: share of the announced points that must have come.

        Raises:
            ScanError: if it is not enough.
        """
        came = self._came.reshape(self._slices, *self._shape, *self._matrix[:2])
        announced = came.size // (self._matrix[0] * self._matrix[1])
        for axis in axes:
            announced *= axis.last - axis.first + 1
        distinct = int(np.count_nonzero(came))
        fraction = distinct / announced
        # Undersampled scans leave most of them out on purpose; the header does not say which.
        amount = f"{distinct} of the {announced} lines that the encoding limits span came"
        end.note(context, amount, complete=distinct >= announced)
        if fraction < minimum_fraction:
            raise ScanError(f"{amount}, less than the minimum_fraction of {minimum_fraction:g}")
        for slice_index in range(self._slices):
            self._judge_slice(context, came[slice_index], slice_index, amount, end.flagged)

    def _judge_slice(
        self, context: Context, came: NDArray[np.bool_], slice_index: int, amount: str, ended: bool
    ) -> None:
        where = f" of slice {slice_index}" if self._slices > 1 else ""
        frames: NDArray[np.bool_] = np.any(came, axis=(3, 4))  # (TI, tau, TE)
        if not frames.any():
            raise ScanError(f"no line{where or ' of the scan'} came; {amount}")
        counters = [context.axes.get(axis) for axis in ("ti", "tau", "te")]
        for axis, counter in enumerate(counters):
            seen: NDArray[np.bool_] = np.any(frames, axis=tuple(other for other in range(3) if other != axis))
            if seen.all():
                continue
            sentence = (
                f"no line{where} has {counter} = {int(seen.argmin())} "
                f"({int((~seen).sum())} of {len(seen)} values never came)"
            )
            # Without an echo there is nothing to fit T2* and B0 to; other contrasts may be thinned out.
            if not ended or axis == 2:
                raise ScanError(f"{sentence}; {amount}")
            if np.count_nonzero(seen) < 2:
                raise ScanError(
                    f"all lines{where} have {counter} = {int(seen.argmax())}, one of {len(seen)} values, "
                    f"which is too few to fit; {amount}"
                )
            context.note(sentence)
        points: NDArray[np.bool_] = np.any(came, axis=(0, 1, 2))  # (z, y)
        nz, ny = points.shape
        near_z, near_y = max(1, nz // 16), max(1, ny // 16)
        centre = points[
            max(0, nz // 2 - near_z) : nz // 2 + near_z + 1, max(0, ny // 2 - near_y) : ny // 2 + near_y + 1
        ]
        if not centre.any():
            raise ScanError(f"the k-space centre{where} never came; {amount}")
