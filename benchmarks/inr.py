"""The coordinate-network solvers at real size: accuracy, time and memory; and what an epoch costs.

    python benchmarks/inr.py accuracy delics_vol00.npz [mni] [--scans vfa_gre:12,27] [--seeds 1,2,3]
    python benchmarks/inr.py epoch delics_vol00.npz

accuracy: scans of real in-vivo maps (Deli-CS volumes, benchmarks/invivo.py) and of the MNI brain, SNR 30, the
object twice finer than the scan and averaged over each scan voxel. Every pipeline runs as it ships, in a
process of its own: seconds and peak memory are those of ``quantitron replay``, from raw file to maps.

epoch: one epoch of LoREIN's joint training on vfa_gre R 12, as this package computes it, at the object's
voxels and at all of them, and as the publications do (benchmarks/published_epoch.py). Their steps alternate:
other work on the machine slows all of them alike. The losses of the forms at all voxels agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from invivo import phantom
from measured_replay import measured_replay
from published_epoch import PlainFrames, gathering
from scan_problem import load
from subspace import AVERAGE, T2IR, VFA

from quantitron.host.compare import compare
from quantitron.phantoms.simulate import simulate
from quantitron.recon.data import Problem
from quantitron.recon.solvers import LoREIN
from quantitron.recon.solvers.cartesian import CartesianSolver, LinearEstimate
from quantitron.recon.solvers.joint_networks import JointNetworks, JointSettings
from quantitron.recon.solvers.lorein_joint import JointTraining
from quantitron.recon.solvers.map_estimate import MapEstimate, start_from
from quantitron.recon.solvers.training import ParameterGroup, Schedule, adam

SCANS = {"vfa_gre": VFA, "t2ir_gre": T2IR}
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
    settings: Iterable[str],
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
                        seconds, memory = measured_replay(raw, pipeline, maps, settings)
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
                        cells = [
                            f"{100 * found[role]['nrmse']:.1f}" if role in found else "" for role in ROLES
                        ]
                        tissue = " / ".join(
                            f"{50 * (found[role]['mape_wm'] + found[role]['mape_gm']):.1f}"
                            if role in found
                            else "-"
                            for role in ROLES
                        )
                        say(
                            f"| {name} | `{sequence}` R {acceleration:g} | {seed} | `{pipeline}` | "
                            f"{' | '.join(cells)} | {tissue} | {seconds:.0f} | {memory:.1f} |"
                        )
    return rows


FORMS = {
    "reduced, sparse matrix, object": (False, False),
    "reduced, sparse matrix": (False, True),
    "frames, gather and scatter": (True, True),
}
"""Name -> frame by frame, at all voxels: the last one is the published form."""


class Form:
    """One way of computing the joint training, with networks of its own."""

    def __init__(self, problem: Problem, estimate: LinearEstimate, start: MapEstimate, name: str) -> None:
        frames, everywhere = FORMS[name]
        settings = JointSettings(held_out=0.0, frames=frames, log2_rows=15, everywhere=everywhere)
        self.training = JointTraining(problem, estimate, start, settings)
        with gathering() if frames else nullcontext():
            self.networks = JointNetworks(estimate, start, settings, 0)
        if frames:
            assert problem.kspace is not None
            self.training._frames = PlainFrames(problem.kspace)  # type: ignore[assignment]
        positions = range(0, self.networks.shape[0], settings.batch)
        self.blocks = [self.networks.block(slice(first, first + settings.batch)) for first in positions]
        self.optimizer = adam([ParameterGroup(self.networks.parameters())], Schedule(1))
        self.seconds = 0.0

    def step(self, block: int) -> dict[str, float]:
        """One step of the data terms."""
        begun = time.perf_counter()
        terms = self.training.step(self.networks, self.blocks[block], self.optimizer)
        self.seconds += time.perf_counter() - begun
        return terms

    def norm_step(self) -> float:
        """The step of the weighted nuclear norm."""
        begun = time.perf_counter()
        value = self.training.norm_step(self.networks, self.blocks, self.optimizer)
        self.seconds += time.perf_counter() - begun
        return value


def epoch(source: Path, folder: Path) -> list[dict[str, Any]]:
    """Time of an epoch of the joint training, as computed here and as published, step by step in turns."""
    anatomy, raw = folder / "object.npz", folder / "raw.h5"
    np.savez(anatomy, **phantom(source))
    simulate(**{**VFA, **AVERAGE}, phantom=anatomy, snr=30.0, seed=1, acceleration=12.0, output=raw)
    problem = load(raw)
    solver = LoREIN()
    estimate = solver.linear_estimate(problem, quiet)
    linear = CartesianSolver.maps(solver, estimate, estimate.coefficients, problem, quiet)
    start = start_from(estimate, linear, problem)
    forms = {name: Form(problem, estimate, start, name) for name in FORMS}
    losses: dict[str, dict[str, float]] = {}
    positions = len(next(iter(forms.values())).blocks)
    for block in torch.randperm(positions, generator=torch.Generator().manual_seed(0)).tolist():
        for name, form in forms.items():
            terms = form.step(block)
            if form.blocks[block].maps.voxels:
                losses.setdefault(name, terms)
    steps = {name: form.seconds for name, form in forms.items()}
    for name, form in forms.items():
        losses[name]["wnnm"] = form.norm_step()
    slowest = list(forms.values())[-1].seconds
    rows = []
    for name, form in forms.items():
        parts = ", ".join(f"{key} {value:.4f}" for key, value in losses[name].items())
        say(
            f"{name:30s} {form.seconds:6.1f} s an epoch, {steps[name]:.1f} without the nuclear norm; "
            f"ratio {slowest / form.seconds:.1f}, {steps[list(forms)[-1]] / steps[name]:.1f} without; "
            f"first losses {parts}"
        )
        rows.append({"form": name, "seconds": form.seconds, "steps": steps[name], "losses": losses[name]})
    return rows


def scans_of(words: Iterable[str]) -> dict[str, list[float]]:
    """``vfa_gre:12,27`` -> {"vfa_gre": [12.0, 27.0]}."""
    found = {}
    for word in words:
        sequence, _, accelerations = word.partition(":")
        found[sequence] = [float(value) for value in accelerations.split(",")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("accuracy", "epoch"))
    parser.add_argument("sources", type=Path, nargs="+", help="delics_volXX.npz, or mni")
    parser.add_argument("--scans", nargs="+", default=["vfa_gre:12,27,48", "t2ir_gre:80,160,320"])
    parser.add_argument("--pipelines", default="subspace,llr,model_based,lorein,summit")
    parser.add_argument("--set", action="append", default=[], help="GADGET.PROPERTY=VALUE for all of them")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--threads", type=int, default=1, help="of epoch")
    parser.add_argument("--folder", type=Path, help="for the raw files; a temporary folder where absent")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.what == "accuracy":
            rows = accuracy(
                arguments.sources,
                folder,
                scans_of(arguments.scans),
                arguments.pipelines.split(","),
                [int(seed) for seed in arguments.seeds.split(",")],
                arguments.set,
            )
        else:
            torch.set_num_threads(arguments.threads)
            rows = epoch(arguments.sources[0], folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
