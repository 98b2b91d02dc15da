"""Gadget ``accumulate``: lines become the 6D k-space, or its reduced form while the scan runs.

Scans on a trajectory are gathered by ``trajectory_accumulate``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import AcquisitionBlock, blocks_of
from quantitron.gadgets.acquisition_kind import CALIBRATION, NAVIGATOR, flagged, is_image, of_scan
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context, Gadget
from quantitron.gadgets.line_position import PositionReader, Positions
from quantitron.gadgets.line_store import CalibrationStore, GrowingRows, LineStore, NavigatorStore
from quantitron.gadgets.measurement_end import MeasurementEnd
from quantitron.gadgets.read_ahead import read_ahead
from quantitron.gadgets.scan_coverage import ScanCoverage
from quantitron.gadgets.single_thread import single_thread
from quantitron.gadgets.trajectory_accumulate import TrajectoryScan
from quantitron.recon.data import ScanData
from quantitron.recon.gram import GramSum

logger = logging.getLogger("quantitron")

PRODUCT_BYTES = 8 << 20
"""Size of basis x lines products that is made at once when summing; bounds memory, changes no result."""


@dataclass(frozen=True)
class Accumulate(Gadget):
    """Gathers the lines of the whole scan and hands on one ``ScanData``.

    Lines may come in any order, repeated or not at all. Repeated lines (the counters ``average`` and
    ``repetition``, and any that carries no contrast) are averaged and counted. Readouts on a trajectory are
    kept one by one.
    """

    name: ClassVar[str] = "accumulate"
    sequence: Literal["auto", "t2ir_gre", "vfa_gre", "megre", "fisp_mrf"] = "auto"
    """Name of the sequence, or ``auto`` for what the header says."""
    axes: str = ""
    """Counters of the contrast axes, as in ``ti=segment,tau=set,te=contrast``; empty for the usual ones."""
    phase_sign: Literal[1, -1] = 1
    """-1 where the phase evolves with time the other way round: B0 maps then have their sign turned.

    Images must be rightly oriented as they are. Data that were conjugated as a whole are mirrored images too,
    which this does not undo."""
    storage: Literal["auto", "lines", "reduced"] = "auto"
    """``lines`` keeps the sampled lines, ``reduced`` only their Gram form, ``auto`` what the solver needs."""
    minimum_fraction: float = field(default=0.0, metadata={"minimum": 0, "maximum": 1})
    """Share of the points of all frames that must have come for a scan to be reconstructed, 0..1."""

    def __call__(self, items: Iterable[AcquisitionBlock], context: Context) -> Iterator[ScanData]:
        """Read the stream to its end and yield its only result.

        Raises:
            ScanError: for counters beyond their limits, samples that are not finite, a changing number of
                channels, or too few data; the sentence names the acquisition.
        """
        scan: _CartesianScan | TrajectoryScan | None = None
        make = _CartesianScan if context.encoding.trajectory == "cartesian" else TrajectoryScan
        with closing(read_ahead(blocks_of(items))) as blocks:
            for block in blocks:
                chosen = of_scan(block, context)
                if scan is None and chosen.any():
                    scan = make(self, context, block)
                if scan is not None:
                    _add(scan, block, chosen)
        if scan is None:
            raise ScanError("the scan ended without a single imaging line")
        result = scan.finish()
        if context.unused_navigators:
            count = context.unused_navigators
            lines = "1 navigator line was" if count == 1 else f"{count} navigator lines were"
            context.note(f"{lines} left out: nothing in this reconstruction uses them")
        yield result


def _add(scan: _CartesianScan | TrajectoryScan, block: AcquisitionBlock, chosen: NDArray[np.bool_]) -> None:
    """Hand the chosen lines up to the end of the measurement to the scan."""
    energy: NDArray[np.float64] | None = None  # of the whole block, once, and only if it is needed
    for piece in scan.end.before_it(block, chosen, scan.complete):
        if not piece.any():
            continue
        energy = _energy(block) if energy is None else energy
        finite = np.isfinite(energy) | ~piece
        if not finite.all():
            raise ScanError(_too_large(block, int(finite.argmin())))
        scan.add(block, piece, energy)


def _too_large(block: AcquisitionBlock, row: int) -> str:
    """Why the energy of a line is no number: a sample is none, or has none for its square."""
    line = f"acquisition {block.first + row}"
    largest = float(np.abs(block.data[row].astype(np.complex128)).max())
    if math.isfinite(largest):
        return (
            f"{line} has samples too large to be of this scan: on its common scale they reach {largest:.1g}, "
            "and their squares go beyond single precision"
        )
    return (
        f"{line} has samples that are not finite numbers, or so large that on the common scale they are not"
    )


class _CartesianScan:
    """The stores of one Cartesian scan in progress."""

    def __init__(self, settings: Accumulate, context: Context, block: AcquisitionBlock) -> None:
        """Preallocate for lines of the shape of ``block``."""
        if not block.hybrid:
            raise ScanError("the pipeline needs the gadget remove_oversampling before accumulate")
        channels = block.data.shape[1]
        self._settings = settings
        self._context = context
        self._reader = PositionReader(context)
        self._shape = context.protocol.contrast_shape
        context.encoding = replace(context.encoding, coils=channels)
        encoding = context.encoding
        # Without announced slices the size of the reduced problem is only known at the end.
        summing = context.basis is not None and settings.storage != "lines" and self._reader.slices_announced
        if settings.storage == "reduced" and not summing:
            raise ScanError(
                "accumulate: storage is 'reduced', which needs a basis known from the protocol and the "
                "number of slices in the header (encodingLimits.slice)"
            )
        self._gram: GramSum | None = None
        self._lines: LineStore | None = None
        if summing and context.basis is not None:
            self._gram = GramSum(
                context.basis, (encoding.slices, *encoding.matrix), context.protocol.echoes, channels
            )
        if self._gram is None or context.needs_lines:
            self._lines = LineStore(encoding.matrix, self._shape, channels, encoding.matrix[2])
        self._navigators = NavigatorStore(channels, encoding.matrix[2])
        self._navigator_place: tuple[int, int] | None = None
        self._calibration: CalibrationStore | None = None
        self._calibration_frame: tuple[int, int] | None = None
        self._energy = GrowingRows((), np.float64)
        self._slice = GrowingRows((), np.int64)
        self._coverage = ScanCoverage(context.protocol, encoding)
        self.end = MeasurementEnd()

    def complete(self) -> bool:
        """Whether every frame of every slice has come, if not every line of it."""
        return self._coverage.every_frame()

    def add(self, block: AcquisitionBlock, chosen: NDArray[np.bool_], energy: NDArray[np.float64]) -> None:
        """Sort the chosen lines of a block, whose energies (n,) are given, into the stores."""
        self._check_shape(block, chosen)
        navigator = chosen & flagged(block, NAVIGATOR)
        calibration = chosen & flagged(block, CALIBRATION) & ~navigator
        imaging = chosen & is_image(block)
        if navigator.any():
            self._add_navigators(block, navigator)
        if calibration.any():
            self._add_calibration(block, calibration)
        if imaging.any():
            self._add_imaging(block, imaging, energy)

    def _check_shape(self, block: AcquisitionBlock, chosen: NDArray[np.bool_]) -> None:
        expected = self._context.encoding.coils
        if block.data.shape[1] != expected:
            raise ScanError(
                f"acquisition {block.first + int(chosen.argmax())} has {block.data.shape[1]} channels, "
                f"the ones before have {expected}"
            )

    def _add_navigators(self, block: AcquisitionBlock, chosen: NDArray[np.bool_]) -> None:
        at, in_frame, _ = self._reader.other(block)
        if self._navigator_place is None:
            first = int(chosen.argmax())
            self._navigator_place = int(at.kz[first]), int(at.ky[first])
        kept = chosen & in_frame & (at.kz == self._navigator_place[0]) & (at.ky == self._navigator_place[1])
        if (chosen & ~kept).any():
            self._context.note("navigator lines of other positions or frames than the scan's were not used")
        self._navigators.add(block.data[kept], at.contrast[kept], at.echo[kept])

    def _add_calibration(self, block: AcquisitionBlock, chosen: NDArray[np.bool_]) -> None:
        at, _, on_grid = self._reader.other(block)
        if self._calibration is None or self._calibration_frame is None:
            first = int(chosen.argmax())
            self._calibration_frame = int(at.contrast[first]), int(at.echo[first])
            encoding = self._context.encoding
            self._calibration = CalibrationStore(encoding.matrix, encoding.coils, encoding.slices)
        frame = self._calibration_frame
        kept = chosen & (at.contrast == frame[0]) & (at.echo == frame[1])
        if (kept & ~on_grid).any():
            self._context.note("calibration lines outside the matrix were not used")
        kept &= on_grid
        self._calibration.add(block.data[kept], at.slice[kept], at.kz[kept], at.ky[kept])

    def _add_imaging(
        self, block: AcquisitionBlock, chosen: NDArray[np.bool_], energy: NDArray[np.float64]
    ) -> None:
        at = self._reader.imaging(block, chosen)
        samples = block.data if chosen.all() else block.data[chosen]
        self._coverage.add(at)
        self._energy.extend(energy[chosen])
        self._slice.extend(at.slice)
        self._context.remember_geometry(block.head[chosen], at.slice)
        if self._lines is not None:
            self._lines.add(samples, at)
        if self._gram is not None:
            self._sum(self._gram, samples, at)

    def _sum(self, gram: GramSum, samples: NDArray[np.complex64], at: Positions) -> None:
        columns = gram.basis.rank
        at_once = max(1, PRODUCT_BYTES // (columns * samples[0].nbytes))
        contrast, echo, slice_index, kz, ky = (
            torch.from_numpy(index) for index in (at.contrast, at.echo, at.slice, at.kz, at.ky)
        )
        data = torch.from_numpy(samples)
        with single_thread():
            for start in range(0, len(samples), at_once):
                part = slice(start, start + at_once)
                gram.add(
                    data[part],
                    contrast[part],
                    echo[part],
                    slice_index[part],
                    kz[part],
                    ky[part],
                    energy=0.0,  # summed here line by line, the same however the stream was cut
                )

    def finish(self) -> ScanData:
        """Judge whether enough came, and hand over."""
        if not self._coverage.lines:
            raise ScanError("the scan ended without a single imaging line")
        slices = max(self._context.encoding.slices, int(self._slice.rows.max()) + 1)
        self._context.encoding = replace(self._context.encoding, slices=slices)
        self._coverage.judge(
            self._context,
            (self._reader.partitions, self._reader.lines),
            end=self.end,
            minimum_fraction=self._settings.minimum_fraction,
        )
        # The sum over slices, then lines in order of arrival, is the same however the stream was cut.
        energy = tuple(
            float(value) for value in np.bincount(self._slice.rows, self._energy.rows, minlength=slices)
        )
        reduced = None
        if self._gram is not None:
            reduced = replace(self._gram.result(), energy=sum(energy))
        return ScanData(
            kspace=self._lines.finish(sum(energy), slices) if self._lines is not None else None,
            reduced=reduced,
            navigator=self._navigators.finish(),
            calibration=self._calibration.finish(slices) if self._calibration is not None else None,
            noise_known=self._context.noise_known,
            energy=energy,
        )


def _energy(block: AcquisitionBlock) -> NDArray[np.float64]:
    """(n,) sum of |s|^2 of each line."""
    flat = np.ascontiguousarray(block.data).reshape(len(block), -1).view(np.float32)
    energy: NDArray[np.float64] = np.einsum("ij,ij->i", flat, flat).astype(np.float64)
    return energy
