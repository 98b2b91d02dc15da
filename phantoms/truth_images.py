"""Ground truth as the images of a map file, with equal files for equal seeds."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.image_geometry import axial_header
from quantitron.gadgets.images import PD_REFERENCE, map_images
from quantitron.phantoms.scene import Scene
from quantitron.phantoms.truth import truth_maps
from quantitron.recon.data import Protocol


def truth_images(
    scenes: list[Scene],
    protocol: Protocol,
    positions: list[tuple[float, float, float]],
    extent: tuple[float, float, float],
    covariance: NDArray[np.complex128],
    seed: int,
) -> Iterator[ismrmrd.Image]:
    """Truth of all slabs as float32 images; PD scaled like that of a reconstruction."""
    slabs = [truth_maps(scene, protocol.sequence, covariance) for scene in scenes]
    names = [name for name in slabs[0] if all(name in slab for slab in slabs)]
    values = {name: np.stack([slab[name] for slab in slabs]) for name in names}  # (s, z, y, x)
    inside = (values["mask"] > 0) & np.isfinite(values["pd"])
    values["pd"] = values["pd"] * np.float32(PD_REFERENCE / np.percentile(values["pd"][inside], 99))
    geometry = {}
    for number, position in enumerate(positions):
        geometry[number] = axial_header()
        geometry[number]["position"] = position
    random = np.random.default_rng([seed, 5])
    uids: dict[int, str] = {}
    for image in map_images(values, geometry, extent):
        # Equal seeds give equal files: the series' own UID is replaced by one drawn from the seed.
        series = int(image.image_series_index)
        if series not in uids:
            uids[series] = f"2.25.{uuid.UUID(bytes=random.bytes(16), version=4).int}"
        meta = image.meta
        meta["SeriesInstanceUID"] = uids[series]
        image.meta = meta
        yield image
