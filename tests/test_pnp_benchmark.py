"""benchmarks/pnp.py: what it compares, what it runs, and what it says of a pipeline that fails."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quantitron.gadgets.image_file import TRUTH_GROUP, read_images, write_images
from quantitron.gadgets.map_volume import map_volumes
from quantitron.host.replay import replay
from quantitron.phantoms.simulate_fingerprint import simulate_fingerprint
from quantitron.recon.metrics import cosine_distance
from quantitron.recon.signal.fingerprint_dictionary import fingerprint_dictionary
from quantitron.recon.signal.fisp_mrf import contrast_signal

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import pnp
from fingerprint_floor import floor
from map_judgement import fingerprints, judge
from measured_replay import measured_replay
from part_costs import part_costs, peak_memory

POINTS = 30
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A small raw file with truth, its protocol and a dictionary."""
    folder = tmp_path_factory.mktemp("scan")
    z, y, x = np.mgrid[:4, :32, :32]
    inside = (y - 15.5) ** 2 + (x - 15.5) ** 2 < 14**2
    grey = inside & (x > 15)
    ripple = 1 + 0.1 * np.sin(x / 3 + y / 4 + z)
    np.savez(
        folder / "phantom.npz",
        t1=np.where(grey, 1.3, 0.8) * ripple,
        t2=np.where(grey, 0.09, 0.06) * ripple,
        pd=np.where(inside, ripple, 0),
        labels=np.where(grey, 2, np.where(inside, 3, 0)).astype(np.uint8),
        mask=inside,
        voxel_size=np.array([4e-3, 2e-3, 2e-3]),
    )
    raw = folder / "raw.h5"
    simulate_fingerprint(
        output=raw,
        phantom=folder / "phantom.npz",
        points=POINTS,
        interleaves=8,
        matrix=(32, 32, 1),
        fov=(64.0, 64.0, 4.0),
        coils=1,
        snr=None,
        supersampling=1,
    )
    protocol = pnp.make_schedule("jiang", POINTS)
    return raw, protocol, fingerprint_dictionary(protocol, t1_points=40, t2_points=40)


def changed(raw, path, **factors):
    """A map file: the truth, some maps times a factor."""
    found = []
    for image in read_images(raw, TRUTH_GROUP):
        image.data[:] = image.data * factors.get(image.meta["GADGETRON_DataRole"], 1.0)
        found.append(image)
    write_images(path, "maps", found)
    return path


def test_the_truth_is_beyond_reproach(scan, tmp_path):
    raw, _, dictionary = scan
    result = judge(changed(raw, tmp_path / "maps.h5"), raw, dictionary)
    assert result["mape"] == result["tissue"] == {"T1": 0.0, "T2": 0.0}
    assert result["cosine"] == pytest.approx(0, abs=1e-6)
    assert set(result["psnr"]) == {"T1w", "T2w", "PDw"}
    assert min(result["psnr"].values()) > 120
    assert min(result["ssim"].values()) == pytest.approx(1)


def test_each_figure_tells_what_it_is_made_for(scan, tmp_path):
    raw, _, dictionary = scan
    scaled = judge(changed(raw, tmp_path / "pd.h5", PD=7.0), raw, dictionary)  # PD is relative
    assert min(scaled["psnr"].values()) > 100
    longer = judge(changed(raw, tmp_path / "t2.h5", T2=1.1), raw, dictionary)
    assert longer["mape"] == {"T1": 0.0, "T2": pytest.approx(0.1, abs=1e-5)}
    assert 1e-6 < longer["cosine"] < 0.01
    assert longer["psnr"]["T2w"] < longer["psnr"]["PDw"]
    assert longer["psnr"]["T2w"] < longer["psnr"]["T1w"]
    assert longer["ssim"]["T2w"] < 1
    json.dumps(longer)


def test_series_are_the_fingerprints_of_the_maps(scan):
    raw, protocol, dictionary = scan
    truth = map_volumes(read_images(raw, TRUTH_GROUP))
    inside = truth["MASK"].values > 0
    series = fingerprints(truth, dictionary)
    assert np.isnan(series[:, np.isnan(truth["T1"].values)]).all()
    axes = dictionary.basis(0.9999).contrast.numpy()  # (w, k)
    t1, t2 = (torch.from_numpy(1e-3 * truth[role].values[inside]) for role in ("T1", "T2"))
    exact = contrast_signal({"t1": t1, "t2": t2}, protocol).numpy().T  # (w, v)
    found = axes @ series[:, inside]
    everywhere = np.ones(found.shape[1], bool)
    assert cosine_distance(found, exact, everywhere) < 3e-4  # the basis leaves out 1e-4 of the energy
    assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)


def test_cases():
    assert pnp.shape_of("slice") == ("slice", 48)
    assert pnp.shape_of("slab/6") == ("slab", 6)
    for wrong in ("cube", "slice/0", "slice/49", "slab/9", "slab/six", "slice/-1"):
        with pytest.raises(SystemExit, match=r"there is no case"):
            pnp.shape_of(wrong)
    arguments = argparse.Namespace(
        cases=["slice/6", "slab/6"],
        coils="8,1",
        orders="shuffled",
        heights="-5,5",
        seeds="1",
        schedule="jiang",
        points=500,
        slice="64,64,1",
        slab="48,48,8",
    )
    assert {case.matrix for case in pnp.cases(arguments)} == {(64, 64, 1), (48, 48, 8)}
    found = [(case.name, case.coils, case.height) for case in pnp.cases(arguments)]
    slices = [("slice/6", coils, height) for coils in (8, 1) for height in (-5.0, 5.0)]
    keys = {case.key("brain")[1] for case in pnp.cases(arguments)}
    assert keys == {"slice/6 64x64", "slab/6 48x48x8"}
    assert found == [*slices, ("slab/6", 8, 0.0), ("slab/6", 1, 0.0)]
    arguments.slab = "48,48"
    with pytest.raises(SystemExit, match="slab/6 cannot have a matrix of"):
        list(pnp.cases(arguments))


def test_unknowns_per_sample():
    """As many samples of a coil as coefficients is 1; trains add samples, interleaves left out take none."""

    def of(name, matrix):
        return pnp.Case(name, 8, "shuffled", 0.0, 1, "jiang", 500, matrix).unknowns_per_sample

    slab = of("slab/1", (128, 128, 24))
    assert 8 < slab < 10
    assert slab / of("slab/4", (128, 128, 24)) == pytest.approx(4)
    assert slab / of("slab/1", (128, 128, 12)) == pytest.approx(2)
    assert of("slice/6", (192, 192, 1)) == of("slice", (192, 192, 1)) < 1


def test_borders_between_tissues_are_the_floor(scan, tmp_path):
    """The ringing of one tissue is one of its density, which leaves T1 and T2 alone."""
    _, protocol, dictionary = scan
    y, x = np.meshgrid(*[np.arange(48) - 23.5] * 2, indexing="ij")
    inside = x**2 + y**2 < 21**2
    grey = inside & (np.hypot(x - 4, y) < 9)
    errors = []
    for t1, t2 in ((0.8, 0.07), (1.4, 0.1)):
        np.savez(
            tmp_path / "discs.npz",
            t1=np.where(grey, t1, 0.8)[None],
            t2=np.where(grey, t2, 0.07)[None],
            pd=np.where(inside, 1.0, 0.0)[None],
            labels=np.where(inside, np.where(grey, 2, 3), 0)[None],
            voxel_size=np.array([5e-3, 1e-3, 1e-3]),
        )
        place = ((24, 24, 1), (48.0, 48.0, 5.0), (2, 2, 1))
        errors.append(floor(tmp_path / "discs.npz", protocol, dictionary, *place, 0.0, 1))
    for role in ("T1", "T2"):
        assert errors[0][role] < 0.005
        assert 0.01 < errors[1][role] < 0.1


def test_an_undersampled_slice_with_several_coils_comes_with_its_calibration(monkeypatch, tmp_path):
    made = {}
    monkeypatch.setattr(pnp, "simulate_fingerprint", lambda **arguments: made.update(arguments))
    for name, coils, calibration in (
        ("slice", 8, "none"),
        ("slice/6", 8, "separate"),
        ("slice/6", 1, "none"),
    ):
        case = pnp.Case(name, coils, "shuffled", 3.0, 1, "jiang", 500, (64, 64, 1))
        case.simulate("brain", "brain.npz", tmp_path)
        assert made["calibration"] == calibration
        assert made["acquired"] == (6 if "6" in name else 48)
    made.clear()
    pnp.Case("slab/6", 8, "shuffled", 0.0, 1, "jiang", 500, (64, 64, 8)).simulate(
        "brain", "brain.npz", tmp_path
    )
    assert (made["volume"], made["trains"]) == ("tilted", 6)
    assert "acquired" not in made


def test_a_pipeline_that_fails_has_a_row_and_the_others_run(scan, tmp_path, monkeypatch, capsys):
    raw, _, dictionary = scan

    def replayed(_raw, method, maps, settings):
        if method == "arnet":
            raise SystemExit("replay of a file ended with status 1: no weights")
        assert settings == (["reconstruct.rounds=3"] if method == "llr" else [])
        maps.unlink(missing_ok=True)
        changed(raw, maps, T1={"lrtv": 1.2, "llr": 1.05}[method])
        return 2.0, 0.5

    monkeypatch.setattr(pnp, "measured_replay", replayed)
    monkeypatch.setattr(pnp, "cached_dictionary", lambda _protocol: dictionary)
    table = pnp.Table(tmp_path / "rows.json", pnp.HEAD)
    case = pnp.Case("slice", 1, "shuffled", 0.0, 1, "jiang", POINTS, (32, 32, 1))
    pipelines = [("lrtv", "lrtv"), ("arnet", "arnet"), ("fewer", "llr:rounds=3")]
    pnp.run(table, case, "ellipse", raw, pipelines)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["label"] for row in rows] == ["lrtv", "arnet", "fewer"]
    assert rows[0]["of_reference"] == 1
    assert rows[2]["of_reference"] == pytest.approx(0.25, rel=1e-3)
    assert rows[1]["failed"] == "status 1: no weights"
    assert table.failed()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5
    assert "| `arnet` | failed: status 1: no weights |" in printed[3]
    assert all(line.count("|") == len(pnp.HEAD) + 1 for line in (printed[0], printed[2], printed[4]))


def test_a_failed_replay_says_why(tmp_path, monkeypatch):
    program = tmp_path / "quantitron"
    program.write_text("#!/bin/sh\necho reading >&2\necho 'quantitron: no such scan' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda *_, **__: str(program))
    with pytest.raises(SystemExit, match=r"ended with status 3: quantitron: no such scan$"):
        measured_replay(tmp_path / "raw.h5", "subspace", tmp_path / "maps.h5", [])


def test_ablations_change_one_thing_each(monkeypatch):
    settings = {"last_level": 0.02, "match_groups": 256, "denoiser": "network"}
    monkeypatch.setattr(pnp, "preset", lambda _name: settings)
    arguments = argparse.Namespace(
        base="mri2qmap:penalty=2", only="modalities", levels="fixed,0.2", rounds="5,10", iterations="1"
    )
    base = ("mri2qmap:penalty=2", "mri2qmap:penalty=2")
    assert pnp.ablations(arguments) == [
        ("lrtv", "lrtv"),
        base,
        *(
            (f"without {name}w", f"mri2qmap:penalty=2+{name.lower()}w_weight=0")
            for name in ("T1", "T2", "PD")
        ),
    ]
    arguments.base, arguments.only = "mri2qmap", "schedule,iterations,matching,denoiser"
    assert [pipeline for _, pipeline in pnp.ablations(arguments)[2:]] == [
        "mri2qmap:first_level=0.02+rounds=5",
        "mri2qmap:first_level=0.02+rounds=10",
        "mri2qmap:first_level=0.2+rounds=5",
        "mri2qmap:first_level=0.2+rounds=10",
        "mri2qmap:iterations=1",
        "mri2qmap:match_groups=0",
        "mri2qmap:denoiser=bm4d",
        "mri2qmap:denoiser=tv",
    ]
    settings["match_groups"], arguments.only = 0, "matching,published"
    changes = [pipeline.removeprefix("mri2qmap:") for _, pipeline in pnp.ablations(arguments)[2:]]
    assert changes[:3] == ["match_groups=100", "start=least_squares", "field_share=0"]
    assert changes[4] == "maps_from=joint"
    assert changes[5] == "+".join(changes[1:5])
    arguments.only = "modality"
    with pytest.raises(SystemExit, match="there is no ablation 'modality'"):
        pnp.ablations(arguments)


def test_parts_of_a_solver():
    steps = pnp.parts_of("mrf_pnp")
    assert {"linear estimate", "conjugate gradients of a round", "final matching"} < set(steps)
    assert any(name.startswith("denoising") for name in steps)
    assert "matching in a round" in pnp.parts_of("mrf_admm")
    for owner, name in steps.values():
        assert callable(getattr(owner, name))
    with pytest.raises(SystemExit, match="there is no solver 'summit' of fingerprints"):
        pnp.parts_of("summit")


def test_costs_of_the_parts_of_a_replay(scan, tmp_path, monkeypatch, capsys):
    raw, _, _ = scan
    monkeypatch.setattr(pnp.Case, "simulate", lambda *_: raw)
    monkeypatch.setattr(pnp, "objects", lambda *_: [("ellipse", None)])
    monkeypatch.setenv("QUANTITRON_CACHE", str(tmp_path))
    monkeypatch.setattr(pnp, "replay", replay_with_small_dictionary)
    arguments = argparse.Namespace(
        cases=["slice"],
        coils="1",
        orders="sequential",
        heights="0",
        seeds="1",
        schedule="jiang",
        points=POINTS,
        slice="32,32,1",
        base="mrf_admm:rounds=3",
        json=tmp_path / "parts.json",
        sources=[],
        warm=False,
    )
    rows = {row["part"]: row for row in pnp.parts(arguments, tmp_path)}
    assert rows["matching in a round"]["calls"] == rows["conjugate gradients of a round"]["calls"] == 3
    assert rows["linear estimate"]["calls"] == rows["final matching"]["calls"] == 1
    inner = sum(row["seconds"] for part, row in rows.items() if part != "everything")
    assert 0 < inner < rows["everything"]["seconds"]
    assert rows["everything"]["memory"] >= max(row["memory"] for row in rows.values())
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def replay_with_small_dictionary(raw, method, maps, settings, overwrite):
    return replay(raw, method, maps, [*settings, "basis.t1_points=40", "basis.t2_points=40"], overwrite)


def test_ablations_are_settings_that_the_pipeline_has():
    """Those that ship; a property that no longer exists would fail only after hours."""
    settings = pnp.preset("mri2qmap")
    arguments = argparse.Namespace(
        base="mri2qmap", only=",".join(pnp.ABLATIONS), levels="fixed,0.5", rounds="5", iterations="20"
    )
    for _, pipeline in pnp.ablations(arguments)[2:]:
        for change in pnp.settings_of(pipeline)[1]:
            name, _, value = change.removeprefix("reconstruct.").partition("=")
            kind = type(settings[name])
            assert kind(value) == value or math.isclose(float(value), float(kind(value)))


class Works:
    def once(self, size):
        return np.ones(size).sum()


def test_parts_are_measured_and_put_back():
    original = Works.once
    with part_costs({"sum": (Works, "once"), "root": (math, "sqrt")}) as costs:
        before = peak_memory()
        assert Works().once(20_000_000) == 20_000_000
        assert Works().once(3) == 3
    assert Works.once is original
    assert (costs["sum"].calls, costs["root"].calls) == (2, 0)
    assert 0 < costs["sum"].seconds < 60
    if not torch.cuda.is_available():
        assert costs["sum"].memory > 0.16
        assert before > 0
    with pytest.raises(RuntimeError, match="mine"), part_costs({"sum": (Works, "once")}):
        raise RuntimeError("mine")
    assert Works.once is original
