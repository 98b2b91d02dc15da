"""Weighted volumes to train on: NIfTI files whose BIDS name, or a table, says the modality."""

from __future__ import annotations

import csv
import hashlib
import logging
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import OrientationError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from quantitron.gadgets.errors import ScanError
from quantitron.recon.priors.denoiser import intensity

logger = logging.getLogger("quantitron")

MODALITIES = {"t1w": "T1w", "t2w": "T2w", "pdw": "PDw", "t1": "T1w", "t2": "T2w", "pd": "PDw"}
"""Last part of a file's name, in small letters -> modality. BIDS has the long names, others the short."""
_ENDINGS = (".nii.gz", ".nii")
_UNREADABLE = (
    ImageFileError,
    HeaderDataError,
    OrientationError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    zlib.error,
)
"""What nibabel raises at files that are not what they seem."""
_MARGIN = 8
"""Voxels of air that are kept around the head."""
_AIR = 0.02
"""Share of the normalised intensity below which a plane holds nothing."""
_MILLIMETRES = {"meter": 1e3, "micron": 1e-3}
"""Of other units of length."""
_LEAST = 16
"""Voxels in plane below which a volume is no image of a head."""
_MOST = 1 << 30
"""Voxels of a volume."""
_THICK = 1.5
"""How much coarser than the others an axis must be to be taken for the slice axis."""


@dataclass(frozen=True)
class Volume:
    """One image of one subject."""

    values: Tensor
    """(z, y, x) float16, the 99.5th percentile of the magnitude is 1."""
    modality: str
    """``T1w``, ``T2w``, ``PDw``, or what a table calls it."""
    subject: str
    """Volumes of one subject share it. Not for people: derived from the name by a checksum."""
    weight: float = 1.0
    """How often it is drawn, relative to others of its modality."""
    digest: str = ""
    """SHA-256 of modality, size and values."""


@dataclass(frozen=True)
class VolumeCollection:
    """All volumes, in an order that depends on what is in them and not on names."""

    volumes: tuple[Volume, ...]
    """At least one."""
    skipped: int = 0
    """NIfTI files whose name is that of no weighted image."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities: the known ones first."""
        found = {volume.modality for volume in self.volumes}
        known = [name for name in dict.fromkeys(MODALITIES.values()) if name in found]
        return (*known, *sorted(found - set(known)))

    @property
    def checksum(self) -> str:
        """SHA-256 of all volumes, whatever their files are called."""
        return hashlib.sha256("".join(sorted(v.digest for v in self.volumes)).encode()).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """Volumes of each modality."""
        return {name: sum(v.modality == name for v in self.volumes) for name in self.modalities}


def read_volumes(source: Path, voxel_size: float | None = None) -> VolumeCollection:
    """Read all weighted volumes.

    Args:
        source: a folder, all of whose NIfTI files whose names end in a modality are taken
            (``sub-01_T1w.nii.gz``); or a table (.csv) with the columns ``file`` (relative to the table),
            ``modality`` and, if wanted, ``weight`` and ``subject``.
        voxel_size: mm of the isotropic grid that volumes are brought to; None: each keeps its own.

    Returns:
        The volumes; axes (z, y, x), x ascending to the right, y to the front, z to the head, but where one
        axis is much coarser than the others, it is z.

    Raises:
        ScanError: if there is nothing to read, or one of the files cannot be trained on.
    """
    if voxel_size is not None and not 0.1 <= voxel_size <= 10:
        raise ScanError(f"a voxel size of {voxel_size:g} mm is not within 0.1..10 mm")
    if not source.exists():
        raise ScanError(f"{source} does not exist")
    skipped = 0
    if source.is_dir():
        files = sorted(
            file
            for file in source.rglob("*")
            if file.name.endswith(_ENDINGS) and not file.is_dir() and not file.name.startswith(".")
        )
        if not files:
            raise ScanError(f"{source} holds no NIfTI files (.nii, .nii.gz)")
        rows = [(file, modality_of(file), 1.0, "") for file in files]
        entries = [(file, name, weight, subject) for file, name, weight, subject in rows if name]
        skipped = len(rows) - len(entries)
        if not entries:
            raise ScanError(
                f"none of the {len(files)} NIfTI files in {source} has a name that ends in T1w, T2w or PDw; "
                "a table (.csv) with the columns file and modality can say what they are"
            )
    else:
        entries = _table(source)
    if skipped:
        logger.info("%d NIfTI files are passed over: their names end in no weighted contrast", skipped)
    volumes = [_read(*entry, voxel_size=voxel_size) for entry in entries]
    repeated = [digest for digest, n in Counter(v.digest for v in volumes).items() if n > 1]
    if repeated:
        logger.warning("%d volumes are in the data more than once", len(repeated))
    volumes.sort(key=lambda volume: (volume.modality, volume.digest))
    return VolumeCollection(tuple(volumes), skipped)


def modality_of(file: Path) -> str:
    """The modality that a file's name ends in, empty if it ends in none."""
    stem = file.name
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    return MODALITIES.get(re.split(r"[_\-]", stem)[-1].lower(), "")


def _subject(file: Path) -> str:
    """What the names of one subject's files have in common, as a checksum."""
    match = re.match(r"(sub-[0-9A-Za-z]+)", file.name)
    stem = re.split(r"[_\-](?=[^_\-]*$)", file.name)[0]
    return hashlib.sha256((match[1] if match else stem).encode()).hexdigest()


def _table(source: Path) -> list[tuple[Path, str, float, str]]:
    """File, modality, weight and subject of each line."""
    if source.suffix.lower() != ".csv":
        raise ScanError(f"{source} is neither a folder of NIfTI files nor a table (.csv)")
    try:
        with source.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = set(reader.fieldnames or ())
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScanError(f"the table {source} cannot be read: {error}") from error
    missing = {"file", "modality"} - columns
    if missing:
        raise ScanError(f"the table {source} has no column '{sorted(missing)[0]}'")
    if not lines:
        raise ScanError(f"the table {source} lists no files")
    entries = []
    for number, line in enumerate(lines, 2):
        where = f"line {number} of {source}"
        name, modality = (line["file"] or "").strip(), (line["modality"] or "").strip()
        if not name:
            raise ScanError(f"{where} names no file")
        if not re.fullmatch(r"[A-Za-z0-9]{1,16}", modality):
            raise ScanError(f"{where}: '{modality}' is no modality; write T1w, T2w, PDw or a short word")
        try:
            weight = float((line.get("weight") or "1").strip())
        except ValueError:
            weight = -1.0
        if not 0 < weight < 1e6:
            raise ScanError(f"{where}: the weight must be a number above zero, not '{line.get('weight')}'")
        subject = (line.get("subject") or "").strip()
        subject = hashlib.sha256(subject.encode()).hexdigest() if subject else ""
        modality = MODALITIES.get(modality.lower(), modality)
        entries.append((source.parent / name, modality, weight, subject))
    return entries


def _read(file: Path, modality: str, weight: float, subject: str, voxel_size: float | None) -> Volume:
    """One file."""
    values, voxel = _load(file)
    if not np.isfinite(values).all():
        raise ScanError(f"{file} holds {np.count_nonzero(~np.isfinite(values))} voxels that are no numbers")
    if values.min() == values.max():
        raise ScanError(f"{file} is empty: every voxel is {values.flat[0]:g}")
    coarsest = int(np.argmax(voxel))
    others = [size for axis, size in enumerate(voxel) if axis != coarsest]
    if voxel_size is not None:
        values = _resampled(values, [size / voxel_size for size in voxel])
    elif coarsest != 0 and voxel[coarsest] > _THICK * max(others):
        # thick slices of a coronal or sagittal scan: their plane is the one with detail
        values = np.moveaxis(values, coarsest, 0)
    if min(values.shape[1:]) < _LEAST:
        raise ScanError(f"{file} has slices of only {values.shape[1]} x {values.shape[2]} voxels")
    normalised = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    scale = intensity(normalised[None])
    normalised = (normalised / scale).clamp(-60000, 60000)
    kept = _around_head(normalised).to(torch.float16)
    digest = hashlib.sha256(f"{modality} {tuple(kept.shape)}".encode())
    digest.update(kept.numpy().tobytes())
    return Volume(kept, modality, subject or _subject(file), weight, digest.hexdigest())


def _load(file: Path) -> tuple[NDArray[np.float32], list[float]]:
    """Values (z, y, x) and voxel size [mm]."""
    try:
        image: Any = nibabel.load(file)
        shape = image.shape
        if len(shape) > 3 and int(np.prod(shape[3:])) == 1:
            image = image.slicer[(slice(None),) * 3 + (0,) * (len(shape) - 3)]
        elif len(shape) != 3:
            size = " x ".join(map(str, shape))
            raise ScanError(f"{file} is {size}: not one volume of three dimensions")
        if 0 in image.shape:
            raise ScanError(f"{file} is empty: it has no voxels")
        if image.get_data_dtype().kind not in "fiu":
            raise ScanError(f"{file} holds {image.get_data_dtype()} values, not real numbers")
        if math.prod(image.shape) > _MOST:
            raise ScanError(
                f"{file} says that it has {math.prod(image.shape):.2g} voxels: too many to be read"
            )
        canonical = nibabel.as_closest_canonical(image)  # type: ignore[no-untyped-call]
        values = np.asarray(canonical.dataobj, dtype=np.float32)
        # NIfTI says what lengths are in; files that do not are in millimetres, as those of other formats.
        units = getattr(canonical.header, "get_xyzt_units", lambda: ("unknown",))()
        voxel = [float(size) * _MILLIMETRES.get(units[0], 1.0) for size in canonical.header.get_zooms()[:3]]
    except FileNotFoundError as error:
        raise ScanError(f"{file} does not exist") from error
    except MemoryError as error:
        raise ScanError(f"{file} is too large for this machine's memory") from error
    except _UNREADABLE as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ScanError(f"{file} cannot be read as NIfTI: {text}") from error
    if not all(np.isfinite(size) and size > 0 for size in voxel):
        raise ScanError(f"{file} gives a voxel size of {' x '.join(f'{size:g}' for size in voxel)} mm")
    return values.transpose(2, 1, 0), voxel[::-1]


def _resampled(values: NDArray[np.float32], factors: Iterable[float]) -> NDArray[np.float32]:
    """Values on a grid that is finer by these factors; smoothed before where it is coarser."""
    factors = list(factors)
    blur = [0.5 * max(0.0, 1 / factor - 1) for factor in factors]
    smooth = ndimage.gaussian_filter(values, blur) if any(blur) else values
    if all(abs(factor - 1) < 0.01 for factor in factors):
        return values
    zoomed: NDArray[np.float32] = ndimage.zoom(smooth, factors, order=1)
    return zoomed


def _around_head(values: Tensor) -> Tensor:
    """Without the planes at the ends that hold only air, but for a margin."""
    for axis in range(3):
        if values.shape[axis] == 1:
            continue
        other = [number for number in range(3) if number != axis]
        filled = (values.abs().amax(dim=other) > _AIR).nonzero().flatten().tolist()
        if filled:
            margin = _MARGIN if axis else 0
            begin = max(0, filled[0] - margin)
            end = min(values.shape[axis], filled[-1] + 1 + margin)
            if axis and end - begin < _LEAST:
                continue
            values = values.narrow(axis, begin, end - begin)
    return values.contiguous()
