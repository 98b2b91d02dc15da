"""Learned priors against classical ones on undersampled fingerprints: accuracy, ablation, cost of each part.

    python benchmarks/pnp.py accuracy delics_vol03.npz [--cases slice/6 slice slab/1] [--coils 8,1]
    python benchmarks/pnp.py ablation delics_vol03.npz --cases slice/6 [--only modalities,denoiser]
    python benchmarks/pnp.py parts delics_vol03.npz --cases slice/6
    python benchmarks/pnp.py floor delics_vol03.npz --cases slice slab

The object has to be one that no network was trained on: delics_vol03. It is twice finer than the scan, whose
k-space is cut as a scanner does; SNR 10, 500 time points. The cases:

slice      192 x 192, one train, all 48 spirals in turn: the standard scan.
slice/6    6 of the 48 alone, evenly spread: 8-fold undersampled in interleaves. K-space has gaps that are the
           same at all time points. With several coils a calibration comes first, whose coil maps fill them.
slab/1     128 x 128 x 24, one train of 500 tilted spirals, none played twice, where a dense scan has 8:
           8-fold undersampled in the paper's sense. Its scan (220 x 220 x 220, 6 groups of 48, spirals of
           some 1500 samples) has about 12 unknowns for each sample of one coil, this one 9; its dense scan
           1.5, 8 trains here 1.1. Counted in the object alone this one is the harder: 3.4 against some 1.7.

Unknowns (``per sample``): 5 coefficient images of all voxels, over the samples of one coil.
MAPE is the mean of that in white and in grey matter; ``tissue`` is over both together, as the paper has it.
``of lrtv`` is T1 + T2 over that of lrtv on the same scan. Cosine distance, PSNR and SSIM: ``map_judgement``.
Pipelines run as they ship or with the settings after the name (``mri2qmap:denoiser=tv+rounds=20``), each in
a process of its own, with the dictionary in the cache; one that fails has a row that says so, and the exit
code is 1 then.

ablation: mri2qmap without each modality in turn; fixed and annealed schedules from several first levels over
several numbers of rounds; conjugate gradient steps a round; all atoms against groups; TV and BM4D in place
of the network; start, prior, weights and maps as published.

parts: one reconstruction by mri2qmap (or what --base names) in this process: seconds and peak memory, of the
GPU where there is one, of each step.

floor: MAPE of the maps of a scan without noise, with all of k-space that the spirals reach: resolution alone.

With --folder, raw files stay there and are used again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fingerprint_floor import floor
from map_judgement import ROLES, judge
from measured_replay import measured_replay
from mrf import objects, say, settings_of
from part_costs import forget_peak, part_costs, peak_memory

from quantitron.gadgets.chain import check_configuration
from quantitron.gadgets.dictionary_cache import cached_dictionary
from quantitron.host.configuration import external_configuration, load_pipeline, parse_pipeline
from quantitron.host.replay import replay
from quantitron.phantoms.schedules import make_schedule
from quantitron.phantoms.simulate_fingerprint import simulate_fingerprint
from quantitron.phantoms.spiral import SpiralDesign, design_spiral
from quantitron.recon.signal.spin_echo import SpinEchoProtocol
from quantitron.recon.solvers import SOLVERS
from quantitron.recon.solvers.coefficient_solver import CoefficientEstimate

PIPELINES = "lrtv,svdmrf,mrf_admm,llr,mri2qmap,mrf_pnp,arnet"
REFERENCE = "lrtv"
"""The pipeline whose T1 + T2 error is the unit; it runs first."""
INTERLEAVES, DENSE_TRAINS, SNR = 48, 8, 10.0
COMPONENTS = 5
"""Coefficient images of a fingerprint."""
SLICE_FIELD, SLAB_FIELD = (220.0, 220.0, 5.0), (220.0, 220.0, 30.0)
SLAB_SUPERSAMPLING = (2, 2, 1)
MODALITIES = SpinEchoProtocol().modalities
CASE_HEAD = ["object", "case", "coils", "order", "height", "seed"]
HEAD = [
    *CASE_HEAD,
    *("per sample", "pipeline", "MAPE T1", "T2", "T1+T2", "of lrtv", "tissue T1", "T2", "cosine %"),
    *("PSNR " + " / ".join(MODALITIES), "SSIM %", "s", "GB"),
]


@dataclass(frozen=True)
class Case:
    """One scan."""

    name: str
    """``slice``, ``slice/N`` or ``slab/N``."""
    coils: int
    order: str
    height: float
    """[mm]; only of slices."""
    seed: int
    schedule: str
    points: int
    matrix: tuple[int, int, int]
    """x, y, z."""

    def key(self, name: str) -> tuple[Any, ...]:
        """The first cells of its rows."""
        size = "x".join(str(points) for points in self.matrix if points > 1)
        return (name, f"{self.name} {size}", self.coils, self.order, f"{self.height:g}", self.seed)

    @property
    def unknowns_per_sample(self) -> float:
        """Coefficients of all voxels over the samples of one coil."""
        kind, count = shape_of(self.name)
        edge = 1e-3 * SLICE_FIELD[0]
        spiral = design_spiral(
            SpiralDesign(matrix=max(self.matrix[:2]), field_of_view=edge, interleaves=INTERLEAVES)
        )
        samples = len(spiral) * self.points * (count if kind == "slab" else 1)
        return COMPONENTS * math.prod(self.matrix) / samples

    def simulate(self, name: str, anatomy: str | Path, folder: Path) -> Path:
        """The raw file, from the folder where it is there."""
        parts = [*map(str, self.key(name)), Path(self.schedule).stem, str(self.points)]
        raw = folder / ("_".join(parts).replace("/", "-").replace(" ", "_") + ".h5")
        if raw.exists():
            return raw
        kind, count = shape_of(self.name)
        if kind == "slab":
            scan: dict[str, Any] = {"fov": SLAB_FIELD, "volume": "tilted"}
            scan |= {"trains": count, "supersampling": SLAB_SUPERSAMPLING}
        else:
            undersampled = count < INTERLEAVES
            scan = {"fov": SLICE_FIELD, "height": self.height, "acquired": count}
            scan["calibration"] = "separate" if undersampled and self.coils > 1 else "none"
        simulate_fingerprint(
            output=raw,
            phantom=anatomy,
            matrix=self.matrix,
            schedule=self.schedule,
            points=self.points,
            interleaves=INTERLEAVES,
            order=self.order,
            coils=self.coils,
            snr=SNR,
            seed=self.seed,
            **scan,
        )
        return raw


def shape_of(text: str) -> tuple[str, int]:
    """``slice`` or ``slab``, and how many interleaves or trains of the full number.

    Raises:
        SystemExit: if there is no such case.
    """
    kind, _, count = text.partition("/")
    full = {"slice": INTERLEAVES, "slab": DENSE_TRAINS}.get(kind, INTERLEAVES)
    if kind not in ("slice", "slab") or (count and not (count.isdecimal() and 1 <= int(count) <= full)):
        raise SystemExit(f"there is no case '{text}'; it must be slice, slice/N or slab/N, N at most {full}")
    return kind, int(count or full)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """All combinations wanted."""
    for name in arguments.cases:
        slab = shape_of(name)[0] == "slab"
        heights = [0.0] if slab else numbers(arguments.heights, float)
        matrix = tuple(numbers(arguments.slab if slab else arguments.slice, int))
        if len(matrix) != 3 or (slab and matrix[2] < 2) or (not slab and matrix[2] != 1):
            raise SystemExit(f"{name} cannot have a matrix of {matrix} (x, y, z)")
        for coils in numbers(arguments.coils, int):
            for order in arguments.orders.split(","):
                for height in heights:
                    for seed in numbers(arguments.seeds, int):
                        scan = (arguments.schedule, arguments.points, matrix)
                        yield Case(name, coils, order, height, seed, *scan)


def numbers(text: str, kind: type) -> list[Any]:
    return [kind(part) for part in text.split(",")]


class Table:
    """Rows of results: printed as they come, and kept for JSON, also when the run is cut short."""

    def __init__(self, file: Path | None, head: list[str]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file = file
        say("| " + " | ".join(head) + " |")
        say("|" + "---|" * len(head))

    def add(self, cells: Iterable[object], row: dict[str, Any]) -> None:
        say("| " + " | ".join(map(str, cells)) + " |")
        self.rows.append(row)
        if self._file is not None:
            self._file.write_text(json.dumps(self.rows))

    def failed(self) -> bool:
        """Whether any row holds no result."""
        return any("failed" in row for row in self.rows)


def run(table: Table, case: Case, name: str, raw: Path, pipelines: Iterable[tuple[str, str]]) -> None:
    """A row for each pipeline on one scan.

    Args:
        table: of the results.
        case: the scan.
        name: of the object.
        raw: its file.
        pipelines: label, and pipeline with settings.
    """
    dictionary = cached_dictionary(make_schedule(case.schedule, case.points, seed=case.seed))
    maps, unit = raw.with_suffix(f".{os.getpid()}.maps"), None  # of this run: the folder may be shared
    place = [*case.key(name), f"{case.unknowns_per_sample:.2g}"]
    for label, pipeline in pipelines:
        method, settings = settings_of(pipeline)
        row: dict[str, Any] = {"case": case.key(name), "label": label, "pipeline": pipeline}
        try:
            seconds, memory = measured_replay(raw, method, maps, settings)
        except SystemExit as failure:
            why = str(failure).rpartition(" ended with ")[2]
            table.add([*place, f"`{label}`", f"failed: {why}"], row | {"failed": why})
            continue
        result = judge(maps, raw, dictionary)
        errors = {role: 100 * result["mape"][role] for role in ROLES}
        total = sum(errors.values())
        unit = total if label == REFERENCE else unit
        cells = [f"{errors['T1']:.2f}", f"{errors['T2']:.2f}", f"{total:.2f}"]
        cells.append("" if unit is None else f"{total / unit:.2f}")
        cells += [f"{100 * result['tissue'][role]:.2f}" for role in ROLES]
        cells.append(f"{100 * result['cosine']:.3f}")
        cells.append(" / ".join(f"{result['psnr'][modality]:.1f}" for modality in MODALITIES))
        cells.append(" / ".join(f"{100 * result['ssim'][modality]:.1f}" for modality in MODALITIES))
        cells += [f"{seconds:.1f}", f"{memory:.2f}"]
        row |= result | {"of_reference": None if unit is None else total / unit}
        table.add([*place, f"`{label}`", *cells], row | {"seconds": seconds, "peak_memory_gb": memory})
    maps.unlink(missing_ok=True)


def preset(pipeline: str) -> dict[str, object]:
    """Settings of a pipeline's solver for fingerprints, as it ships."""
    text, where = load_pipeline(pipeline)
    configuration = external_configuration(parse_pipeline(text, where), where)
    return check_configuration(configuration, where)["fisp_mrf"]["reconstruct"]


def modalities(_settings: dict[str, object], _arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Each left out in turn."""
    for modality in MODALITIES:
        yield f"without {modality}", f"{modality.lower()}_weight=0"


def schedule(settings: dict[str, object], arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """First levels over numbers of rounds; ``fixed`` begins where the others end."""
    for level in arguments.levels.split(","):
        first = settings["last_level"] if level == "fixed" else float(level)
        for rounds in numbers(arguments.rounds, int):
            yield f"from {level}, {rounds} rounds", f"first_level={first}+rounds={rounds}"


def iterations(_settings: dict[str, object], arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Conjugate gradient steps in each round."""
    for count in numbers(arguments.iterations, int):
        yield f"{count} steps a round", f"iterations={count}"


def matching(settings: dict[str, object], _arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """All atoms where the preset has groups, else the paper's number of groups."""
    yield ("all atoms", "match_groups=0") if settings["match_groups"] else ("100 groups", "match_groups=100")


def published(_settings: dict[str, object], _arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """What is done in another way than the paper has it, each in its way, then all."""
    start, prior = "start=least_squares", "field_share=0"
    weights = "+".join(f"{modality.lower()}_weight=1" for modality in MODALITIES)
    maps = "maps_from=joint"
    yield "start as published", start
    yield "no prior of the field", prior
    yield "weights as published", weights
    yield "maps as published", maps
    yield "all as published", f"{start}+{prior}+{weights}+{maps}"


def denoiser(settings: dict[str, object], _arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """What takes the network's place."""
    for name in ("network", "bm4d", "tv"):
        if name != settings["denoiser"]:
            yield f"{name}", f"denoiser={name}"


ABLATIONS = {
    part.__name__: part for part in (modalities, schedule, iterations, matching, denoiser, published)
}


def ablations(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Label and pipeline of everything that is compared, the reference and the preset first."""
    settings = preset("mri2qmap")
    base = arguments.base
    result = [(REFERENCE, REFERENCE), (base, base)]
    for part in arguments.only.split(","):
        if part not in ABLATIONS:
            raise SystemExit(f"there is no ablation '{part}'; there are {', '.join(ABLATIONS)}")
        for label, change in ABLATIONS[part](settings, arguments):
            result.append((label, f"{base}{'+' if ':' in base else ':'}{change}"))
    return result


def parts_of(method: str) -> dict[str, tuple[object, str]]:
    """The steps of a solver of fingerprints, as ``part_costs`` wants them.

    Raises:
        SystemExit: if there is no such solver.
    """
    solver = next((kind for kind in SOLVERS if kind.name == method and "fisp_mrf" in kind.sequences), None)
    if solver is None:
        raise SystemExit(f"there is no solver '{method}' of fingerprints")
    module = sys.modules[solver.__module__]
    found: dict[str, tuple[object, str]] = {}
    if hasattr(solver, "linear_estimate"):
        found["linear estimate"] = (solver, "linear_estimate")
    found["conjugate gradients of a round"] = (CoefficientEstimate, "proximal")
    for name, part in vars(module).items():
        if not isinstance(part, type) or getattr(part, "_is_protocol", False):
            continue
        if any("__call__" in vars(kind) for kind in part.__mro__):
            if name.endswith("Denoiser"):
                found[f"denoising ({name})"] = (part, "__call__")
            elif name.startswith("Nearest"):
                found["matching in a round"] = (part, "__call__")
    return found | {"final matching": (solver, "matched")}


def parts(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Seconds and memory of the steps of a pipeline; those that it does not take have no row."""
    method, settings = settings_of(arguments.base)
    wrapped = parts_of(method)
    table = Table(arguments.json, [*CASE_HEAD, "part", "calls", "s", "s / call", "GB"])
    for name, anatomy in objects(arguments.sources, folder):
        for case in cases(arguments):
            raw = case.simulate(name, anatomy, folder)
            maps = raw.with_suffix(f".{os.getpid()}.maps")
            # The first run of a process also pays for what later ones find ready (kernels, threads).
            for warm in (False, True) if arguments.warm else (True,):
                forget_peak()
                begun = time.perf_counter()
                with part_costs(wrapped) as costs:
                    replay(raw, method, maps, settings, overwrite=True)
                seconds, memory = time.perf_counter() - begun, peak_memory()
                if not warm:
                    continue
                for part, cost in costs.items():
                    if cost.calls == 0:
                        continue
                    each = cost.seconds / cost.calls
                    table.add(
                        [
                            *case.key(name),
                            part,
                            cost.calls,
                            f"{cost.seconds:.2f}",
                            f"{each:.3f}",
                            f"{cost.memory:.2f}",
                        ],
                        {"case": case.key(name), "part": part, **vars(cost)},
                    )
                most = max([memory, *(cost.memory for cost in costs.values())])
                table.add(
                    [*case.key(name), "everything", 1, f"{seconds:.2f}", f"{seconds:.3f}", f"{most:.2f}"],
                    {"case": case.key(name), "part": "everything", "seconds": seconds, "memory": most},
                )
            maps.unlink(missing_ok=True)
    return table.rows


def floors(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each kind, size and place of the cases, whatever their undersampling and coils."""
    table = Table(arguments.json, ["object", "kind", "matrix", "height", "T1", "T2", "T1+T2"])
    for name, anatomy in objects(arguments.sources, folder):
        told = set()
        for case in cases(arguments):
            kind = shape_of(case.name)[0]
            place = (name, kind, "x".join(map(str, case.matrix)), f"{case.height:g}")
            if place in told:
                continue
            told.add(place)
            protocol = make_schedule(case.schedule, case.points, seed=case.seed)
            found = floor(
                anatomy,
                protocol,
                cached_dictionary(protocol),
                case.matrix,
                SLAB_FIELD if kind == "slab" else SLICE_FIELD,
                SLAB_SUPERSAMPLING if kind == "slab" else (2, 2, 2),
                case.height,
                case.seed,
            )
            errors = [100 * found[role] for role in ROLES]
            cells = [f"{error:.2f}" for error in (*errors, sum(errors))]
            table.add([*place, *cells], {"case": place, "floor": found})
    return table.rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("accuracy", "ablation", "parts", "floor"))
    parser.add_argument("sources", type=Path, nargs="+", help="delics_volXX.npz, or mni")
    parser.add_argument("--cases", nargs="+", default=["slice/6", "slice", "slab/1"])
    parser.add_argument("--coils", default="8,1")
    parser.add_argument("--orders", default="shuffled")
    parser.add_argument("--heights", default="0", help="centres of slices in mm, with commas between")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--slice", default="192,192,1", help="matrix of slices, of 220 x 220 x 5 mm")
    parser.add_argument("--slab", default="128,128,24", help="matrix of slabs, of 220 x 220 x 30 mm")
    parser.add_argument("--schedule", default="jiang")
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--pipelines", default=PIPELINES, help="accuracy: name[:property=value+...], ...")
    parser.add_argument("--base", default="mri2qmap", help="ablation, parts: pipeline[:property=value+...]")
    parser.add_argument("--only", default=",".join(ABLATIONS), help="ablation: which")
    parser.add_argument("--levels", default="fixed,0.05,0.1,0.2,0.5", help="ablation: first levels")
    parser.add_argument("--rounds", default="5,10,15,20", help="ablation: rounds")
    parser.add_argument("--iterations", default="1,5,10,20", help="ablation: conjugate gradient steps")
    parser.add_argument("--warm", action="store_true", help="parts: run twice, measure the second")
    parser.add_argument("--folder", type=Path, help="for the raw files; a temporary folder where absent")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        # The cache lies beside the raw files, so that seconds never hold the simulation of the dictionary.
        os.environ["QUANTITRON_CACHE"] = os.fspath(folder)
        for seed in numbers(arguments.seeds, int):
            cached_dictionary(make_schedule(arguments.schedule, arguments.points, seed=seed))
        if arguments.what == "parts":
            parts(arguments, folder)
            return
        if arguments.what == "floor":
            floors(arguments, folder)
            return
        if arguments.what == "ablation":
            pipelines = ablations(arguments)
        else:
            pipelines = [(name, name) for name in arguments.pipelines.split(",")]
            pipelines.sort(key=lambda pipeline: pipeline[0] != REFERENCE)
        table = Table(arguments.json, HEAD)
        for name, anatomy in objects(arguments.sources, folder):
            for case in cases(arguments):
                run(table, case, name, case.simulate(name, anatomy, folder), pipelines)
    if table.failed():
        sys.exit(1)


if __name__ == "__main__":
    main()
