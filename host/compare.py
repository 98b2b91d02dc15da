"""``quantitron compare``: maps against the truth of the same grid, by the metrics of METHODS.md 7."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_file import TRUTH_GROUP, image_groups, read_images
from quantitron.gadgets.map_roles import MAP_ROLES
from quantitron.gadgets.map_volume import MapVolume, map_volumes
from quantitron.recon import metrics

_COMPARED = ("T1", "T2", "T2STAR", "PD", "FREQMAP", "PHASE", "CHI", "CHIPOS", "CHINEG", "R2STAR", "INVERSION")
_RELATIVE = ("T1", "T2", "T2STAR", "PD", "R2STAR", "INVERSION")
_IN_SPHERES = ("T1", "T2", "T2STAR")
_CAPS_MS = {MAP_ROLES[name].name: 1e3 * cap for name, cap in metrics.CAPS.items()}
_MAJORITY = 0.5


def compare(maps_path: str | os.PathLike[str], truth_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Compare every map that both files hold, inside the truth's mask.

    Args:
        maps_path: a map file; its latest run is compared.
        truth_path: a raw file with ground truth in group ``truth``, or a map file.

    Returns:
        A dictionary that JSON can hold: ``mask_voxels``, ``maps`` and, for phantoms with spheres,
        ``spheres``. ``maps`` is role -> ``unit``, ``missing`` (voxels inside the mask without a value, which
        count as 0), ``bias`` and, where they have a meaning, ``nrmse``, ``mape_wm``, ``mape_gm`` (fractions),
        ``slope``, ``intercept``, ``r_squared``, ``rmse`` (signed maps; circular for PHASE) and ``factor``
        (PD, whose other numbers hold after it). T1, T2 and T2STAR are capped at 3500, 200 and 100 ms, except
        for the MAPE and in spheres. ``spheres`` is role -> ``slope``, ``intercept``, ``r_squared`` of the
        means over all spheres and ``list`` of ``label, voxels, reference, mean, variation, bias`` (the last
        two as fractions). What cannot be told is None.

    Raises:
        ScanError: if a file cannot be read, if the grids differ, or if the files have no map in common.
    """
    in_raw = TRUTH_GROUP in image_groups(truth_path)
    if not in_raw and image_groups(maps_path) == [TRUTH_GROUP]:
        raise ScanError(
            f"{maps_path} holds a ground truth and {truth_path} none: the maps come first, the truth second"
        )
    maps = map_volumes(read_images(maps_path))
    truth = map_volumes(read_images(truth_path, TRUTH_GROUP if in_raw else None))
    roles = [role for role in _COMPARED if role in maps and role in truth]
    if not roles:
        raise ScanError(
            f"{maps_path} ({_listed(maps)}) and {truth_path} ({_listed(truth)}) have no map in common"
        )
    for role in roles:
        _check_grid(maps[role], truth[role], Path(maps_path), Path(truth_path))
    mask = _mask(truth, roles, Path(truth_path))
    tissues = {
        name: mask & (truth[role].values > _MAJORITY)
        for name, role in (("wm", "WM"), ("gm", "GM"))
        if role in truth and truth[role].values.shape == mask.shape
    }
    result: dict[str, Any] = {
        "mask_voxels": int(mask.sum()),
        "maps": {role: _compare_map(maps[role], truth[role], mask, tissues) for role in roles},
    }
    if "SPHERES" in truth and truth["SPHERES"].values.shape == mask.shape:
        labels = np.rint(truth["SPHERES"].values).astype(np.int64)
        if (labels > 0).any():
            result["spheres"] = {
                role: _compare_spheres(maps[role], truth[role], labels)
                for role in roles
                if role in _IN_SPHERES
            }
    return result


def table(result: Mapping[str, Any]) -> str:
    """The numbers of ``compare`` as text, one line a map and one a sphere."""
    head = ("map", "NRMSE", "MAPE WM", "MAPE GM", "bias", "RMSE", "unit", "slope", "R^2", "missing")
    rows: list[tuple[str, ...]] = []
    for role, row in result["maps"].items():
        rows.append(
            (
                role,
                _percent(row.get("nrmse")),
                _percent(row.get("mape_wm")),
                _percent(row.get("mape_gm")),
                _number(row.get("bias")),
                _number(row.get("rmse")),
                row["unit"],
                _number(row.get("slope")),
                _number(row.get("r_squared")),
                str(row["missing"]),
            )
        )
    lines = [f"{result['mask_voxels']} voxels inside the mask", *_columns(head, rows)]
    sphere_head = ("map", "sphere", "voxels", "reference", "mean", "bias", "CoV")
    for role, part in result.get("spheres", {}).items():
        rows = [
            (
                role,
                str(sphere["label"]),
                str(sphere["voxels"]),
                _number(sphere["reference"]),
                _number(sphere["mean"]),
                _percent(sphere["bias"]),
                _percent(sphere["variation"]),
            )
            for sphere in part["list"]
        ]
        lines += ["", *_columns(sphere_head, rows)]
        lines.append(
            f"slope {_number(part['slope'])}, R^2 {_number(part['r_squared'])} over the spheres' means"
        )
    return "\n".join(lines)


def _compare_map(
    found: MapVolume, truth: MapVolume, mask: NDArray[np.bool_], tissues: Mapping[str, NDArray[np.bool_]]
) -> dict[str, Any]:
    role = found.role
    estimate, reference = found.values, truth.values
    row: dict[str, Any] = {"unit": truth.unit, "missing": metrics.missing_voxels(estimate, mask)}
    if role == "PHASE":
        row["rmse"] = metrics.circular_rmse(estimate, reference, mask)
        return row
    if role == "PD":  # both are relative: the factor takes the arbitrary scale out
        has_signal = bool(np.any(np.nan_to_num(estimate[mask])))
        row["factor"] = metrics.fitted_factor(estimate, reference, mask) if has_signal else None
        estimate = estimate * np.float32(row["factor"] or 1.0)
    cap = _CAPS_MS.get(role)
    row["bias"] = metrics.bias(estimate, reference, mask, cap)
    if role not in _RELATIVE:
        row["rmse"] = metrics.rmse(estimate, reference, mask)
        return row | _line(metrics.fit_line(estimate, reference, mask))
    if np.any(np.nan_to_num(reference[mask])):
        row["nrmse"] = metrics.nrmse(estimate, reference, mask, cap)
    row |= _line(metrics.fit_line(estimate, reference, mask, cap))
    for name, tissue in tissues.items():
        if np.any(np.nan_to_num(reference[tissue])):
            row[f"mape_{name}"] = metrics.mape(estimate, reference, tissue)
    return row


def _compare_spheres(found: MapVolume, truth: MapVolume, labels: NDArray[np.int64]) -> dict[str, Any]:
    spheres = metrics.sphere_statistics(found.values, truth.values, labels)
    line = metrics.line_through(
        np.array([sphere.mean for sphere in spheres]), np.array([sphere.reference for sphere in spheres])
    )
    return _line(line) | {
        "list": [{name: _finite(value) for name, value in vars(sphere).items()} for sphere in spheres]
    }


def _check_grid(found: MapVolume, truth: MapVolume, maps_path: Path, truth_path: Path) -> None:
    if found.values.shape != truth.values.shape:
        raise ScanError(
            f"map {found.role} is {_shape(found)} in {maps_path} but {_shape(truth)} in {truth_path} "
            "(z x y x x voxels); maps and truth must be on the same grid"
        )
    if found.unit != truth.unit:
        raise ScanError(
            f"map {found.role} is in {found.unit} in {maps_path} but in {truth.unit} in {truth_path}"
        )
    voxel = np.array(truth.voxel_size)
    resized = not np.allclose(found.voxel_size, voxel, rtol=1e-3)
    apart, *ends = np.linalg.norm(found.corners - truth.corners, axis=1).tolist()
    if resized or apart > 0.1 * voxel.min():
        raise ScanError(
            f"map {found.role} lies elsewhere in {maps_path} than in {truth_path}: first voxels "
            f"{apart:.3g} mm apart, voxel sizes {_sizes(found)} and {_sizes(truth)} mm (z, y, x)"
        )
    if max(ends) > 0.1 * voxel.min():
        raise ScanError(
            f"map {found.role} is turned or mirrored in {maps_path} against {truth_path}: first voxels are "
            f"at one place, the last ones along x, y and z {', '.join(f'{end:.3g}' for end in ends)} mm apart"
        )


def _mask(truth: Mapping[str, MapVolume], roles: list[str], path: Path) -> NDArray[np.bool_]:
    """The truth's mask; without one, where all its compared maps have values other than 0."""
    shape = truth[roles[0]].values.shape
    if "MASK" in truth:
        mask: NDArray[np.bool_] = truth["MASK"].values > 0
        if mask.shape != shape:
            raise ScanError(f"{path}: MASK is {mask.shape}, but map {roles[0]} is {shape}")
    else:
        relative = [role for role in roles if role in _RELATIVE] or roles
        mask = np.all([np.nan_to_num(truth[role].values) != 0 for role in relative], axis=0)
    if not mask.any():
        raise ScanError(f"{path}: the mask is empty, so there is nothing to compare")
    return mask


def _line(line: metrics.Line) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in vars(line).items()}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _listed(volumes: Mapping[str, MapVolume]) -> str:
    return ", ".join(volumes) or "no maps"


def _shape(volume: MapVolume) -> str:
    return " x ".join(str(points) for points in volume.values.shape)


def _sizes(volume: MapVolume) -> str:
    return " x ".join(f"{size:.4g}" for size in volume.voxel_size)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _columns(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
