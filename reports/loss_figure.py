"""The curve of a training: its loss, and what held out data gained."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from quantitron.gadgets.errors import ScanError


def draw_losses(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Draw a loss curve.

    Args:
        source: table with the columns ``step``, ``loss`` and ``validation_gain_db``, which may be empty.
        output: PNG file.

    Raises:
        ScanError: if the table cannot be read or the picture cannot be written.
    """
    try:
        with Path(source).open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        losses = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
        gains = [
            (int(row["step"]), float(row["validation_gain_db"])) for row in rows if row["validation_gain_db"]
        ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ScanError(f"{source} is no table of a training's losses: {error}") from error
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], color="black", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if losses and min(loss for _, loss in losses) > 0:
        axes.set_yscale("log")
    if gains:
        beside = axes.twinx()
        beside.plot([step for step, _ in gains], [gain for _, gain in gains], "o-", color="tab:red")
        beside.set_ylabel("mean gain of held out patches [dB]", color="tab:red")
    try:
        canvas.print_png(str(output))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ScanError(f"{output} cannot be written: {error.strerror}") from error
