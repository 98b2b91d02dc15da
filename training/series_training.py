"""``quantitron train-arnet`` and ``train-series-denoiser``: networks for coefficient images of a protocol.

One learns from simulated pairs what undersampling does to the linear estimate, the other from perfect images
what they look like without noise. Both see single slices in the canonical form.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from quantitron.gadgets.errors import ScanError
from quantitron.phantoms.simulate import load_anatomy
from quantitron.recon.canonical_series import protocol_checksum
from quantitron.recon.device import choose_device
from quantitron.recon.networks.conditional_unet import ConditionalUNet, UNetShape
from quantitron.recon.networks.trained_network import NetworkDescription
from quantitron.recon.priors.series_denoiser import series_intensity
from quantitron.recon.scan_conditions import ScanConditions, conditions_card
from quantitron.recon.solvers.arnet import TRAINED_ON, ArtifactRemoval
from quantitron.training.batch import Sampler
from quantitron.training.denoiser_training import noise_loss
from quantitron.training.loop import LoopSettings, Loss, Standing, Trained, Validate, train_network
from quantitron.training.output_files import check_outputs, cut_short, write_outputs
from quantitron.training.series_batches import (
    CleanSampler,
    Denoising,
    PairSampler,
    Restoration,
    SeriesPatches,
    artifact_energy,
    equalise,
    restoration_loss,
)
from quantitron.training.series_pairs import PairPlan, clean_series, simulate_pairs
from quantitron.training.slice_parting import part_slices

logger = logging.getLogger("quantitron")

Simulated = Callable[[int, int], None]
"""Told how many slices of how many there are."""


@dataclass(frozen=True)
class SeriesTraining:
    """Everything that decides about the result, beside the phantoms."""

    slices: PairPlan
    """Which slices of which scans."""
    channels: tuple[int, ...] = (32, 64, 96)
    """Features of each resolution level."""
    blocks: int = 2
    """Residual blocks of each level."""
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(steps=10000))
    patches: SeriesPatches = field(default_factory=SeriesPatches)
    levels: tuple[float, float, int] = (0.002, 0.5, 16)
    """Lowest and highest noise level relative to the intensity, and how many; of the denoiser only."""
    held_out: float = 0.1
    """Share of the slices that validates."""
    note: str = ""
    """For the card, such as the licence of the data."""

    def shape(self, noise: bool) -> UNetShape:
        """Layers of the network."""
        count = 2 * self.slices.components
        return UNetShape(count, count, self.channels, self.blocks, noise=noise)

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """All of them, spaced evenly in the logarithm.

        Raises:
            ScanError: if there are none.
        """
        low, high, count = self.levels
        if not (0 < low < high <= 10 and 2 <= count <= 1000):
            raise ScanError(f"noise levels must ascend from above zero, not from {low:g} to {high:g}")
        return tuple(round(low * (high / low) ** (number / (count - 1)), 7) for number in range(count))


def train_artifact_removal(
    phantoms: Sequence[Path | str],
    output: Path,
    training: SeriesTraining,
    device: str = "auto",
    resume: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[Standing], None] | None = None,
    simulated: Simulated | None = None,
) -> dict[str, Any]:
    """Simulate pairs, train, and write the network with its card and its loss curve.

    Args:
        phantoms: ``mni`` or ``FILE.npz``.
        output: safetensors file to write; beside it ``<stem>.md``, ``<stem>.loss.csv``, ``<stem>.checkpoint``
            and ``<stem>.pairs``, folders. Pairs that are there are not simulated again.
        training: how.
        device: see ``recon.device``.
        resume: folder of a checkpoint to go on from.
        overwrite: replace what is there.
        progress: told after every step.
        simulated: told after every slice.

    Returns:
        The card.

    Raises:
        ScanError: if phantoms or scans make no sense, an output is there already, or the training failed.
    """
    run = _Run(phantoms, output, training, device, resume, overwrite, progress)
    parting = run.parting
    pairs = simulate_pairs(
        phantoms,
        training.slices,
        ArtifactRemoval(),
        output.with_suffix(".pairs"),
        simulated,
        parting.places,
    )
    learned, held = (
        [pair for number in parting.of(part) for pair in pairs[number]]
        for part in (parting.learned, parting.held)
    )
    energy = artifact_energy(learned)
    solver = ArtifactRemoval().estimate_settings
    conditions = [
        ScanConditions(
            scan.coils, scan.calibration, scan.visited, series_intensity(pair.reconstructed), solver
        )
        for number in parting.of(parting.learned)
        for scan, pair in zip(training.slices.scans, pairs[number], strict=True)
    ]
    shape = training.shape(noise=False)
    network = ConditionalUNet(shape, torch.Generator().manual_seed(training.loop.seed))
    return run.train(
        "artifact_removal",
        network,
        PairSampler(learned, training.patches),
        restoration_loss(energy),
        Restoration(held, energy, shape.multiple),
        (len(learned), len(held)),
        (),
        {TRAINED_ON: conditions_card(conditions)},
    )


def train_series_denoiser(
    phantoms: Sequence[Path | str],
    output: Path,
    training: SeriesTraining,
    device: str = "auto",
    resume: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[Standing], None] | None = None,
    simulated: Simulated | None = None,
) -> dict[str, Any]:
    """Make perfect images, train a denoiser of them, and write it with its card and its loss curve.

    Arguments, result and errors are those of ``train_artifact_removal``; there is no folder of pairs.
    """
    levels = training.noise_levels
    run = _Run(phantoms, output, training, device, resume, overwrite, progress)
    parting = run.parting
    series = clean_series(phantoms, training.slices, simulated, parting.places)
    learned, held = (
        [series[number] for number in parting.of(part)] for part in (parting.learned, parting.held)
    )
    shape = training.shape(noise=True)
    network = ConditionalUNet(shape, torch.Generator().manual_seed(training.loop.seed))
    sampler = CleanSampler(learned, levels, training.patches)
    equalise(network, sampler.series)
    return run.train(
        "series_denoiser",
        network,
        sampler,
        noise_loss,
        Denoising(held, levels, shape.multiple, training.loop.seed),
        (len(learned), len(held)),
        levels,
    )


class _Run:
    """What both trainings have in common."""

    def __init__(
        self,
        phantoms: Sequence[Path | str],
        output: Path,
        training: SeriesTraining,
        device: str,
        resume: Path | None,
        overwrite: bool,
        progress: Callable[[Standing], None] | None,
    ) -> None:
        """Refuse what cannot work before hours are spent.

        Raises:
            ScanError: in one sentence.
        """
        self.output, self.training, self.resume = output, training, resume
        self.progress = progress
        self.checkpoint = resume if resume is not None else output.with_suffix(".checkpoint")
        read = (*phantoms, *(scan.schedule for scan in training.slices.scans))
        self.overwrite = overwrite or (resume is not None and cut_short(output, self.checkpoint))
        check_outputs(output, self.checkpoint, resume is not None, self.overwrite, *read)
        if not phantoms:
            raise ScanError("no phantom to learn from")
        try:
            self.device = choose_device(device)
        except ValueError as error:
            raise ScanError(str(error)) from error
        multiple = training.shape(noise=False).multiple
        for length in (*training.patches.size, *training.slices.scans[0].matrix):
            if length < 1 or length % multiple:
                raise ScanError(f"patches and slices must be multiples of {multiple} voxels, not {length}")
        self.parting = part_slices(len(phantoms), training.slices, training.held_out)
        self.protocol = training.slices.scans[0].protocol()
        self.data = hashlib.sha256()
        known: dict[bytes, Path | str] = {}  # by content
        for phantom in phantoms:
            named = str(phantom) in ("mni", "nist")
            try:
                content = str(phantom).encode() if named else Path(phantom).read_bytes()
            except OSError as error:
                raise ScanError(f"the phantom {phantom} cannot be read: {error.strerror}") from error
            self.data.update(content)
            digest = hashlib.sha256(content).digest()
            if digest in known:
                # Of many phantoms whole ones are held out, which then would have been learned from.
                raise ScanError(f"the phantoms {known[digest]} and {phantom} are the same")
            known[digest] = phantom
            load_anatomy(phantom)  # its faults are to be known before a dictionary is simulated
        self.phantoms = len(phantoms)
        training.slices.check_components()

    def train(
        self,
        kind: str,
        network: ConditionalUNet,
        sampler: Sampler,
        loss: Loss,
        validate: Validate,
        counts: tuple[int, int],
        levels: tuple[float, ...],
        further: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Train and write; ``further`` goes into the card."""
        training = self.training
        logger.info(
            "%d slices to learn from, %d held out; %d weights, on %s",
            *counts,
            sum(weight.numel() for weight in network.parameters()),
            self.device,
        )
        kept = asdict(training)
        del kept["loop"], kept["note"]
        identity = {
            "kind": kind,
            "seed": training.loop.seed,
            "data": self.data.hexdigest(),
            "protocol": protocol_checksum(self.protocol),  # a schedule's file may have changed
            "held_out_by": self.parting.by,
            **kept,
        }
        trained = train_network(
            network,
            sampler,
            loss,
            training.loop,
            self.device,
            validate,
            self.checkpoint,
            identity,
            self.resume is not None,
            self.progress,
        )
        card = self._card(trained, counts) | dict(further or {})
        size = (1, *training.patches.size)
        description = NetworkDescription(
            kind, network.shape, (), levels, size, (1, min(32, size[1]), min(32, size[2])), card
        )
        write_outputs(self.output, self.checkpoint, trained, description, self.overwrite)
        return card

    def _card(self, trained: Trained, counts: tuple[int, int]) -> dict[str, Any]:
        """For people, and the checksum of the protocol. Counts and checksums, no names of files."""
        try:
            own = version("quantitron")
        except PackageNotFoundError:
            own = "not installed"
        training, scan = self.training, self.training.slices.scans[0]
        options = asdict(training)
        del options["note"]
        schedule = scan.schedule if Path(scan.schedule).suffix == "" else "a schedule from a file"
        options["slices"]["scans"] = {
            str(number): {
                **asdict(one),
                "schedule": schedule,
                "snr": one.snr if math.isfinite(one.snr) else "infinite",
            }
            for number, one in enumerate(training.slices.scans)
        }
        return {
            "protocol_checksum": protocol_checksum(self.protocol),
            "protocol": f"{schedule} of {self.protocol.contrasts} time points",
            "data": {
                "volumes": {"phantoms": self.phantoms},
                "sha256": self.data.hexdigest(),
                "learned_from": counts[0],
                "held_out": counts[1],
                "held_out_by": self.parting.by,
            },
            "note": training.note,
            "options": options,
            "weights": sum(weight.numel() for weight in trained.network.parameters()),
            "steps": trained.state.step,
            "minutes": round(trained.state.seconds / 60, 1),
            "loss": trained.state.losses[-1][1] if trained.state.losses else None,
            "validation": dict(trained.state.validations[-1]),
            "device": self.device.type,
            "versions": {"quantitron": own, "torch": str(torch.__version__)},
            "date": datetime.date.today().isoformat(),
        }
