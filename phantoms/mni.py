"""The MNI152 brain: tissue templates from inside the nilearn package, with relaxation times at 3 T."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quantitron.phantoms.anatomy import CSF, GREY_MATTER, WHITE_MATTER, Anatomy
from quantitron.phantoms.texture import smooth_texture

TISSUES = {
    CSF: {"t1": 4.163, "t2": 1.65, "t2star": 0.300, "pd": 1.0},
    GREY_MATTER: {"t1": 1.45, "t2": 0.080, "t2star": 0.066, "pd": 0.8},
    WHITE_MATTER: {"t1": 0.82, "t2": 0.065, "t2star": 0.053, "pd": 0.7},
}
"""T1, T2, T2* [s] and relative proton density of the tissues at 3 T, within the ranges of the literature."""

VARIATION = {"t1": 0.05, "t2": 0.05, "t2star": 0.07, "pd": 0.04}
"""Relative smooth variation within each tissue, so that maps are not piecewise constant."""


@lru_cache(maxsize=1)
def mni_brain() -> Anatomy:
    """The MNI152 brain at 1 mm, (189, 233, 197) voxels, without skull and scalp.

    Each voxel holds its most probable tissue (CSF is the brain less grey and white matter); partial volume
    comes from simulating on a grid finer than the scan's. Parameters vary smoothly by a few per cent within
    a tissue.

    Source: Fonov et al., NeuroImage 54:313 (2011), as shipped with nilearn (BSD-3).
    """
    from nilearn.datasets import (  # imported here: nilearn takes seconds to load
        load_mni152_brain_mask,
        load_mni152_gm_template,
        load_mni152_wm_template,
    )

    def template(image: object) -> NDArray[np.float32]:
        # The templates run (x, y, z) towards right, front and head.
        values = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
        return np.ascontiguousarray(values.T[:, ::-1, ::-1])

    brain = template(load_mni152_brain_mask(resolution=1)) > 0.5
    grey = template(load_mni152_gm_template(resolution=1))
    white = template(load_mni152_wm_template(resolution=1))
    fluid = np.clip(1 - grey - white, 0, None)
    labels = np.argmax(np.stack([fluid, grey, white]), axis=0).astype(np.uint8) + 1
    labels[~brain] = 0

    maps = {}
    for number, (name, amount) in enumerate(VARIATION.items()):
        values = np.zeros(brain.shape, dtype=np.float32)
        for label, tissue in TISSUES.items():
            values[labels == label] = tissue[name]
        maps[name] = values * (1 + amount * smooth_texture(brain.shape, scale=25.0, seed=number))
    # Variations of T2 and T2* are independent; relaxation by field inhomogeneity cannot be negative.
    maps["t2star"] = np.minimum(maps["t2star"], 0.95 * maps["t2"])
    return Anatomy(
        t1=maps["t1"],
        t2=maps["t2"],
        t2star=maps["t2star"],
        pd=maps["pd"],
        labels=labels,
        mask=brain,
        voxel_size=(1e-3, 1e-3, 1e-3),
    )
