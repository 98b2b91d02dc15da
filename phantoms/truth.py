"""Ground truth on the scan grid: what a perfect scan of the object should measure."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantitron.phantoms.anatomy import CSF, GREY_MATTER, SPHERES, WHITE_MATTER
from quantitron.phantoms.scene import Scene, scan_mask
from quantitron.recon.data import SEQUENCE_MAPS

TIMES = ("t1", "t2", "t2star")
TISSUES = {"wm": WHITE_MATTER, "gm": GREY_MATTER, "csf": CSF}


def truth_maps(
    scene: Scene, sequence: str, covariance: NDArray[np.complex128] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Maps of the sequence, mask and tissues of one slab.

    A scan voxel averages its fine voxels, weighted by |pd|: ``t1``, ``t2``, ``t2star`` are geometric means,
    ``b0`` and ``inversion`` arithmetic ones; ``pd`` and ``phase`` are modulus and angle of the mean complex
    pd. The geometric mean is the same for times and for rates, and nearest to what a perfect scan of a
    mixture of tissue and fluid measures (an arithmetic mean of times is all fluid, one of rates all
    tissue). With supersampling 1 all are the object's own maps. ``mask`` holds voxels of which at least
    half lies in the object's mask; ``wm``, ``gm``, ``csf`` are the fractions of each tissue; ``spheres``
    numbers the sphere that fills a voxel completely.

    Args:
        scene: the object.
        sequence: decides which maps.
        covariance: (c, c) of the channels' noise, where a reconstruction will whiten them. PD is defined for
            coil maps of unit root-sum-of-squares in whitened channels, so ``pd`` holds their receive profile.

    Returns:
        Name -> (z, y, x) float32 on the scan grid in s, Hz, rad; NaN where there is no signal.
    """
    weight = np.abs(scene.pd.numpy())
    total = scene.block_mean(scene.embed(weight))
    air = total == 0
    divisor = np.where(air, 1, total)
    complex_pd = scene.block_mean(scene.embed(scene.pd * _whitened_sensitivity(scene, covariance)))
    maps: dict[str, NDArray[np.float32]] = {}
    for name in SEQUENCE_MAPS[sequence]:
        if name == "pd":
            values = np.abs(complex_pd)
        elif name == "phase":
            values = np.angle(complex_pd)
        else:
            own = scene.parameters[name].numpy()
            averaged = np.log(own) if name in TIMES else own
            values = scene.block_mean(scene.embed(weight * averaged)) / divisor
            if name in TIMES:
                values = np.exp(values)
        maps[name] = np.where(air, np.nan, values).astype(np.float32)
    if scene.fine.chi is not None:
        maps["chi"] = scene.block_mean(scene.fine.chi.astype(np.float32))
    maps["mask"] = scan_mask(scene).astype(np.float32)
    labels = scene.fine.labels
    if (labels > SPHERES).any():
        maps["spheres"] = _full_spheres(scene)
    elif (labels > 0).any():
        for name, label in TISSUES.items():
            maps[name] = scene.block_mean((labels == label).astype(np.float32))
    return maps


def transmit_map(scene: Scene) -> NDArray[np.float32]:
    """Actual over nominal flip angle (z, y, x) on the scan grid: the mean weighted by |pd|, 1 in air."""
    if scene.b1 is None:
        return np.ones(scene.matrix, dtype=np.float32)
    weight = np.abs(scene.pd.numpy())
    total = scene.block_mean(scene.embed(weight))
    mean = scene.block_mean(scene.embed(weight * scene.b1.numpy())) / np.where(total == 0, 1, total)
    return np.where(total == 0, 1, mean).astype(np.float32)


def _whitened_sensitivity(scene: Scene, covariance: NDArray[np.complex128] | None) -> Tensor:
    """(v,) root-sum-of-squares of the coil maps after whitening; 1 for channels that are not whitened."""
    if covariance is None or not covariance.any():
        return torch.ones(len(scene.pd))
    whitening = torch.from_numpy(np.linalg.inv(np.linalg.cholesky(covariance)).astype(np.complex64))
    root: Tensor = torch.linalg.vector_norm(whitening @ scene.coils, dim=0)
    return root


def _full_spheres(scene: Scene) -> NDArray[np.float32]:
    """Sphere numbers, 0 where a voxel is not of one sphere alone."""
    blocks = scene.blocks(scene.fine.labels)
    lowest, highest = blocks.min(axis=(1, 3, 5)), blocks.max(axis=(1, 3, 5))
    return np.where((lowest == highest) & (lowest > SPHERES), lowest.astype(np.int64) - SPHERES, 0).astype(
        np.float32
    )
