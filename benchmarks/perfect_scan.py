"""The maps of a scan that lacks next to nothing: what noise and undersampling put in is counted from there.

The truth of a scan voxel is the mean of its fine voxels. Where several tissues meet in one, their signals
add, and the maps that fit the sum best are others than that mean, however good the scan is. A worse scan may
give maps between both and so have the lower error against the truth; against a perfect scan's maps it has
not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.image_file import read_images
from quantitron.host.replay import replay
from quantitron.phantoms.simulate import simulate
from quantitron.recon.metrics import CAPS, nrmse

PERFECT_SNR = 3000.0
PERFECT_ACCELERATION = {"vfa_gre": 1.0, "t2ir_gre": 8.0}
"""All points of 640 frames would not fit into memory; an eighth of them overdetermines nine coefficients."""
NAMES = {"T1": "t1", "T2": "t2", "T2STAR": "t2star"}


def perfect_maps(scan: dict[str, Any], anatomy: Any, spread: str, folder: Path) -> Path:
    """File with the maps of ``subspace`` of such a scan of an object.

    Args:
        scan: what ``simulate`` takes, but for object, noise and undersampling.
        anatomy: the object.
        spread: point spread of the object's fine voxels.
        folder: for the raw file and the maps.
    """
    raw, maps = folder / "perfect_raw.h5", folder / "perfect_maps.h5"
    simulate(
        **{**scan, "phantom": anatomy, "snr": PERFECT_SNR, "seed": 1},
        acceleration=PERFECT_ACCELERATION[scan["sequence"]],
        point_spread=spread,
        output=raw,
        overwrite=True,
    )
    replay(raw, "subspace", maps, overwrite=True)
    raw.unlink()
    return maps


def from_perfect(maps: Path, perfect: Path, raw: Path) -> dict[str, float]:
    """NRMSE of T1, T2 and T2* inside the brain against the maps of the perfect scan.

    Args:
        maps: that are judged.
        perfect: of the perfect scan.
        raw: with the truth, for its mask.

    Returns:
        Role -> NRMSE, for the maps that are there.
    """
    found, reference, inside = _maps(maps), _maps(perfect), _maps(raw, "truth")["MASK"] > 0
    return {
        role: nrmse(found[role] / 1e3, reference[role] / 1e3, inside, CAPS[name])
        for role, name in NAMES.items()
        if role in found
    }


def _maps(path: Path, group: str | None = None) -> dict[str, NDArray[np.float64]]:
    return {
        image.meta["GADGETRON_DataRole"]: np.nan_to_num(image.data[0].astype(np.float64))
        for image in read_images(path, group)
    }
