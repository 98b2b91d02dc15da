"""A noise scan in a file of its own does what noise lines in the scan do."""

from __future__ import annotations

from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_file import read_images
from quantitron.host.replay import replay
from quantitron.phantoms.simulate import simulate

FLAG = np.uint64(1 << (ismrmrd.ACQ_IS_NOISE_MEASUREMENT - 1))
SCAN = {
    "sequence": "megre",
    "matrix": (16, 16, 1),
    "acceleration": 1.0,
    "snr": 30.0,
    "supersampling": (1, 1, 1),
    "phantom": "mni",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan, and its parts: noise lines, all else, noise twice as strong beside all else."""
    path = tmp_path_factory.mktemp("noise")
    simulate(**SCAN, coils=4, output=path / "whole.h5")
    simulate(**SCAN, coils=3, output=path / "three.h5")
    with h5py.File(path / "whole.h5") as file:
        rows, header = file["dataset/data"][()], file["dataset/xml"][()]
    is_noise = rows["head"]["flags"] & FLAG > 0
    louder = rows.copy()
    for row in np.flatnonzero(is_noise):
        louder["data"][row] = 2 * rows["data"][row]
    parts = {"noise": rows[is_noise], "scan": rows[~is_noise], "louder": louder}
    for name, part in parts.items():
        with h5py.File(path / f"{name}.h5", "w") as file:
            file.create_dataset("dataset/xml", data=header)
            file.create_dataset("dataset/data", data=part)
    return path


def maps(path: Path) -> dict[str, np.ndarray]:
    return {image.meta["GADGETRON_DataRole"]: image.data for image in read_images(path)}


@pytest.mark.parametrize("scan", ["scan", "louder"])
def test_noise_lines_may_lie_in_another_file(folder: Path, tmp_path: Path, scan: str) -> None:
    """In place of the scan's own, if it has any."""
    replay(folder / "whole.h5", "subspace", tmp_path / "expected.h5")
    result = replay(folder / f"{scan}.h5", "subspace", tmp_path / "maps.h5", noise=folder / "noise.h5")
    assert not any("noise line" in note or "noise scan" in note for note in result.notes)
    expected, found = maps(tmp_path / "expected.h5"), maps(tmp_path / "maps.h5")
    assert found.keys() == expected.keys()
    for role, values in expected.items():
        np.testing.assert_array_equal(found[role], values, err_msg=role)


def test_louder_noise_changes_the_maps(folder: Path, tmp_path: Path) -> None:
    """Or the comparison above would say nothing."""
    replay(folder / "whole.h5", "subspace", tmp_path / "expected.h5")
    replay(folder / "louder.h5", "subspace", tmp_path / "maps.h5")
    residual = [
        float(read_images(tmp_path / name)[0].meta["Quantitron_ResidualToNoise"])
        for name in ("expected.h5", "maps.h5")
    ]
    assert residual[0] / residual[1] == pytest.approx(4, rel=0.1)  # of energies


@pytest.mark.parametrize(
    ("noise", "sentence"),
    [
        ("scan.h5", r"scan\.h5 holds no noise lines"),
        ("absent.h5", r"absent\.h5 does not exist"),
        ("three.h5", "has 4 channels, the noise scan has 3"),
    ],
)
def test_what_is_no_noise_of_the_scan_is_refused(
    folder: Path, tmp_path: Path, noise: str, sentence: str
) -> None:
    with pytest.raises(ScanError, match=sentence):
        replay(folder / "scan.h5", "subspace", tmp_path / "maps.h5", noise=folder / noise)
    assert not list(tmp_path.iterdir())


def test_the_noise_file_is_not_written_over(folder: Path) -> None:
    with pytest.raises(ScanError, match="noise"):
        replay(folder / "scan.h5", "subspace", folder / "noise.h5", noise=folder / "noise.h5", overwrite=True)
    with h5py.File(folder / "noise.h5") as file:
        assert len(file["dataset/data"])
