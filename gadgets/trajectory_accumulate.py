"""Accumulation of readouts that bring their k-space positions along (spirals, any trajectory)."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.acquisition_kind import CALIBRATION, flagged, is_image
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.header import counter_length, counter_limit, phase_encoding
from quantitron.gadgets.line_position import Index, counter_values
from quantitron.gadgets.measurement_end import MeasurementEnd
from quantitron.gadgets.trajectory_store import Readouts, TrajectoryStore
from quantitron.recon.data import ScanData, TrajectoryKSpace

ROUNDING = 1e-3
"""How far beyond its limit a k-space position may be, relative to the width of k-space."""
HOLE = 1.0
"""Distance [cycles per field of view] of the samples nearest to the k-space centre that needs mention."""
LEAST_REACH = 1 / 3
"""Share of the way to the edge of k-space that a trajectory must reach along x or y. Images interpolated to
twice the resolution of the scan have 1/2."""
COLUMNS = "xyz"


class AccumulateSettings(Protocol):
    """The properties of ``accumulate`` that matter here."""

    @property
    def storage(self) -> str:
        """``auto``, ``lines`` or ``reduced``."""

    @property
    def minimum_fraction(self) -> float:
        """Share of the readouts that must have come."""


class TrajectoryScan:
    """The readouts of one scan in progress.

    Columns of the trajectory are kx, ky[, kz] and, where there is one more than dimensions, density weights.
    A scan is 2D where its images have one partition. In 3D two columns leave kz to ``kspace_encode_step_2``,
    and a third column wins over it. Positions are in cycles per voxel; where the largest of the whole scan
    lies beyond +-0.5 they are in cycles per field of view, which is noted.
    """

    def __init__(self, settings: AccumulateSettings, context: Context, block: AcquisitionBlock) -> None:
        """Prepare for readouts like those of ``block``."""
        if settings.storage == "reduced":
            raise ScanError(
                "accumulate: storage is 'reduced', which is for Cartesian scans; leave it at 'auto' here"
            )
        self._minimum_fraction = settings.minimum_fraction
        self._context = context
        self._coils = block.data.shape[1]
        context.encoding = replace(context.encoding, coils=self._coils)
        matrix = context.encoding.matrix
        self._dimensions = 2 if matrix[0] == 1 else 3
        self._points = context.protocol.contrasts
        self._slices = counter_length(context.header, "slice")
        notes: list[str] = []
        self._partitions = phase_encoding(context.header, context.encoding, 0, notes)
        self._partition_notes = notes
        self._columns: int | None = None
        announced = context.encoding.slices * self._points * self._announced_partitions
        announced *= counter_length(context.header, "average") or 1
        self._imaging = TrajectoryStore(self._coils, self._dimensions, announced * block.data.shape[2])
        self._calibration = TrajectoryStore(self._coils, self._dimensions)
        self._largest = np.zeros(self._dimensions)
        self._farthest = np.zeros(self._dimensions, dtype=np.int64)
        self._readouts = self._readouts_beyond = 0
        self._came = np.zeros((0, self._points, self._announced_partitions), dtype=bool)
        """Which readouts have come, by slice, time point and partition."""
        self.end = MeasurementEnd()

    # ------------------------------------------------------------------------------------------------ input

    def add(self, block: AcquisitionBlock, chosen: NDArray[np.bool_], energy: NDArray[np.float64]) -> None:
        """Take the chosen readouts of a block, whose energies (n,) are given.

        Raises:
            ScanError: for readouts without samples or trajectory or with one of another dimension, a changing
                number of channels, values that are not finite, and counters beyond their limits.
        """
        if block.mixing is not None or (block.head["discard_pre"] | block.head["discard_post"])[chosen].any():
            raise ScanError("the pipeline needs the gadget remove_oversampling before accumulate")
        later = chosen & self._later_echoes(block)
        if later.any():
            self._context.note(
                "readouts of later echoes (counter 'contrast') are not used: a fingerprint has one"
            )
        chosen = chosen & ~later
        if not chosen.any():
            return
        numbers = block.first + np.flatnonzero(chosen)
        self._check_columns(block, int(numbers[0]))
        positions = block.trajectory if chosen.all() else block.trajectory[chosen]
        finite = np.isfinite(positions).all(axis=(1, 2))
        if not finite.all():
            number = numbers[int(finite.argmin())]
            raise ScanError(f"acquisition {number} has trajectory values that are not finite numbers")
        calibration = flagged(block, CALIBRATION)[chosen]
        imaging = is_image(block)[chosen]
        time_point = self._time_points(block, chosen, imaging, numbers)
        readouts = Readouts(
            samples=block.data if chosen.all() else block.data[chosen],
            trajectory=self._positions(positions, numbers),
            density=self._density(positions, numbers),
            time_point=time_point,
            slice=self._slice_numbers(block, chosen, numbers),
            partition=self._partition_numbers(block, chosen, numbers),
            energy=energy[chosen],
        )
        if calibration.any():
            self._calibration.add(_of(readouts, calibration))
        if imaging.any():
            self._context.remember_geometry(block.head[chosen][imaging], readouts.slice[imaging])
            self._count(block.head["idx"][chosen][imaging], _of(readouts, imaging))
            self._imaging.add(_of(readouts, imaging))

    def _later_echoes(self, block: AcquisitionBlock) -> NDArray[np.bool_]:
        if "contrast" in self._context.axes.values():
            return np.zeros(len(block), dtype=bool)
        later: NDArray[np.bool_] = block.head["idx"]["contrast"] > 0
        return later

    def _check_columns(self, block: AcquisitionBlock, number: int) -> None:
        channels, columns = block.data.shape[1], block.trajectory.shape[2]
        if channels != self._coils:
            raise ScanError(
                f"acquisition {number} has {channels} channels, the ones before have {self._coils}"
            )
        if not block.data.shape[2]:
            raise ScanError(f"acquisition {number} has no samples")
        if columns == 0:
            raise ScanError(
                f"acquisition {number} has no trajectory, which a scan that is not Cartesian needs"
            )
        allowed = (2, 3) if self._dimensions == 2 else (2, 3, 4)
        if columns not in allowed:
            most = "kx, ky, density" if self._dimensions == 2 else "kx, ky, kz, density"
            raise ScanError(
                f"acquisition {number} has a trajectory of {columns} column{'' if columns == 1 else 's'}; a "
                f"{self._dimensions}D scan has {', '.join(map(str, allowed[:-1]))} or {allowed[-1]} ({most})"
            )
        if self._columns is None:
            self._columns = columns
            if columns == 2 and self._dimensions == 3:
                for sentence in self._partition_notes:
                    self._context.note(sentence)
        if columns != self._columns:
            raise ScanError(
                f"acquisition {number} has a trajectory of {columns} columns, the ones before have "
                f"{self._columns}"
            )

    def _positions(self, trajectory: NDArray[np.float32], numbers: Index) -> NDArray[np.float32]:
        """(readout, sample, d), and the largest of the scan remembered."""
        given = trajectory[..., : self._dimensions]
        if given.shape[1]:
            reach = np.abs(given).max(axis=1)  # (readout, column)
            self._readouts += len(reach)
            self._readouts_beyond += int(np.count_nonzero(reach.max(axis=1) > 0.5 + ROUNDING))
            for column, row in enumerate(reach.argmax(axis=0)):
                if reach[row, column] > self._largest[column]:
                    self._largest[column], self._farthest[column] = reach[row, column], numbers[row]
        if given.shape[2] == self._dimensions:
            return given
        missing = np.zeros((*given.shape[:2], self._dimensions - given.shape[2]), dtype=np.float32)
        return np.concatenate([given, missing], axis=2)

    def _density(self, trajectory: NDArray[np.float32], numbers: Index) -> NDArray[np.float32] | None:
        if trajectory.shape[2] <= self._dimensions:
            return None
        density: NDArray[np.float32] = trajectory[..., self._dimensions]
        negative: NDArray[np.bool_] = np.any(density < 0, axis=1)
        if negative.any():
            number = numbers[int(negative.argmax())]
            raise ScanError(
                f"acquisition {number} has negative density weights (the last column of its trajectory)"
            )
        return density

    def _time_points(
        self,
        block: AcquisitionBlock,
        chosen: NDArray[np.bool_],
        imaging: NDArray[np.bool_],
        numbers: Index,
    ) -> Index:
        counter = self._context.axes["ti"]
        values = counter_values(block.head["idx"][chosen], counter)
        beyond = imaging & (values >= self._points)
        if beyond.any():
            row = int(beyond.argmax())
            raise ScanError(
                f"acquisition {numbers[row]} has {counter} = {values[row]}, beyond the {self._points} time "
                "points of the schedule"
            )
        # Readouts for calibration alone may count on; of which contrast they are is then not known.
        return np.minimum(values, self._points - 1)

    def _slice_numbers(self, block: AcquisitionBlock, chosen: NDArray[np.bool_], numbers: Index) -> Index:
        values = counter_values(block.head["idx"][chosen], "slice")
        if self._slices is not None and (beyond := values >= self._slices).any():
            row = int(beyond.argmax())
            limit = self._slices - 1
            raise ScanError(
                f"acquisition {numbers[row]} has slice = {values[row]}, beyond its limit of {limit}"
            )
        return values

    def _partition_numbers(self, block: AcquisitionBlock, chosen: NDArray[np.bool_], numbers: Index) -> Index:
        """kz by its counter, in cycles per field of view; zeros where the trajectory says it."""
        values = counter_values(block.head["idx"][chosen], "kspace_encode_step_2")
        if self._dimensions == 2 or self._columns != 2:
            return np.zeros_like(values)
        points, limit = self._partitions.points, counter_limit(self._context.header, "kspace_encode_step_2")
        centre = self._partitions.centre if self._partitions.centre is not None else points // 2
        position = values - centre + points // 2
        wrong = (position < 0) | (position >= points)
        if limit is not None:
            wrong |= values > int(limit.maximum)
        if wrong.any():
            row = int(wrong.argmax())
            raise ScanError(
                f"acquisition {numbers[row]} has kspace_encode_step_2 = {values[row]}, which with the centre "
                f"at {centre} and the limit at {self._partitions.last} lies outside the matrix of {points}"
            )
        return values - centre

    def complete(self) -> bool:
        """Whether every time point of every announced slice has come."""
        enough = len(self._came) >= self._context.encoding.slices
        return enough and bool(self._came.any(2).all())

    def _count(self, counters: NDArray[np.void], readouts: Readouts) -> None:
        """Remember which slices, time points and partitions have come."""
        partition = counter_values(counters, "kspace_encode_step_2")
        partition = np.clip(partition - self._partitions.first, 0, self._announced_partitions - 1)
        self._reach(int(readouts.slice.max()) + 1)
        self._came[readouts.slice, readouts.time_point, partition] = True

    def _reach(self, slices: int) -> None:
        missing = slices - len(self._came)
        if missing > 0:
            more = np.zeros((missing, *self._came.shape[1:]), dtype=bool)
            self._came = np.concatenate([self._came, more])

    @property
    def _announced_partitions(self) -> int:
        """Values of the partition counter; 1 where nothing is counted."""
        if self._dimensions == 2 or counter_limit(self._context.header, "kspace_encode_step_2") is None:
            return 1
        return max(1, self._partitions.last - self._partitions.first + 1)

    # --------------------------------------------------------------------------------------------- the end

    def finish(self) -> ScanData:
        """Judge whether enough came, settle the unit of the trajectory, and hand over.

        Raises:
            ScanError: if a slice has no readout, too few came, or positions lie outside k-space.
        """
        if not len(self._imaging):
            raise ScanError("the scan ended without a single imaging line")
        slices = max(self._context.encoding.slices, int(self._imaging.slice.max()) + 1)
        if len(self._calibration):
            slices = max(slices, int(self._calibration.slice.max()) + 1)
        self._context.encoding = replace(self._context.encoding, slices=slices)
        self._judge(slices)
        per_field_of_view = self._settle_unit()
        weighted = self._imaging.weighted
        if self._columns == self._dimensions + 1 and not weighted:
            self._context.note("the scan's density weights are all zero; they are computed")
        energy = self._imaging.slice_energy(slices)
        grid = (slices, *self._context.encoding.matrix)
        by_counter = self._dimensions == 3 and self._columns == 2
        kspace, calibration = (
            store.finish(
                grid,
                self._points,
                per_field_of_view=per_field_of_view,
                partitions_counted=by_counter,
                weighted=weighted,
            )
            if len(store)
            else None
            for store in (self._imaging, self._calibration)
        )
        self._note_holes([part for part in (calibration, kspace) if part is not None], slices)
        return ScanData(
            kspace=kspace,
            reduced=None,
            navigator=None,
            calibration=calibration,
            noise_known=self._context.noise_known,
            energy=energy,
        )

    def _note_holes(self, sources: list[TrajectoryKSpace], slices: int) -> None:
        """Say where the k-space centre was not sampled: coil maps are then guessed from what lies around it.

        Args:
            sources: readouts that coil maps may come from; a slice takes the first ones that it has.
            slices: of the scan.
        """
        nearest = np.full(slices, np.inf)  # cycles per field of view
        for source in sources:
            size = np.array(source.grid[:0:-1][: self._dimensions], dtype=np.float32)
            distance = np.linalg.norm(source.trajectory.numpy() * size, axis=1)
            starts = (source.readout_length.cumsum(0) - source.readout_length).numpy()
            found = np.full(slices, np.inf)
            np.minimum.at(found, source.slice.numpy(), np.minimum.reduceat(distance, starts))
            nearest = np.where(np.isfinite(nearest), nearest, found)
        for index in np.flatnonzero(np.isfinite(nearest) & (nearest > HOLE)):
            where = f" of slice {index}" if slices > 1 else ""
            self._context.note(
                f"the k-space centre{where} was not sampled, the nearest sample lies {nearest[index]:.3g} "
                "cycles per field of view from it: coil maps, which come from there, are not to be relied on"
            )

    def _judge(self, slices: int) -> None:
        self._reach(slices)
        distinct, announced = int(np.count_nonzero(self._came)), self._came.size
        what = "slice, time point and partition" if self._announced_partitions > 1 else "slice and time point"
        amount = f"{distinct} of the {announced} readouts that the header announces (by {what}) came"
        self.end.note(self._context, amount, complete=distinct >= announced)
        if distinct / announced < self._minimum_fraction:
            raise ScanError(f"{amount}, less than the minimum_fraction of {self._minimum_fraction:g}")
        time_points: NDArray[np.bool_] = np.any(self._came, axis=2)  # (s, w)
        for index, points in enumerate(time_points):
            came = int(np.count_nonzero(points))
            where = f" of slice {index}" if slices > 1 else ""
            if not came:
                raise ScanError(f"no readout{where} came; {amount}")
            if came < self._points:
                self._context.note(f"{self._points - came} of {self._points} time points{where} never came")

    def _settle_unit(self) -> bool:
        """Whether the trajectory of the whole scan is in cycles per field of view."""
        matrix = self._context.encoding.matrix[::-1][: self._dimensions]
        column = int(self._largest.argmax())
        if self._largest[column] <= 0.5 + ROUNDING:
            self._refuse_small(matrix)
            return False
        for axis, points in enumerate(matrix):
            if self._largest[axis] > points * (0.5 + ROUNDING):
                raise ScanError(
                    f"acquisition {self._farthest[axis]} reaches k{COLUMNS[axis]} = "
                    f"{self._largest[axis]:.4g}, beyond 0.5 cycles per voxel and beyond {points / 2:g} "
                    "cycles per field of view"
                )
        # In cycles per field of view nearly every readout leaves the innermost cycle.
        if self._readouts_beyond < 0.5 * self._readouts:
            within = self._readouts - self._readouts_beyond
            raise ScanError(
                f"acquisition {self._farthest[column]} reaches k{COLUMNS[column]} = "
                f"{self._largest[column]:.4g}, beyond 0.5 cycles per voxel, but {within} of the scan's "
                f"{self._readouts} readouts stay within: their unit must be the same"
            )
        # Cycles per field of view that stay below one make no image: something else is meant.
        for axis in range(self._dimensions):
            if 0 < self._largest[axis] < 1:
                other = f"k{COLUMNS[axis]} only reaches {self._largest[axis]:.4g}, "
                raise ScanError(
                    f"acquisition {self._farthest[column]} reaches k{COLUMNS[column]} = "
                    f"{self._largest[column]:.4g}, beyond 0.5 cycles per voxel, but "
                    f"{other if axis != column else 'that is '}too little for cycles per field of view"
                )
        self._refuse_small(tuple(1 for _ in matrix))
        self._context.note(
            f"the trajectory reaches {self._largest[column]:.4g}: taken as cycles per field of view and "
            "divided by the matrix"
        )
        return True

    def _refuse_small(self, voxels: tuple[int, ...]) -> None:
        """Refuse a scan that covers too little of k-space.

        Within one cycle per field of view along an axis, no image comes of it. Far from the edge of k-space
        in both directions of the plane, another unit is meant: radians per voxel pass for cycles per field of
        view, cycles per millimetre for both.

        Args:
            voxels: (x, y[, z]) over which the unit of the trajectory counts its cycles.
        """
        given = min(self._columns or 0, self._dimensions)
        for axis, points in enumerate(self._context.encoding.matrix[::-1][:given]):
            reach = self._largest[axis] * voxels[axis]  # cycles per field of view
            if points > 2 and reach < 1 - ROUNDING:
                raise ScanError(
                    f"k{COLUMNS[axis]} of all readouts stays within {reach:.4g} cycles per field of view: "
                    f"the trajectory tells nothing about the {points} voxels along {COLUMNS[axis]}"
                )
        plane = list(zip(self._largest, voxels, self._context.encoding.matrix[::-1], strict=False))[:2]
        if all(reach * unit < LEAST_REACH * points / 2 for reach, unit, points in plane):
            reaches, edges = (
                " and ".join(f"{value:.4g}" for value in values)
                for values in (
                    [reach * unit for reach, unit, _ in plane],
                    [points / 2 for _, _, points in plane],
                )
            )
            raise ScanError(
                f"the trajectory reaches {reaches} cycles per field of view along x and y, where the matrix "
                f"asks for {edges}: it must be in cycles per voxel or per field of view, and the matrix that "
                "of the scan's resolution"
            )


def _of(readouts: Readouts, chosen: NDArray[np.bool_]) -> Readouts:
    if chosen.all():
        return readouts
    return Readouts(
        samples=readouts.samples[chosen],
        trajectory=readouts.trajectory[chosen],
        density=None if readouts.density is None else readouts.density[chosen],
        time_point=readouts.time_point[chosen],
        slice=readouts.slice[chosen],
        partition=readouts.partition[chosen],
        energy=readouts.energy[chosen],
    )
