"""How good the maps of a fingerprint are: their errors, and those of the images that can be made of them.

Image series: what is compared are the fingerprints of the delivered T1 and T2 in the temporal basis, voxel by
voxel; PD is a factor there, which the cosine does not see. Coefficient images that a solver holds before
matching are not delivered and not judged.

Contrasts: spin-echo images (eq. 5 of MRI2Qmap) of the delivered maps against those of the true ones, PD after
one fitted factor; background, where the true PD is low, is cut off in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantitron.gadgets.image_file import TRUTH_GROUP, read_images
from quantitron.gadgets.map_volume import MapVolume, map_volumes
from quantitron.host.compare import compare
from quantitron.recon.data import FingerprintDictionary
from quantitron.recon.fingerprint_match import dictionary_table
from quantitron.recon.grid_spline import GridSpline
from quantitron.recon.metrics import cosine_distance, fitted_factor, mape, psnr, ssim
from quantitron.recon.signal.spin_echo import SpinEchoProtocol, spin_echo_images

ROLES = ("T1", "T2")
FOREGROUND = 0.1
"""Proton density, over its 99th percentile in the brain, below which there is background."""
RETAINED = 0.9999
"""Energy of the temporal basis in which image series are compared."""


def judge(maps: Path, raw: Path, dictionary: FingerprintDictionary) -> dict[str, Any]:
    """All figures of merit, as JSON can hold them.

    Returns:
        ``maps`` (of ``quantitron compare``), ``mape`` (role -> mean of those in white and in grey matter),
        ``tissue`` (role -> over white and grey matter together, as published), ``cosine``, ``psnr`` [dB] and
        ``ssim`` (modality -> value). Fractions, not per cent.
    """
    found, truth = map_volumes(read_images(maps)), map_volumes(read_images(raw, TRUTH_GROUP))
    compared = compare(maps, raw)["maps"]
    inside = truth["MASK"].values > 0
    tissue = inside & ((truth["WM"].values > 0.5) | (truth["GM"].values > 0.5))
    result: dict[str, Any] = {
        "maps": compared,
        "mape": {role: (compared[role]["mape_wm"] + compared[role]["mape_gm"]) / 2 for role in ROLES},
        "tissue": {role: mape(found[role].values, truth[role].values, tissue) for role in ROLES},
        "cosine": cosine_distance(fingerprints(found, dictionary), fingerprints(truth, dictionary), inside),
    }
    density = truth["PD"].values
    foreground = density > FOREGROUND * np.percentile(density[inside & np.isfinite(density)], 99)
    factor = fitted_factor(found["PD"].values, density, inside)
    protocol = SpinEchoProtocol()
    contrasts = zip(
        protocol.modalities, images(found, factor, protocol), images(truth, 1.0, protocol), strict=True
    )
    result["psnr"], result["ssim"] = {}, {}
    for modality, estimate, reference in contrasts:
        result["psnr"][modality] = psnr(estimate, reference, foreground)
        result["ssim"][modality] = ssim(estimate, reference, foreground)
    return result


def fingerprints(maps: dict[str, MapVolume], dictionary: FingerprintDictionary) -> NDArray[np.floating]:
    """(k, z, y, x) coefficients of fingerprints of unit PD; NaN where T1 or T2 has no value."""
    spline = GridSpline(dictionary_table(dictionary, dictionary.basis(RETAINED)))
    places = []
    for role, axis in zip(ROLES, (dictionary.t1, dictionary.t2), strict=True):
        seconds = torch.from_numpy(1e-3 * maps[role].values.astype(np.float64)).flatten()
        known = torch.where(seconds > 0, seconds, torch.nan).log()
        step = float((axis[-1] / axis[0]).log()) / (len(axis) - 1)
        places.append(((known - float(axis[0].log())) / step).clamp(0, len(axis) - 1).float())
    known = ~(places[0].isnan() | places[1].isnan())
    value, _, _ = spline(None, places[0][known], places[1][known])  # (k, v)
    series = torch.full((len(value), len(known)), torch.nan, dtype=value.dtype)
    series[:, known] = value
    return series.reshape(-1, *maps["T1"].values.shape).numpy()


def images(maps: dict[str, MapVolume], factor: float, protocol: SpinEchoProtocol) -> NDArray[np.floating]:
    """(m, z, y, x) weighted images; 0 where a map has no value."""
    t1, t2 = (torch.nan_to_num(torch.from_numpy(1e-3 * maps[role].values)) for role in ROLES)
    density = torch.nan_to_num(torch.from_numpy(factor * maps["PD"].values))
    return spin_echo_images(t1, t2, density, protocol).numpy()
