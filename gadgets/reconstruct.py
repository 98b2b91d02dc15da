"""The GPU gadget ``reconstruct``: waits for its device, runs the solver that the XML names, yields maps."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar

import torch

from quantitron.gadgets import settings as gadget_settings
from quantitron.gadgets.b1_map import nominal_within, read_b1_map
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context, Gadget, SliceProblem
from quantitron.gadgets.image_metadata import SHORT_CHECKSUM
from quantitron.gadgets.network_weights import requested_network
from quantitron.gadgets.solver_class import require_complete
from quantitron.gadgets.solver_result import check_result
from quantitron.recon.data import Encoding, Maps, Problem, ReducedKSpace
from quantitron.recon.device import choose_device
from quantitron.recon.networks.trained_network import NetworkRequest, TrainedNetwork
from quantitron.recon.signal_presence import calibration_serves, holds_signal, is_one_plane, silenced
from quantitron.recon.solvers import SOLVERS, Solver, Subspace

logger = logging.getLogger("quantitron")

_SEEDS = {"minimum": 0, "maximum": gadget_settings.LARGEST_SEED}


@dataclass(frozen=True)
class Reconstruct(Gadget):
    """Takes the problem of each slice, yields ``Maps`` of all slices: previews first, the final ones last.

    Properties besides its own are the settings of the solver.
    """

    name: ClassVar[str] = "reconstruct"

    solver: str = "subspace"
    """Method, one of ``recon.solvers.SOLVERS``."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    seed: int = field(default=0, metadata=_SEEDS)
    """Seed of everything random."""
    b1_map: str = ""
    """File (.npz or .npy) that holds ``b1``, actual over nominal flip angle; only ``fisp_mrf``."""
    method: Solver = field(default_factory=Subspace)
    """The solver with its settings; made from the other properties, not a property itself."""

    @classmethod
    def build(cls, values: Mapping[str, object], where: str, sequence: str | None = None) -> Reconstruct:
        """Make the gadget and its solver from properties.

        Args:
            values: property -> string or value.
            where: what the sentence of an error begins with.
            sequence: of the scan; it decides where several solvers share a name. None takes the first.

        Raises:
            ScanError: if the solver does not exist or is not for this sequence, a property belongs neither to
                it nor to the gadget, or a class in ``SOLVERS`` is not complete.
        """
        chosen = str(values.get("solver", cls.solver))
        named = _solvers_named(chosen)
        if not named:
            names = dict.fromkeys(kind.name for kind in SOLVERS)
            raise ScanError(f"{where}: there is no solver '{chosen}'; there are {', '.join(names)}")
        if sequence is not None and sequence not in cls.sequences_of(values):
            raise ScanError(_cannot(chosen, sequence, cls.sequences_of(values)))
        able = [one for one in named if sequence in one.sequences]
        if len(able) > 1:
            classes = " and ".join(one.__name__ for one in able)
            raise ScanError(f"{where}: {classes} are both called '{chosen}' and do both {sequence}")
        kind = able[0] if able else named[0]
        own = {entry.name for entry in fields(cls)} - {"method"}
        for entry in fields(kind):
            if entry.name in own or entry.name == "method":
                raise ScanError(
                    f"{where}: solver '{chosen}' has a setting '{entry.name}', which is the gadget's own "
                    "name; it must have another"
                )
        settings = {key: value for key, value in values.items() if key not in own}
        allowed = {entry.name for entry in fields(kind)}
        for key in settings:
            if key not in allowed:
                raise ScanError(gadget_settings.unknown(key, allowed | own, where, "property"))
        method = gadget_settings.build(kind, settings, where)
        return gadget_settings.build(
            _Own, {key: value for key, value in values.items() if key in own}, where
        ).with_method(method)

    @classmethod
    def sequences_of(cls, values: Mapping[str, object]) -> tuple[str, ...]:
        """Sequences that the solver of these properties reconstructs; none where there is no such solver."""
        named = _solvers_named(str(values.get("solver", cls.solver)))
        return tuple(dict.fromkeys(sequence for kind in named for sequence in kind.sequences))

    def prepare(self, context: Context) -> None:
        """Refuse what can be refused before data flows: device, sequence, rank, grid, B1 map, network."""
        try:
            choose_device(self.device)
        except ValueError as error:
            raise ScanError(str(error)) from error
        sequence = context.protocol.sequence
        if sequence not in self.method.sequences:
            raise ScanError(_cannot(self.solver, sequence, self.method.sequences))
        for entry in fields(self.method):
            rank, frames = getattr(self.method, entry.name), context.protocol.frames
            if entry.name.endswith("rank") and isinstance(rank, int) and rank > frames:
                raise ScanError(f"reconstruct.{entry.name} {rank} is above the {frames} frames of the scan")
        try:
            self.method.check(context.encoding, context.protocol)
        except ValueError as error:
            raise ScanError(f"solver '{self.solver}': {error}") from error
        if self.b1_map:
            context.b1 = read_b1_map(self.b1_map, context)
        elif context.dictionary_b1 is not None:
            nominal_within(context.dictionary_b1)
        if self.method.network is not None:
            context.network = self._network(self.method.network, context)
        context.needs_lines = context.needs_lines or self.method.needs_lines
        context.seed = self.seed

    def _network(self, request: NetworkRequest, context: Context) -> TrainedNetwork:
        """The network that the solver asks for, if it suits solver and scan."""
        network = requested_network(request)
        try:
            self.method.check_network(network.description, context.encoding, context.protocol)
        except ValueError as error:
            raise ScanError(f"solver '{self.solver}': {error}") from error
        logger.info("%s with the weights %s", request.kind, network.checksum[:SHORT_CHECKSUM])
        return network

    def __call__(self, items: Iterable[SliceProblem], context: Context) -> Iterator[Maps]:
        """Reconstruct slice by slice; one that fails does not stop the others.

        Where there are several, it leaves the values of its preview, or none where there was none, and a
        sentence says so in the end, one for all slices that failed for the same reason.

        Args:
            items: as many problems as ``context.encoding`` then has slices.
            context: of the scan.

        Raises:
            ScanError: if no slice has maps; a preview that was sent before stands.
        """
        # The first problem comes when the scan has ended; until then others may have the device. Of the rest
        # each is made when it is its turn: all at once, they would hold the data of the scan a second time.
        problems = iter(items)
        problem = next(problems, None)
        slices = context.encoding.slices
        device = choose_device(self.device)
        context.device = str(device)
        finished: list[Maps | None] = []
        reason = ""
        with _device_to_ourselves(device), _failed_slices(context) as failed:
            while problem is not None:
                number = len(finished)
                final: Maps | None = None
                preview: Maps | None = None
                residuals: list[float] = []
                if not holds_signal(problem):
                    problem = silenced(problem)
                    context.note(f"{_named(number, slices)} holds noise alone: its maps are empty")
                elif problem.calibration is not None and not calibration_serves(problem):
                    problem = replace(problem, calibration=None)
                    context.note(
                        f"the calibration of {_named(number, slices)} holds noise alone, or too little of "
                        "k-space: coil maps come from the scan itself"
                    )
                elif is_one_plane(problem):
                    context.note(
                        f"the calibration of {_named(number, slices)} holds kz = 0 alone: its coil maps do "
                        "not change along z, and maps are the less to be relied on the thicker the slab"
                    )
                problem = replace(problem, device=device, seed=self.seed, network=context.network)
                try:
                    for yielded in self.method.solve(problem, _progress_of(number, slices)):
                        maps = check_result(yielded, problem.encoding)
                        residuals.append(maps.residual_to_noise)
                        if not maps.preview:
                            final = maps
                        elif slices == 1:
                            yield _crop(maps, problem.encoding)
                        else:
                            preview = maps
                    if final is None:
                        raise ValueError("the solver ended without yielding final maps")
                except Exception as error:
                    reason = _reason(error)
                    if not isinstance(error, ValueError) and reason not in failed.reasons:
                        # A mistake of this program: say where, once.
                        logger.error("slice %d: %s", number, type(error).__name__, exc_info=error)
                    if final is not None:
                        failed.add(number, "{}: failed after {its} maps were made", reason)
                    elif preview is not None:
                        final = replace(preview, preview=False)
                        failed.add(number, "{} {holds} the maps of {its} preview", reason)
                    elif slices > 1:
                        failed.add(number, "{} {was} not reconstructed", reason)
                if isinstance(problem, Problem) and final is not None:
                    _judge_fit(residuals, problem.reduced, _named(number, slices), context)
                finished.append(None if final is None else _crop(final, problem.encoding))
                problem = None  # before the next one is made
                problem = next(problems, None)
        done = [maps for maps in finished if maps is not None]
        if not done:
            why = "" if len(finished) > 1 else f": {reason or 'there was no slice to reconstruct'}"
            raise ScanError(f"solver '{self.solver}' gave no maps{why}")
        maps = Maps.stack([_without_values(done[0]) if maps is None else maps for maps in finished])
        if maps.failure:
            context.fail(maps.failure)
        if not maps.mask.any():
            context.fail(
                "the scan holds no signal: no voxel stands out from the background, the maps are empty"
            )
        elif empty := [name for name, values in maps.values.items() if not _any_value(values, maps.mask)]:
            context.fail(f"solver '{self.solver}' gave no value of {', '.join(empty)} in any voxel")
        yield maps


@dataclass(frozen=True)
class _Own:
    """The gadget's own properties, for the checks of ``settings.build``."""

    solver: str = Reconstruct.solver
    device: str = Reconstruct.device
    seed: int = field(default=Reconstruct.seed, metadata=_SEEDS)
    b1_map: str = Reconstruct.b1_map

    def with_method(self, method: Solver) -> Reconstruct:
        return Reconstruct(self.solver, self.device, self.seed, self.b1_map, method)


def _reason(error: Exception) -> str:
    """The first line of what a solver raised; its kind too where the words alone tell little."""
    said = str(error).splitlines()[0] if str(error) else ""
    if said and isinstance(error, (ValueError, RuntimeError, ArithmeticError, MemoryError)):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _any_value(values: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether a map has a value anywhere inside the mask."""
    return bool(values[mask].isfinite().any())


def _solvers_named(name: str) -> list[type[Solver]]:
    """Several may share a name, each for sequences of its own."""
    require_complete(SOLVERS)
    return [kind for kind in SOLVERS if kind.name == name]


def _cannot(solver: str, sequence: str, sequences: tuple[str, ...]) -> str:
    return f"solver '{solver}' does not reconstruct {sequence}; it does {', '.join(sequences)}"


UNEXPLAINED = 0.02
"""Share of the signal energy of a Cartesian scan that needs mention where it is left unexplained. Of sound
scans it is 1e-4 whatever their noise; where the off-resonance lies beyond what the echoes or ``field_range``
tell, a tenth and more. (Of fingerprints aliasing alone may leave that.)"""
LEAST_UNEXPLAINED = 1.3
"""Residual in units of the noise below which it may be noise whose level is not quite known."""


def _judge_fit(residuals: list[float], reduced: ReducedKSpace, where: str, context: Context) -> None:
    """Say where the images that the maps come from leave much of the signal unexplained.

    Args:
        residuals: of the maps as they came, previews first, in units of the noise; nothing is said where that
            is not known (nan).
        reduced: the data of the slice, of noise variance 1.
        where: the slice, for the sentence.
        context: takes the note.
    """
    signal = max(reduced.energy / max(reduced.samples, 1) - 1, 1e-12)  # of a sample, in units of the noise
    poor = [value > LEAST_UNEXPLAINED and (value - 1) / signal > UNEXPLAINED for value in residuals]
    if not poor[-1]:
        return
    share = 100 * min((residuals[-1] - 1) / signal, 1)
    amount = f"{share:.0f} % of the signal's energy unexplained ({residuals[-1]:.1f} times the noise)"
    if all(poor):
        context.note(
            f"the images of {where} leave {amount}, so that maps may be wrong: by off-resonance "
            "beyond reconstruct.field_range or beyond what the echo times tell, motion, or a header that "
            "does not tell what was played"
        )
    else:
        context.note(
            f"the maps of {where} leave {amount}, which the linear estimate explains: networks that were "
            "trained too little, or a header that does not tell what was played"
        )


def _named(number: int, slices: int) -> str:
    return f"slice {number} of {slices}" if slices > 1 else "the scan"


def _crop(maps: Maps, encoding: Encoding) -> Maps:
    """Cut phase and slice oversampling off."""
    return replace(
        maps,
        values={name: encoding.crop(values) for name, values in maps.values.items()},
        mask=encoding.crop(maps.mask),
        standard_deviation={name: encoding.crop(values) for name, values in maps.standard_deviation.items()},
        magnitude=None if maps.magnitude is None else encoding.crop(maps.magnitude),
    )


def _without_values(like: Maps) -> Maps:
    """A slice with the shape of another and no estimate anywhere."""
    return replace(
        like,
        values={name: torch.full_like(values, torch.nan) for name, values in like.values.items()},
        mask=torch.zeros_like(like.mask),
        standard_deviation={
            name: torch.full_like(values, torch.nan) for name, values in like.standard_deviation.items()
        },
        magnitude=None if like.magnitude is None else torch.zeros_like(like.magnitude),
    )


class _FailedSlices:
    """What failed in which slices, and why."""

    def __init__(self) -> None:
        self.reasons: set[str] = set()
        self._numbers: dict[tuple[str, str], list[int]] = {}

    def add(self, number: int, what: str, reason: str) -> None:
        """Note a slice.

        Args:
            number: of the slice.
            what: the sentence up to its reason, with places for slices and words that go with their number.
            reason: of it.
        """
        self.reasons.add(reason)
        self._numbers.setdefault((what, reason), []).append(number)

    def sentences(self, slices: int) -> list[str]:
        """One for each reason, of ``slices`` slices in all."""
        said = []
        for (what, reason), numbers in self._numbers.items():
            one = len(numbers) == 1
            which = f"slice{'' if one else 's'} {_ranges(numbers)} of {slices}"
            words = {"its": "its" if one else "their", "holds": "holds" if one else "hold"}
            said.append(f"{what.format(which, was='was' if one else 'were', **words)}: {reason}")
        return said


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs of them by their ends: 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


@contextmanager
def _failed_slices(context: Context) -> Iterator[_FailedSlices]:
    """Slices that fail in the block; it ends with a sentence for each reason, whatever ends it."""
    failed = _FailedSlices()
    try:
        yield failed
    finally:
        for sentence in failed.sentences(context.encoding.slices):
            context.fail(sentence)


_LEAST_SHARE = 0.1
"""Of the whole, before which nothing is said of the time that is left."""


class _progress_of:
    """Progress of one slice on stderr (through the log), no more than once a second."""

    def __init__(self, number: int, slices: int) -> None:
        self._where = f"slice {number + 1}/{slices}: " if slices > 1 else ""
        self._start = time.monotonic()
        self._last = -math.inf

    def __call__(self, doing: str, share: float) -> None:
        now = time.monotonic()
        if now - self._last < 1 and share < 1:
            return
        self._last = now
        seconds = now - self._start
        left = ""
        if _LEAST_SHARE <= share < 1:
            minutes, rest = divmod(round(seconds * (1 - share) / share), 60)
            left = f", about {minutes} min {rest} s left" if minutes else f", about {rest} s left"
        logger.info("%s%3.0f %% %s (%.1f s%s)", self._where, 100 * share, doing, seconds, left)


@contextmanager
def _device_to_ourselves(device: torch.device) -> Iterator[None]:
    """Wait until no other process of this machine reconstructs on the GPU; the CPU is shared freely.

    Gadgetron starts a process for each connection and arbitrates nothing between them.
    """
    if device.type != "cuda":
        yield
        return
    path = Path(tempfile.gettempdir()) / f"quantitron-cuda{device.index or 0}-{os.getuid()}.lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for %s, another reconstruction holds it", device)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
