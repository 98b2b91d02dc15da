"""Stores of readouts on a trajectory, which grow with the scan and end as one array without a second copy."""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quantitron.gadgets.line_position import Index
from quantitron.gadgets.line_store import GrowingRows
from quantitron.recon.data import TrajectoryKSpace

PIECE_BYTES = 16 << 20
"""Memory that is taken at a time."""


class SampleStore:
    """Samples (c, n) that can be extended along n.

    What was expected is written where it stays. What goes beyond is gathered in pieces, whose memory goes
    back to the system at once when they are copied into the result.
    """

    def __init__(self, coils: int, expected: int = 0) -> None:
        """Make room.

        Args:
            coils: channels.
            expected: samples to make room for; pages that are not written are not taken.
        """
        self._coils = coils
        self._pieces: list[NDArray[np.complex64]] = []
        if expected:
            # A header may announce more than there is memory; then it goes by pieces alone.
            with suppress(MemoryError, OSError, OverflowError):
                self._pieces.append(self._piece(expected))
        self._used = 0
        """Samples in the last piece."""
        self.length = 0

    def extend(self, samples: NDArray[np.complex64]) -> None:
        """Append readouts (readout, c, sample) one after the other."""
        count, _, points = samples.shape
        added = count * points
        self.length += added
        if self._pieces and added <= self._pieces[-1].shape[1] - self._used:
            place = self._pieces[-1][:, self._used : self._used + added]
            place.reshape(self._coils, count, points)[...] = samples.transpose(1, 0, 2)
            self._used += added
            return
        flat = samples.transpose(1, 0, 2).reshape(self._coils, added)
        while flat.shape[1]:
            if not self._pieces or self._used == self._pieces[-1].shape[1]:
                self._pieces.append(self._piece(max(1, PIECE_BYTES // (8 * self._coils))))
                self._used = 0
            part = flat[:, : self._pieces[-1].shape[1] - self._used]
            self._pieces[-1][:, self._used : self._used + part.shape[1]] = part
            self._used += part.shape[1]
            flat = flat[:, part.shape[1] :]

    def _piece(self, points: int) -> NDArray[np.complex64]:
        memory = mmap.mmap(-1, 8 * self._coils * points, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel built without them; they only make the first writing faster
                memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, dtype=np.complex64).reshape(self._coils, points)

    def finish(self) -> NDArray[np.complex64]:
        """The samples (c, n), contiguous. The store is empty afterwards."""
        pieces, self._pieces, length = self._pieces[::-1], [], self.length
        self._used = self.length = 0
        if len(pieces) == 1:
            return _leading_columns(pieces[0], length)
        result = np.empty((self._coils, length), dtype=np.complex64)
        start = 0
        while pieces:
            piece = pieces.pop()
            kept = min(piece.shape[1], length - start)
            result[:, start : start + kept] = piece[:, :kept]
            start += kept
        return result


def _leading_columns(array: NDArray[np.complex64], columns: int) -> NDArray[np.complex64]:
    """The leading columns as a contiguous array in the memory of ``array``, which they overwrite."""
    rows, room = array.shape
    flat = array.reshape(-1)
    if columns < room:
        memory = _memory_of(array)
        for row in range(1, rows):
            flat[row * columns : (row + 1) * columns] = flat[row * room : row * room + columns]
            # Pages between the end of what has been moved and the next row are given back.
            start = -(-8 * (row + 1) * columns // mmap.PAGESIZE) * mmap.PAGESIZE
            end = 8 * (row + 1) * room // mmap.PAGESIZE * mmap.PAGESIZE
            if start < end and hasattr(mmap, "MADV_DONTNEED"):
                memory.madvise(mmap.MADV_DONTNEED, start, end - start)
    return flat[: rows * columns].reshape(rows, columns)


def _memory_of(array: NDArray[np.complex64]) -> mmap.mmap:
    """The mapping that an array was made of."""
    owner: object = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap):
        raise TypeError(f"the array lies in a {type(owner).__name__}, not in a mapping")
    return owner


@dataclass(frozen=True)
class Readouts:
    """Readouts of one length, checked."""

    samples: NDArray[np.complex64]
    """(readout, c, sample)."""
    trajectory: NDArray[np.float32]
    """(readout, sample, d) in the unit that the scan came with; columns that the scan lacks are zero."""
    density: NDArray[np.float32] | None
    """(readout, sample)."""
    time_point: Index
    """(readout,)."""
    slice: Index
    """(readout,)."""
    partition: Index
    """(readout,) kz in cycles per field of view, where the trajectory does not hold it."""
    energy: NDArray[np.float64]
    """(readout,) sum of |s|^2."""


class TrajectoryStore:
    """Readouts in the order in which they came."""

    def __init__(self, coils: int, dimensions: int, expected: int = 0) -> None:
        """Prepare for ``expected`` samples; more may come."""
        self._samples = SampleStore(coils, expected)
        self._trajectory = GrowingRows((dimensions,), np.float32)
        self._density: GrowingRows[np.float32] | None = None
        self._readout_length = GrowingRows((), np.int64)
        self._time_point = GrowingRows((), np.int64)
        self._slice = GrowingRows((), np.int64)
        self._partition = GrowingRows((), np.int64)
        self._energy = GrowingRows((), np.float64)

    def __len__(self) -> int:
        return self._readout_length.length

    @property
    def time_point(self) -> Index:
        """(readout,) so far."""
        return self._time_point.rows

    @property
    def slice(self) -> Index:
        """(readout,) so far."""
        return self._slice.rows

    @property
    def weighted(self) -> bool:
        """Whether density weights came, and not only zeros."""
        return self._density is not None and bool(self._density.rows.any())

    def slice_energy(self, slices: int) -> tuple[float, ...]:
        """(s,) sum of |s|^2 of each slice, in the order in which the readouts came."""
        sums = np.bincount(self._slice.rows, self._energy.rows, minlength=slices)
        return tuple(float(value) for value in sums)

    def add(self, readouts: Readouts) -> None:
        """Append readouts."""
        count, length, dimensions = readouts.trajectory.shape
        self._samples.extend(readouts.samples)
        self._trajectory.extend(readouts.trajectory.reshape(count * length, dimensions))
        if readouts.density is not None:
            if self._density is None:
                self._density = GrowingRows((), np.float32)
            self._density.extend(readouts.density.reshape(-1))
        self._readout_length.extend(np.full(count, length, dtype=np.int64))
        self._time_point.extend(readouts.time_point)
        self._slice.extend(readouts.slice)
        self._partition.extend(readouts.partition)
        self._energy.extend(readouts.energy)

    def finish(
        self,
        grid: tuple[int, int, int, int],
        time_points: int,
        *,
        per_field_of_view: bool,
        partitions_counted: bool,
        weighted: bool,
    ) -> TrajectoryKSpace:
        """Hand the readouts over, in cycles per voxel. The store is empty afterwards.

        Args:
            grid: (s, z, y, x) of the images.
            time_points: length of the schedule.
            per_field_of_view: whether the trajectory came in cycles per field of view.
            partitions_counted: whether kz is that of ``Readouts.partition``.
            weighted: whether to hand on the density weights.
        """
        energy = float(self._energy.rows.sum())
        trajectory = self._trajectory.finish()
        if per_field_of_view:
            trajectory /= np.array(grid[:0:-1][: trajectory.shape[1]], dtype=np.float32)
        lengths = self._readout_length.finish()
        if partitions_counted:
            trajectory[:, 2] = np.repeat(
                self._partition.rows.astype(np.float32) / np.float32(grid[1]), lengths
            )
        density = None
        if self._density is not None and weighted:
            density = torch.from_numpy(self._density.finish())
        self._density = None
        return TrajectoryKSpace(
            samples=torch.from_numpy(self._samples.finish()),
            trajectory=torch.from_numpy(trajectory),
            readout_length=torch.from_numpy(lengths),
            time_point=torch.from_numpy(self._time_point.finish()),
            slice=torch.from_numpy(self._slice.finish()),
            density=density,
            energy=energy,
            time_points=time_points,
            grid=grid,
        )
