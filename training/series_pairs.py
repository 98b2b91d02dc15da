"""Pairs of coefficient images: as an undersampled scan gives them, and as a perfect one would.

Both stand in the canonical form of ``recon.canonical_series``; the first is what the pipeline ``arnet`` has
before its network, by the same code. Pairs are kept in a folder, one file each, so that a training that was
stopped does not simulate them again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.unfinished_file import clear_abandoned, discard, unfinished_file
from quantitron.phantoms.anatomy import Anatomy
from quantitron.phantoms.simulate import load_anatomy
from quantitron.recon.canonical_series import canonical_series, protocol_checksum, tissue_axes
from quantitron.recon.data import FingerprintDictionary
from quantitron.recon.solvers.fingerprint import FingerprintSolver
from quantitron.training.artifact_scan import ScanPlan, SimulatedSlice, place_slice, simulate_slice

logger = logging.getLogger("quantitron")

_LAYOUT = 3
"""Raised whenever the arrays of a file change their meaning."""


@dataclass(frozen=True)
class SeriesPair:
    """One slice, in units of the noise of whitened samples and, each component, of its size in tissue."""

    reconstructed: Tensor
    """(2K, z, y, x) float32."""
    perfect: Tensor
    """(2K, z, y, x) float32."""


def reconstructed_pair(scan: SimulatedSlice, solver: FingerprintSolver, components: int) -> SeriesPair:
    """Reconstruct a simulated slice up to the linear estimate.

    Args:
        scan: the slice.
        solver: whose estimate is taken.
        components: K.
    """
    problem = scan.problem
    estimate = solver.linear_estimate(problem, lambda _doing, _share: None)
    images = torch.einsum("lk,xkzy->xlzy", estimate.basis.mixing[0], estimate.coefficients)
    axes = tissue_axes(problem.basis, problem.dictionary, components)
    form = canonical_series(images, axes.axes, estimate.voxel_size)
    perfect = scan.placed.perfect(estimate.operator.csm)
    return SeriesPair(form.images(images) / axes.channels(), form.images(perfect) / axes.channels())


@dataclass(frozen=True)
class PairPlan:
    """Which slices of which scans."""

    scans: tuple[ScanPlan, ...]
    """Of one protocol; each slice is scanned by every one of them."""
    slices: int = 8
    """Of each phantom."""
    extent: float = 24.0
    """Length [mm] along z, about the middle, over which they are spread."""
    components: int = 5
    """K."""
    rank: int | float = 0.9999
    """Of the temporal basis."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        """Refuse scans of several protocols.

        Raises:
            ScanError: in one sentence.
        """
        if not self.scans:
            raise ScanError("no scan to learn from")
        if len({(scan.schedule, scan.points, scan.schedule_seed) for scan in self.scans}) > 1:
            raise ScanError("a network is for one protocol: all scans need the same schedule and points")
        if self.slices < 1:
            raise ScanError(f"{self.slices} slices of each phantom are none to learn from")

    def places(self, phantoms: int) -> list[tuple[int, int]]:
        """Numbers of phantom and slice of all slices."""
        return [(number, place) for number in range(phantoms) for place in range(self.slices)]

    def check_components(self) -> None:
        """Refuse more coefficient images than the protocol's fingerprints have. Needs the dictionary.

        Raises:
            ScanError: in one sentence.
        """
        rank = self.scans[0].dictionary().basis(self.rank).rank
        if self.components > rank:
            raise ScanError(
                f"{self.components} components are more than the {rank} coefficient images in which the "
                f"fingerprints of this protocol are reconstructed; learn from {rank} or fewer"
            )


def simulate_pairs(
    phantoms: Sequence[Path | str],
    plan: PairPlan,
    solver: FingerprintSolver,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    places: Sequence[tuple[int, int]] | None = None,
) -> list[list[SeriesPair]]:
    """Simulate what is not in the folder yet, and read all of it.

    Args:
        phantoms: ``mni`` or ``FILE.npz``.
        plan: of the slices.
        solver: whose estimate is learned from.
        folder: of the pairs; made where absent.
        progress: told how many of how many there are.
        places: numbers of phantom and slice of those that are wanted, phantom by phantom; None: all.

    Returns:
        For each place the pairs of its scans.

    Raises:
        ScanError: if a phantom or the plan makes no sense, or the folder cannot be written.
    """
    places = plan.places(len(phantoms)) if places is None else places
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScanError(f"the folder {folder} cannot be made: {error.strerror}") from error
    total = len(places) * len(plan.scans)
    found: list[list[SeriesPair]] = []
    anatomies = _Anatomies(phantoms)
    dictionary: FingerprintDictionary | None = None
    for number, place in places:
        pairs: list[SeriesPair] = []
        for scan_number, scan in enumerate(plan.scans):
            seed = _seed(plan.seed, number, place, scan_number)
            name = _name(phantoms[number], scan, plan, solver, place, seed)
            pair = _read(folder / name)
            if pair is None:
                dictionary = dictionary or scan.dictionary()
                height, phase = _drawn(plan, place, seed)
                placed = place_slice(
                    anatomies[number],
                    scan,
                    dictionary.basis(plan.rank),
                    height=height,
                    receive_phase=phase,
                    seed=seed,
                )
                simulated = simulate_slice(placed, scan, dictionary, seed)
                pair = reconstructed_pair(simulated, solver, plan.components)
                _write(folder / name, pair)
            pairs.append(pair)
            if progress is not None:
                progress(len(found) * len(plan.scans) + len(pairs), total)
        found.append(pairs)
    return found


def clean_series(
    phantoms: Sequence[Path | str],
    plan: PairPlan,
    progress: Callable[[int, int], None] | None = None,
    places: Sequence[tuple[int, int]] | None = None,
) -> list[Tensor]:
    """Perfect images of slices, in the canonical form, as a network that removes noise learns from.

    Args:
        phantoms: ``mni`` or ``FILE.npz``.
        plan: of the slices; of its scans only the first one's object and grid matter.
        progress: told how many of how many there are.
        places: as of ``simulate_pairs``.

    Returns:
        (2K, z, y, x) float32 each.

    Raises:
        ScanError: if a phantom or the plan makes no sense.
    """
    scan = plan.scans[0]
    dictionary = scan.dictionary()
    basis = dictionary.basis(plan.rank)
    dz, dy, dx = scan.encoding.voxel_size
    places = plan.places(len(phantoms)) if places is None else places
    found: list[Tensor] = []
    anatomies = _Anatomies(phantoms)
    for number, place in places:
        seed = _seed(plan.seed, number, place, 0)
        height, phase = _drawn(plan, place, seed)
        placed = place_slice(anatomies[number], scan, basis, height=height, receive_phase=phase, seed=seed)
        images = placed.combined()
        axes = tissue_axes(basis, dictionary, plan.components).axes
        found.append(canonical_series(images, axes, (dx, dz, dy)).images(images))
        if progress is not None:
            progress(len(found), len(places))
    return found


class _Anatomies:
    """Phantoms by number, the last one kept: slices come phantom by phantom."""

    def __init__(self, phantoms: Sequence[Path | str]) -> None:
        self._phantoms = phantoms
        self._last: tuple[int, Anatomy] | None = None

    def __getitem__(self, number: int) -> Anatomy:
        if self._last is None or self._last[0] != number:
            self._last = None  # never two of them in memory
            self._last = (number, load_anatomy(self._phantoms[number]))
        return self._last[1]


def _drawn(plan: PairPlan, place: int, seed: int) -> tuple[float, float]:
    """Height [m] and receive phase [rad] of a slice."""
    random = np.random.default_rng([seed, 31])
    share = (place + random.uniform(0.25, 0.75)) / plan.slices
    return 1e-3 * plan.extent * (share - 0.5), float(random.uniform(0.5, 2.5))


def _seed(seed: int, phantom: int, place: int, scan: int) -> int:
    return int(np.random.default_rng([seed, phantom, place, scan]).integers(1 << 31))


def _name(
    phantom: Path | str, scan: ScanPlan, plan: PairPlan, solver: FingerprintSolver, place: int, seed: int
) -> str:
    """File of a pair: a hash of all that it depends on."""
    content = str(phantom)
    if content not in ("mni", "nist"):
        try:
            content = hashlib.sha256(Path(phantom).read_bytes()).hexdigest()
        except OSError as error:
            raise ScanError(f"the phantom {phantom} cannot be read: {error.strerror}") from error
    # a schedule is what stands in its file, whatever that is called
    played = asdict(scan) | {"schedule": protocol_checksum(scan.protocol())}
    of = [_LAYOUT, content, played, plan.components, plan.rank, plan.slices, plan.extent, place, seed]
    of.append({key: value for key, value in asdict(solver).items() if key != "weights"})
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:20] + ".npz"


def _write(path: Path, pair: SeriesPair) -> None:
    """Under another name first: a file is whole or not there."""
    part = unfinished_file(path)
    clear_abandoned(path)
    try:
        with part.open("wb") as stream:
            np.savez(stream, reconstructed=pair.reconstructed.numpy(), perfect=pair.perfect.numpy())
        os.replace(part, path)
    except OSError as error:
        raise ScanError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        discard(part)


def _read(path: Path) -> SeriesPair | None:
    if not path.exists():
        return None
    try:
        # np.load leaves a file open that it cannot read
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            parts = [torch.from_numpy(arrays[name]) for name in ("reconstructed", "perfect")]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ScanError(f"{path} is not a pair of coefficient images ({error}); remove it") from error
    if parts[0].shape != parts[1].shape or not all(bool(part.isfinite().all()) for part in parts):
        raise ScanError(f"{path} is not a pair of coefficient images; remove it")
    return SeriesPair(*parts)
