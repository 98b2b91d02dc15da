"""``quantitron train-denoiser``: from weighted volumes to a network that removes noise from such images."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantitron.gadgets.errors import ScanError
from quantitron.recon.device import choose_device
from quantitron.recon.networks.conditional_unet import ConditionalUNet, UNetShape
from quantitron.recon.networks.trained_network import NetworkDescription
from quantitron.recon.priors.network_denoiser import predicted_noise
from quantitron.training.augmentation import Augmentation
from quantitron.training.batch import Batch, step_generator
from quantitron.training.loop import LoopSettings, Standing, Trained, train_network
from quantitron.training.noise_batches import NoiseSampler, PatchPlan, hold_out, noisy, validation_batches
from quantitron.training.output_files import check_outputs, cut_short, write_outputs
from quantitron.training.volumes import VolumeCollection, read_volumes

logger = logging.getLogger("quantitron")

_TOLD_LEVELS = 5
"""Noise levels that validations during the training look at; the last one looks at all."""
_SLICES_TOLD, _SLABS_TOLD = 8, 2
"""Held out patches of each modality."""


@dataclass(frozen=True)
class DenoiserTraining:
    """Everything that decides about the result, beside the data."""

    shape: UNetShape = field(default_factory=lambda: UNetShape(attention=(2,)))
    """Of the network; the number of modalities is that of the data."""
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(steps=20000))
    plan: PatchPlan = field(default_factory=PatchPlan)
    augmentation: Augmentation = field(default_factory=Augmentation)
    levels: tuple[float, float, int] = (0.005, 0.5, 25)
    """Lowest and highest noise level, relative to the normalised intensity, and how many in between."""
    held_out: float = 0.1
    """Share of the data that validates."""
    voxel_size: float | None = None
    """mm that volumes are brought to; None: as they are."""
    note: str = ""
    """For the card, such as the licence of the data."""

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """All of them, spaced evenly in logarithm.

        Raises:
            ScanError: if there are none.
        """
        low, high, count = self.levels
        if not (0 < low < high <= 10 and 2 <= count <= 1000):
            raise ScanError(f"noise levels must ascend from above zero, not from {low:g} to {high:g}")
        ratio = (high / low) ** (1 / (count - 1))
        return tuple(round(low * ratio**number, 7) for number in range(count))


def train_denoiser(
    data: Path,
    output: Path,
    training: DenoiserTraining,
    device: str = "auto",
    resume: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[Standing], None] | None = None,
) -> dict[str, Any]:
    """Train a denoiser and write it with its card, its loss curve and its last checkpoint.

    Args:
        data: folder or table, see ``read_volumes``.
        output: safetensors file to write; beside it ``<stem>.md`` (card), ``<stem>.loss.csv`` and
            ``<stem>.checkpoint`` (folder).
        training: how.
        device: see ``recon.device``.
        resume: folder of a checkpoint to go on from.
        overwrite: replace what is there; outputs that this training was writing when it ended are its own.
        progress: told after every step.

    Returns:
        The card.

    Raises:
        ScanError: if the data cannot be trained on, an output is there already, or the training failed.
    """
    checkpoint = resume if resume is not None else output.with_suffix(".checkpoint")
    overwrite = overwrite or (resume is not None and cut_short(output, checkpoint))
    check_outputs(output, checkpoint, resume is not None, overwrite, data)
    try:
        chosen = choose_device(device)
    except ValueError as error:
        raise ScanError(str(error)) from error
    levels = training.noise_levels
    collection = read_volumes(data, training.voxel_size)
    shape = _shape(training.shape, collection)
    _check_plan(training.plan, shape)
    learned, held, how = hold_out(collection, training.held_out, training.loop.seed)
    sampler = NoiseSampler(learned, collection.modalities, levels, training.plan, training.augmentation)
    validation = Validation.of(collection, held, levels, training)
    network = ConditionalUNet(shape, torch.Generator().manual_seed(training.loop.seed))
    logger.info(
        "%s; %d volumes to learn from, %d held out (%s); %d weights, on %s",
        ", ".join(f"{count} {name}" for name, count in collection.counts.items()),
        len(learned),
        len(held),
        how,
        sum(weight.numel() for weight in network.parameters()),
        chosen,
    )
    identity = _identity(training, shape, collection)
    trained = train_network(
        network,
        sampler,
        noise_loss,
        training.loop,
        chosen,
        validation,
        checkpoint,
        identity,
        resume is not None,
        progress,
    )
    final = trained.state.validations[-1]
    card = _card(training, shape, collection, (len(learned), len(held), how), trained, final, chosen)
    plan = training.plan
    description = NetworkDescription(
        kind="contrast_denoiser",
        shape=shape,
        modalities=collection.modalities,
        noise_levels=levels,
        patch=plan.slab_size if plan.slab_share > 0 else plan.slice_size,
        least=_least(plan),
        card=card,
    )
    write_outputs(output, checkpoint, trained, description, overwrite)
    return card


def noise_loss(network: ConditionalUNet, batch: Batch) -> Tensor:
    """Mean squared error of the predicted noise, in units of its variance: 1 is knowing nothing.

    Raises:
        ValueError: if the batch has no noise level.
    """
    if batch.level is None:
        raise ValueError("a batch without noise levels")
    predicted = predicted_noise(network, batch.input, batch.level, batch.modality)
    return (predicted - batch.target).square().mean()


@dataclass(frozen=True)
class Validation:
    """How well held out patches are denoised."""

    patches: Mapping[str, Mapping[str, Tensor]]
    """``slices``, ``slabs`` -> modality -> (n, 1, z, y, x)."""
    modalities: tuple[str, ...]
    levels: tuple[float, ...]
    seed: int

    @classmethod
    def of(
        cls,
        collection: VolumeCollection,
        held: tuple[Any, ...],
        levels: tuple[float, ...],
        training: DenoiserTraining,
    ) -> Validation:
        """Cut the patches."""
        plan, seed = training.plan, training.loop.seed
        sets = {}
        if plan.slab_share < 1:
            sets["slices"] = (plan.slice_size, _SLICES_TOLD)
        if plan.slab_share > 0:
            sets["slabs"] = (plan.slab_size, _SLABS_TOLD)
        patches = {
            name: validation_batches(held, collection.modalities, size, count, seed)
            for name, (size, count) in sets.items()
        }
        return cls(patches, collection.modalities, levels, seed)

    def __call__(self, network: ConditionalUNet, last: bool) -> dict[str, Any]:
        """PSNR at a few noise levels, at all of them in the end, and ``score``: the mean gain in dB.

        Args:
            network: with averaged weights.
            last: whether the training has ended.
        """
        count = len(self.levels)
        numbers = torch.linspace(0, count - 1, count if last else min(_TOLD_LEVELS, count))
        return self._at(network, sorted({round(float(number)) for number in numbers}))

    def _at(self, network: ConditionalUNet, numbers: list[int]) -> dict[str, Any]:
        """``slices`` -> modality -> noise level -> [PSNR of the noisy, of the denoised] in dB."""
        device = next(network.parameters()).device
        table: dict[str, Any] = {}
        gains: list[float] = []
        for kind, patches in self.patches.items():
            for name, clean in patches.items():
                rows: dict[str, list[float]] = {}
                for number in numbers:
                    sigma = self.levels[number]
                    level = torch.full((len(clean),), sigma)
                    modality = torch.full((len(clean),), self.modalities.index(name))
                    batch = noisy(clean, level, modality, step_generator(self.seed, number, name)).to(device)
                    assert batch.level is not None
                    denoised = batch.input - sigma * predicted_noise(
                        network, batch.input, batch.level, batch.modality
                    )
                    before, after = (_psnr(image.cpu(), clean) for image in (batch.input, denoised))
                    rows[f"{sigma:.4g}"] = [round(before, 2), round(after, 2)]
                    gains.append(after - before)
                table.setdefault(kind, {})[name] = rows
        return {"score": round(sum(gains) / max(1, len(gains)), 3), **table}


def _psnr(image: Tensor, clean: Tensor) -> float:
    """Peak 1, the 99.5th percentile of a volume."""
    return float(-10 * (image - clean).square().mean().clamp_min(1e-12).log10())


def _shape(wanted: UNetShape, collection: VolumeCollection) -> UNetShape:
    fields = asdict(wanted) | {"modalities": len(collection.modalities), "noise": True}
    return UNetShape(**fields)


def _check_plan(plan: PatchPlan, shape: UNetShape) -> None:
    sizes = {"slices": plan.slice_size[1:], "slabs": plan.slab_size if plan.slab_share > 0 else ()}
    for name, size in sizes.items():
        if any(length < 1 or length % shape.multiple for length in size):
            text = " x ".join(map(str, size))
            raise ScanError(f"{name} of {text} voxels: each must be a multiple of {shape.multiple}")
    if not 0 <= plan.slab_share <= 1 or min(plan.slices, plan.slabs) < 1:
        raise ScanError("the share of slabs must be within 0..1, and a batch hold at least one patch")


def _least(plan: PatchPlan) -> tuple[int, int, int]:
    used = [plan.slice_size] if plan.slab_share < 1 else []
    used += [plan.slab_size] if plan.slab_share > 0 else []
    depth, height, width = (min(sizes) for sizes in zip(*used, strict=True))
    return depth, min(32, height), min(32, width)


def _identity(
    training: DenoiserTraining, shape: UNetShape, collection: VolumeCollection
) -> dict[str, object]:
    """What must be the same for a training to go on. Its length and rate may change."""
    kept = asdict(training)
    for name in ("shape", "loop", "note"):
        del kept[name]
    return {
        "shape": asdict(shape),
        "seed": training.loop.seed,
        "data": collection.checksum,
        "modalities": collection.modalities,
        **kept,
    }


def _card(
    training: DenoiserTraining,
    shape: UNetShape,
    collection: VolumeCollection,
    parts: tuple[int, int, str],
    trained: Trained,
    final: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """For people. Counts and checksums, no names of files."""
    try:
        own = version("quantitron")
    except PackageNotFoundError:
        own = "not installed"
    options = asdict(training)
    del options["shape"], options["note"]
    return {
        "data": {
            "volumes": collection.counts,
            "sha256": collection.checksum,
            "learned_from": parts[0],
            "held_out": parts[1],
            "held_out_by": parts[2],
        },
        "note": training.note,
        "options": options,
        "weights": sum(weight.numel() for weight in trained.network.parameters()),
        "steps": trained.state.step,
        "minutes": round(trained.state.seconds / 60, 1),
        "loss": round(trained.state.last_loss, 5),
        "validation": dict(final),
        "device": device.type,
        "versions": {"quantitron": own, "torch": str(torch.__version__)},
        "date": datetime.date.today().isoformat(),
        "shape": asdict(shape),
    }
