"""Gadget ``basis``: the temporal basis, and the scan in it: one ``Problem`` per slice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context, Gadget
from quantitron.recon.data import Basis, Calibration, KSpace, Problem, ReducedKSpace, ScanData
from quantitron.recon.gram import reduce_kspace
from quantitron.recon.temporal_basis import centre_basis, dictionary_basis, measured_basis


@dataclass(frozen=True)
class BasisGadget(Gadget):
    """Finds the temporal basis over the contrasts (METHODS 3) and splits the scan into slices."""

    name: ClassVar[str] = "basis"
    source: Literal["auto", "dictionary", "navigator", "centre"] = "auto"
    """``dictionary`` (from the protocol, before the scan), ``navigator`` or ``centre`` (from the data);
    ``auto`` is the dictionary."""
    rank: int | float = field(default=0.99999, metadata={"above": 0})
    """Columns (1 or more, whole), or below 1 the share of the signal's energy to keep."""

    @property
    def columns_or_energy(self) -> int | float:
        """``rank`` as the number of columns (int) or the share of the energy (float)."""
        return int(self.rank) if self.rank >= 1 else float(self.rank)

    def prepare(self, context: Context) -> None:
        """Check the rank, and set ``context.basis`` where the protocol determines it.

        Raises:
            ScanError: if the rank is neither a number of columns nor an energy, or above the number of
                contrasts.
        """
        if self.rank >= 1 and self.rank != int(self.rank):
            raise ScanError(
                f"basis: rank is {self.rank:g}; it must be a whole number of columns, or an energy between "
                "0 and 1"
            )
        contrasts = context.protocol.contrasts
        if self.rank >= 1 and self.rank > contrasts:
            raise ScanError(
                f"basis: rank {int(self.rank)} is above the {contrasts} contrasts of this "
                f"{context.protocol.sequence} scan"
            )
        if self.source in ("auto", "dictionary"):
            context.basis = dictionary_basis(context.protocol, self.columns_or_energy)

    def __call__(self, items: Iterable[ScanData], context: Context) -> Iterator[Problem]:
        """Yield the problem of each slice, in order.

        Raises:
            ScanError: if the data that the basis should come from are not there.
        """
        for scan in items:
            yield from self._problems(scan, context)

    def _problems(self, scan: ScanData, context: Context) -> Iterator[Problem]:
        kspace, reduced = scan.kspace, scan.reduced
        if reduced is None:
            if kspace is None:
                raise ScanError("basis: the scan came neither as lines nor in reduced form")
            context.basis = context.basis if context.basis is not None else self._measured(scan, context)
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

    def _measured(self, scan: ScanData, context: Context) -> Basis:
        try:
            if self.source == "centre" and scan.kspace is not None:
                return centre_basis(scan.kspace, self.columns_or_energy)
            if scan.navigator is None:
                raise ScanError("basis: source is 'navigator', but the scan has no navigator lines")
            return measured_basis(scan.navigator, context.protocol.contrasts, self.columns_or_energy)
        except ValueError as error:
            raise ScanError(f"basis: {error}") from error


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


def _slice_of_calibration(calibration: Calibration | None, index: int) -> Calibration | None:
    """The slice's calibration lines; None where it has none: its coil maps then come from its own centre."""
    if calibration is None:
        return None
    part = slice(index, index + 1)
    if not bool(calibration.count[part].any()):
        return None
    return Calibration(calibration.samples[part], calibration.count[part])
