"""Meta attributes of the images under the names of Gadgetron and of FIRE / OpenRecon, with provenance.

All values are ASCII strings or lists of them, so that they pass the Gadgetron client unchanged. Nothing is
copied from the scan's patient or study information.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from xml.etree.ElementTree import ParseError

import ismrmrd
import numpy as np
from numpy.typing import NDArray

DISCLAIMER = "research use only"
SHORT_CHECKSUM = 16
"""Digits of a checksum that tell networks apart."""
_NOTES = "Quantitron_Notes"
_BETWEEN_NOTES = " | "


@dataclass(frozen=True)
class Storage:
    """How the voxels of one image were stored: stored = value x ratio + offset."""

    ratio: float
    offset: float
    unit: str
    window_centre: float
    """In map units."""
    window_width: float
    """In map units."""
    clipped: int = 0
    """Voxels whose value lies outside what can be stored."""


def package_version() -> str:
    """Version of the installed package; ``unknown`` in a checkout that was never installed."""
    try:
        return version("quantitron")
    except PackageNotFoundError:
        return "unknown"


def new_series_uid() -> str:
    """A DICOM UID for a new series (UUID-derived, root 2.25)."""
    return f"2.25.{uuid.uuid4().int}"


def map_meta(
    role: str,
    storage: Storage,
    colour_map: str,
    description: str,
    series_uid: str,
    provenance: Mapping[str, str],
) -> ismrmrd.Meta:
    """Attributes of one quantitative map image; ``geometry_meta`` and the image number complete them.

    Args:
        role: ``GADGETRON_DataRole``.
        storage: scale, unit and window.
        colour_map: name of the palette, without suffix.
        description: ends the series description: the role, with ``_preview`` for previews.
        series_uid: SeriesInstanceUID that all images of the series share.
        provenance: ``Quantitron_...`` keys of the run.
    """
    scale = f"{role}_x{storage.ratio:g}_{1 / storage.ratio:g}{storage.unit}"
    return ismrmrd.Meta(
        {
            **_shared(storage, colour_map, description, series_uid, provenance),
            "GADGETRON_DataRole": role,
            "GADGETRON_ImageComment": scale,
            "GADGETRON_SeqDescription": [provenance.get("Quantitron_Pipeline") or "quantitron", role],
            "GADGETRON_ImageProcessingHistory": ["quantitron", role],
            "DataRole": ["Quantitative", role],
            "ImageComments": scale,
            "ImageType": ["DERIVED", "PRIMARY", role],
        }
    )


def magnitude_meta(
    storage: Storage,
    description: str,
    series_uid: str,
    echo_time: float,
    inversion_time: float | None,
    provenance: Mapping[str, str],
) -> ismrmrd.Meta:
    """Attributes of an ordinary magnitude image; times in seconds."""
    meta = ismrmrd.Meta(
        {
            **_shared(storage, "gray", description, series_uid, provenance),
            "GADGETRON_DataRole": "Image",
            "GADGETRON_ImageComment": description,
            "GADGETRON_SeqDescription": [provenance.get("Quantitron_Pipeline") or "quantitron", description],
            "GADGETRON_ImageProcessingHistory": ["quantitron", "magnitude"],
            "DataRole": "Image",
            "ImageComments": description,
            "ImageType": ["DERIVED", "PRIMARY", "M"],
            "GADGETRON_TE": f"{1e3 * echo_time:.9g}",
            "EchoTime": f"{1e3 * echo_time:.9g}",
        }
    )
    if inversion_time is not None:
        meta["GADGETRON_TI"] = meta["InversionTime"] = f"{1e3 * inversion_time:.9g}"
    return meta


def geometry_meta(header: NDArray[np.void]) -> dict[str, list[str]]:
    """FIRE's image directions from an acquisition header."""
    return {
        "ImageRowDir": [f"{component:.18f}" for component in np.asarray(header["read_dir"]).tolist()],
        "ImageColumnDir": [f"{component:.18f}" for component in np.asarray(header["phase_dir"]).tolist()],
    }


def provenance_meta(
    pipeline: str = "",
    settings_hash: str = "",
    seed: int = 0,
    device: str = "",
    rank: int = 0,
    retained_energy: float = math.nan,
    residual_to_noise: float = math.nan,
    failed_voxels: int = 0,
    notes: Sequence[str] = (),
    weights: str = "",
) -> dict[str, str]:
    """The ``Quantitron_...`` keys that say how a map was made (clipped voxels are counted by image).

    ``weights``, the checksum of the trained network, is there only where one was used.
    """
    meta = {
        "Quantitron_Version": package_version(),
        "Quantitron_Pipeline": pipeline,
        "Quantitron_SettingsHash": settings_hash,
        "Quantitron_Seed": str(seed),
        "Quantitron_Device": device,
        "Quantitron_Rank": str(rank),
        "Quantitron_RetainedEnergy": f"{retained_energy:.9g}",
        "Quantitron_ResidualToNoise": f"{residual_to_noise:.6g}",
        "Quantitron_FailedVoxels": str(failed_voxels),
        "Quantitron_Disclaimer": DISCLAIMER,
    }
    if weights:
        meta["Quantitron_Weights"] = weights[:SHORT_CHECKSUM]
    if notes:
        meta[_NOTES] = _BETWEEN_NOTES.join(notes)
    return meta


def notes_of(attributes: str) -> list[str]:
    """What was assumed about the scan that an image is of.

    Args:
        attributes: the image's Meta as XML, of whoever made it.

    Returns:
        The notes in their order; none where the image has none, or no Meta that can be read.
    """
    if _NOTES not in attributes:
        return []
    try:
        notes = ismrmrd.Meta.deserialize(attributes).get(_NOTES)
    except ParseError:
        return []
    return notes.split(_BETWEEN_NOTES) if isinstance(notes, str) else []


def _shared(
    storage: Storage,
    colour_map: str,
    description: str,
    series_uid: str,
    provenance: Mapping[str, str],
) -> dict[str, str]:
    ratio, offset = storage.ratio, storage.offset
    return {
        # Gadgetron: windows in stored units
        "GADGETRON_ScaleRatio": f"{ratio:.9g}",
        "GADGETRON_ScaleOffset": f"{offset:.9g}",
        "GADGETRON_WindowCenter": str(round(storage.window_centre * ratio + offset)),
        "GADGETRON_WindowWidth": str(max(1, round(storage.window_width * ratio))),
        "GADGETRON_ColorMap": f"{colour_map}.pal",
        "Skip_processing_after_recon": "1",
        "Use_dedicated_scaling_factor": "1",
        "Keep_image_geometry": "1",
        # FIRE / OpenRecon: windows in rescaled units
        "SeriesDescription": description,
        "SeriesDescriptionAdditional": description,
        "SequenceDescriptionAdditional": description,
        "SeriesInstanceUID": series_uid,
        "RescaleSlope": f"{1 / ratio:.9g}",
        "RescaleIntercept": f"{-offset / ratio:.9g}",
        "WindowCenter": str(round(storage.window_centre)),
        "WindowWidth": str(max(1, round(storage.window_width))),
        "LUTFileName": f"{colour_map}.pal",
        "Quantitron_Unit": storage.unit,
        "Quantitron_ClippedVoxels": str(storage.clipped),
        **provenance,
    }
