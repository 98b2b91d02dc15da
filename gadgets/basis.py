"""Gadget ``basis``: the temporal basis, and the scan in it: one problem per slice."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from quantitron.gadgets.b1_map import check_slices
from quantitron.gadgets.dictionary_cache import cached_dictionary
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context, Gadget, SliceProblem
from quantitron.gadgets.image_geometry import slab_order
from quantitron.gadgets.protocol_precision import precision_notes
from quantitron.recon.data import (
    Basis,
    Calibration,
    FingerprintProblem,
    KSpace,
    Problem,
    ReducedKSpace,
    ScanData,
    TrajectoryKSpace,
)
from quantitron.recon.gram import reduce_kspace
from quantitron.recon.temporal_basis import centre_basis, dictionary_basis, measured_basis

logger = logging.getLogger("quantitron")

DICTIONARY_GRID = ("t1_range", "t2_range", "t1_points", "t2_points", "b1_range", "b1_points")
"""Properties that set the grid of a fingerprint dictionary."""
B1_POINTS = 11
"""Points over a range of B1."""

LEAST_COLUMNS = {"vfa_gre": 2, "t2ir_gre": 3, "fisp_mrf": 3}
"""Columns in which the contrasts differ by PD and each relaxation time that shapes them; others need one."""


@dataclass(frozen=True)
class BasisGadget(Gadget):
    """Finds the temporal basis over the contrasts (METHODS 3) and splits the scan into slices.

    Fingerprints get their dictionary here too; its grid is that of ``recon`` where nothing is set.
    """

    name: ClassVar[str] = "basis"
    source: Literal["auto", "dictionary", "navigator", "centre"] = "auto"
    """``dictionary`` (from the protocol, before the scan), ``navigator`` or ``centre`` (from the data);
    ``auto`` is the dictionary."""
    rank: int | float | None = field(default=None, metadata={"above": 0})
    """Columns (1 or more, whole), or below 1 the share of the signal's energy to keep at least, in no fewer
    columns than the maps take; None for 0.9999 in fingerprints and 0.99999 in all other scans."""
    t1_range: tuple[float, float] | None = field(default=None, metadata={"above": 0})
    """First and last T1 of the dictionary [s]. This and what follows are for ``fisp_mrf`` only."""
    t2_range: tuple[float, float] | None = field(default=None, metadata={"above": 0})
    """First and last T2 of the dictionary [s]."""
    t1_points: int | None = field(default=None, metadata={"minimum": 2})
    """Points of T1."""
    t2_points: int | None = field(default=None, metadata={"minimum": 2})
    """Points of T2."""
    b1_range: tuple[float, float] | None = field(default=None, metadata={"minimum": 0.2, "maximum": 2})
    """First and last actual over nominal flip angle of the dictionary; None for 1 alone. It must hold 1
    unless reconstruct has a ``b1_map``."""
    b1_points: int | None = field(default=None, metadata={"minimum": 2})
    """Points of B1; 11 where only their range is given."""

    def columns_or_energy(self, sequence: str) -> int | float:
        """``rank`` as the number of columns (int) or the share of the energy (float)."""
        if self.rank is None:
            return 0.9999 if sequence == "fisp_mrf" else 0.99999
        return int(self.rank) if self.rank >= 1 else float(self.rank)

    def prepare(self, context: Context) -> None:
        """Check the settings, set ``context.basis`` of a Cartesian scan whose protocol determines it, and ask
        for navigators where it comes from them. What the protocol hardly tells is noted.

        Raises:
            ScanError: if the rank is neither a number of columns nor an energy, or above the number of
                contrasts, or settings do not fit the sequence or each other.
        """
        sequence = context.protocol.sequence
        for sentence in precision_notes(context.protocol):
            context.note(sentence)
        context.needs_navigators = self.source == "navigator" and context.encoding.trajectory == "cartesian"
        rank = self.columns_or_energy(sequence)
        if self.rank is not None and self.rank >= 1 and self.rank != rank:
            raise ScanError(
                f"basis: rank is {self.rank:g}; it must be a whole number of columns, or an energy between "
                "0 and 1"
            )
        contrasts = context.protocol.contrasts
        if rank >= 1 and rank > contrasts:
            raise ScanError(
                f"basis: rank {int(rank)} is above the {contrasts} contrasts of this {sequence} scan"
            )
        if isinstance(rank, int):
            _check_columns(rank, sequence)
        if sequence == "fisp_mrf":
            if self.source not in ("auto", "dictionary"):
                raise ScanError(
                    f"basis: source is '{self.source}', but fingerprints are matched in the basis of their "
                    "dictionary; leave it at 'auto'"
                )
            context.dictionary_b1 = self._b1_values()
            return
        for name in DICTIONARY_GRID:
            if getattr(self, name) is not None:
                raise ScanError(f"basis: property '{name}' is for fisp_mrf, this scan is {sequence}")
        if self.source in ("auto", "dictionary"):
            context.basis = self._columns(lambda kept: dictionary_basis(context.protocol, kept), context)

    def _b1_values(self) -> tuple[float, ...]:
        """Actual over nominal flip angles of the dictionary, ascending."""
        if self.b1_range is None:
            if self.b1_points is not None:
                raise ScanError("basis: property 'b1_points' needs 'b1_range' beside it")
            return (1.0,)
        first, last = self.b1_range
        if not first < last:
            raise ScanError(f"basis: b1_range runs from {first:g} to {last:g}")
        points = B1_POINTS if self.b1_points is None else self.b1_points
        return tuple(np.linspace(first, last, points).tolist())

    def _columns(self, leading: Callable[[int | float], Basis], context: Context) -> Basis:
        """The basis of the rank that is set. An energy is kept in as many columns as the maps take at least.

        Args:
            leading: makes the basis of a number of columns or a share of the energy.
            context: of the scan.

        """
        sequence = context.protocol.sequence
        basis = leading(self.columns_or_energy(sequence))
        least = LEAST_COLUMNS.get(sequence, 1)
        return leading(least) if basis.rank < least else basis

    def make_ready(self, context: Context) -> None:
        """Simulate the dictionary of a fingerprint, which may take minutes, and take its leading columns.

        Raises:
            ScanError: if its grid makes no dictionary.
        """
        if context.protocol.sequence != "fisp_mrf":
            return
        grid: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("t1_range", "t2_range", "t1_points", "t2_points")
            if getattr(self, name) is not None
        }
        try:
            context.dictionary = cached_dictionary(
                context.protocol, **grid, b1=self._b1_values(), progress=_log_progress()
            )
            context.basis = self._columns(context.dictionary.basis, context)
        except ValueError as error:
            raise ScanError(f"basis: {error}") from error

    def __call__(self, items: Iterable[ScanData], context: Context) -> Iterator[SliceProblem]:
        """Yield the problem of each slice, in order.

        Raises:
            ScanError: if the data that the basis should come from are not there.
        """
        for scan in items:
            if isinstance(scan.kspace, TrajectoryKSpace):
                yield from _fingerprints(scan, scan.kspace, context)
            else:
                yield from self._problems(scan, scan.kspace, context)

    def _problems(self, scan: ScanData, kspace: KSpace | None, context: Context) -> Iterator[Problem]:
        reduced = scan.reduced
        if reduced is None:
            if kspace is None:
                raise ScanError("basis: the scan came neither as lines nor in reduced form")
            context.basis = (
                context.basis if context.basis is not None else self._measured(scan, kspace, context)
            )
            reduced = reduce_kspace(kspace, context.basis)
        if not context.needs_lines:
            kspace = None
        slices = context.encoding.slices
        for index in range(slices):
            energy = scan.energy[index]
            yield Problem(
                encoding=replace(context.encoding, slices=1),
                protocol=context.protocol,
                reduced=_slice_of_reduced(reduced, index, energy),
                kspace=_slice_of_lines(kspace, index, energy) if kspace is not None else None,
                calibration=_slice_of_calibration(scan.calibration, index),
                noise_known=scan.noise_known,
                seed=context.seed,
            )

    def _measured(self, scan: ScanData, kspace: KSpace, context: Context) -> Basis:
        navigator, contrasts = scan.navigator, context.protocol.contrasts
        try:
            if self.source == "centre":
                return self._columns(lambda kept: centre_basis(kspace, kept), context)
            if navigator is None:
                raise ScanError("basis: source is 'navigator', but the scan has no navigator lines")
            return self._columns(lambda kept: measured_basis(navigator, contrasts, kept), context)
        except ValueError as error:
            raise ScanError(f"basis: {error}") from error


def _check_columns(columns: int, sequence: str) -> None:
    """Refuse a basis in which tissues of different relaxation times look alike.

    Raises:
        ScanError: if there are too few columns for the maps of the sequence.
    """
    least = LEAST_COLUMNS.get(sequence, 1)
    if columns < least:
        times = "T1 and PD" if least == 2 else "T1, T2 and PD"
        raise ScanError(
            f"basis: rank leaves {columns} column{'s' if columns > 1 else ''} of the temporal basis, {times} "
            f"of {sequence} take {least} or more"
        )


def _log_progress() -> Callable[[float], None]:
    """Progress of a simulation in the log, no more than every other second."""
    last = time.monotonic()

    def progress(share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 2:
            last = now
            logger.info("%3.0f %% of the dictionary simulated", 100 * share)

    return progress


def _fingerprints(scan: ScanData, kspace: TrajectoryKSpace, context: Context) -> Iterator[FingerprintProblem]:
    if context.dictionary is None or context.basis is None:
        raise ScanError(f"basis: a scan on a trajectory is no {context.protocol.sequence}")
    slices = context.encoding.slices
    if context.b1 is not None:
        check_slices(context.b1, slices)
    # The B1 map has the slices in the order of the images, not in that of the counter.
    order = slab_order(context.geometry, slices, context.encoding.field_of_view[0])
    for index in range(slices):
        calibration = scan.calibration
        if isinstance(calibration, TrajectoryKSpace):
            here = bool((calibration.slice == index).any())
            calibration = calibration.of_slice(index) if here else None
        else:
            calibration = None
        yield FingerprintProblem(
            encoding=replace(context.encoding, slices=1),
            protocol=context.protocol,
            kspace=replace(kspace.of_slice(index), energy=scan.energy[index]),
            basis=context.basis,
            dictionary=context.dictionary,
            calibration=calibration,
            b1=None if context.b1 is None else context.b1[order.index(index)],
            noise_known=scan.noise_known,
            seed=context.seed,
        )


def _slice_of_reduced(reduced: ReducedKSpace, index: int, energy: float) -> ReducedKSpace:
    part = slice(index, index + 1)
    channels, points = reduced.projected.shape[-2:]
    count = reduced.count[part]
    return replace(
        reduced,
        gram=reduced.gram[part],
        projected=reduced.projected[part],
        count=count,
        energy=energy,
        samples=round(float(count.double().sum())) * channels * points,
    )


def _slice_of_lines(kspace: KSpace, index: int, energy: float) -> KSpace:
    if kspace.grid[0] == 1:
        return kspace
    chosen = kspace.slice == index
    return replace(
        kspace,
        samples=kspace.samples[chosen],
        contrast=kspace.contrast[chosen],
        echo=kspace.echo[chosen],
        slice=kspace.slice[chosen] * 0,
        kz=kspace.kz[chosen],
        ky=kspace.ky[chosen],
        count=kspace.count[chosen],
        energy=energy,
        grid=(1, *kspace.grid[1:]),
    )


def _slice_of_calibration(
    calibration: Calibration | TrajectoryKSpace | None, index: int
) -> Calibration | None:
    """The slice's calibration lines; None where it has none: its coil maps then come from its own centre."""
    if not isinstance(calibration, Calibration):
        return None
    part = slice(index, index + 1)
    if not bool(calibration.count[part].any()):
        return None
    return Calibration(calibration.samples[part], calibration.count[part])
