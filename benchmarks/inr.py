"""The coordinate-network solvers at real size: accuracy, time and memory; and what an epoch costs.

    python benchmarks/inr.py accuracy delics_vol00.npz [mni] [--scans vfa_gre:12,27] [--seeds 1,2,3]
    python benchmarks/inr.py summary first.json [second.json]
    python benchmarks/inr.py epoch delics_vol00.npz
    python benchmarks/inr.py equal delics_vol00.npz [--epochs 60] [--seeds 1,2]

accuracy: scans of real in-vivo maps (Deli-CS volumes, benchmarks/invivo.py) and of the MNI brain, SNR 30,
the object twice finer than the scan and averaged over each scan voxel. ``--scans large:960`` is the second
data set of LoREIN's publication: ``t2ir_gre``, 240x240x14, 14 coils, T = 1280. Every pipeline runs as it
ships or with the settings after its name (``summit:coils=given+epochs=40``), in a process of its own:
seconds and peak memory are those of ``quantitron replay``, from raw file to maps. With several seeds a
second table follows, of their means.

summary: that table, of the rows that --json of several runs wrote.

epoch, equal: LoREIN's joint training as this package computes it and as the publications do (joint_forms.py):
time of an epoch of the vfa_gre scan R 12, and errors after a training on a coarser scan.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from invivo import phantom
from joint_forms import FORMS, epoch, equal
from measured_replay import measured_replay
from mrf import settings_of
from subspace import AVERAGE, T2IR, VFA

from quantitron.host.compare import compare
from quantitron.phantoms.simulate import simulate

LARGE = {
    "sequence": "t2ir_gre",
    "matrix": (240, 240, 14),
    "fov": (240.0, 240.0, 56.0),
    "coils": 14,
    "excitations": 80,
    "flip_angles": (math.radians(10),),
    "repetition_time": 0.030,
    "preparation_times": (0.025, 0.050, 0.070, 0.090),
    "echo_times": (4.5e-3, 11.2e-3, 17.9e-3, 24.6e-3),
}
"""The second data set of LoREIN's publication, T = 1280."""
SCANS = {"vfa_gre": VFA, "t2ir_gre": T2IR, "large": LARGE}
ROLES = ("T1", "T2", "T2STAR")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def quiet(doing: str, share: float) -> None:
    """Progress that nobody sees."""
    del doing, share


def accuracy(
    sources: Iterable[Path],
    folder: Path,
    scans: dict[str, list[float]],
    pipelines: Iterable[str],
    seeds: Iterable[int],
) -> list[dict[str, Any]]:
    """NRMSE, MAPE, time and memory of every pipeline on every scan."""
    objects: dict[str, Any] = {}
    for source in sources:
        if source.stem == "mni":
            objects["mni"] = "mni"
            continue
        objects[source.stem] = folder / f"{source.stem}.npz"
        np.savez(objects[source.stem], **phantom(source))
    say("| object | scan | seed | pipeline | T1 | T2 | T2* | MAPE T1 / T2 / T2* | seconds | GB |")
    say("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for name, anatomy in objects.items():
        for sequence, accelerations in scans.items():
            for acceleration in accelerations:
                for seed in seeds:
                    raw, maps = folder / "raw.h5", folder / "maps.h5"
                    simulate(
                        **{**SCANS[sequence], **AVERAGE, "phantom": anatomy, "snr": 30.0, "seed": seed},
                        acceleration=acceleration,
                        output=raw,
                        overwrite=True,
                    )
                    for pipeline in pipelines:
                        method, settings = settings_of(pipeline)
                        seconds, memory = measured_replay(raw, method, maps, settings)
                        found = compare(maps, raw)["maps"]
                        rows.append(
                            {
                                "object": name,
                                "scan": f"{sequence} R {acceleration:g}",
                                "seed": seed,
                                "pipeline": pipeline,
                                "seconds": seconds,
                                "memory": memory,
                                "maps": found,
                            }
                        )
                        cells = [cell(rows[-1:], role, "nrmse") for role in ROLES]
                        say(
                            f"| {name} | `{sequence}` R {acceleration:g} | {seed} | `{pipeline}` | "
                            f"{' | '.join(cells)} | {tissue(rows[-1:])} | {seconds:.0f} | {memory:.1f} |"
                        )
    return rows


def cell(rows: list[dict[str, Any]], role: str, *metrics: str) -> str:
    """Mean of metrics of a map over rows [%], and the range of the rows where there are several."""
    if any(role not in row["maps"] for row in rows):
        return ""
    values = [100 * np.mean([row["maps"][role][metric] for metric in metrics]) for row in rows]
    spread = f" ({max(values) - min(values):.1f})" if len(rows) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def tissue(rows: list[dict[str, Any]]) -> str:
    """MAPE of the maps, mean of white and grey matter."""
    return " / ".join(cell(rows, role, "mape_wm", "mape_gm").split(" ")[0] or "-" for role in ROLES)


def summary(rows: list[dict[str, Any]]) -> None:
    """Means over the seeds; in brackets how far these lie apart."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["object"], row["scan"], row["pipeline"]), []).append(row)
    say("| object | scan | seeds | pipeline | T1 | T2 | T2* | MAPE T1 / T2 / T2* |")
    say("|---|---|---|---|---|---|---|---|")
    for (name, scan, pipeline), found in sorted(groups.items(), key=lambda group: order(*group[0])):
        cells = [cell(found, role, "nrmse") for role in ROLES]
        say(
            f"| {name} | `{scan.split()[0]}` {scan.partition(' ')[2]} | {len(found)} | `{pipeline}` | "
            f"{' | '.join(cells)} | {tissue(found)} |"
        )


def order(name: str, scan: str, _pipeline: str) -> tuple[str, bool, float]:
    """Objects by name, vfa_gre first, accelerations from low to high."""
    sequence, _, acceleration = scan.partition(" R ")
    return name, sequence != "vfa_gre", float(acceleration)


def scans_of(words: Iterable[str]) -> dict[str, list[float]]:
    """``vfa_gre:12,27`` -> {"vfa_gre": [12.0, 27.0]}.

    Raises:
        SystemExit: if a word is not such a scan.
    """
    found = {}
    for word in words:
        sequence, _, accelerations = word.partition(":")
        try:
            found[sequence] = [float(value) for value in accelerations.split(",")]
        except ValueError:
            raise SystemExit(
                f"--scans takes a sequence and accelerations, as vfa_gre:12,27; not '{word}'"
            ) from None
        if sequence not in SCANS:
            raise SystemExit(f"--scans: there is no scan of '{sequence}'; there are {', '.join(SCANS)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("accuracy", "summary", "epoch", "equal"))
    parser.add_argument("sources", type=Path, nargs="+", help="delics_volXX.npz, or mni; summary: JSON files")
    parser.add_argument("--scans", nargs="+", default=["vfa_gre:12,27,48", "t2ir_gre:80,160,320"])
    parser.add_argument(
        "--pipelines", default="subspace,llr,lorein,summit", help="name[:property=value+...], ..."
    )
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--threads", type=int, default=1, help="of epoch and equal")
    parser.add_argument("--epochs", type=int, default=60, help="of equal")
    parser.add_argument("--forms", default=",".join(FORMS), help="of equal")
    parser.add_argument("--folder", type=Path, help="for the raw files; a temporary folder where absent")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "summary":
        try:
            summary([row for source in arguments.sources for row in json.loads(source.read_text())])
        except (OSError, ValueError) as error:
            raise SystemExit(f"summary takes files that --json wrote: {error}") from error
        return
    volumes = [source for source in arguments.sources if source.stem != "mni"]
    if arguments.what != "accuracy" and len(volumes) != 1:
        raise SystemExit(f"{arguments.what} takes one volume, delics_volXX.npz")
    for source in volumes:
        if not source.is_file():
            raise SystemExit(f"there is no file '{source}'")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.what == "accuracy":
            rows = accuracy(
                arguments.sources,
                folder,
                scans_of(arguments.scans),
                arguments.pipelines.split(","),
                [int(seed) for seed in arguments.seeds.split(",")],
            )
            if len(arguments.seeds.split(",")) > 1:
                summary(rows)
        else:
            torch.set_num_threads(arguments.threads)
            anatomy = folder / "object.npz"
            np.savez(anatomy, **phantom(arguments.sources[0]))
            if arguments.what == "epoch":
                rows = epoch(anatomy, folder / "raw.h5")
            else:
                seeds = [int(seed) for seed in arguments.seeds.split(",")]
                rows = equal(anatomy, folder / "raw.h5", arguments.epochs, arguments.forms.split(","), seeds)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
