"""``quantitron train-arnet`` and ``train-series-denoiser``: options to a training, and its progress line."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from quantitron.gadgets.errors import ScanError
from quantitron.host.train import TrainingLine
from quantitron.reports.loss_figure import draw_losses
from quantitron.training.artifact_scan import ScanPlan
from quantitron.training.loop import LoopSettings
from quantitron.training.output_files import FIGURE, LOSSES
from quantitron.training.series_batches import SeriesPatches
from quantitron.training.series_pairs import PairPlan
from quantitron.training.series_training import (
    SeriesTraining,
    train_artifact_removal,
    train_series_denoiser,
)

logger = logging.getLogger("quantitron")

TRAININGS = {"artifact_removal": train_artifact_removal, "series_denoiser": train_series_denoiser}


def run_series_training(
    kind: str,
    phantoms: Sequence[str],
    output: Path,
    scan: Mapping[str, Any],
    acquired: Sequence[int | None],
    slices: Mapping[str, Any],
    patches: Mapping[str, Any],
    loop: Mapping[str, Any],
    options: Mapping[str, Any],
    device: str = "auto",
    threads: int | None = None,
    resume: Path | None = None,
    overwrite: bool = False,
    shown: bool = True,
) -> dict[str, Any]:
    """Train a network for coefficient images.

    Args:
        kind: one of ``TRAININGS``.
        phantoms: ``mni`` or ``FILE.npz``.
        output: weights to write.
        scan: fields of ``ScanPlan`` but for ``acquired``; an ``snr`` of 0 is noise-free.
        acquired: numbers of interleaves, a scan each; None: all.
        slices: fields of ``PairPlan`` but for the scans.
        patches: fields of ``SeriesPatches``.
        loop: fields of ``LoopSettings``.
        options: further fields of ``SeriesTraining``.
        device: to train on.
        threads: of the CPU.
        resume: checkpoint to go on from.
        overwrite: replace outputs.
        shown: whether there is a progress line.

    Returns:
        The card.

    Raises:
        ScanError: if anything fails.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    values = {**scan, "snr": scan["snr"] if scan.get("snr") else math.inf} if "snr" in scan else dict(scan)
    interleaves = int(values.get("interleaves", ScanPlan.interleaves))
    scans = tuple(ScanPlan(**values, acquired=None if n == interleaves else n) for n in acquired)
    training = SeriesTraining(
        PairPlan(scans, **slices),
        loop=LoopSettings(**loop, warm_up=_warm_up(int(loop["steps"]))),
        patches=SeriesPatches(**patches),
        **options,
    )
    console = Console(stderr=True)
    line = TrainingLine(console, shown)

    def simulated(done: int, total: int) -> None:
        line.progress.update(line.task, completed=done / total, description=f"slice {done} of {total}")
        if not line.watched:
            logger.info("slice %d of %d", done, total)

    with line.progress:
        try:
            card = TRAININGS[kind](phantoms, output, training, device, resume, overwrite, line, simulated)
        except ValueError as error:
            if isinstance(error, ScanError):
                raise
            raise ScanError(str(error)) from error
    draw_losses(output.with_suffix(LOSSES), output.with_suffix(FIGURE))
    return card


def _warm_up(steps: int) -> int:
    """A tenth of a short training; 100 steps of others."""
    return min(100, max(1, steps // 10)) if steps else 100
