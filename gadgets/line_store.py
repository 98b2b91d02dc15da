"""Stores that grow with the scan: distinct lines with their repeats summed, navigators, calibration lines."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from quantitron.gadgets.line_position import Index, Positions
from quantitron.recon.data import Calibration, KSpace, Navigator

GROWTH = 8
"""A full store grows by 1 / GROWTH: large arrays move by remapping pages, so that growing copies nothing."""


Scalar = TypeVar("Scalar", bound=np.generic)


class GrowingRows(Generic[Scalar]):
    """Rows of one shape in one contiguous array that can be extended at its end."""

    def __init__(self, shape: tuple[int, ...], dtype: type[Scalar], expected: int = 0) -> None:
        self._rows: NDArray[Scalar] = np.empty((max(256, expected), *shape), dtype=dtype)
        self.length = 0

    def extend(self, rows: NDArray[Scalar]) -> None:
        """Append rows."""
        end = self.length + len(rows)
        if end > len(self._rows):
            larger = max(end, len(self._rows) + len(self._rows) // GROWTH)
            self._rows.resize((larger, *self._rows.shape[1:]), refcheck=False)
        self._rows[self.length : end] = rows
        self.length = end

    @property
    def rows(self) -> NDArray[Scalar]:
        """The rows so far; not to be kept across ``extend``."""
        return self._rows[: self.length]

    def finish(self) -> NDArray[Scalar]:
        """The rows, with what was not used given back. The store is empty afterwards."""
        rows = self._rows
        rows.resize((self.length, *rows.shape[1:]), refcheck=False)
        self._rows, self.length = np.empty((0, *rows.shape[1:]), rows.dtype), 0
        return rows


class LineStore:
    """Distinct lines of a Cartesian scan. A repeated line is added to the first in the order of arrival."""

    def __init__(
        self,
        grid: tuple[int, int, int],
        contrast_shape: tuple[int, int, int],
        coils: int,
        points: int,
        expected: int = 0,
    ) -> None:
        """Preallocate.

        Args:
            grid: (z, y, x), where x is not used.
            contrast_shape: lengths of (TI, tau, TE).
            coils: channels.
            points: readout points.
            expected: lines to make room for; pages that are not written are not taken.
        """
        self._grid = grid
        self._contrast_shape = contrast_shape
        self._samples = GrowingRows((coils, points), np.complex64, expected)
        self._where = GrowingRows((5,), np.int64)
        self._count = GrowingRows((), np.float32)
        self._place = np.zeros(0, dtype=np.int32)
        """Flat position -> row + 1; zero where there is none. Grows with the slices."""

    def __len__(self) -> int:
        return self._samples.length

    def add(self, samples: NDArray[np.complex64], at: Positions) -> None:
        """Add lines (n, c, x)."""
        nz, ny, _ = self._grid
        contrasts, echoes = self._contrast_shape[0] * self._contrast_shape[1], self._contrast_shape[2]
        flat = (((at.slice * contrasts + at.contrast) * echoes + at.echo) * nz + at.kz) * ny + at.ky
        needed = (int(at.slice.max()) + 1) * contrasts * echoes * nz * ny
        if needed > len(self._place):
            place = np.zeros(needed, dtype=np.int32)
            place[: len(self._place)] = self._place
            self._place = place
        # Lines that repeat within the block take turns, so that the order of summation is that of arrival.
        pending = np.arange(len(flat))
        while len(pending):
            _, first = np.unique(flat[pending], return_index=True)
            turn = pending[np.sort(first)]
            self._add_distinct(samples, at, flat, turn)
            pending = np.delete(pending, first)

    def _add_distinct(self, samples: NDArray[np.complex64], at: Positions, flat: Index, rows: Index) -> None:
        known = self._place[flat[rows]] - 1
        repeats = known >= 0
        if repeats.any():
            self._samples.rows[known[repeats]] += samples[rows[repeats]]
            self._count.rows[known[repeats]] += np.float32(1)
        new = rows[~repeats]
        if not len(new):
            return
        self._place[flat[new]] = np.arange(len(self) + 1, len(self) + len(new) + 1)
        everything = len(new) == len(samples)
        self._samples.extend(samples if everything else samples[new])
        where = np.stack([at.contrast, at.echo, at.slice, at.kz, at.ky], axis=1)
        self._where.extend(where[new])
        self._count.extend(np.ones(len(new), np.float32))

    def finish(self, energy: float, slices: int) -> KSpace:
        """Average repeats and hand the lines over. The store is empty afterwards.

        Args:
            energy: sum of |s|^2 of all acquisitions.
            slices: number of slices of the scan.
        """
        count = self._count.finish()
        samples = self._samples.finish()
        repeated = np.flatnonzero(count > 1)
        for part in np.array_split(repeated, max(1, len(repeated) // 256)):
            samples[part] /= count[part, np.newaxis, np.newaxis]
        contrast, echo, slice_index, kz, ky = torch.from_numpy(np.ascontiguousarray(self._where.finish().T))
        return KSpace(
            samples=torch.from_numpy(samples),
            contrast=contrast,
            echo=echo,
            slice=slice_index,
            kz=kz,
            ky=ky,
            count=torch.from_numpy(count),
            energy=energy,
            contrast_shape=self._contrast_shape,
            grid=(slices, *self._grid),
        )


class NavigatorStore:
    """Navigator lines at the position of the first of them."""

    def __init__(self, coils: int, points: int) -> None:
        self._samples = GrowingRows((coils, points), np.complex64)
        self._frame = GrowingRows((2,), np.int64)

    def add(self, samples: NDArray[np.complex64], contrast: Index, echo: Index) -> None:
        """Add lines (n, c, x)."""
        self._samples.extend(samples)
        self._frame.extend(np.stack([contrast, echo], axis=1))

    def finish(self) -> Navigator | None:
        """The lines, or None if there were none."""
        if not self._samples.length:
            return None
        frame = torch.from_numpy(np.ascontiguousarray(self._frame.finish().T))
        return Navigator(torch.from_numpy(self._samples.finish()), frame[0], frame[1])


class CalibrationStore:
    """Calibration lines of one contrast and echo on the full grid; untouched pages are never taken."""

    def __init__(self, grid: tuple[int, int, int], coils: int, slices: int) -> None:
        self._grid = grid
        self._sum = np.zeros((slices, *grid[:2], coils, grid[2]), dtype=np.complex64)
        self._count = np.zeros((slices, *grid[:2]), dtype=np.float32)

    def add(self, samples: NDArray[np.complex64], slice_index: Index, kz: Index, ky: Index) -> None:
        """Add lines (n, c, x)."""
        if not len(samples):
            return
        self._reach(int(slice_index.max()) + 1)
        nz, ny, _ = self._grid
        flat = torch.from_numpy((slice_index * nz + kz) * ny + ky)
        torch.from_numpy(self._sum).flatten(0, 2).index_add_(0, flat, torch.from_numpy(samples))
        torch.from_numpy(self._count).flatten().index_add_(0, flat, torch.ones(len(flat)))

    def finish(self, slices: int) -> Calibration:
        """Average repeats."""
        self._reach(slices)
        repeated = np.nonzero(self._count > 1)
        self._sum[repeated] /= self._count[repeated][:, np.newaxis, np.newaxis]
        return Calibration(torch.from_numpy(self._sum), torch.from_numpy(self._count))

    def _reach(self, slices: int) -> None:
        """Make room for slices that the header did not announce."""
        missing = slices - len(self._sum)
        if missing > 0:
            more = np.zeros((missing, *self._sum.shape[1:]), np.complex64)
            self._sum = np.concatenate([self._sum, more])
            self._count = np.concatenate(
                [self._count, np.zeros((missing, *self._count.shape[1:]), np.float32)]
            )
