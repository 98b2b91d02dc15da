"""What a training writes beside its weights; that it can is settled before hours are spent."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.network_weights import write_network
from quantitron.gadgets.output_file import check_no_input
from quantitron.recon.networks.trained_network import NetworkDescription
from quantitron.training.checkpoint import STATE, holds_nothing
from quantitron.training.loop import Trained
from quantitron.training.model_card import card_text

CARD, LOSSES, FIGURE = ".md", ".loss.csv", ".loss.png"
"""Endings of what is written beside the weights."""
_MARK = "outputs.txt"
"""File in the folder of checkpoints that names the weights while all outputs are written."""


def check_outputs(
    output: Path, checkpoint: Path, resume: bool, overwrite: bool, *inputs: str | os.PathLike[str]
) -> None:
    """Refuse to begin what could not be written in the end, or would replace what is there.

    Args:
        output: weights to write, with a card and a loss curve beside them.
        checkpoint: folder.
        resume: whether the checkpoint is to go on from.
        overwrite: whether to replace what is there.
        inputs: files that the training reads; they are never replaced.

    Raises:
        ScanError: in one sentence.
    """
    if output.suffix != ".safetensors":
        raise ScanError(f"{output} must end in .safetensors")
    for ending in (output.suffix, CARD, LOSSES, FIGURE):
        written = output.with_suffix(ending)
        check_no_input(written, *inputs)
        if written.exists() and not overwrite:
            raise ScanError(f"{written} is there already; --overwrite replaces it")
    held = (checkpoint / STATE).exists()
    if resume and not held:
        raise ScanError(f"{checkpoint} holds no checkpoint of a training")
    if checkpoint.exists() and not checkpoint.is_dir():
        raise ScanError(f"{checkpoint} is no folder, and checkpoints would be written there")
    if checkpoint.exists() and not (resume or overwrite or holds_nothing(checkpoint)):
        goes_on = "--resume goes on, " if held else ""
        raise ScanError(f"{checkpoint} holds a training already: {goes_on}--overwrite starts anew")
    if not output.parent.is_dir():
        raise ScanError(f"there is no folder {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise ScanError(f"nothing may be written to {output.parent}")


def write_outputs(
    output: Path, checkpoint: Path, trained: Trained, description: NetworkDescription, overwrite: bool
) -> None:
    """Write weights, card and table of losses. A mark in the checkpoint stays where that fails or is killed.

    Args:
        output: weights; the others go beside them.
        checkpoint: folder, with a checkpoint.
        trained: the network and its losses.
        description: of the network, for its file and its card.
        overwrite: replace what is there.

    Raises:
        ScanError: if a file cannot be written.
    """
    mark = checkpoint / _MARK
    write_text(mark, str(output.resolve()))
    checksum = write_network(output, trained.network, description, overwrite)
    write_text(output.with_suffix(CARD), card_text(output.name, description, checksum))
    write_losses(output.with_suffix(LOSSES), trained)
    mark.unlink(missing_ok=True)


def cut_short(output: Path, checkpoint: Path) -> bool:
    """Whether the training of this checkpoint ended while it wrote these outputs, which are its own so.

    Args:
        output: weights.
        checkpoint: folder, which need not exist.
    """
    try:
        return (checkpoint / _MARK).read_text(encoding="utf-8") == str(output.resolve())
    except (OSError, ValueError):
        return False


def write_text(path: Path, text: str) -> None:
    """Write a page, or say in one sentence (ScanError) why not."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ScanError(f"{path} cannot be written: {error.strerror}") from error


def write_losses(path: Path, trained: Trained) -> None:
    """Write the loss curve as a table: step, loss, rate, seconds, gain in validation [dB].

    Raises:
        ScanError: if it cannot be written.
    """
    try:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["step", "loss", "rate", "seconds", "validation_gain_db"])
            scores = {int(entry["step"]): entry["score"] for entry in trained.state.validations}
            points = {
                int(step): (f"{loss:.6g}", f"{rate:.4g}", seconds)
                for step, loss, rate, seconds in trained.state.losses
            }
            for step in sorted(scores.keys() | points.keys()):
                writer.writerow([step, *points.get(step, ("", "", "")), scores.get(step, "")])
    except OSError as error:
        raise ScanError(f"{path} cannot be written: {error.strerror}") from error
