"""``quantitron train-denoiser``: options to a training, and its progress line."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from quantitron.gadgets.errors import ScanError
from quantitron.recon.networks.conditional_unet import UNetShape
from quantitron.reports.loss_figure import draw_losses
from quantitron.training.augmentation import Augmentation
from quantitron.training.denoiser_training import DenoiserTraining
from quantitron.training.denoiser_training import train_denoiser as train
from quantitron.training.loop import LoopSettings, Standing
from quantitron.training.noise_batches import PatchPlan
from quantitron.training.output_files import FIGURE, LOSSES

logger = logging.getLogger("quantitron")

_LOG_EVERY = 60.0
"""Seconds between lines where nobody watches a terminal."""


def run_training(
    data: Path,
    output: Path,
    shape: Mapping[str, Any],
    loop: Mapping[str, Any],
    plan: Mapping[str, Any],
    augmentation: Mapping[str, Any],
    options: Mapping[str, Any],
    device: str = "auto",
    threads: int | None = None,
    resume: Path | None = None,
    overwrite: bool = False,
    shown: bool = True,
) -> dict[str, Any]:
    """Train a denoiser.

    Args:
        data: folder or table of volumes.
        output: weights to write.
        shape: fields of ``UNetShape``.
        loop: fields of ``LoopSettings``.
        plan: fields of ``PatchPlan``.
        augmentation: fields of ``Augmentation``.
        options: further fields of ``DenoiserTraining``.
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
    try:
        training = DenoiserTraining(
            shape=UNetShape(**shape),
            loop=LoopSettings(**loop),
            plan=PatchPlan(**plan),
            augmentation=Augmentation(**augmentation),
            **options,
        )
    except ValueError as error:
        raise ScanError(str(error)) from error
    console = Console(stderr=True)
    line = TrainingLine(console, shown)
    with line.progress:
        card = train(data, output, training, device, resume, overwrite, line)
    draw_losses(output.with_suffix(LOSSES), output.with_suffix(FIGURE))
    return card


class TrainingLine:
    """Loss, speed and time left: a line that moves on a terminal, else one a minute in the log."""

    def __init__(self, console: Console, shown: bool) -> None:
        """Make the line.

        Args:
            console: on stderr.
            shown: whether to show it.
        """
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self.task = self.progress.add_task("reading the data", total=1.0)
        self.watched = console.is_terminal
        self.told = -_LOG_EVERY

    def __call__(self, standing: Standing) -> None:
        """Show where the training stands."""
        text = (
            f"step {standing.step}, loss {standing.loss:.4f}, {standing.images_per_second:.1f} images/s, "
            f"{_time(standing.seconds_left)} left"
        )
        self.progress.update(self.task, completed=standing.share, description=text)
        now = time.monotonic()
        if not self.watched and (now - self.told > _LOG_EVERY or standing.share >= 1):
            self.told = now
            logger.info("%s", text)
        if standing.validation is not None:
            for sentence in validation_lines(standing.validation):
                if self.watched and not self.progress.disable:
                    self.progress.console.print(sentence, highlight=False)  # above the line that moves
                else:
                    logger.info("%s", sentence)


def validation_lines(validation: Mapping[str, Any]) -> list[str]:
    """PSNR per modality and noise level, a line a modality."""
    lines = [f"validation after {validation['step']} steps: {validation['score']:+.2f} dB in the mean"]
    for kind in ("slices", "slabs"):
        for name, rows in dict(validation.get(kind, {})).items():
            cells = ", ".join(
                f"{level}: {before:.1f} -> {after:.1f}" for level, (before, after) in rows.items()
            )
            lines.append(f"  {kind} {name} PSNR at noise {cells}")
    return lines


def _time(seconds: float) -> str:
    if seconds > 1e7:
        return "? min"
    minutes = int(seconds // 60)
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {int(seconds % 60)} s"
    )
