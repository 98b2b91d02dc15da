"""Accuracy and time of ``subspace`` at real size, on simulated scans of real in-vivo maps, SNR 30.

    python benchmarks/subspace.py DELICS.npz [--seed 1] [--folder DIR] [--json FILE]

DELICS.npz holds the maps of a Deli-CS volunteer (benchmarks/invivo.py makes the phantom of them); the object
is twice finer than the scan. Each scan is simulated, replayed and compared as a user would do it; the time is
that of the whole replay, from raw file to maps. Rows with limits average the object over each scan voxel
(partial volume alone, as in the study that the limits come from: its perfect scan is off by 7 % in T2); the
last rows cut k-space off as a scanner does, ringing included (10 % for a perfect scan). Before them
come noise-free, fully sampled scans of the MNI brain with the truth on the scan's own grid, which should
return it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from invivo import phantom

from quantitron.host.compare import compare
from quantitron.host.replay import replay
from quantitron.phantoms.simulate import simulate

PERFECT = {"phantom": "mni", "snr": None, "supersampling": 1, "fov": (224.0, 224.0, 64.0)}
VFA = {"sequence": "vfa_gre", "matrix": (112, 112, 16), "fov": (224.0, 224.0, 32.0), "coils": 8}
T2IR = {
    "sequence": "t2ir_gre",
    "matrix": (96, 96, 12),
    "fov": (192.0, 192.0, 24.0),
    "coils": 10,
    "excitations": 40,
}
AVERAGE = {"point_spread": "average"}
# name, what is simulated, NRMSE limits of T1, T2, T2* in the project's first issue
CASES: list[tuple[str, dict[str, Any], dict[str, float]]] = [
    (
        "vfa_gre 64x64x8 R 1 noise-free",
        {**PERFECT, "sequence": "vfa_gre", "matrix": (64, 64, 8)},
        {"T1": 0.02, "T2STAR": 0.02},
    ),
    (
        "t2ir_gre 32x32x8 R 1 noise-free",
        {**PERFECT, "sequence": "t2ir_gre", "matrix": (32, 32, 8), "excitations": 40},
        {"T1": 0.03, "T2": 0.03, "T2STAR": 0.03},
    ),
    ("vfa_gre 112x112x16 R 12", {**VFA, **AVERAGE, "acceleration": 12.0}, {"T1": 0.13, "T2STAR": 0.18}),
    ("vfa_gre 112x112x16 R 27", {**VFA, **AVERAGE, "acceleration": 27.0}, {"T1": 0.17, "T2STAR": 0.23}),
    ("t2ir_gre 96x96x12 R 80", {**T2IR, **AVERAGE, "acceleration": 80.0}, {}),
    (
        "t2ir_gre 96x96x12 R 160",
        {**T2IR, **AVERAGE, "acceleration": 160.0},
        {"T1": 0.13, "T2": 0.12, "T2STAR": 0.25},
    ),
    ("vfa_gre R 12, truncated", {**VFA, "acceleration": 12.0}, {}),
    ("vfa_gre R 27, truncated", {**VFA, "acceleration": 27.0}, {}),
    ("vfa_gre R 48, truncated", {**VFA, "acceleration": 48.0}, {}),
    ("t2ir_gre R 80, truncated", {**T2IR, "acceleration": 80.0}, {}),
    ("t2ir_gre R 160, truncated", {**T2IR, "acceleration": 160.0}, {}),
]


def measure(name: str, scan: dict[str, Any], anatomy: Path, folder: Path, seed: int) -> dict[str, Any]:
    """One scan from simulation to comparison."""
    raw, maps = folder / "raw.h5", folder / "maps.h5"
    simulate(**{"phantom": anatomy, "snr": 30.0, "seed": seed, **scan}, output=raw, overwrite=True)
    start = time.perf_counter()
    replay(raw, "subspace", maps, overwrite=True)
    seconds = time.perf_counter() - start
    return {"case": name, "seconds": seconds, "maps": compare(maps, raw)["maps"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="delics_volXX.npz")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the raw files; a temporary folder where absent")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        anatomy = folder / "phantom.npz"
        np.savez(anatomy, **phantom(arguments.source))
        print(f"{'NRMSE (limit) %':34s} {'T1':>14s} {'T2':>14s} {'T2*':>14s}   MAPE WM+GM / 2 %    seconds")
        rows = []
        for case, scan, limits in CASES:
            row = measure(case, scan, anatomy, folder, arguments.seed)
            rows.append(row)
            cells, tissue = [], []
            for role in ("T1", "T2", "T2STAR"):
                found = row["maps"].get(role)
                limit = f" ({100 * limits[role]:.0f})" if role in limits else ""
                cells.append(f"{100 * found['nrmse']:.1f}{limit}" if found else "")
                if found:
                    tissue.append(f"{50 * (found['mape_wm'] + found['mape_gm']):.1f}")
            columns = " ".join(f"{cell:>14s}" for cell in cells)
            print(f"{case:34s} {columns}   {' / '.join(tissue):18s} {row['seconds']:8.1f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
