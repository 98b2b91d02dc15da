from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest
from stand_in import gather, pipeline, scan, write_raw
from typer.testing import CliRunner

from quantitron.host import doctor
from quantitron.host.command import app
from quantitron.host.doctor import hash_grid
from quantitron.pipelines import pipeline_names

pytestmark = pytest.mark.timeout(240)

RUN = [sys.executable, str(Path(__file__).with_name("run_command.py"))]


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *map(str, arguments)], capture_output=True, text=True, timeout=240, check=False
    )


def test_help_names_the_commands_and_does_not_load_torch():
    done = command("--help")
    assert done.returncode == 0
    for name in ("simulate", "replay", "serve", "listen", "compare", "pipelines", "doctor"):
        assert name in done.stdout
    folder = str(Path(RUN[1]).parent)
    code = f"import runpy, sys; sys.argv = ['q', '--version']; sys.path.insert(0, {folder!r})\n"
    code += f"try: runpy.run_path({RUN[1]!r}, run_name='__main__')\n"
    code += "except SystemExit: pass\nprint('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("simulate", "[default: 112,112,16; fisp_mrf 192,192,1]"),
        ("simulate", "[default: jiang]"),
        ("train-denoiser", "[default: 20000, or as many as fit --minutes]"),
        ("train-arnet", "[default: the schedule's]"),
    ],
)
def test_help_tells_defaults_that_depend_on_other_options(name, default):
    told = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).stdout
    assert default in " ".join(told.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["replay"],
        ["nothing"],
        ["replay", "x.h5"],
        ["serve", "--port", "x"],
        ["simulate", "megre", "-o", "x.h5", "--matrix", "1,2"],
        ["simulate", "megre", "-o", "x.h5", "--seed", "-1"],
        ["train-denoiser", "--data", "x", "-o", "x.safetensors", "--seed", "99999999999999999999"],
        ["train-arnet", "mni", "-o", "x.safetensors", "--schedule-seed", "-1"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_pipelines_lists_settings_for_people_and_programs():
    table = command("pipelines")
    assert table.returncode == 0
    assert "linear_iterations = " in table.stdout
    listed = json.loads(command("pipelines", "--json").stdout)
    assert sorted(listed) == pipeline_names()
    assert listed["subspace"]["vfa_gre"]["reconstruct"]["solver"] == "subspace"
    # What only some sequences have is shown as well: here two solvers share the name.
    subspace = table.stdout.partition("\nsubspace\n")[2].partition("\nsummit\n")[0]
    for settings in listed["subspace"].values():
        for key in settings["reconstruct"]:
            assert f"    {key} = " in subspace
    assert "    detectable = 0.03  (only fisp_mrf)\n" in subspace


def test_doctor_finds_this_machine_fit():
    done = command("doctor", "--json")
    found = json.loads(done.stdout)
    states = {finding["what"]: finding["state"] for finding in found["findings"]}
    assert states["pipeline subspace"] == "ok"
    assert states["torch"] == "ok"
    assert found["ok"] == ("broken" not in states.values())
    assert done.returncode == (0 if found["ok"] else 1)


def test_doctor_tells_all_it_finds_where_a_package_cannot_be_imported(monkeypatch, tmp_path):
    (tmp_path / "skimage.py").write_text("raise ModuleNotFoundError(\"No module named 'skimage'\")")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    done = command("doctor")
    assert done.returncode == 1
    assert "cannot be looked at: No module named 'skimage'" in done.stdout
    assert "memory" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert "checks failed" in last
    assert "pipelines" in last


def test_doctor_looks_for_every_requirement():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).resolve().parents[1] / "setup.cfg", encoding="utf-8")
    needed = {line.split(">=")[0] for line in setup["options"]["install_requires"].split()}
    assert needed <= set(doctor.PACKAGES)


def test_doctor_says_which_hash_grid_is_used(monkeypatch):
    assert "for GPUs" in hash_grid(gpu=False).detail
    monkeypatch.setitem(sys.modules, "tinycudann", None)  # importing it raises ImportError
    assert hash_grid(gpu=True).state == "note"
    assert "cannot be imported" in hash_grid(gpu=True).detail
    monkeypatch.setitem(sys.modules, "tinycudann", ModuleType("tinycudann"))
    assert hash_grid(gpu=True).state == "ok"


def test_doctor_says_whether_fingerprints_run_on_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: {"cufinufft": "2.5.0"}[name])
    assert doctor.nonuniform_fourier().as_json()["state"] == "ok"

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    finding = doctor.nonuniform_fourier()
    assert finding.state == "note"
    assert "fingerprints need it" in finding.detail


def test_doctor_fails_where_a_device_is_missing(monkeypatch):
    monkeypatch.setenv("QUANTITRON_DEVICE", "cuda:99")
    done = command("doctor")
    assert done.returncode == 1
    assert re.search(r"broken +QUANTITRON_DEVICE +QUANTITRON_DEVICE=cuda:99 was asked for, but", done.stdout)
    assert "QUANTITRON_DEVICE" in done.stderr.splitlines()[-1]


def test_replay_prints_results_for_people_and_programs(tmp_path):
    raw = write_raw(tmp_path / "raw.h5", scan())
    name = tmp_path / "pipeline.xml"
    name.write_text(pipeline(gather()))
    done = command("--stand-in", "replay", raw, "-p", name, "-o", tmp_path / "maps.h5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'maps.h5'}: 2 images (T1, T1)")
    again = command("--stand-in", "replay", raw, "-p", name, "-o", tmp_path / "maps.h5")
    assert again.returncode == 1
    last = again.stderr.splitlines()[-1]
    assert last == f"quantitron: {tmp_path / 'maps.h5'} exists already (--overwrite replaces it)"
    done = command(
        "--stand-in", "replay", raw, "-p", name, "-o", tmp_path / "maps.h5", "--overwrite", "--json"
    )
    result = json.loads(done.stdout)
    assert result["images"] == 2
    assert result["series"] == {"101": "T1", "102": "T1"}
    assert any("megre" in note for note in result["notes"])
    before = raw.read_bytes()
    for arguments in (
        ["replay", raw, "-p", name, "-o", raw, "--overwrite"],
        ["compare", raw, raw, "--json", raw],
    ):
        done = command("--stand-in", *arguments)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == f"quantitron: {raw} is read and cannot be the output as well"
        assert raw.read_bytes() == before


def test_debug_shows_where_it_failed_and_nothing_else_does(tmp_path):
    plain = command("replay", tmp_path / "no.h5", "-p", "subspace")
    assert plain.returncode == 1
    assert plain.stderr.splitlines()[-1] == f"quantitron: {tmp_path / 'no.h5'} does not exist"
    assert "Traceback" not in plain.stderr
    assert "Traceback" in command("--debug", "replay", tmp_path / "no.h5", "-p", "subspace").stderr


def test_simulated_scan_through_the_pipeline_compares_with_its_truth(tmp_path):
    raw, maps = tmp_path / "raw.h5", tmp_path / "maps.h5"
    started = time.monotonic()
    for arguments in (
        ["simulate", "megre", "-o", raw, "--matrix", "32,32,4", "--coils", "2", "--snr", "60"],
        ["replay", raw, "-p", "subspace", "-o", maps],
        ["compare", maps, raw, "--json", tmp_path / "numbers.json"],
    ):
        done = command(*arguments)
        assert done.returncode == 0, done.stderr
    assert "T2STAR" in done.stdout
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["maps"]["T2STAR"]["nrmse"] < 0.5
    assert time.monotonic() - started < 200
