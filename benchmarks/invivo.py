"""Real in-vivo maps (Deli-CS volunteers, 1 mm, 3 T) as a phantom FILE.npz for ``quantitron simulate``.

    python benchmarks/invivo.py delics_vol00.npz phantom.npz

The source holds ``t1_ms``, ``t2_ms``, ``pd_abs``, ``pd_phase`` and ``head``, each (z, y, x); cite
PMC11914339. T2* is not measured there: R2* = R2 + R2' with a plausible R2' for each tissue.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from quantitron.phantoms.anatomy import CSF, GREY_MATTER, WHITE_MATTER
from quantitron.phantoms.texture import smooth_texture

VOXEL = 1e-3
T1_LIMITS = (1.10, 2.00)
"""T1 [s] between white and grey matter, and between grey matter and CSF."""
FIELD_RELAXATION = {WHITE_MATTER: 3.5, GREY_MATTER: 2.7, CSF: 1.0, 0: 5.0}
"""R2' [1/s] of the tissues; 0 is everything outside the brain (scalp, marrow)."""
SHORTEST_T2, LONGEST_T2, SHORTEST_T1 = 5e-3, 0.5, 0.05
"""[s]. A fingerprint of a few seconds does not measure longer T2: fluid has 0.5 to 4 s there at random."""
MIRRORED_SLICES = 2
"""Slices mirrored at each end of the slab: the tissue of a real slab does not end in air."""


def ball(radius: float, height: int) -> NDArray[np.bool_]:
    """An ellipsoid of ``radius`` voxels in-plane and ``height`` planes to either side."""
    r = int(radius)
    z, y, x = np.mgrid[-height : height + 1, -r : r + 1, -r : r + 1]
    return (y**2 + x**2 + (z * radius / max(height, 1)) ** 2 <= radius**2) & (abs(z) <= height)


def largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected component."""
    labels, count = ndimage.label(mask)
    if count == 0:
        raise SystemExit("no brain was found in the file")
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == int(np.argmax(sizes))


def brain_mask(
    t1: NDArray[np.floating], t2: NDArray[np.floating], pd: NDArray[np.floating], head: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Brain inside the skull: neither fat (T1) nor muscle (T2), cut from the scalp by opening, holes filled.

    Args:
        t1: (z, y, x) [s].
        t2: (z, y, x) [s].
        pd: (z, y, x) modulus of the proton density.
        head: (z, y, x).
    """
    smooth = ndimage.gaussian_filter(pd, (0, 1, 1))
    typical = np.median(smooth[head])
    tissue = head & (smooth > 0.55 * typical)
    tissue &= (ndimage.median_filter(t1, (1, 5, 5)) > 0.6) & (ndimage.median_filter(t2, (1, 5, 5)) > 0.040)
    core = largest_part(ndimage.binary_erosion(tissue, ball(6, 1), border_value=1))
    grown = ndimage.binary_dilation(core, ball(7, 1)) & tissue
    closed = ndimage.binary_closing(np.pad(grown, 4), ball(4, 1))[4:-4, 4:-4, 4:-4]
    filled = np.stack([ndimage.binary_fill_holes(plane) for plane in closed | grown])
    return largest_part(filled & head)


def phantom(source: Path) -> dict[str, NDArray[np.generic]]:
    """Maps of FILE.npz from a Deli-CS volume."""
    with np.load(source, allow_pickle=False) as volume:
        t1 = volume["t1_ms"].astype(np.float32) / 1e3
        t2 = volume["t2_ms"].astype(np.float32) / 1e3
        modulus = volume["pd_abs"].astype(np.float32)
        phase = volume["pd_phase"].astype(np.float32)
        head = volume["head"].astype(bool)
    head &= (t1 > 0) & (t2 > 0)
    brain = brain_mask(t1, t2, modulus, head)
    labels = np.zeros(t1.shape, dtype=np.uint8)
    labels[brain] = np.select(
        [t1[brain] < T1_LIMITS[0], t1[brain] < T1_LIMITS[1]], [WHITE_MATTER, GREY_MATTER], CSF
    )
    t1 = np.maximum(t1, SHORTEST_T1)
    t2 = np.clip(t2, SHORTEST_T2, LONGEST_T2)
    field_relaxation = np.select(
        [labels == label for label in FIELD_RELAXATION], list(FIELD_RELAXATION.values())
    ).astype(np.float32)
    # Tissue borders of R2' are softened, and it varies smoothly by a fifth.
    field_relaxation = ndimage.gaussian_filter(field_relaxation, 1.0)
    field_relaxation *= 1 + 0.2 * smooth_texture(t1.shape, scale=20.0, seed=11)
    t2star = 1 / (1 / t2 + field_relaxation)
    pd = np.where(head, modulus * np.exp(1j * phase), 0).astype(np.complex64)

    def tissue_only(values: NDArray[np.floating]) -> NDArray[np.float32]:
        return np.where(head, values, 0).astype(np.float32)

    maps = {
        "t1": tissue_only(t1),
        "t2": tissue_only(t2),
        "t2star": tissue_only(t2star),
        "pd": pd,
        "labels": labels,
        "mask": brain,
    }
    ends = ((MIRRORED_SLICES, MIRRORED_SLICES), (0, 0), (0, 0))
    return {
        **{name: np.pad(values, ends, mode="reflect") for name, values in maps.items()},
        "voxel_size": np.array([VOXEL, VOXEL, VOXEL]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="delics_volXX.npz")
    parser.add_argument("output", type=Path, help="FILE.npz to write")
    arguments = parser.parse_args()
    np.savez_compressed(arguments.output, **phantom(arguments.source))


if __name__ == "__main__":
    main()
