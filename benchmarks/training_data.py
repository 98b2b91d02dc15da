"""The weighted volumes that the shipped denoiser was trained on: a folder for ``quantitron train-denoiser``.

    python benchmarks/training_data.py DATA OUT
    quantitron train-denoiser --data OUT -o contrast_denoiser.safetensors --minutes 68 --attention none \
        --rate 5e-4 --seed 1 --threads 1

DATA holds delics_vol00.npz and delics_vol08.npz (in-vivo 3 T maps of two volunteers, PMC11914339), BrainWeb's
subject 05 (brainweb_s05_crisp_0p5mm.npz) and two measured volumes, qmrlab_vfa_T1w / _PDw.nii.gz; the MNI152
brain comes with nilearn. delics_vol03 takes no part: it is what benchmarks are judged on. Six subjects are
made of each volunteer, three of the MNI brain, two of BrainWeb's; the first of each keeps shape and tissues.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
from invivo import MIRRORED_SLICES, phantom

from quantitron.phantoms.anatomy import Anatomy
from quantitron.phantoms.file import read_anatomy
from quantitron.phantoms.mni import mni_brain
from quantitron.training.synthetic_contrasts import write_subjects

SEED = 1
MNI_PART = (slice(10, 150), slice(10, 220), slice(10, 190))
BRAINWEB_PART = (slice(60, 330), slice(10, -10), slice(10, -10))
BRAINWEB_TISSUE = {
    1: (4.0, 1.99, 1.0),  # CSF
    2: (1.25, 0.09, 0.85),  # grey matter
    3: (0.75, 0.07, 0.75),  # white matter
    4: (0.25, 0.07, 1.0),  # fat
    5: (1.485, 0.05, 1.0),  # muscle
    6: (1.485, 0.05, 1.0),  # skin
    7: (1.0, 0.05, 0.0),  # skull
    8: (1.96, 0.2, 1.2),  # vessels
    9: (0.25, 0.07, 1.0),  # fat around
    10: (0.99, 0.15, 1.0),  # dura
    11: (0.587, 0.05, 1.0),  # marrow
}
"""Label -> T1, T2 [s], PD at 3 T."""


def volunteer(source: Path) -> Anatomy:
    """Without the slices that are mirrored at the ends, the same tissue a second time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "phantom.npz"
        np.savez(file, **phantom(source))
        return cut(read_anatomy(file), (slice(MIRRORED_SLICES, -MIRRORED_SLICES),))


def brainweb(source: Path) -> Anatomy:
    """Crisp tissues at 0.5 mm."""
    with np.load(source, allow_pickle=False) as archive:
        labels = archive["labels"][BRAINWEB_PART]
    maps = {
        name: np.full(labels.shape, empty, np.float32) for name, empty in (("t1", 1), ("t2", 0.05), ("pd", 0))
    }
    for label, values in BRAINWEB_TISSUE.items():
        inside = labels == label
        for grid, value in zip(maps.values(), values, strict=True):
            grid[inside] = value
    return Anatomy(**maps, labels=labels, mask=labels > 0, voxel_size=(0.5e-3,) * 3)


def cut(anatomy: Anatomy, part: tuple[slice, ...]) -> Anatomy:
    return Anatomy(
        **{name: values[part] for name, values in anatomy.maps().items()}, voxel_size=anatomy.voxel_size
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    data, output = arguments.data, arguments.output
    for first, name in ((1, "delics_vol00.npz"), (7, "delics_vol08.npz")):
        write_subjects(volunteer(data / name), output, 6, first, SEED)
    write_subjects(cut(mni_brain(), MNI_PART), output, 3, 13, SEED)
    write_subjects(brainweb(data / "brainweb_s05_crisp_0p5mm.npz"), output, 2, 30, SEED, average=2)
    for modality in ("T1w", "PDw"):
        shutil.copyfile(data / f"qmrlab_vfa_{modality}.nii.gz", output / f"sub-0050_{modality}.nii.gz")


if __name__ == "__main__":
    main()
