"""What gets installed: every subpackage, the command and the pipelines, all requirements pinned."""

from __future__ import annotations

import configparser
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKAGED = ("tests", "benchmarks", "build", "docker", "docs", "demo")


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def folders_with_code() -> set[str]:
    """Dotted names of all folders that hold Python files and belong to the package."""
    found = set()
    for file in ROOT.rglob("*.py"):
        folder = file.parent.relative_to(ROOT)
        top = folder.parts[0] if folder.parts else ""
        if top and not top.startswith(".") and top not in NOT_PACKAGED:
            found.add(".".join(("quantitron", *folder.parts)))
    return found


def requirements(setup: configparser.ConfigParser) -> list[str]:
    listed = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
    return [re.split(r"[<>=!~\[; ]", line)[0] for line in listed.split("\n") if line.strip()]


def test_every_subpackage_is_listed(setup: configparser.ConfigParser) -> None:
    assert set(setup["options"]["packages"].split()) == folders_with_code()


def test_every_subpackage_says_what_it_is() -> None:
    for name in folders_with_code():
        init = ROOT.joinpath(*name.split(".")[1:], "__init__.py")
        assert init.is_file(), f"{name} has no __init__.py"
        assert init.read_text(encoding="utf-8").startswith('"""'), f"{init} has no docstring"


def test_the_command_exists(setup: configparser.ConfigParser) -> None:
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition("=")
    module, _, function = target.strip().partition(":")
    assert name.strip() == "quantitron"
    assert callable(getattr(importlib.import_module(module), function))


def test_every_requirement_is_pinned(setup: configparser.ConfigParser) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].strip() for line in lines if "==" in line and not line.startswith("#")}
    asked = {name.lower().replace("_", "-") for name in requirements(setup)}
    assert asked <= pinned


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_pins_hold_once_for_each_python(version: str) -> None:
    """Environment markers must leave exactly one version of each package that has one at all."""
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins: dict[str, list[str]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            pin = Requirement(line)
            held = pins.setdefault(pin.name, [])
            if pin.marker is None or pin.marker.evaluate({"python_version": version}):
                held.append(str(pin.specifier))
    assert {name: held for name, held in pins.items() if len(held) != 1} == {}


def test_wheel_holds_the_pipelines(tmp_path: Path, setup: configparser.ConfigParser) -> None:
    """An editable install hides what a wheel lacks, so build one from a copy."""
    source, out = tmp_path / "source", tmp_path / "wheel"
    out.mkdir()
    tops = {name.split(".")[1] for name in folders_with_code()}
    for top in tops:
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    expected = {
        f"quantitron/{file.relative_to(ROOT).as_posix()}"
        for top in tops
        for pattern in ("*.py", "*.xml", "*.yaml", "*.safetensors")
        for file in (ROOT / top).rglob(pattern)
    }
    assert any(name.endswith("pipelines/subspace.xml") for name in expected)
    assert expected <= held
