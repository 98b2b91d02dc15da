"""Who may import whom, and never back.

host -> training, reports -> phantoms -> gadgets -> pipelines -> recon; reports leave phantoms alone.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "host": {"host", "training", "phantoms", "reports", "gadgets", "pipelines", "recon"},
    "training": {"training", "phantoms", "gadgets", "pipelines", "recon"},
    "phantoms": {"phantoms", "gadgets", "pipelines", "recon"},
    "reports": {"reports", "gadgets", "pipelines", "recon"},
    "gadgets": {"gadgets", "pipelines", "recon"},
    "pipelines": {"pipelines"},
    "recon": {"recon"},
}
"""Folder -> folders of this project that its modules may import."""

LAYERS_OF_RECON = {
    "data": {"networks"},
    "algorithms": {"algorithms"},
    "metrics": set[str](),
    "device": set[str](),
    "trajectory_sums": {"data"},
    "operators": {"operators", "data", "trajectory_sums"},
    "signal": {"signal", "data"},
}
"""Parts of recon at the bottom -> parts of recon that they may import. The others stand between these and the
solvers, which import everything and are imported by nothing else."""

ONLY_IN = {
    "gadgetron": {"gadgets"},
    "ismrmrd": {"gadgets", "host", "phantoms"},
    "h5py": {"gadgets", "host", "phantoms"},
    "nilearn": {"phantoms"},
    "nibabel": {"phantoms", "reports", "training"},
    "matplotlib": {"reports"},
    "cmcrameri": {"reports"},
    "typer": {"host"},
    "rich": {"host"},
    "sigpy": {"recon", "phantoms"},
    "yaml": {"gadgets", "pipelines", "host"},
    "socket": {"gadgets", "host"},
}
"""Library -> folders that may import it."""

TORCH_ONLY = [name for name in ("algorithms", "priors", "networks") if (ROOT / "recon" / name).is_dir()]
NETWORKS_IN = {"priors": {"networks"}}
"""A denoiser is a prior that a network was trained for."""
STANDARD = sys.stdlib_module_names


def imported(file: Path) -> set[str]:
    """Absolute dotted names that a file imports, anywhere in it; names from a package are its members."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write quantitron...."
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def within(names: set[str], prefix: str) -> set[str]:
    """The part after ``prefix`` of the names under it."""
    return {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_point_one_way(folder: str) -> None:
    files = sources(folder)
    assert files, f"{folder} holds no code"
    for file in files:
        wrong = within(imported(file), "quantitron.") - MAY_IMPORT[folder]
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_no_folder_is_outside_the_rules() -> None:
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} == set(MAY_IMPORT)


def part_of_recon(file: Path) -> str:
    return file.relative_to(ROOT / "recon").parts[0].removesuffix(".py")


def test_recon_stands_on_its_data_and_physics() -> None:
    for file in sources("recon"):
        part = part_of_recon(file)
        parts = within(imported(file), "quantitron.recon.")
        if part in LAYERS_OF_RECON:
            wrong = parts - LAYERS_OF_RECON[part]
        else:
            wrong = parts & {"solvers"} if part != "solvers" else set()
        assert not wrong, f"{file.relative_to(ROOT)} imports recon's {', '.join(sorted(wrong))}"


def test_recon_has_no_circle() -> None:
    """Modules of recon import one another in one direction only."""
    graph = {}
    for file in sources("recon"):
        module = ".".join(("quantitron", *file.relative_to(ROOT).with_suffix("").parts))
        graph[module] = imported(file)
    edges = {
        module: {
            other
            for other in graph
            if other != module and any(f"{name}.".startswith(f"{other}.") for name in names)
        }
        for module, names in graph.items()
    }
    left = dict(edges)
    while left:
        free = [module for module, needs in left.items() if not needs & set(left)]
        assert free, f"modules import one another in a circle: {', '.join(sorted(left))}"
        for module in free:
            del left[module]


@pytest.mark.parametrize("folder", TORCH_ONLY)
def test_algorithms_know_only_torch(folder: str) -> None:
    for file in sources(f"recon/{folder}"):
        tops = {name.split(".")[0] for name in imported(file)} - STANDARD - {"torch"}
        own = {name for name in imported(file) if name.startswith(f"quantitron.recon.{folder}.")}
        assert tops <= ({"quantitron"} if own else set()), (
            f"{file.relative_to(ROOT)} imports {', '.join(tops)}"
        )
        others = within(imported(file), "quantitron.recon.") - {folder} - NETWORKS_IN.get(folder, set())
        assert not others, f"{file.relative_to(ROOT)} imports recon's {', '.join(others)}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_where_they_belong(library: str) -> None:
    for folder in MAY_IMPORT:
        if folder not in ONLY_IN[library]:
            for file in sources(folder):
                tops = {name.split(".")[0] for name in imported(file)}
                assert library not in tops, f"{file.relative_to(ROOT)} imports {library}"


def test_recon_loads_without_transport_files_or_figures() -> None:
    """What recon's libraries bring along counts too: a solver must run where ISMRMRD is not installed."""
    modules = [
        ".".join(("quantitron", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for file in sources("recon")
    ]
    script = (
        "import importlib, sys; sys.path.insert(0, 'tests'); import conftest\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "unwanted = {'ismrmrd', 'gadgetron', 'h5py', 'matplotlib', 'nilearn', 'typer'}\n"
        "print(*sorted(unwanted & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
