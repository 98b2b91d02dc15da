"""Small NIfTI files to train on: blobs of four tissues, seen in three contrasts."""

from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

TISSUES = {
    "T1w": (0.0, 1.0, 0.7, 0.4, 0.2),
    "T2w": (0.0, 0.3, 0.5, 0.7, 1.0),
    "PDw": (0.0, 0.6, 0.7, 0.9, 1.0),
}


def blobs(seed: int, shape: tuple[int, int, int] = (40, 44, 18)) -> np.ndarray:
    """Labels 0..4 (x, y, z)."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), (4, 4, 2))
    return np.digitize(smooth, np.quantile(smooth, [0.3, 0.5, 0.7, 0.85]))


def write_nifti(file: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), file)
    return file


def write_subjects(folder: Path, count: int, modalities: tuple[str, ...] = ("T1w", "T2w", "PDw")) -> Path:
    folder.mkdir(exist_ok=True)
    for subject in range(count):
        labels = blobs(subject)
        for name in modalities:
            values = (1000 * np.array(TISSUES[name])[labels]).astype(np.float32)
            write_nifti(folder / f"sub-{subject:02d}_{name}.nii.gz", values)
    return folder
