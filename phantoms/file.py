"""A phantom from a file: ``FILE.npz`` with maps (z, y, x) in SI units (DESIGN, command line)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from quantitron.gadgets.errors import ScanError
from quantitron.phantoms.anatomy import Anatomy

MAPS = ("t1", "t2", "t2star", "pd", "b0", "b1", "chi", "labels", "mask")
POSITIVE = ("t1", "t2", "t2star", "b1")


def read_anatomy(path: Path) -> Anatomy:
    """Read t1, t2, t2star [s], pd, chi [ppm], b0 [Hz], b1, labels, mask and voxel_size [m].

    Only ``pd`` and ``voxel_size`` are always needed. Without ``mask`` the labelled voxels are the mask,
    without ``labels`` everything with signal is. Where ``pd`` is zero the other maps are not looked at.

    Raises:
        ScanError: if the file is missing or not an npz archive, a map is missing, not a number or of another
            shape, a time is not positive where there is signal, or the voxel size is not three positive
            numbers.
    """
    try:
        if not zipfile.is_zipfile(path) and path.exists():
            raise ScanError(f"phantom '{path}' is not an .npz archive of maps")
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise ScanError(f"phantom file '{path}' does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ScanError(f"phantom '{path}' is not an .npz archive of plain arrays ({error})") from error

    for name in ("pd", "voxel_size"):
        if name not in found:
            raise ScanError(
                f"phantom '{path}' has no '{name}'; it holds {', '.join(sorted(found)) or 'nothing'}"
            )
    voxel_size = np.asarray(found["voxel_size"]).ravel()
    if voxel_size.shape != (3,) or voxel_size.dtype.kind not in "iuf" or not (voxel_size > 0).all():
        raise ScanError(f"voxel_size in phantom '{path}' must be three positive numbers (z, y, x) in metres")
    if (voxel_size > 0.1).any():
        raise ScanError(
            f"voxel_size in phantom '{path}' is {tuple(map(float, voxel_size))}, "
            "more than 10 cm: it must be in metres, not millimetres"
        )
    pd = found["pd"]
    if pd.ndim != 3:
        raise ScanError(f"pd in phantom '{path}' must have three axes (z, y, x), not shape {pd.shape}")
    for name in MAPS:
        if name in found and found[name].shape != pd.shape:
            raise ScanError(f"{name} in phantom '{path}' has shape {found[name].shape} but pd has {pd.shape}")
        if name in found and found[name].dtype.kind not in ("biufc" if name == "pd" else "biuf"):
            raise ScanError(f"{name} in phantom '{path}' is of type {found[name].dtype}, not real numbers")
    pd = pd.astype(np.complex64 if pd.dtype.kind == "c" else np.float32)
    if not np.isfinite(pd).all():
        raise ScanError(f"pd in phantom '{path}' has values that are not finite; air must be 0")
    signal = pd != 0
    if not signal.any():
        raise ScanError(f"pd in phantom '{path}' is zero everywhere")
    maps = {}
    for name in ("t1", "t2", "t2star", "b0", "b1", "chi"):
        if name not in found:
            continue
        values = found[name].astype(np.float32)
        wrong = ~np.isfinite(values[signal])
        if name in POSITIVE:
            wrong |= ~(values[signal] > 0)
        if wrong.any():
            kind = "positive and finite" if name in POSITIVE else "finite"
            raise ScanError(
                f"{name} in phantom '{path}' is not {kind} in {int(wrong.sum())} voxels with signal"
            )
        maps[name] = np.where(signal, values, 0) if name != "chi" else values
    labels = found["labels"].astype(np.int32) if "labels" in found else np.zeros(pd.shape, dtype=np.int32)
    if "mask" in found:
        mask = found["mask"].astype(bool)
    else:
        mask = labels > 0 if "labels" in found else signal
    mask = mask & signal
    if not mask.any():
        raise ScanError(f"the mask in phantom '{path}' holds no voxel with signal")
    size = (float(voxel_size[0]), float(voxel_size[1]), float(voxel_size[2]))
    return Anatomy(pd=pd, mask=mask, labels=labels, voxel_size=size, **maps)
