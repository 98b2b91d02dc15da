"""Maps against truth, from files: numbers, table, and what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import matplotlib.image
import numpy as np
import pytest

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_file import read_images, write_images
from quantitron.gadgets.image_geometry import axial_header
from quantitron.gadgets.images import map_images
from quantitron.gadgets.map_volume import magnitude_volumes, map_volumes
from quantitron.host.compare import compare, table
from quantitron.reports.map_figure import figure_beside_truth, figure_of_maps

FIELD_OF_VIEW = (0.012, 0.2, 0.16)  # (z, y, x) [m]
SHAPE = (1, 3, 20, 16)


def brain() -> dict[str, np.ndarray]:
    """An ellipsoid in air, white matter on one side and grey matter on the other."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE[1:]), indexing="ij")
    inside = (0.2 * z**2 + y**2 + x**2 < 0.8)[None]
    ramp = (1 + 0.2 * y)[None]
    white = inside & (x < 0)[None]
    maps = {
        "t1": np.where(white, 0.8, 1.4) * ramp,
        "t2": np.where(white, 0.06, 0.08) * ramp,
        "t2star": np.where(white, 0.05, 0.06) * ramp,
        "pd": np.where(white, 0.7, 0.8) * ramp,
        "b0": 30 * x[None],
        "phase": 3 * y[None],
    }
    maps = {name: np.where(inside, value, np.nan) for name, value in maps.items()}
    return {**maps, "mask": inside, "wm": white, "gm": inside & ~white}


def write(path: Path, group: str | None, maps: Mapping[str, np.ndarray], **storage: Any) -> Path:
    field_of_view = storage.pop("field_of_view", FIELD_OF_VIEW)
    header = axial_header()
    header["position"] = storage.pop("position", (0, 0, 0))
    for direction, vector in storage.pop("directions", {}).items():
        header[direction] = vector
    write_images(path, group, map_images(maps, {0: header}, field_of_view, **storage))
    return path


@pytest.fixture
def truth_file(tmp_path: Path) -> Path:
    """A raw file with ground truth."""
    path = tmp_path / "raw.h5"
    with h5py.File(path, "w") as file:
        file["dataset/xml"] = "header"
    return write(path, "truth", brain())


def test_perfect_maps_have_no_error(tmp_path: Path, truth_file: Path) -> None:
    maps = brain()
    maps["pd"] = 812 * maps["pd"]
    result = compare(write(tmp_path / "maps.h5", None, maps), truth_file)
    assert result["mask_voxels"] == maps["mask"].sum()
    assert list(result["maps"]) == ["T1", "T2", "T2STAR", "PD", "FREQMAP", "PHASE"]
    for role in ("T1", "T2", "T2STAR", "PD"):
        row = result["maps"][role]
        for number in ("nrmse", "mape_wm", "mape_gm"):
            assert row[number] == pytest.approx(0, abs=1e-6)
        assert row["slope"] == pytest.approx(1)
        assert row["r_squared"] == pytest.approx(1)
        assert row["missing"] == 0
    assert result["maps"]["PD"]["factor"] == pytest.approx(1 / 812)
    assert result["maps"]["FREQMAP"]["rmse"] == pytest.approx(0, abs=1e-5)
    assert result["maps"]["PHASE"]["rmse"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("layout", ["volume", "slices"])
@pytest.mark.parametrize("output", ["float32", "uint16"])
def test_known_errors_are_found(tmp_path: Path, truth_file: Path, layout: str, output: str) -> None:
    maps = brain()
    maps["t1"] = 1.1 * maps["t1"]
    maps["b0"] = maps["b0"] + 2.5
    maps["phase"] = np.angle(np.exp(1j * (maps["phase"] + 0.25)))
    first = tuple(np.argwhere(maps["wm"])[0])
    maps["t2"][first] = np.nan
    result = compare(write(tmp_path / "maps.h5", None, maps, layout=layout, output=output), truth_file)[
        "maps"
    ]
    coarse = 2e-3 if output == "uint16" else 1e-5
    assert result["T1"]["nrmse"] == pytest.approx(0.1, abs=coarse)
    assert result["T1"]["mape_wm"] == pytest.approx(0.1, abs=coarse)
    assert result["T1"]["slope"] == pytest.approx(1.1, abs=coarse)
    assert result["T1"]["unit"] == "ms"
    assert result["T1"]["bias"] == pytest.approx(0.1 * 1e3 * np.nanmean(brain()["t1"]), abs=0.6)
    assert result["FREQMAP"]["rmse"] == pytest.approx(2.5, abs=0.05)
    assert result["FREQMAP"]["bias"] == pytest.approx(2.5, abs=0.05)
    assert result["PHASE"]["rmse"] == pytest.approx(0.25, abs=2e-3)
    assert result["T2"]["missing"] == 1
    assert result["T2"]["mape_wm"] == pytest.approx(1 / brain()["wm"].sum(), abs=coarse)
    assert result["T2"]["mape_gm"] == pytest.approx(0, abs=coarse)


def test_relaxation_times_are_capped(tmp_path: Path) -> None:
    fluid, other = brain(), brain()
    for name, value in (("t1", 4.2), ("t2", 1.6), ("t2star", 0.5)):
        fluid[name] = np.where(fluid["mask"], value, np.nan)
        other[name] = 1.3 * fluid[name]
    result = compare(write(tmp_path / "m.h5", None, other), write(tmp_path / "t.h5", "truth", fluid))["maps"]
    for role in ("T1", "T2", "T2STAR"):
        assert result[role]["nrmse"] == result[role]["bias"] == 0
        assert result[role]["mape_wm"] == pytest.approx(0.3)


def test_spheres(tmp_path: Path) -> None:
    truth = brain()
    del truth["wm"], truth["gm"]
    labels = np.zeros(SHAPE, int)
    labels[0, :, 6:9, 4:7], labels[0, :, 11:14, 9:12] = 1, 14
    truth["spheres"] = labels
    truth["t1"] = np.where(labels == 1, 0.5, np.where(labels == 14, 2.0, 1.0))
    found = dict(truth, t1=np.where(labels == 14, 1.9, truth["t1"]))
    found["t1"][labels == 1] *= np.where(np.arange(27) % 2 == 0, 1.1, 0.9)
    result = compare(write(tmp_path / "m.h5", None, found), write(tmp_path / "t.h5", "truth", truth))
    small, large = result["spheres"]["T1"]["list"]
    assert (small["label"], large["label"], large["voxels"]) == (1, 14, 27)
    assert large["bias"] == pytest.approx(-0.05)
    assert large["variation"] == pytest.approx(0, abs=1e-6)
    assert small["variation"] == pytest.approx(0.1, rel=0.01)
    assert result["spheres"]["T1"]["slope"] == pytest.approx((1.9 - small["mean"] / 1e3) / 1.5)
    text = table(result)
    assert "sphere" in text
    assert "-5.00 %" in text


def test_table_and_json_hold_the_numbers(tmp_path: Path, truth_file: Path) -> None:
    maps = brain()
    maps["t1"] = 1.1 * maps["t1"]
    result = compare(write(tmp_path / "maps.h5", None, maps), truth_file)
    lines = table(result).splitlines()
    assert lines[0] == f"{maps['mask'].sum()} voxels inside the mask"
    assert lines[1].split()[:2] == ["map", "NRMSE"]
    t1 = next(line for line in lines if line.startswith("T1 "))
    assert t1.split()[1:3] == ["10.00", "%"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_latest_run_counts_and_a_map_file_can_be_the_truth(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"
    wrong = dict(brain(), t1=2 * brain()["t1"])
    write(path, "2026-01-01 10:00:00", wrong)
    write(path, "2026-01-01 11:00:00", brain())
    assert compare(path, path)["maps"]["T1"]["nrmse"] == 0
    reference = write(tmp_path / "reference.h5", "2026-01-01 09:00:00", brain())
    assert compare(path, reference)["maps"]["T1"]["nrmse"] == 0


@pytest.mark.parametrize("layout", ["volume", "slices"])
def test_of_runs_that_a_client_appended_to_one_group_the_last_counts(tmp_path: Path, layout: str) -> None:
    runs = [
        image
        for maps in (dict(brain(), t1=2 * brain()["t1"]), brain())
        for image in map_images(maps, {0: axial_header()}, FIELD_OF_VIEW, layout=layout)
    ]
    write_images(tmp_path / "maps.h5", "maps", runs)
    reference = write(tmp_path / "reference.h5", None, brain(), layout=layout)
    assert compare(tmp_path / "maps.h5", reference)["maps"]["T1"]["nrmse"] == 0


def test_without_a_mask_all_voxels_with_truth_count(tmp_path: Path) -> None:
    truth = brain()
    inside = truth.pop("mask")
    reference = write(tmp_path / "t.h5", "truth", truth)
    assert compare(write(tmp_path / "m.h5", None, brain()), reference)["mask_voxels"] == inside.sum()


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path, truth_file: Path) -> None:
    smaller = {name: value[..., :-1] for name, value in brain().items()}
    path = write(tmp_path / "smaller.h5", None, smaller)
    with pytest.raises(ScanError, match=r"map T1 is 3 x 20 x 15 in .* but 3 x 20 x 16 in .*same grid"):
        compare(path, truth_file)
    moved = write(tmp_path / "moved.h5", None, brain(), position=(10, 0, 0))
    with pytest.raises(ScanError, match=r"lies elsewhere .* first voxels 10 mm apart"):
        compare(moved, truth_file)
    wide = write(tmp_path / "wide.h5", None, brain(), field_of_view=(0.012, 0.2, 0.32))
    with pytest.raises(ScanError, match=r"lies elsewhere .* voxel sizes 4 x 10 x 20 and 4 x 10 x 10 mm"):
        compare(wide, truth_file)
    # The first voxel stays where it is: it lies half a field of view from the position.
    mirrored = {"position": (-160, 0, 0), "directions": {"read_dir": (-1, 0, 0)}}
    for layout in ("volume", "slices"):
        path = write(tmp_path / f"{layout}.h5", None, brain(), layout=layout, **mirrored)
        with pytest.raises(ScanError, match=r"turned or mirrored .* along x, y and z 300, 0, 0 mm apart"):
            compare(path, truth_file)
    upside_down = {"position": (0, 0, -8), "directions": {"slice_dir": (0, 0, -1)}}
    for layout in ("volume", "slices"):
        path = write(tmp_path / f"z_{layout}.h5", None, brain(), layout=layout, **upside_down)
        with pytest.raises(ScanError, match=r"turned or mirrored .* along x, y and z 0, 0, 16 mm apart"):
            compare(path, truth_file)
    other = write(tmp_path / "other.h5", None, {"r2star": 20 * np.ones(SHAPE)})
    with pytest.raises(ScanError, match=r"\(R2STAR\) and .* have no map in common"):
        compare(other, truth_file)
    empty = write(tmp_path / "empty.h5", "truth", dict(brain(), mask=np.zeros(SHAPE)))
    with pytest.raises(ScanError, match="the mask is empty"):
        compare(
            path.parent / "smaller.h5",
            write(tmp_path / "e.h5", "truth", dict(smaller, mask=0 * smaller["mask"])),
        )
    with pytest.raises(ScanError, match="the mask is empty"):
        compare(write(tmp_path / "fine.h5", None, brain()), empty)
    with pytest.raises(ScanError, match="does not exist"):
        compare(tmp_path / "none.h5", truth_file)
    with pytest.raises(ScanError, match="the maps come first, the truth second"):
        compare(truth_file, write(tmp_path / "swapped.h5", None, brain()))
    raw = tmp_path / "no_truth.h5"
    with h5py.File(raw, "w") as file:
        file["dataset/xml"] = "header"
    with pytest.raises(ScanError, match="holds no images"):
        compare(path, raw)


def test_maps_that_are_zero_everywhere_are_measured(tmp_path: Path, truth_file: Path) -> None:
    nothing = {
        name: np.where(value == value, np.nan, value) for name, value in brain().items() if name != "mask"
    }
    result = compare(write(tmp_path / "maps.h5", None, nothing), truth_file)["maps"]
    assert result["T1"]["nrmse"] == 1
    assert result["T1"]["mape_gm"] == 1
    assert result["PD"]["factor"] is None
    assert result["PD"]["nrmse"] == 1


def test_figures_are_drawn(tmp_path: Path, truth_file: Path) -> None:
    volumes = map_volumes(read_images(write(tmp_path / "maps.h5", None, brain())))
    truth = map_volumes(read_images(truth_file, "truth"))
    figure_beside_truth(tmp_path / "beside.png", {"ours": volumes, "theirs": volumes}, truth, "title")
    figure_of_maps(tmp_path / "alone.png", volumes, magnitude_volumes([]))
    beside, alone = (matplotlib.image.imread(tmp_path / name) for name in ("beside.png", "alone.png"))
    assert beside.shape[1] > alone.shape[1] > 500  # five columns against four
    assert beside.shape[0] > alone.shape[0] > 300  # six rows, one a map, against two
    for picture in (beside, alone):
        black = np.all(picture[..., :3] == 0, axis=-1).mean()
        assert 0.05 < black < 0.6  # what lies outside the mask
    with pytest.raises(ScanError, match="cannot write"):
        figure_of_maps(tmp_path / "no" / "folder.png", volumes)
    with pytest.raises(ScanError, match="no map to draw"):
        figure_of_maps(tmp_path / "none.png", {})
    for methods, right in (({"ours": volumes}, {}), ({"ours": {}}, truth), ({}, truth)):
        with pytest.raises(ScanError, match="no map in common"):
            figure_beside_truth(tmp_path / "none.png", methods, right)


def test_a_figure_shows_the_maps_asked_for_and_their_errors(tmp_path: Path, truth_file: Path) -> None:
    """Three panels of one map: the truth, the map, which is the truth, and its error, which is nowhere."""
    truth = map_volumes(read_images(truth_file, "truth"))
    figure_beside_truth(tmp_path / "same.png", {"ours": truth}, truth, roles=("T1",))
    low = {"T1": replace(truth["T1"], values=0.8 * truth["T1"].values)}
    figure_beside_truth(tmp_path / "low.png", {"ours": low}, truth, roles=("T1",), slice_index=0)
    same, lower = (matplotlib.image.imread(tmp_path / name)[..., :3] for name in ("same.png", "low.png"))
    assert same.shape[1] > 1.5 * same.shape[0]  # one row
    right = slice(int(0.65 * same.shape[1]), int(0.85 * same.shape[1]))

    def blue(picture: np.ndarray) -> float:
        red, _, blue = np.moveaxis(picture[:, right], -1, 0)
        return float(np.mean(blue > red + 0.2))

    assert blue(same) < 0.05
    assert blue(lower) > 0.2
    short = {"T1": replace(truth["T1"], values=truth["T1"].values[:, 1:])}
    with pytest.raises(ScanError, match="not on the same grid"):
        figure_beside_truth(tmp_path / "none.png", {"ours": short}, truth)
    empty = {**truth, "MASK": replace(truth["MASK"], values=np.zeros_like(truth["MASK"].values))}
    with pytest.raises(ScanError, match="mask of the truth is empty"):
        figure_beside_truth(tmp_path / "none.png", {"ours": truth}, empty)
