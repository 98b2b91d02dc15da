"""``quantitron doctor``: is this machine fit to reconstruct, and would a Gadgetron on it find us?"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from quantitron.gadgets.errors import ScanError
from quantitron.host.configuration import external_configuration, load_pipeline, parse_pipeline
from quantitron.pipelines import pipeline_names

PACKAGES = (
    "quantitron",
    "torch",
    "numpy",
    "scipy",
    "finufft",
    "sigpy",
    "ismrmrd",
    "gadgetron",
    "h5py",
    "pyyaml",
    "scikit-image",
    "nibabel",
    "matplotlib",
    "cmcrameri",
    "typer",
    "rich",
    "safetensors",
    "nilearn",
)
"""The package and what it requires."""
LEAST_MEMORY = 2 << 30
LEAST_DISK = 1 << 30
IMPORT_TIMEOUT = 120.0
"""Seconds that an interpreter on PATH has to import the chain."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "note", "broken"]
    """``broken`` makes the command fail; ``note`` is worth knowing."""
    detail: str

    def as_json(self) -> dict[str, str]:
        """For ``--json``."""
        return asdict(self)


def examine(folder: str | os.PathLike[str] = ".") -> list[Finding]:
    """Look at everything that a reconstruction needs.

    Args:
        folder: where maps would be written.
    """
    return [
        Finding("python", "ok", f"{platform.python_version()} ({sys.executable})"),
        *_packages(),
        *_importing("devices", _devices),
        *_importing("pipelines", _pipelines),
        *_importing("networks", networks),
        _gadgetron_python(),
        _gadgetron_home(),
        _memory(),
        _disk(Path(folder)),
    ]


def _importing(what: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """What ``look`` finds; where it cannot even import what it looks at, that is what was found."""
    try:
        return look()
    except (ImportError, OSError) as error:  # a library that a package links is missing: either
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [Finding(what, "broken", f"cannot be looked at: {reason}")]


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding(name, "ok", version(name)))
        except PackageNotFoundError:
            # a bare checkout runs without being installed; everything else must be there
            state: Literal["note", "broken"] = "note" if name == "quantitron" else "broken"
            findings.append(Finding(name, state, "not installed"))
    return findings


def _devices() -> list[Finding]:
    import torch

    from quantitron.recon.device import choose_device

    wanted = os.environ.get("QUANTITRON_DEVICE", "")
    findings = [Finding("cpu", "ok", f"{os.cpu_count()} processors, {torch.get_num_threads()} threads")]
    available = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if available else 0):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        findings.append(Finding(f"cuda:{index}", "ok", f"{properties.name}, {memory:.0f} GiB"))
    if not available:
        findings.append(Finding("cuda", "note", "no GPU; reconstructions run on the processors"))
    findings.append(hash_grid(available))
    if available:
        findings.append(nonuniform_fourier())
    if wanted:
        try:
            findings.append(Finding("QUANTITRON_DEVICE", "ok", f"{wanted}: {choose_device()}"))
        except ValueError as error:
            findings.append(Finding("QUANTITRON_DEVICE", "broken", str(error)))
    return findings


def hash_grid(gpu: bool) -> Finding:
    """Which hash grid the coordinate networks would use: tiny-cuda-nn's is for GPUs, and optional there.

    Args:
        gpu: whether there is a GPU; the library cannot even be imported without.
    """
    from quantitron.recon.networks.tiny_cuda_grid import MODULE, find_library

    if not gpu:
        return Finding(MODULE, "note", "for GPUs; coordinate networks take the sparse-matrix hash grid")
    if find_library() is None:
        return Finding(
            MODULE, "note", "cannot be imported; coordinate networks take the sparse-matrix hash grid"
        )
    return Finding(MODULE, "ok", "coordinate networks take its hash grid on a GPU")


def nonuniform_fourier() -> Finding:
    """Whether fingerprints can be reconstructed on a GPU."""
    try:
        return Finding("cufinufft", "ok", version("cufinufft"))
    except PackageNotFoundError:
        return Finding("cufinufft", "note", "not installed; fingerprints need it on a GPU, or device=cpu")


def _pipelines() -> list[Finding]:
    from quantitron.gadgets.chain import check_configuration

    findings = []
    for name in pipeline_names():
        try:
            text, where = load_pipeline(name)
            check_configuration(external_configuration(parse_pipeline(text, where), where), where)
            findings.append(Finding(f"pipeline {name}", "ok", "valid for every sequence"))
        except ScanError as error:
            findings.append(Finding(f"pipeline {name}", "broken", str(error)))
    return findings


def networks() -> list[Finding]:
    """Whether the trained networks that come with the package are there and whole."""
    from quantitron.gadgets.network_weights import TRAINED_BY, read_network, shipped_network
    from quantitron.recon.networks.trained_network import KINDS

    findings = []
    for kind in KINDS:
        what = f"network {kind}"
        if not shipped_network(kind).is_file():
            detail = f"none comes with this package; '{TRAINED_BY[kind]}' trains one"
            findings.append(Finding(what, "note", detail))
            continue
        try:
            network = read_network(shipped_network(kind), kind)
        except ScanError as error:
            findings.append(Finding(what, "broken", str(error)))
            continue
        count = sum(weight.numel() for weight in network.network.parameters())
        findings.append(Finding(what, "ok", f"{count} weights, checksum {network.checksum[:16]} holds"))
    return findings


def _gadgetron_python() -> Finding:
    """Gadgetron starts the first ``python`` or ``python3`` on its PATH; an import that fails is silent."""
    what = "python for Gadgetron"
    interpreter = shutil.which("python") or shutil.which("python3")
    if interpreter is None:
        return Finding(
            what, "note", "neither python nor python3 is on PATH; Gadgetron could not start gadgets"
        )
    home = os.environ.get("GADGETRON_HOME")
    paths = [os.environ.get("PYTHONPATH", ""), f"{home}/share/gadgetron/python" if home else ""]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    code = "import gadgetron, quantitron.gadgets.chain as chain; chain.run"
    try:
        done = subprocess.run(
            [interpreter, "-c", code],
            env=environment,
            cwd=os.sep,  # not the checkout, which would be found by chance
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(what, "note", f"{interpreter} cannot be tried: {error}")
    if done.returncode == 0:
        return Finding(what, "ok", f"{interpreter} finds gadgetron and quantitron.gadgets.chain")
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    # broken only where there is a Gadgetron to be broken for
    state: Literal["note", "broken"] = "broken" if home or shutil.which("gadgetron") else "note"
    return Finding(what, state, f"{interpreter} does not find quantitron.gadgets.chain: {reason}")


def _gadgetron_home() -> Finding:
    home = os.environ.get("GADGETRON_HOME")
    server = shutil.which("gadgetron")
    if not home:
        found = f"not set, but gadgetron is {server}" if server else "not set; only the embedded host is here"
        return Finding("GADGETRON_HOME", "note", found)
    configs = Path(home) / "share" / "gadgetron" / "config"
    if not configs.is_dir():
        return Finding("GADGETRON_HOME", "broken", f"{home} has no share/gadgetron/config")
    missing = [name for name in pipeline_names() if not (configs / f"{name}.xml").is_file()]
    if missing:
        detail = (
            f"{configs} lacks {', '.join(f'{name}.xml' for name in missing)}; clients must send them (-C)"
        )
        return Finding("GADGETRON_HOME", "note", detail)
    return Finding("GADGETRON_HOME", "ok", f"all pipelines are in {configs}")


def _memory() -> Finding:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    detail = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return Finding("memory", "ok" if total >= LEAST_MEMORY else "note", detail)


def _disk(folder: Path) -> Finding:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Finding("disk", "broken", f"{folder}: {error.strerror}")
    detail = f"{usage.free / 2**30:.1f} GiB free in {folder.absolute()}"
    if not os.access(folder, os.W_OK):
        return Finding("disk", "note", f"{folder.absolute()} may not be written to")
    return Finding("disk", "ok" if usage.free >= LEAST_DISK else "broken", detail)
