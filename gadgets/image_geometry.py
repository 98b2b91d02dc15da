"""Where images lie in the patient: from acquisition headers to positions, directions, fields of view.

Voxel i lies at (i - n/2) Delta along +read, +phase and +slice direction, and ``position`` of a volume is the
centre of voxel n/2 (n // 2 for odd n). Cropping about voxel n/2 therefore leaves ``position`` as the
acquisitions give it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import HEADER_DTYPE

Layout = Literal["volume", "slices"]
Voxel = TypeVar("Voxel", bound=np.generic)
_AXES = {"read_dir": (1.0, 0.0, 0.0), "phase_dir": (0.0, 1.0, 0.0), "slice_dir": (0.0, 0.0, 1.0)}


@dataclass(frozen=True)
class Placement:
    """One image to be cut from an array (s, z, y, x), and where it lies."""

    slabs: tuple[int, ...]
    """Indices s that the image is stacked from, in the order of its z axis."""
    partitions: slice
    """Range of z taken from each of them."""
    slice_index: int
    """``slice`` of the image header: ascending along the slice direction."""
    position: NDArray[np.float64]
    """(3,) centre of voxel n/2 of the image, patient LPS [mm]."""
    field_of_view: tuple[float, float, float]
    """(x, y, z) extent of the image [mm]."""
    header: NDArray[np.void]
    """Acquisition header (``HEADER_DTYPE`` scalar) for directions, table position and time stamps."""

    def cut(self, values: NDArray[Voxel]) -> NDArray[Voxel]:
        """The image's own voxels (z, y, x) of an array (s, z, y, x)."""
        part = values[list(self.slabs)][:, self.partitions]  # (s, z, y, x)
        return part.reshape(-1, *values.shape[2:])


def axial_header() -> NDArray[np.void]:
    """An acquisition header (``HEADER_DTYPE`` scalar) of an axial slab at the isocentre."""
    header = np.zeros((), HEADER_DTYPE)
    header["version"] = 1
    for name, direction in _AXES.items():
        header[name] = direction
    return header


def place(
    geometry: Mapping[int, NDArray[np.void]],
    shape: Sequence[int],
    field_of_view: Sequence[float],
    layout: Layout,
) -> list[Placement]:
    """Lay out the images of an array (s, z, y, x).

    ``volume``: one 3D image of a slab; evenly spaced single slices are stacked into one 3D image whose z
    extent is spacing x slices, and anything else becomes one image a slab. ``slices``: one image for each
    slice and partition, ascending along the slice direction.

    Args:
        geometry: slab s -> acquisition header; a slab without one lies beside its nearest neighbour, and with
            none at all the first is axial at the isocentre.
        shape: (s, z, y, x).
        field_of_view: (z, y, x) extent of one slab [m].
        layout: ``volume`` or ``slices``.
    """
    slabs, partitions = int(shape[0]), int(shape[1])
    extent_z, extent_y, extent_x = (1e3 * float(extent) for extent in field_of_view)  # mm
    headers = [_header(geometry, s, extent_z) for s in range(slabs)]
    positions = [np.asarray(header["position"], np.float64) for header in headers]
    order = _order(headers)

    if layout == "slices":
        thickness = extent_z / partitions
        placements: list[Placement] = []
        for s in order:
            along = np.asarray(headers[s]["slice_dir"], np.float64)
            for z in range(partitions):
                centre = positions[s] + (z - partitions // 2) * thickness * along
                placements.append(
                    Placement(
                        (s,),
                        slice(z, z + 1),
                        len(placements),
                        centre,
                        (extent_x, extent_y, thickness),
                        headers[s],
                    )
                )
        return placements

    spacing = _spacing(headers, order) if partitions == 1 else None
    if spacing is not None:
        middle = order[slabs // 2]
        field = (extent_x, extent_y, spacing * slabs)
        return [Placement(tuple(order), slice(None), 0, positions[middle], field, headers[middle])]
    field = (extent_x, extent_y, extent_z)
    return [
        Placement((s,), slice(None), rank, positions[s], field, headers[s]) for rank, s in enumerate(order)
    ]


def slab_order(geometry: Mapping[int, NDArray[np.void]], slabs: int, thickness: float) -> list[int]:
    """Slabs in the order in which their images come, whatever their numbers are.

    Args:
        geometry: slab s -> acquisition header, as of ``place``.
        slabs: how many there are.
        thickness: z extent of one [m].
    """
    return _order([_header(geometry, s, 1e3 * thickness) for s in range(slabs)])


def _order(headers: Sequence[NDArray[np.void]]) -> list[int]:
    """Ascending along the slice direction; by number where slabs are not parallel."""
    order = list(range(len(headers)))
    if all(_parallel(headers[0], header) for header in headers):
        normal = np.asarray(headers[0]["slice_dir"], np.float64)
        order.sort(key=lambda s: float(np.asarray(headers[s]["position"], np.float64) @ normal))
    return order


def _header(geometry: Mapping[int, NDArray[np.void]], s: int, thickness: float) -> NDArray[np.void]:
    """Header of slab s with usable directions, made from its nearest neighbour's where it has none."""
    nearest = min(geometry, key=lambda known: abs(known - s), default=0)
    header = np.array(geometry[nearest] if geometry else axial_header(), dtype=HEADER_DTYPE).reshape(())
    if not all(np.linalg.norm(header[name]) > 0.5 for name in _AXES):
        for name, direction in _AXES.items():  # some converters leave the directions zero
            header[name] = direction
    header["position"] = header["position"] + np.float32(thickness * (s - nearest)) * header["slice_dir"]
    return header


def _parallel(first: NDArray[np.void], second: NDArray[np.void]) -> bool:
    return all(np.allclose(first[name], second[name], atol=1e-3) for name in _AXES)


def _spacing(headers: list[NDArray[np.void]], order: list[int]) -> float | None:
    """Distance [mm] of evenly spaced parallel slices; None where they are not such a stack."""
    if len(order) < 2 or not all(_parallel(headers[0], header) for header in headers):
        return None
    normal = np.asarray(headers[0]["slice_dir"], np.float64)
    steps = np.diff([np.asarray(headers[s]["position"], np.float64) for s in order], axis=0)  # (s - 1, 3)
    spacing = float(np.mean(steps @ normal))
    even = spacing > 0 and bool(
        np.all(np.linalg.norm(steps - spacing * normal, axis=1) < 0.01 * spacing + 1e-3)
    )
    return spacing if even else None
