"""Every Cartesian pipeline from a raw file to maps, with the settings that it comes with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantitron.gadgets.image_file import read_images
from quantitron.gadgets.image_metadata import SHORT_CHECKSUM
from quantitron.gadgets.network_weights import read_network, shipped_network
from quantitron.host.command import app
from quantitron.host.compare import compare
from quantitron.host.replay import replay
from quantitron.phantoms.simulate import simulate
from quantitron.pipelines import pipeline_names, settings_names
from quantitron.recon.solvers import SOLVERS

pytestmark = pytest.mark.usefixtures("one_thread")

CARTESIAN = ("subspace", "llr", "lrtv", "lrt", "model_based")

SCANS = {
    "vfa_gre": {"acceleration": 3.0, "echo_times": (2e-3, 6e-3, 12e-3, 18e-3)},
    "t2ir_gre": {"acceleration": 12.0, "excitations": 12, "echo_times": (3e-3, 9e-3, 15e-3)},
    "megre": {"acceleration": 1.5, "echo_times": (4e-3, 9e-3, 14e-3, 19e-3)},
}
"""Of 24x24x4 voxels of 9.3x9.3x8 mm, 4 coils."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    for sequence, scan in SCANS.items():
        simulate(
            sequence=sequence,
            output=folder / f"{sequence}.h5",
            matrix=(24, 24, 4),
            fov=(224.0, 224.0, 32.0),
            coils=4,
            snr=30.0,
            supersampling=1,
            calibration_lines=(12, 4),
            **scan,
        )
    return folder


@pytest.fixture(scope="module")
def plane(tmp_path_factory) -> Path:
    """A t2ir_gre scan of 32x32x4 voxels of 7x7x8 mm."""
    path = tmp_path_factory.mktemp("plane") / "t2ir_gre.h5"
    simulate(
        sequence="t2ir_gre",
        output=path,
        matrix=(32, 32, 4),
        fov=(224.0, 224.0, 32.0),
        coils=4,
        snr=30.0,
        supersampling=1,
        calibration_lines=(12, 4),
        **SCANS["t2ir_gre"],
    )
    return path


def test_a_solver_has_a_pipeline_with_settings_of_its_name():
    assert {solver.name for solver in SOLVERS} <= set(pipeline_names())
    assert set(CARTESIAN) <= set(settings_names()) <= set(pipeline_names())


def test_pipelines_are_listed_with_their_settings():
    listed = json.loads(CliRunner().invoke(app, ["pipelines", "--json"]).stdout)
    for name in CARTESIAN:
        for sequence in SCANS:
            assert listed[name][sequence]["reconstruct"]["solver"] == name
    assert listed["llr"]["megre"]["reconstruct"]["random_shifts"] is True
    assert listed["lrtv"]["megre"]["reconstruct"]["algorithm"] == "reweighted"
    assert "tensor_rank" in listed["lrt"]["megre"]["reconstruct"]


LIMITS = {
    # [%], subspace / llr / lrtv / lrt, with weights a third above today's presets, / model_based
    # T1 7.0 / 7.2 / 5.4 / 6.0 / 4.5, T2* 11.1 / 9.3 / 9.9 / 9.6 / 9.0
    "vfa_gre": {"T1": 0.09, "T2STAR": 0.14, "PD": 0.08},
    # T1 5.8 / 5.6 / 5.5 / 5.5 / 5.4, T2 5.1 / 4.2 / 5.0 / 4.8 / 3.5, T2* 15.3 / 12.9 / 12.3 / 12.2 / 10.4
    "t2ir_gre": {"T1": 0.08, "T2": 0.07, "T2STAR": 0.19, "PD": 0.12, "INVERSION": 0.05},
    # T2* 13.4 / 12.4 / 12.3 / 12.2 / 12.6
    "megre": {"T2STAR": 0.17, "PD": 0.05},
}
"""Largest NRMSE of each map of the brain."""


@pytest.mark.parametrize("sequence", SCANS)
def test_pipelines_take_a_file_to_maps(raw: Path, tmp_path: Path, sequence: str):
    """All maps come close, and T2*, whose components are weak, closer than the linear method's."""
    errors = {}
    for name in CARTESIAN:
        output = tmp_path / f"{name}.h5"
        replay(raw / f"{sequence}.h5", name, output)
        found = compare(output, raw / f"{sequence}.h5")["maps"]
        errors[name] = {role: found[role]["nrmse"] for role in LIMITS[sequence]}
        images = read_images(output)
        assert {image.meta["Quantitron_Pipeline"] for image in images} == {name}
        assert {image.meta["Quantitron_FailedVoxels"] for image in images} == {"0"}
    for name, found in errors.items():
        for role, limit in LIMITS[sequence].items():
            assert found[role] < limit, (name, role)
        if name != "subspace":
            assert found["T2STAR"] < 0.985 * errors["subspace"]["T2STAR"], name


@pytest.mark.parametrize("denoiser", ["network", "bm4d"])
def test_mri2qmap_takes_a_file_to_maps(plane: Path, tmp_path: Path, denoiser: str):
    """With the network that comes with it, which wants 32 voxels, and with the one that needs no training.

    T1 5.8, T2 5.1, T2* 13.1 %; the linear method's 5.8, 5.2, 15.0.
    """
    settings = [] if denoiser == "network" else [f"reconstruct.denoiser={denoiser}"]
    replay(plane, "mri2qmap", tmp_path / "maps.h5", settings)
    replay(plane, "subspace", tmp_path / "linear.h5")
    maps, linear = (
        {role: said["nrmse"] for role, said in compare(path, plane)["maps"].items() if "nrmse" in said}
        for path in (tmp_path / "maps.h5", tmp_path / "linear.h5")
    )
    for role, limit in LIMITS["t2ir_gre"].items():
        assert maps[role] < limit, role
    assert maps["T2STAR"] < 0.92 * linear["T2STAR"]
    assert maps["T1"] < 1.03 * linear["T1"]
    assert maps["T2"] < 1.03 * linear["T2"]
    weights = {image.meta.get("Quantitron_Weights", "") for image in read_images(tmp_path / "maps.h5")}
    checksum = read_network(shipped_network("contrast_denoiser"), "contrast_denoiser").checksum
    assert weights == {checksum[:SHORT_CHECKSUM] if denoiser == "network" else ""}
