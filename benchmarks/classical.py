"""The classical solvers side by side: accuracy, against BART and SigPy, and what they cost.

    python benchmarks/classical.py accuracy delics_vol00.npz delics_vol03.npz [--folder DIR] [--json FILE]
    python benchmarks/classical.py peers delics_vol00.npz
    python benchmarks/classical.py cost

accuracy: scans of the MNI brain and of real in-vivo maps (Deli-CS volumes, benchmarks/invivo.py), SNR 30, the
object twice finer than the scan and averaged over each scan voxel, replayed through every pipeline as it
ships. Seconds are those of the whole replay, from raw file to maps. Rows ``perfect`` are the floor that
voxels of several tissues set (perfect_scan.py); "from it" is the error against the maps of that row, so
what noise and undersampling put in.

peers: one vfa_gre scan, the same lines, coil maps and basis for all (one that spans the whole field: no
peer can take a field map). Every method at its best weight of the same grid search, scored by the mean NRMSE
of T1 and T2*; locally low rank with two values of a second setting each, the size of the blocks for BART and
the share of the Gaussian prior for ours. Needs the program ``bart`` for that part.

cost: seconds of the solvers on random problems, one size doubled at a time, with the exponent of the growth.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fair_comparison import best_weight, seconds_to_reach
from invivo import phantom
from peers_bart import Pics, Shuffle, bart_available, bart_version
from peers_sigpy import SigpyProblem
from perfect_scan import from_perfect, perfect_maps
from scan_problem import load
from subspace import T2IR, VFA
from torch import Tensor

from quantitron.gadgets.image_file import read_images
from quantitron.host.compare import compare
from quantitron.host.replay import replay
from quantitron.phantoms.simulate import simulate
from quantitron.recon.coefficient_basis import CoefficientBasis, coefficient_basis, echo_images
from quantitron.recon.coils import coil_maps
from quantitron.recon.data import Basis, Encoding, Problem, Protocol, ReducedKSpace
from quantitron.recon.field_map import field_map
from quantitron.recon.masks import signal_mask
from quantitron.recon.metrics import CAPS, nrmse
from quantitron.recon.operators.reduced_sense import ReducedSense
from quantitron.recon.operators.subspace import off_resonance_phase
from quantitron.recon.parameter_maps import parameter_maps
from quantitron.recon.signal_energy import centre_energy
from quantitron.recon.solvers import SOLVERS, LocallyLowRank, LowRankTotalVariation
from quantitron.recon.solvers.cartesian import CartesianSolver

SCANS = [(VFA, 12.0), (VFA, 27.0), (T2IR, 80.0), (T2IR, 160.0)]
COEFFICIENT_IMAGES = ("subspace", "llr", "lrtv", "lrt")
"""Solvers whose own part is to find coefficient images."""
PIPELINES = (*COEFFICIENT_IMAGES, "model_based")
ROLES = ("T1", "T2", "T2STAR")


def quiet(doing: str, share: float) -> None:
    """Progress that nobody sees."""
    del doing, share


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def accuracy(
    sources: Iterable[Path], folder: Path, pipelines: Iterable[str], spread: str
) -> list[dict[str, Any]]:
    """NRMSE of every pipeline on every scan of every object."""
    objects: dict[str, Any] = {}
    for source in sources:
        objects[source.stem] = folder / f"{source.stem}.npz"
        np.savez(objects[source.stem], **phantom(source))
    objects["mni"] = "mni"
    say(
        f"{'NRMSE %':34s} {'pipeline':11s} {'T1':>6s} {'T2':>6s} {'T2*':>6s}   "
        f"{'from perfect %':20s} {'MAPE WM+GM / 2 %':18s} seconds"
    )
    rows = []
    for name, anatomy in objects.items():
        perfect = {}
        for scan, acceleration in SCANS:
            sequence = scan["sequence"]
            raw, maps = folder / "raw.h5", folder / "maps.h5"
            simulate(
                **{**scan, "phantom": anatomy, "snr": 30.0, "seed": 1, "acceleration": acceleration},
                point_spread=spread,
                output=raw,
                overwrite=True,
            )
            if sequence not in perfect:
                perfect[sequence] = perfect_maps(scan, anatomy, spread, folder).rename(
                    folder / f"perfect_{sequence}.h5"
                )
            for pipeline in ("perfect", *pipelines):
                case = f"{name} {sequence} R {acceleration:g}"
                start = time.perf_counter()
                if pipeline == "perfect":
                    judged = perfect[sequence]
                else:
                    judged = maps
                    replay(raw, pipeline, maps, overwrite=True)
                seconds = time.perf_counter() - start
                found = compare(judged, raw)["maps"]
                excess = from_perfect(judged, perfect[sequence], raw)
                rows.append(
                    {"case": case, "pipeline": pipeline, "seconds": seconds, "maps": found, "from": excess}
                )
                cells = " ".join(
                    f"{100 * found[role]['nrmse']:6.1f}" if role in found else " " * 6 for role in ROLES
                )
                tissue = " / ".join(
                    f"{50 * (found[role]['mape_wm'] + found[role]['mape_gm']):.1f}"
                    for role in ROLES
                    if role in found
                )
                rest = " / ".join(f"{100 * value:.1f}" for value in excess.values())
                say(f"{case:34s} {pipeline:11s} {cells}   {rest:20s} {tissue:18s} {seconds:7.1f}")
    return rows


class PeerProblem:
    """A vfa_gre scan in a basis that spans the field, for solvers that know no field map."""

    def __init__(self, raw: Path) -> None:
        self.problem: Problem = load(raw)
        protocol, reduced = self.problem.protocol, self.problem.reduced
        self.wide: CoefficientBasis = coefficient_basis(reduced.basis, protocol, 60.0, 0.999)
        self.csm = coil_maps(reduced, self.problem.calibration, self.wide, 1.0)
        psi = reduced.basis.contrast.to(torch.complex64)  # (w, l)
        self.phi = torch.einsum("wl,elk->wek", psi, self.wide.mixing).flatten(0, 1)  # (t, k)
        self.truth = {
            image.meta["GADGETRON_DataRole"]: np.nan_to_num(image.data[0].astype(np.float64))
            for image in read_images(raw, "truth")
        }

    def errors(self, coefficients: Tensor, basis: CoefficientBasis | None = None) -> dict[str, float]:
        """NRMSE of T1 and T2* of coefficient images (x, k, z, y), the field found in them."""
        protocol = self.problem.protocol
        images = echo_images(coefficients, basis or self.wide)  # (e, l, z, y, x)
        mask = signal_mask(images.abs().square().sum((0, 1)).sqrt(), 0.05)
        b0 = field_map(images, protocol, mask)
        phase = off_resonance_phase(b0[None], torch.tensor(protocol.echo_time), protocol.phase_sign)[0]
        found = parameter_maps(
            images * phase[:, None].conj(),
            b0,
            self.problem,
            mask_threshold=0.05,
            rank=self.wide.rank,
            retained_energy=self.wide.retained_energy,
            residual_to_noise=float("nan"),
            standard_deviations=False,
        )
        inside = self.truth["MASK"] > 0
        return {
            name: nrmse(found.values[name][0].numpy(), self.truth[role] / 1e3, inside, CAPS[name])
            for name, role in (("t1", "T1"), ("t2star", "T2STAR"))
        }

    def score(self, coefficients: Tensor, basis: CoefficientBasis | None = None) -> float:
        """Mean of the errors."""
        return sum(self.errors(coefficients, basis).values()) / 2

    def solve(self, solver: CartesianSolver) -> tuple[tuple[Tensor, CoefficientBasis], float]:
        """Our solver on the same lines, coil maps and basis, all its passes included."""
        start = time.perf_counter()
        problem = self.problem
        energy = centre_energy(problem.reduced, self.wide, 1.0)
        operator = ReducedSense(problem.reduced, self.csm, self.wide.mixing)
        nothing = torch.zeros_like(energy)
        mask = signal_mask(energy.sqrt(), solver.mask_threshold)
        estimate = solver.learnt_estimate(problem, operator, self.wide, energy, mask, nothing, quiet)
        coefficients = solver.refine(estimate, problem.seed, quiet)
        return (coefficients, estimate.basis), time.perf_counter() - start


def processor_seconds() -> float:
    """User and system time of this process and of the children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def timed(run: Callable[[], tuple[Any, float]]) -> tuple[Any, float]:
    """Result and processor seconds, which do not depend on what else the machine does."""
    before = processor_seconds()
    result, _ = run()
    return result, processor_seconds() - before


def peers(
    source: Path, folder: Path, acceleration: float, threads: int, programs: Iterable[str] = ("bart", "sigpy")
) -> list[dict[str, Any]]:
    """Best weight of each method, its error and time; then time at equal error."""
    anatomy, raw = folder / "phantom.npz", folder / "raw.h5"
    np.savez(anatomy, **phantom(source))
    simulate(
        **{**VFA, "matrix": PEER_MATRIX, "phantom": anatomy, "snr": 30.0, "seed": 1},
        acceleration=acceleration,
        point_spread="average",
        output=raw,
        overwrite=True,
    )
    scan = PeerProblem(raw)
    lines = scan.problem.kspace
    assert lines is not None
    grid = "x".join(map(str, PEER_MATRIX))
    say(f"vfa_gre {grid} R {acceleration:g}, rank {scan.wide.rank}, {threads} threads")
    say("error: mean NRMSE of T1 and T2*; s: processor seconds without files and scoring")
    rows: list[dict[str, Any]] = []

    def report(method: str, weight: float, error: float, seconds: float) -> None:
        rows.append({"method": method, "weight": weight, "score": error, "seconds": seconds})
        say(f"{method:44s} weight {weight:9.4g}  error {100 * error:6.2f} %  {seconds:7.1f} s")

    for name, solver, shares, weights in (
        ("llr", LocallyLowRank, (0.5, 0.8), (0.1, 0.3, 0.9)),
        ("lrtv", LowRankTotalVariation, (0.5,), (0.1, 0.2, 0.4)),
    ):
        for share in shares:

            def ours(weight: float, solver: Any = solver, share: float = share) -> tuple[Any, float]:
                return timed(lambda: scan.solve(solver(weight=weight, field_share=share)))

            found = best_weight(ours, weights, lambda found: scan.score(*found))
            report(f"quantitron {name}, field_share {share:g}", *found)
    totals: dict[tuple[str, int], float] = {}
    if "bart" in programs and bart_available():
        say(f"BART {bart_version()}, {PEER_ITERATIONS} iterations")
        with Shuffle(lines, scan.csm, scan.phi, folder, threads) as shuffle:
            for kind, block in BART_PENALTIES:
                settings = {"block": block, "step": 0.95} if kind == "L" else {"rho": 0.1}

                def theirs(
                    weight: float, count: int = PEER_ITERATIONS, kind: Any = kind, settings: Any = settings
                ) -> tuple[Tensor, float]:
                    return timed(lambda: shuffle(kind, weight, count, **settings))

                weight, error, seconds = best_weight(theirs, (0.1, 0.3), scan.score)
                blocks = f", blocks of {block}" if kind == "L" else ""
                report(f"BART wshfl -R {kind}{blocks}", weight, error, seconds)
                totals[kind, block] = weight
                reached = seconds_to_reach(
                    lambda count, run=theirs, weight=weight: run(weight, count),
                    scan.score,
                    1.01 * error,
                    (8, 15, 30),
                )
                if reached:
                    say(f"    within 1 % of that error after {reached[0]} iterations, {reached[1]:.1f} s")
        # The same objectives by way of the dense buffer, at the weights that were best for them.
        with Pics(lines, scan.csm, scan.phi, folder) as pics:
            for kind, block in (("L", 8), ("T", 0)):
                settings = {"block": block} if kind == "L" else {"rho": 0.1}
                for count in PICS_ITERATIONS:
                    weight = totals[kind, block]
                    found, seconds = timed(
                        lambda kind=kind, weight=weight, count=count, settings=settings: pics(
                            kind, weight, count, threads=threads, **settings
                        )
                    )
                    name = f"BART pics -B -R {kind}, {count} iterations"
                    report(name, weight, scan.score(found), seconds)
    if "sigpy" not in programs:
        return rows
    peer = SigpyProblem(lines, scan.csm, scan.phi)
    weight = totals.get(("T", 0), 0.3)
    found, seconds = timed(lambda: peer("T", weight, FEW_ITERATIONS))
    report(f"SigPy LinearLeastSquares, TV, {FEW_ITERATIONS} iterations", weight, scan.score(found), seconds)
    return rows


PEER_MATRIX = (64, 64, 12)
PEER_ITERATIONS = 60
PICS_ITERATIONS = (12, 30)
"""At some 5 to 10 s each."""
FEW_ITERATIONS = 12
BART_PENALTIES = (("L", 8), ("L", 4), ("T", 0), ("TJ", 0))
"""Penalty (that of each coefficient image by itself, or joint over them) and block, where it has any."""


def random_problem(
    nx: int, ny: int, nz: int, coils: int, excitations: int, rank: int
) -> tuple[Problem, Tensor]:
    """A t2ir_gre problem whose sums are those of noise: what is in it does not change the cost."""
    protocol = Protocol(
        "t2ir_gre",
        echo_time=(4.5e-3, 11.2e-3, 17.9e-3, 24.6e-3),
        repetition_time=(30e-3,),
        flip_angle=(math.radians(10),),
        preparation_time=(25e-3, 50e-3, 70e-3, 90e-3),
        excitations=excitations,
        inversion_efficiency=1.0,
        field_strength=3.0,
    )
    generator = torch.Generator().manual_seed(0)
    contrast = torch.linalg.qr(torch.randn(protocol.contrasts, rank, generator=generator)).Q
    basis = Basis(contrast, 10.0 ** -torch.arange(rank), 1.0, "navigator")
    root = torch.randn(1, 4, nz, ny, rank, rank, generator=generator) / rank**0.5
    reduced = ReducedKSpace(
        gram=root @ root.mT,
        projected=torch.randn(1, 4, nz, ny, rank, coils, nx, generator=generator, dtype=torch.complex64),
        count=torch.ones(1, 4, nz, ny),
        energy=1.0,
        samples=4 * nz * ny * coils * nx,
        basis=basis,
    )
    grid = (nz, ny, nx)
    encoding = Encoding(grid, (nz * 2e-3, ny * 2e-3, nx * 2e-3), grid, 1, coils)
    csm = torch.randn(nx, coils, nz, ny, generator=generator, dtype=torch.complex64)
    return Problem(encoding, protocol, reduced), csm / csm.norm(dim=1, keepdim=True)


COST = {
    "readout positions": ({"nx": n} for n in (8, 16, 32)),
    "phase encodes": ({"ny": n} for n in (24, 48, 96)),
    "coils": ({"coils": n} for n in (3, 6, 12)),
    "contrast rank": ({"rank": n} for n in (3, 6, 12)),
    "frames T": ({"excitations": n} for n in (20, 40, 80)),
}
BASE = {"nx": 16, "ny": 48, "nz": 8, "coils": 6, "excitations": 40, "rank": 6}


def cost() -> list[dict[str, Any]]:
    """Seconds of each solver, best of two, without coil maps, field and fit."""
    rows = []
    say(f"base: {BASE}, 4 echoes, 9 coefficient images")
    for axis, sizes in COST.items():
        found: dict[str, list[tuple[float, float]]] = {}
        for change in sizes:
            ((setting, size),) = change.items()
            problem, csm = random_problem(**{**BASE, **change})
            wide = coefficient_basis(problem.reduced.basis, problem.protocol, 3.0, 9)
            energy = torch.ones(problem.encoding.matrix)
            for kind in SOLVERS:
                if not issubclass(kind, CartesianSolver) or kind.name not in COEFFICIENT_IMAGES:
                    continue
                solver = kind(tolerance=0.0)
                seconds = math.inf
                for _ in range(2):
                    start = time.perf_counter()
                    operator = ReducedSense(problem.reduced, csm, wide.mixing)
                    estimate = solver.learnt_estimate(
                        problem, operator, wide, energy, energy > 0, 0 * energy, quiet
                    )
                    solver.refine(estimate, 0, quiet)
                    seconds = min(seconds, time.perf_counter() - start)
                count = problem.protocol.frames if setting == "excitations" else size
                found.setdefault(kind.name, []).append((count, seconds))
        for name, points in found.items():
            slope = np.polyfit(*(np.log(np.array(part)) for part in zip(*points, strict=True)), 1)[0]
            rows.append({"axis": axis, "pipeline": name, "points": points, "exponent": float(slope)})
            cells = ", ".join(f"{count:g}: {seconds:.2f} s" for count, seconds in points)
            say(f"{axis:18s} {name:9s} {cells:42s} growth ^{slope:.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say(f"peak memory of the whole run {peak:.0f} MiB")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("accuracy", "peers", "cost"))
    parser.add_argument("sources", type=Path, nargs="*", help="delics_volXX.npz")
    parser.add_argument("--pipelines", default=",".join(PIPELINES))
    parser.add_argument("--point-spread", default="average", choices=("average", "truncation"))
    parser.add_argument("-R", "--acceleration", type=float, default=12.0, help="of the scan for peers")
    parser.add_argument("--peers", default="bart,sigpy", help="which of them are run beside ours")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="for the raw files; a temporary folder where absent")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.what == "accuracy":
            rows = accuracy(arguments.sources, folder, arguments.pipelines.split(","), arguments.point_spread)
        elif arguments.what == "peers":
            rows = peers(
                arguments.sources[0],
                folder,
                arguments.acceleration,
                arguments.threads,
                arguments.peers.split(","),
            )
        else:
            rows = cost()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
