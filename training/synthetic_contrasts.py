"""Weighted images of subjects that never were: from tissue maps, with other tissue values and shapes.

Where no archive of routine images is at hand, a denoiser can be trained on what spin echoes would have shown
of known anatomies. Each subject is an anatomy whose shape is bent by some millimetres, whose tissues have
other T1, T2 and proton density, and which was scanned with other TR and TE; each of its images lies in a file
that is named as BIDS asks, so that ``quantitron train-denoiser`` reads them like any other folder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from quantitron.gadgets.errors import ScanError
from quantitron.phantoms.anatomy import Anatomy
from quantitron.phantoms.texture import smooth_texture

TIMES = {
    "T1w": ((0.30, 0.80), (0.008, 0.016)),
    "T2w": ((3.0, 7.0), (0.080, 0.120)),
    "PDw": ((3.0, 7.0), (0.008, 0.030)),
}
"""Modality -> ranges of TR and TE [s] of clinical spin echoes."""

Volume = NDArray[np.float32]


@dataclass(frozen=True)
class Variation:
    """How far subjects are from the anatomy that they are made of."""

    bend: float = 4.0
    """Standard deviation of the displacement [mm], which varies over some 30 mm."""
    tissue: float = 0.12
    """Standard deviation of the logarithm of T1 and T2 of each tissue; half of it for proton density."""
    texture: float = 0.04
    """Relative smooth variation within tissues."""


def synthetic_subject(
    anatomy: Anatomy, variation: Variation, seed: int, average: int = 1
) -> dict[str, Volume]:
    """The images of one subject.

    Args:
        anatomy: with T1, T2 and PD.
        variation: of the subject from it.
        seed: of the subject.
        average: voxels along each axis whose mean is a voxel of the images: partial volume, for an anatomy
            finer than they are to be.

    Returns:
        modality -> (z, y, x), not normalised.

    Raises:
        ScanError: if the anatomy has no T1 or T2.
    """
    if anatomy.t1 is None or anatomy.t2 is None:
        raise ScanError("weighted images need an anatomy with t1 and t2")
    random = np.random.default_rng([seed, 21])
    pd = np.abs(anatomy.pd).astype(np.float32)
    tissue = pd > 0
    maps = {
        "t1": np.where(tissue, anatomy.t1, 1.0).astype(np.float32),
        "t2": np.where(tissue, anatomy.t2, 0.05).astype(np.float32),
        "pd": pd,
    }
    for number, (name, share) in enumerate({"t1": 1.0, "t2": 1.0, "pd": 0.5}.items()):
        change = _by_tissue(anatomy.labels, random, share * variation.tissue)
        change += variation.texture * smooth_texture(pd.shape, scale=15.0, seed=1000 * seed + number)
        maps[name] = maps[name] * np.exp(change)
    coordinates = _bent(pd.shape, anatomy.voxel_size, variation.bend, random)
    images = {}
    for modality, (repetition_times, echo_times) in TIMES.items():
        repetition_time, echo_time = random.uniform(*repetition_times), random.uniform(*echo_times)
        image = (
            maps["pd"] * (1 - np.exp(-repetition_time / maps["t1"])) * np.exp(-echo_time / maps["t2"])
        ).astype(np.float32)
        if coordinates is not None:
            image = ndimage.map_coordinates(image, coordinates, order=1, mode="nearest")
        images[modality] = _block_mean(image, average)
    return images


def write_subjects(
    anatomy: Anatomy,
    folder: Path,
    subjects: int,
    first: int,
    seed: int = 0,
    variation: Variation | None = None,
    average: int = 1,
) -> list[Path]:
    """Write ``sub-0001_T1w.nii.gz`` and so on, float32, in ``folder``.

    Args:
        anatomy: of all of them.
        folder: made where it does not exist.
        subjects: how many. The first keeps the anatomy's shape and tissues.
        first: number of the first.
        seed: of all of them.
        variation: from the anatomy.
        average: as for ``synthetic_subject``.

    Returns:
        the files.

    Raises:
        ScanError: if a file exists or cannot be written.
    """
    variation = variation or Variation()
    folder.mkdir(parents=True, exist_ok=True)
    dz, dy, dx = (1e3 * average * edge for edge in anatomy.voxel_size)  # [mm]
    affine = np.diag([-dx, dy, dz, 1.0])  # columns towards left, back and head; NIfTI counts right and front
    affine[1, 1] = -dy
    files = []
    for number in range(first, first + subjects):
        own = variation if number > first else replace(variation, bend=0.0, tissue=0.0, texture=0.0)
        for modality, image in synthetic_subject(anatomy, own, seed * 10_000 + number, average).items():
            file = folder / f"sub-{number:04d}_{modality}.nii.gz"
            if file.exists():
                raise ScanError(f"{file} exists")
            try:
                nibabel.save(nibabel.Nifti1Image(image.transpose(2, 1, 0), affine), file)  # type: ignore[no-untyped-call]
            except OSError as error:
                raise ScanError(f"cannot write {file}: {error.strerror or error}") from error
            files.append(file)
    return files


def _by_tissue(
    labels: NDArray[np.integer], random: np.random.Generator, deviation: float
) -> NDArray[np.float32]:
    """(z, y, x) logarithm of a random factor for each tissue, smooth over a voxel at their borders."""
    kinds = np.unique(labels)
    change = np.zeros(labels.shape, dtype=np.float32)
    for kind, value in zip(kinds, random.normal(0, deviation, len(kinds)), strict=True):
        change[labels == kind] = value
    smooth: NDArray[np.float32] = ndimage.gaussian_filter(change, 1.0)
    return smooth


def _bent(
    shape: tuple[int, ...],
    voxel_size: tuple[float, float, float],
    bend: float,
    random: np.random.Generator,
) -> NDArray[np.float32] | None:
    """(3, z, y, x) where each voxel of the subject lies in the anatomy; None where it keeps its shape."""
    if bend == 0:
        return None
    coordinates = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"))
    for axis, edge in enumerate(voxel_size):
        scale = 0.03 / edge  # voxels over which the displacement varies
        coarse = tuple(max(2, round(n / scale) + 1) for n in shape)
        field = random.normal(0, 1e-3 * bend / edge, coarse)
        places = np.meshgrid(
            *(np.linspace(0, c - 1, n) for c, n in zip(coarse, shape, strict=True)), indexing="ij"
        )
        coordinates[axis] += ndimage.map_coordinates(field, places, order=3, mode="nearest")
    return coordinates


def _block_mean(image: Volume, factor: int) -> Volume:
    """Mean of blocks of ``factor`` voxels along each axis; what is left at the ends is cut off."""
    if factor == 1:
        return image
    nz, ny, nx = (n // factor for n in image.shape)
    image = image[: nz * factor, : ny * factor, : nx * factor]
    blocks = image.reshape(nz, factor, ny, factor, nx, factor)
    mean: Volume = blocks.mean((1, 3, 5), dtype=np.float32)
    return mean
