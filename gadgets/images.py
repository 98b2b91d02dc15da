"""Gadget ``images``: Maps -> ISMRMRD images with geometry, units, scale, series and provenance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import ismrmrd
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quantitron.gadgets.gadget import Context, Gadget
from quantitron.gadgets.image_geometry import Layout, Placement, place
from quantitron.gadgets.image_metadata import (
    Storage,
    geometry_meta,
    magnitude_meta,
    map_meta,
    new_series_uid,
    provenance_meta,
)
from quantitron.gadgets.map_roles import (
    CODE_MAXIMUM,
    MAP_ROLES,
    PREVIEW_SERIES,
    Role,
    standard_deviation_role,
)
from quantitron.recon.data import Maps

Output = Literal["float32", "uint16"]
PD_REFERENCE = 1000.0
"""What the 99th percentile of PD inside the mask is scaled to."""
MOST_ECHOES = 90
"""Magnitude series 1..90 lie below the preview series."""


@dataclass(frozen=True)
class Images(Gadget):
    """Takes ``Maps``, yields ``ismrmrd.Image``: maps, standard deviations, mask, magnitude images."""

    name: ClassVar[str] = "images"

    output: Output = "uint16"
    """``uint16`` (12 bits as consoles keep them, 0 means no value) or ``float32`` (map units, else NaN)."""
    layout: Layout = "volume"
    """``volume`` (3D images) or ``slices`` (2D images, ascending along the slice direction)."""

    def __call__(self, items: Iterable[Maps], context: Context) -> Iterator[ismrmrd.Image]:
        """Images of each ``Maps``, as soon as it comes."""
        for maps in items:
            yield from self._images(maps, context)

    def _images(self, maps: Maps, context: Context) -> Iterator[ismrmrd.Image]:
        field_of_view = context.encoding.delivered_field_of_view
        provenance = provenance_meta(
            pipeline=context.pipeline,
            settings_hash=context.settings_hash,
            seed=context.seed,
            device=context.device,
            rank=maps.rank,
            retained_energy=maps.retained_energy,
            residual_to_noise=maps.residual_to_noise,
            failed_voxels=maps.failed_voxels,
            notes=context.notes,
            weights="" if context.network is None else context.network.checksum,
        )
        pd_scale = _pd_scale(maps)
        values = {name: _array(value) for name, value in maps.values.items()}
        deviations = {name: _array(value) for name, value in maps.standard_deviation.items()}
        for part in (values, deviations):
            if "pd" in part:
                part["pd"] = part["pd"] * pd_scale
        if not maps.preview:
            values["mask"] = _array(maps.mask)
        yield from map_images(
            values,
            context.geometry,
            field_of_view,
            standard_deviation={} if maps.preview else deviations,
            output=self.output,
            layout=self.layout,
            provenance=provenance,
            preview=maps.preview,
        )
        if maps.magnitude is not None and not maps.preview:
            if len(maps.magnitude) > MOST_ECHOES:
                context.note(
                    f"only the first {MOST_ECHOES} of {len(maps.magnitude)} magnitude images are sent"
                )
            yield from self._magnitude_images(maps.magnitude[:MOST_ECHOES], context, provenance)

    def _magnitude_images(
        self, magnitude: Tensor, context: Context, provenance: Mapping[str, str]
    ) -> Iterator[ismrmrd.Image]:
        """Echo images (e, s, z, y, x): series 1 + e, ``contrast`` e, one scale for all echoes."""
        echoes = np.nan_to_num(_array(magnitude), nan=0.0, posinf=0.0, neginf=0.0)
        brightest = float(echoes.max(initial=0.0)) or 1.0
        ratio = CODE_MAXIMUM / brightest if self.output == "uint16" else 1.0
        window = float(np.percentile(echoes[0], 99.5)) or brightest
        storage = Storage(ratio, 0.0, "a.u.", window / 2, window)
        inversion_times = context.protocol.inversion_time
        for echo, values in enumerate(echoes):
            meta = magnitude_meta(
                storage,
                f"magnitude_echo{echo + 1}",
                new_series_uid(),
                context.protocol.echo_time[echo],
                inversion_times[0] if inversion_times else None,
                provenance,
            )
            placements = place(
                context.geometry, values.shape, context.encoding.delivered_field_of_view, self.layout
            )
            stored = np.rint(values * ratio).astype(np.uint16) if self.output == "uint16" else values
            for number, placement in enumerate(placements, start=1):
                yield _image(
                    placement,
                    placement.cut(stored),
                    meta,
                    number,
                    image_series_index=1 + echo,
                    image_type=ismrmrd.IMTYPE_MAGNITUDE,
                    contrast=echo,
                )


def map_images(
    values: Mapping[str, Tensor | NDArray[Any]],
    geometry: Mapping[int, NDArray[np.void]],
    field_of_view: tuple[float, float, float],
    *,
    standard_deviation: Mapping[str, Tensor | NDArray[Any]] | None = None,
    output: Output = "float32",
    layout: Layout = "volume",
    provenance: Mapping[str, str] | None = None,
    preview: bool = False,
) -> Iterator[ismrmrd.Image]:
    """Images of maps, or of the ground truth of a simulated scan.

    Args:
        values: map name (a key of ``MAP_ROLES``: ``t1``, ``t2``, ``t2star``, ``pd``, ``b0``, ``phase``,
            ``chi``, ``inversion``, ``mask``, ``wm``, ``gm``, ``csf``, ``spheres``, ...) -> (s, z, y, x) in
            the unit of ``recon``: s, Hz, rad, ppm, 1/s; masks and tissue fractions 0..1; ``spheres`` numbered
            from 1. A voxel without a value is NaN. PD is stored as it comes.
        geometry: slab s -> acquisition header (``HEADER_DTYPE`` scalar), whose ``position`` is voxel n/2.
        field_of_view: (z, y, x) extent of one slab [m].
        standard_deviation: like ``values``, for maps among them.
        output: ``float32`` or ``uint16`` storage.
        layout: ``volume`` or ``slices``.
        provenance: ``Quantitron_...`` keys from ``provenance_meta``; None for ground truth.
        preview: store in the preview series, which only T1..R2STAR have.
    """
    if provenance is None:
        provenance = provenance_meta(pipeline="truth")
    series = [(MAP_ROLES[name], value) for name, value in values.items()]
    if preview:
        series = [(role, value) for role, value in series if role.previewed]
    for name, value in (standard_deviation or {}).items():
        series.append((standard_deviation_role(MAP_ROLES[name]), value))
    for role, value in series:
        in_unit = _array(value) * np.float32(role.per_si)  # (s, z, y, x)
        placements = place(geometry, in_unit.shape, field_of_view, layout)
        series_uid = new_series_uid()
        for number, placement in enumerate(placements, start=1):
            stored, storage = store(placement.cut(in_unit), role, output)
            description = f"{role.name}_preview" if preview else role.name
            meta = map_meta(role.name, storage, role.colour_map, description, series_uid, provenance)
            yield _image(
                placement,
                stored,
                meta,
                number,
                image_series_index=role.series + (PREVIEW_SERIES if preview else 0),
                image_type=ismrmrd.IMTYPE_REAL if role.signed else ismrmrd.IMTYPE_MAGNITUDE,
            )


def store(
    values: NDArray[np.float32], role: Role, output: Output
) -> tuple[NDArray[np.float32] | NDArray[np.uint16], Storage]:
    """Voxels as they are stored, and how.

    ``float32``: as they are, NaN where there is no value (0 for masks and tissue fractions). ``uint16``:
    value x ratio + offset, rounded, in 1..4095, with 0 where there is no value; values outside are clipped
    and counted.

    Args:
        values: (...) in ``role.unit``; not finite where there is no value.
        role: how this map is stored.
        output: ``float32`` or ``uint16``.
    """
    known = np.isfinite(values)
    if role.background:
        known &= values != 0
    window = (role.window_centre, role.window_width)
    if output == "float32":
        nothing = np.float32(0 if role.background else np.nan)
        return np.where(known, values, nothing).astype(np.float32), Storage(1.0, 0.0, role.unit, *window)
    codes = np.rint(np.where(known, values, 0).astype(np.float64) * role.ratio + role.offset)
    clipped = int(np.count_nonzero(known & ((codes < 1) | (codes > CODE_MAXIMUM))))
    stored = np.where(known, np.clip(codes, 1, CODE_MAXIMUM), 0).astype(np.uint16)
    return stored, Storage(role.ratio, role.offset, role.unit, *window, clipped)


def _pd_scale(maps: Maps) -> float:
    """Factor that brings the 99th percentile of PD inside the mask to 1000; 1 where there is none."""
    if "pd" not in maps.values:
        return 1.0
    pd = _array(maps.values["pd"])
    inside = pd[_array(maps.mask).astype(bool) & np.isfinite(pd)]
    reference = float(np.percentile(inside, 99)) if inside.size else 0.0
    return PD_REFERENCE / reference if reference > 0 else 1.0


def _array(values: Tensor | NDArray[Any]) -> NDArray[np.float32]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(array, dtype=np.float32)


def _image(
    placement: Placement, values: NDArray[Any], meta: ismrmrd.Meta, number: int, **fields: int
) -> ismrmrd.Image:
    """One image of stored voxels (z, y, x); ``fields`` go into its header."""
    header = placement.header
    image = ismrmrd.Image.from_array(
        np.ascontiguousarray(values),
        transpose=False,
        measurement_uid=int(header["measurement_uid"]),
        field_of_view=placement.field_of_view,
        position=tuple(placement.position.tolist()),
        read_dir=tuple(header["read_dir"].tolist()),
        phase_dir=tuple(header["phase_dir"].tolist()),
        slice_dir=tuple(header["slice_dir"].tolist()),
        patient_table_position=tuple(header["patient_table_position"].tolist()),
        slice=placement.slice_index,
        acquisition_time_stamp=int(header["acquisition_time_stamp"]),
        physiology_time_stamp=tuple(header["physiology_time_stamp"].tolist()),
        image_index=number,
        **fields,
    )
    image.meta = ismrmrd.Meta({**meta, **geometry_meta(header), "GADGETRON_ImageNumber": str(number)})
    return image
