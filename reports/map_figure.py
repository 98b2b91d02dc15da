"""Pictures of maps: beside the truth with the error, or alone.

Colours follow the relaxometry recommendation (doi 10.1002/mrm.30290): lipari for T1, navia for T2 and T2*,
black where there is no value.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from cmcrameri import cm
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.map_roles import MAP_ROLES
from quantitron.gadgets.map_volume import MapVolume
from quantitron.recon.metrics import CAPS

TITLES = {
    "T1": "T1",
    "T2": "T2",
    "T2STAR": "T2*",
    "PD": "PD",
    "FREQMAP": "B0",
    "PHASE": "phase",
    "CHI": "χ",
    "CHIPOS": "χ+",
    "CHINEG": "χ-",
    "R2STAR": "R2*",
    "INVERSION": "inversion efficiency",
    "Image": "magnitude",
}
"""Role -> what it is called in a figure, in the order of panels."""

_COLOURS = {"T1": cm.lipari, "T2": cm.navia, "T2STAR": cm.navia, "R2STAR": cm.navia, "PHASE": cm.vikO}
_SIGNED = ("FREQMAP", "PHASE", "CHI", "CHINEG")
_FULL_SCALE = {"T1": 3000.0, "T2": 150.0, "T2STAR": 100.0}
_CAPS_MS = {MAP_ROLES[name].name: 1e3 * cap for name, cap in CAPS.items()}
_PANEL = 2.6
"""Width of one panel [inch]."""


@dataclass(frozen=True)
class _Panel:
    title: str
    values: NDArray[np.float32]
    colours: Colormap
    limits: tuple[float, float]
    unit: str


def figure_beside_truth(
    path: str | os.PathLike[str],
    maps: Mapping[str, MapVolume],
    truth: Mapping[str, MapVolume],
    title: str = "",
    slice_index: int | None = None,
) -> None:
    """Write a PNG with a column for each map: truth, estimate and difference, inside the truth's mask.

    Args:
        path: PNG file to write.
        maps: role -> map, from ``map_volumes``.
        truth: role -> map on the same grid; its MASK, where present, is what is shown.
        title: line above all.
        slice_index: partition z to show; None takes the one with most voxels inside the mask.

    Raises:
        ScanError: if there is no map in common, or the file cannot be written.
    """
    roles = [role for role in TITLES if role in maps and role in truth]
    if not roles:
        raise ScanError("maps and truth have no map in common to draw")
    shape = truth[roles[0]].values.shape
    mask = truth["MASK"].values > 0 if "MASK" in truth else np.isfinite(truth[roles[0]].values)
    if any(volume[role].values.shape != shape for volume in (maps, truth) for role in roles):
        raise ScanError("maps and truth are not on the same grid and cannot be drawn side by side")
    z = _fullest(mask) if slice_index is None else slice_index
    rows = []
    for role in roles:
        found, right = (np.where(mask[z], volume[role].values[z], np.nan) for volume in (maps, truth))
        if role == "PD":  # relative: bring it to the scale of the truth
            pair = np.isfinite(found) & np.isfinite(right)
            energy = float(np.sum(found[pair] ** 2))
            found = found * (float(np.sum(found[pair] * right[pair])) / energy if energy > 0 else 1.0)
        # beyond these no scan resolves fluid, and the metrics do not count it either
        cap = _CAPS_MS.get(role, math.inf)
        difference = np.minimum(found, cap) - np.minimum(right, cap)
        if role == "PHASE":
            difference = np.angle(np.exp(1j * difference))
        limits = _limits(role, right)
        half = 0.25 * (limits[1] - limits[0])
        unit = truth[role].unit
        colours = _colours(role)
        rows.append(
            [
                _Panel(f"{TITLES[role]} truth", right, colours, limits, unit),
                _Panel(f"{TITLES[role]} reconstructed", found, colours, limits, unit),
                _Panel("difference", difference, _black_where_missing(cm.vik), (-half, half), unit),
            ]
        )
    _write(path, list(zip(*rows, strict=True)), maps[roles[0]].voxel_size, title)


def figure_of_maps(
    path: str | os.PathLike[str],
    maps: Mapping[str, MapVolume],
    magnitude: Sequence[MapVolume] = (),
    title: str = "",
    slice_index: int | None = None,
) -> None:
    """Write a PNG of the maps of a scan without truth: the magnitude image of the first echo, then each map.

    Args:
        path: PNG file to write.
        maps: role -> map, from ``map_volumes``; MASK, where present, blackens what lies outside.
        magnitude: magnitude images, from ``magnitude_volumes``; the first is drawn.
        title: line above all.
        slice_index: partition z to show; None takes the one with most voxels inside the mask.

    Raises:
        ScanError: if there is nothing to draw, or the file cannot be written.
    """
    volumes = [*magnitude[:1], *(maps[role] for role in TITLES if role in maps)]
    if not volumes:
        raise ScanError("there is no map to draw")
    mask = maps["MASK"].values > 0 if "MASK" in maps else np.isfinite(volumes[0].values)
    z = _fullest(mask) if slice_index is None else slice_index
    panels = []
    for volume in volumes:
        values = volume.values[z]
        if volume.role != "Image":
            values = np.where(mask[z], values, np.nan)
        name = TITLES[volume.role]
        if volume.role == "Image" and volume.echo_time is not None:
            name = f"{name}, TE {volume.echo_time:.3g} ms"
        panels.append(_Panel(name, values, _colours(volume.role), _limits(volume.role, values), volume.unit))
    columns = min(4, len(panels)) if len(panels) != 5 else 3
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    _write(path, rows, volumes[0].voxel_size, title)


def _fullest(mask: NDArray[np.bool_]) -> int:
    return int(np.argmax(mask.sum(axis=(1, 2))))


def _black_where_missing(colours: Colormap) -> Colormap:
    return colours.with_extremes(bad="black")


def _colours(role: str) -> Colormap:
    other = cm.vik if role in _SIGNED else matplotlib.colormaps["gray"]
    return _black_where_missing(_COLOURS.get(role, other))


def _limits(role: str, values: NDArray[np.float32]) -> tuple[float, float]:
    """Colour limits: those of brain tissue where they suit the relaxation times, else from the values."""
    known = values[np.isfinite(values)]
    top = float(np.percentile(np.abs(known), 99)) if known.size else 1.0
    top = top or 1.0
    if role == "PHASE":
        return -math.pi, math.pi
    if role in _SIGNED:
        return -top, top
    full = _FULL_SCALE.get(role)
    if full is not None and known.size and 0.2 * full < float(np.median(known)) < 0.8 * full:
        top = full
    return 0.0, top


def _write(
    path: str | os.PathLike[str],
    rows: Sequence[Sequence[_Panel]],
    voxel_size: tuple[float, float, float],
    title: str,
) -> None:
    columns = max(len(row) for row in rows)
    height, width = (
        points * size for points, size in zip(rows[0][0].values.shape, voxel_size[1:], strict=True)
    )
    shape = min(max(height / width, 0.5), 2.0)
    figure = Figure(
        figsize=(columns * _PANEL * 1.25, len(rows) * _PANEL * shape + (0.4 if title else 0)),
        layout="constrained",
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, panel in zip(line, row, strict=False):
            drawn = axes.imshow(
                np.ma.masked_invalid(panel.values),
                cmap=panel.colours,
                vmin=panel.limits[0],
                vmax=panel.limits[1],
                aspect=voxel_size[1] / voxel_size[2],
                interpolation="nearest",
            )
            axes.set_title(panel.title, fontsize=9)
            bar = figure.colorbar(drawn, ax=axes, shrink=0.85, pad=0.02)
            bar.ax.tick_params(labelsize=7)
            bar.set_label(panel.unit, fontsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ScanError(f"cannot write {path}: {error.strerror or error}") from error
