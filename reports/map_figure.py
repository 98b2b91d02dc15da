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
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.map_roles import MAP_ROLES
from quantitron.gadgets.map_volume import MapVolume
from quantitron.recon import metrics

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
_CAPS_MS = {MAP_ROLES[name].name: 1e3 * cap for name, cap in metrics.CAPS.items()}
_ERRORS = cm.vik.with_extremes(bad="black")
_PANEL = 2.6
"""Width of one panel [inch]."""
_BAR = 0.42
"""Width of a colour bar with its numbers, in panels."""
ERROR_SCALE = 0.15
"""Error at the end of its colours, as a share of the range of the map's."""
MARGIN = 2
"""Voxels shown around the mask."""


@dataclass(frozen=True)
class _Panel:
    title: str
    values: NDArray[np.float32]
    colours: Colormap
    limits: tuple[float, float]
    unit: str
    note: str = ""
    """Written into the corner."""


def figure_beside_truth(
    path: str | os.PathLike[str],
    methods: Mapping[str, Mapping[str, MapVolume]],
    truth: Mapping[str, MapVolume],
    title: str = "",
    slice_index: int | None = None,
    roles: Sequence[str] = tuple(TITLES),
) -> None:
    """Write a PNG with a row for each map: truth, each method, each method's error, inside the truth's mask.

    All maps of a row share their colours, and so do all errors. The number in the corner of an error is that
    of the whole volume.

    Args:
        path: PNG file to write.
        methods: name as it will be shown -> role -> map, from ``map_volumes``.
        truth: role -> map on the same grid; its MASK, where present, is what is shown.
        title: line above all.
        slice_index: partition z to show; None takes the one with most voxels inside the mask.
        roles: maps to show, of those that the truth and every method have.

    Raises:
        ScanError: if there is no map in common, or the file cannot be written.
    """
    shown = [role for role in roles if role in truth and all(role in maps for maps in methods.values())]
    if not shown or not methods:
        raise ScanError("maps and truth have no map in common to draw")
    shape = truth[shown[0]].values.shape
    mask = truth["MASK"].values > 0 if "MASK" in truth else np.isfinite(truth[shown[0]].values)
    if any(volume[role].values.shape != shape for volume in (truth, *methods.values()) for role in shown):
        raise ScanError("maps and truth are not on the same grid and cannot be drawn side by side")
    if not mask.any():
        raise ScanError("the mask of the truth is empty, so there is nothing to draw")
    z = _fullest(mask) if slice_index is None else slice_index
    window = _surroundings(mask[z])

    def seen(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.where(mask[z], values[z], np.nan)[window]

    rows = []
    for role in shown:
        reference, unit = truth[role].values, truth[role].unit
        limits, colours = _limits(role, seen(reference)), _colours(role)
        half = ERROR_SCALE * (limits[1] - limits[0])
        maps, errors = [_Panel("truth", seen(reference), colours, limits, unit)], []
        for name, method in methods.items():
            found, difference, note = _against(role, method[role].values, reference, mask, unit)
            maps.append(_Panel(name, seen(found), colours, limits, unit))
            errors.append(
                _Panel(f"{name} \N{MINUS SIGN} truth", seen(difference), _ERRORS, (-half, half), unit, note)
            )
        rows.append((TITLES[role], maps, errors))
    _write_rows(path, rows, truth[shown[0]].voxel_size, title)


def _against(
    role: str,
    found: NDArray[np.float32],
    reference: NDArray[np.float32],
    mask: NDArray[np.bool_],
    unit: str,
) -> tuple[NDArray[np.float32], NDArray[np.float32], str]:
    """A map on the scale of the truth, its error, and the error as a number."""
    if role == "PD":  # relative: bring it to the scale of the truth
        found = found * np.float32(metrics.fitted_factor(found, reference, mask))
    if role == "PHASE":
        difference = np.angle(np.exp(1j * (found - reference))).astype(np.float32)
        return found, difference, f"RMSE\n{metrics.circular_rmse(found, reference, mask):.2g} {unit}"
    # beyond these no scan resolves fluid, and the metrics do not count it either
    cap = _CAPS_MS.get(role, math.inf)
    difference = np.minimum(found, cap) - np.minimum(reference, cap)
    if role in _SIGNED:
        return found, difference, f"RMSE\n{metrics.rmse(found, reference, mask):.2g} {unit}"
    return found, difference, f"NRMSE\n{100 * metrics.nrmse(found, reference, mask, cap):.1f} %"


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


def _surroundings(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The part of a slice that is not empty, and a margin; all of it where nothing is inside the mask."""
    if not mask.any():
        return slice(None), slice(None)
    window = []
    for axis in (1, 0):
        inside = np.flatnonzero(mask.any(axis=axis))
        window.append(slice(max(int(inside[0]) - MARGIN, 0), int(inside[-1]) + 1 + MARGIN))
    return window[0], window[1]


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
    """Panels that have nothing in common, each with its own colour bar."""
    columns = max(len(row) for row in rows)
    size = (columns * _PANEL * 1.25, len(rows) * _PANEL * _height(rows[0][0], voxel_size))
    figure = _figure(size, title)
    grid: Any = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, panel in zip(line, row, strict=False):
            drawn = _draw(axes, panel, voxel_size)
            axes.set_title(panel.title, fontsize=9)
            _colour_bar(figure, drawn, axes, panel)
    _save(figure, path)


def _write_rows(
    path: str | os.PathLike[str],
    rows: Sequence[tuple[str, Sequence[_Panel], Sequence[_Panel]]],
    voxel_size: tuple[float, float, float],
    title: str,
) -> None:
    """Rows of maps and errors, one colour bar for the maps of a row and one for its errors."""
    _, maps, errors = rows[0]
    columns = len(maps) + len(errors)
    size = ((columns + 2 * _BAR) * _PANEL, len(rows) * _PANEL * _height(maps[0], voxel_size))
    figure = _figure(size, title, ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0))
    grid: Any = figure.subplots(len(rows), columns, squeeze=False)
    for number, (line, (name, maps, errors)) in enumerate(zip(grid, rows, strict=True)):
        for axes, panel in zip(line, (*maps, *errors), strict=True):
            drawn = _draw(axes, panel, voxel_size)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if number == 0:
                axes.set_title(panel.title, fontsize=11)
            axes.text(0.03, 0.02, panel.note, transform=axes.transAxes, color="white", fontsize=9)
            if panel is maps[-1]:
                _colour_bar(figure, drawn, list(line[: len(maps)]), panel)
            elif panel is errors[-1]:
                _colour_bar(figure, drawn, list(line[len(maps) :]), panel)
        line[0].set_ylabel(name, fontsize=13, rotation=0, ha="right", va="center", labelpad=6)
    _save(figure, path)


def _height(panel: _Panel, voxel_size: tuple[float, float, float]) -> float:
    """Height of a panel over its width, within reason."""
    height, width = (points * size for points, size in zip(panel.values.shape, voxel_size[1:], strict=True))
    return float(min(max(height / width, 0.5), 2.0))


def _figure(size: tuple[float, float], title: str, layout: ConstrainedLayoutEngine | None = None) -> Figure:
    width, height = size
    figure = Figure(
        figsize=(width, height + (0.4 if title else 0)), layout=layout or "constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _draw(axes: Axes, panel: _Panel, voxel_size: tuple[float, float, float]) -> AxesImage:
    return axes.imshow(
        np.ma.masked_invalid(panel.values),
        cmap=panel.colours,
        vmin=panel.limits[0],
        vmax=panel.limits[1],
        aspect=voxel_size[1] / voxel_size[2],
        interpolation="nearest",
    )


def _colour_bar(figure: Figure, drawn: AxesImage, beside: Axes | list[Axes], panel: _Panel) -> None:
    beyond = "both" if panel.limits[0] < 0 else "max"
    bar = figure.colorbar(drawn, ax=beside, shrink=0.9, pad=0.02, extend=beyond, extendfrac=0.03)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(panel.unit, fontsize=7)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ScanError(f"cannot write {path}: {error.strerror or error}") from error
