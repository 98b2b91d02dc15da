"""From images back to maps: values in their units, slices stacked, whatever the storage was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.map_roles import MAP_ROLES, role_named

_BACKGROUND = {role.name for role in MAP_ROLES.values() if role.background}


@dataclass(frozen=True)
class MapVolume:
    """One map of a scan."""

    role: str
    """``GADGETRON_DataRole``: T1, T2SD, MASK, ...; ``Image`` for a magnitude image."""
    unit: str
    """ms, 1/s, Hz, rad, ppb or a.u."""
    values: NDArray[np.float32]
    """(z, y, x) in ``unit``; NaN where there is no value (0 in masks and tissue fractions)."""
    voxel_size: tuple[float, float, float]
    """Distance of neighbouring voxels (z, y, x) [mm]."""
    images: tuple[ismrmrd.Image, ...]
    """The images that the map was put together from, in the order of z."""

    @property
    def first_voxel(self) -> NDArray[np.float64]:
        """(3,) centre of voxel (0, 0, 0), patient LPS [mm]."""
        image = self.images[0]
        corner = np.array(image.position, np.float64)
        steps = self.voxel_size[::-1]  # (x, y, z)
        directions = (image.read_dir, image.phase_dir, image.slice_dir)
        for points, step, direction in zip(image.matrix_size, steps, directions, strict=True):
            corner -= (int(points) // 2) * step * np.array(direction, np.float64)
        return corner

    @property
    def corners(self) -> NDArray[np.float64]:
        """(4, 3) centres of the first voxel and of those at the other ends of x, y and z, LPS [mm]."""
        image, last = self.images[0], self.images[-1]
        directions = np.array([image.read_dir, image.phase_dir, last.slice_dir], np.float64)
        points = np.array(image.matrix_size, np.float64)
        along = ((points - 1) * self.voxel_size[::-1])[:, np.newaxis] * directions  # (x y z, 3)
        # Where several slices or slabs lie is told by their positions.
        along[2] += np.subtract(last.position, image.position, dtype=np.float64)
        corners: NDArray[np.float64] = self.first_voxel + np.concatenate([np.zeros((1, 3)), along])
        return corners

    @property
    def echo_time(self) -> float | None:
        """Echo time [ms] of a magnitude image; None for maps."""
        value = self.images[0].meta.get("EchoTime")
        return None if value is None else float(value)


def map_volumes(images: Iterable[ismrmrd.Image]) -> dict[str, MapVolume]:
    """The quantitative maps among the images, by role, without previews; of several runs the last.

    Raises:
        ScanError: if a map's scale is missing or its slices differ in size.
    """
    series: dict[str, list[ismrmrd.Image]] = {}
    for image in images:
        role = image.meta.get("GADGETRON_DataRole")
        known = role_named(role) if isinstance(role, str) else None
        if known is not None and image.image_series_index == known.series:
            series.setdefault(known.name, []).append(image)
    return {role: _volume(role, parts) for role, parts in series.items()}


def magnitude_volumes(images: Iterable[ismrmrd.Image]) -> list[MapVolume]:
    """The ordinary magnitude images, by ascending series (echo); of several runs the last.

    Raises:
        ScanError: if an image's scale is missing or the slices of a series differ in size.
    """
    series: dict[int, list[ismrmrd.Image]] = {}
    for image in images:
        if image.meta.get("GADGETRON_DataRole") == "Image":
            series.setdefault(image.image_series_index, []).append(image)
    return [_volume("Image", series[index]) for index in sorted(series)]


def _volume(role: str, parts: list[ismrmrd.Image]) -> MapVolume:
    parts = sorted(_last_run(parts), key=lambda image: int(image.slice))
    if len({image.data.shape[1:] for image in parts}) > 1:
        raise ScanError(f"the images of map {role} differ in size")
    values = np.concatenate([_values(role, image) for image in parts])  # (z, y, x)
    first = parts[0]
    size_x, size_y, size_z = (
        float(extent) / int(points)
        for extent, points in zip(first.field_of_view, first.matrix_size, strict=True)
    )
    if len(parts) > 1 and first.matrix_size[2] == 1:
        size_z = float(np.linalg.norm(np.subtract(parts[1].position, first.position)))
    return MapVolume(role, _unit(first), values, (size_z, size_y, size_x), tuple(parts))


def _last_run(parts: list[ismrmrd.Image]) -> list[ismrmrd.Image]:
    """Images of the series that was written last: a client that is given a group again appends to it."""
    last = parts[-1].meta.get("SeriesInstanceUID")
    return [image for image in parts if image.meta.get("SeriesInstanceUID") == last]


def _unit(image: ismrmrd.Image) -> str:
    return str(image.meta.get("Quantitron_Unit", "a.u."))


def _values(role: str, image: ismrmrd.Image) -> NDArray[np.float32]:
    """(z, y, x) in the map's unit, from stored = value x ratio + offset."""
    try:
        ratio = float(image.meta["GADGETRON_ScaleRatio"])
        offset = float(image.meta["GADGETRON_ScaleOffset"])
    except (KeyError, TypeError, ValueError):
        raise ScanError(
            f"an image of map {role} does not say how it is scaled (GADGETRON_ScaleRatio)"
        ) from None
    if not ratio > 0:
        raise ScanError(f"an image of map {role} has GADGETRON_ScaleRatio {ratio:g}")
    stored = image.data[0]  # (z, y, x)
    if np.iscomplexobj(stored):
        raise ScanError(f"an image of map {role} is complex; maps are float32 or uint16")
    values: NDArray[np.float32] = ((stored.astype(np.float64) - offset) / ratio).astype(np.float32)
    if stored.dtype == np.uint16 and role not in _BACKGROUND and role != "Image":
        values[stored == 0] = np.nan
    return values
