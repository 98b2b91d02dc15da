"""From the counters of acquisition headers to positions in the 6D k-space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.header import PhaseEncoding, counter_length, counter_limit, phase_encoding

Index = NDArray[np.int64]

AVERAGED = ("repetition", "phase", "set")
"""Counters that are averaged over, and said so, where they carry no contrast."""


@dataclass(frozen=True)
class Positions:
    """Where the lines of a block lie; (n,) int64 each."""

    contrast: Index
    echo: Index
    slice: Index
    kz: Index
    ky: Index


class PositionReader:
    """Positions of the lines of one scan.

    Grid position = counter - encodingLimits.center + points // 2. Where the header has no limits, Siemens
    converters leave the centre line and partition in the user counters 5 and 6; otherwise it is the middle.
    """

    def __init__(self, context: Context) -> None:
        notes: list[str] = []
        self.lines = phase_encoding(context.header, context.encoding, 1, notes)
        self.partitions = phase_encoding(context.header, context.encoding, 0, notes)
        for sentence in notes:
            context.note(sentence)
        self._context = context
        self._shape = context.protocol.contrast_shape
        self._slices = counter_length(context.header, "slice")
        system = context.header.acquisitionSystemInformation
        vendor = system.systemVendor if system is not None else None
        self._siemens = "siemens" in (vendor or "").lower()

    @property
    def slices_announced(self) -> bool:
        """Whether the header tells how many slices there are."""
        return self._slices is not None

    def imaging(self, block: AcquisitionBlock, chosen: NDArray[np.bool_]) -> Positions:
        """Positions of the chosen lines.

        Raises:
            ScanError: if a counter is beyond its limit; the sentence names counter, value, limit and
                acquisition.
        """
        rows = np.flatnonzero(chosen)
        counters = block.head["idx"][rows]
        numbers = rows + block.first
        self._note_averages(counters)
        axes = self._context.axes
        ti, tau, te = (
            self._bounded(counters, axes.get(axis), length, numbers)
            for axis, length in zip(("ti", "tau", "te"), self._shape, strict=True)
        )
        return Positions(
            contrast=ti * self._shape[1] + tau,
            echo=te,
            slice=self._bounded(counters, "slice", self._slices, numbers),
            kz=self._placed(counters, self.partitions, 6, numbers),
            ky=self._placed(counters, self.lines, 5, numbers),
        )

    def other(self, block: AcquisitionBlock) -> tuple[Positions, NDArray[np.bool_], NDArray[np.bool_]]:
        """Positions of lines that may have counters of their own (navigators, calibration); never an error.

        Returns:
            The positions of all lines of the block; (n,) whether contrast and echo are those of a frame; (n,)
            whether slice, kz and ky lie on the grid.
        """
        counters = block.head["idx"]
        axes = self._context.axes
        ti, tau, te = (counter_values(counters, axes.get(axis)) for axis in ("ti", "tau", "te"))
        slices = counter_values(counters, "slice")
        kz = self._position(counters, self.partitions, 6)
        ky = self._position(counters, self.lines, 5)
        in_frame = (ti < self._shape[0]) & (tau < self._shape[1]) & (te < self._shape[2])
        on_grid = (kz >= 0) & (kz < self.partitions.points) & (ky >= 0) & (ky < self.lines.points)
        if self._slices is not None:
            on_grid &= slices < self._slices
        return Positions(ti * self._shape[1] + tau, te, slices, kz, ky), in_frame, on_grid

    def _note_averages(self, counters: NDArray[np.void]) -> None:
        for name in AVERAGED:
            if name not in self._context.axes.values() and counters[name].any():
                self._context.note(f"the counter '{name}' carries no contrast here; its values are averaged")

    def _bounded(
        self, counters: NDArray[np.void], counter: str | None, length: int | None, numbers: Index
    ) -> Index:
        values = counter_values(counters, counter)
        if length is not None and len(values) and (beyond := values >= length).any():
            row = int(beyond.argmax())
            raise ScanError(
                f"acquisition {numbers[row]} has {counter} = {values[row]}, beyond its limit of {length - 1}"
            )
        return values

    def _placed(self, counters: NDArray[np.void], axis: PhaseEncoding, user: int, numbers: Index) -> Index:
        values = counters[axis.counter].astype(np.int64)
        position = self._position(counters, axis, user)
        limit = counter_limit(self._context.header, axis.counter)
        wrong = (position < 0) | (position >= axis.points)
        if limit is not None:
            wrong |= values > int(limit.maximum)
        if wrong.any():
            row = int(wrong.argmax())
            highest = axis.last if limit is not None else axis.points - 1
            if limit is None or values[row] > highest:
                raise ScanError(
                    f"acquisition {numbers[row]} has {axis.counter} = {values[row]}, beyond its limit of "
                    f"{highest}"
                )
            raise ScanError(
                f"acquisition {numbers[row]} has {axis.counter} = {values[row]}, which with the centre at "
                f"{axis.centre} lies outside the matrix of {axis.points}"
            )
        return position

    def _position(self, counters: NDArray[np.void], axis: PhaseEncoding, user: int) -> Index:
        values = counters[axis.counter].astype(np.int64)
        centre: Index | int
        if axis.centre is not None:
            centre = axis.centre
        elif self._siemens:
            told = counters["user"][:, user].astype(np.int64)
            centre = np.where((told > 0) & (told < axis.points), told, axis.points // 2)
        else:
            centre = axis.points // 2
        return values - centre + axis.points // 2


def counter_values(counters: NDArray[np.void], counter: str | None) -> Index:
    """(n,) values of a counter; zeros for an axis that has none."""
    if counter is None:
        return np.zeros(len(counters), dtype=np.int64)
    if counter.startswith("user_"):
        values: Index = counters["user"][:, int(counter[5:])].astype(np.int64)
        return values
    values = counters[counter].astype(np.int64)
    return values
