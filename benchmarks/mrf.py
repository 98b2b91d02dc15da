"""Fingerprinting at real size: accuracy of every pipeline, spheres of the NIST plate, time and memory.

    python benchmarks/mrf.py accuracy delics_vol00.npz [...] [--scans jiang:500,1000 tgas:500] [--seeds 1]
        [--snr 5,10,20,30] [--samples 768,1166]
    python benchmarks/mrf.py spheres [--scans jiang:500,1000] [--snr 10] [--samples 768]
    python benchmarks/mrf.py ... [--orders sequential,shuffled,17]
    python benchmarks/mrf.py volume delics_vol00.npz

accuracy: one slice 192x192 of real in-vivo maps (Deli-CS volumes, benchmarks/invivo.py) or of the MNI brain,
8 coils, one of 48 spirals a time point, in sequential and in shuffled order, the object twice finer than the
scan and its k-space cut as a scanner does. ``--orders`` may name a number: consecutive interleaves are as
many apart. ``--snr`` is the SNR of one sample at full sampling, 10 if nothing
is said; ``--samples`` those of a readout: more of them come closer together on the same spiral with the same
noise each, which is a longer readout. MAPE is that in white matter, that in grey matter and their mean. The
floor is the match of perfect images: the true coefficient images at the scan's resolution, with the noise of
frames that are fully sampled; ``floor, R`` has R times its variance, that of the samples acquired. Pipelines
run as they ship, or with settings after the name (``joint_inr:start=adjoint``), each in a process of its own;
the dictionary is in the cache, as for every scan but the first of a protocol.

spheres: T2 plate of the NIST phantom: bias and coefficient of variation of each sphere, slope over all, of
every pipeline and of the two floors. A sphere without any estimate has a bias of -100 % and counts as a CoV
of 100 %; its number is named.

volume: a stack of spirals, 96x96x24, 500 points, 8 coils: seconds and peak memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from invivo import phantom
from measured_replay import measured_replay

from quantitron.gadgets.dictionary_cache import cached_dictionary
from quantitron.gadgets.image_file import read_images
from quantitron.gadgets.map_volume import map_volumes
from quantitron.host.compare import compare
from quantitron.phantoms.coils import noise_covariance
from quantitron.phantoms.scene import FieldSettings, Scene, make_scene
from quantitron.phantoms.schedules import make_schedule
from quantitron.phantoms.signal_table import signal_basis, tabulate
from quantitron.phantoms.simulate import Simulation, load_anatomy
from quantitron.phantoms.simulate_fingerprint import simulate_fingerprint
from quantitron.phantoms.spiral import SpiralDesign, design_spiral
from quantitron.recon.data import Encoding, FingerprintProblem, Protocol, TrajectoryKSpace
from quantitron.recon.fingerprint_maps import fingerprint_maps
from quantitron.recon.metrics import line_through, mape, sphere_statistics

MATRIX, FIELD, COILS, INTERLEAVES, SNR, SAMPLES = 192, (220.0, 220.0, 5.0), 8, 48, 10.0, 768
ORDERS = ("sequential", "shuffled")
PIPELINES = "svdmrf,subspace,llr,lrtv,mrf_admm,joint_inr:start=adjoint,joint_inr"
ROLES = ("T1", "T2")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def scans(texts: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Schedule and points of ``jiang:500,1000 tgas:500``."""
    for text in texts:
        schedule, _, points = text.partition(":")
        for number in points.split(","):
            yield schedule, int(number)


def objects(sources: Iterable[Path], folder: Path) -> Iterator[tuple[str, str | Path]]:
    """Name and phantom of each source."""
    for source in sources:
        if source.stem in ("mni", "nist"):
            yield source.stem, source.stem
            continue
        file = folder / f"{source.stem}.npz"
        np.savez(file, **phantom(source))
        yield source.stem, file


def settings_of(pipeline: str) -> tuple[str, list[str]]:
    """``name:key=value+key=value`` as the name and what follows ``--set``."""
    name, _, rest = pipeline.partition(":")
    return name, [f"reconstruct.{part}" for part in rest.split("+") if part]


def spiral_of(samples: int) -> SpiralDesign:
    """The spiral of the scanner's limits, sampled as often as wanted."""
    design = SpiralDesign()
    same = replace(design, matrix=MATRIX, field_of_view=FIELD[0] / 1e3, interleaves=INTERLEAVES)
    usual = len(design_spiral(same))
    if samples == usual:
        return design
    # The spiral ends up to one dwell time after its last sample: half of one is right within one sample.
    return replace(design, dwell_time=design.dwell_time * (usual - 0.5) / (samples - 0.5))


def slice_of(
    anatomy: str | Path,
    schedule: str,
    points: int,
    order: str,
    snr: float,
    samples: int,
    seed: int,
    raw: Path,
) -> Simulation:
    """The standard scan of one slice of an object, into ``raw``; an order may be a number of interleaves."""
    step = int(order) if order.isdecimal() else 1
    return simulate_fingerprint(
        output=raw,
        phantom=anatomy,
        schedule=schedule,
        points=points,
        interleaves=INTERLEAVES,
        order="sequential" if order.isdecimal() else order,
        step=step,
        matrix=(MATRIX, MATRIX, 1),
        fov=FIELD,
        coils=COILS,
        snr=snr,
        seed=seed,
        spiral=spiral_of(samples),
        overwrite=True,
    )


def accuracy(
    sources: Iterable[Path],
    folder: Path,
    wanted: list[tuple[str, int]],
    orders: Sequence[str],
    pipelines: Sequence[str],
    seeds: Sequence[int],
    levels: Sequence[float],
    lengths: Sequence[int],
) -> list[dict[str, Any]]:
    """MAPE, NRMSE, time and memory of every pipeline on every scan."""
    columns = "object | schedule | points | SNR | samples | seed | order | pipeline | MAPE T1 | T2"
    say(f"| {columns} | T1 WM / GM | T2 WM / GM | NRMSE T1 / T2 | s | GB |")
    say("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []

    def add(case: tuple[Any, ...], pipeline: str, found: dict[str, Any], cost: tuple[float, float]) -> None:
        errors = {role: 50 * (found[role]["mape_wm"] + found[role]["mape_gm"]) for role in ROLES}
        rows.append({"case": case, "pipeline": pipeline, "mape": errors, "maps": found, "cost": cost})
        nrmse = " / ".join(
            f"{100 * found[role]['nrmse']:.1f}" if "nrmse" in found[role] else "" for role in ROLES
        )
        apart = [
            " / ".join(f"{100 * found[role][f'mape_{tissue}']:.2f}" for tissue in ("wm", "gm"))
            for role in ROLES
        ]
        means = [f"{errors[role]:.2f}" for role in ROLES]
        cells = [*map(str, case), f"`{pipeline}`", *means, *apart, nrmse]
        say("| " + " | ".join(cells) + f" | {cost[0]:.1f} | {cost[1]:.2f} |")

    conditions = list(itertools.product(wanted, levels, lengths, seeds))
    raw, maps = folder / "raw.h5", folder / "maps.h5"
    for name, anatomy in objects(sources, folder):
        for (schedule, points), snr, samples, seed in conditions:
            for number, order in enumerate(orders):
                scan = slice_of(anatomy, schedule, points, order, snr, samples, seed, raw)
                case = (name, schedule, points, f"{snr:g}", samples, seed)
                if number == 0:  # perfect images know no order
                    protocol = make_schedule(schedule, points, seed=seed)
                    for label, excess in (("floor", 1.0), ("floor, R", scan.acceleration)):
                        found = floor(anatomy, protocol, raw, snr, seed, excess)
                        add((*case, ""), label, found, (0, 0))
                for pipeline in pipelines:
                    method, settings = settings_of(pipeline)
                    cost = measured_replay(raw, method, maps, settings)
                    add((*case, order), pipeline, compare(maps, raw)["maps"], cost)
    return rows


def perfect_match(
    anatomy: str | Path, protocol: Protocol, snr: float, seed: int, excess: float
) -> dict[str, np.ndarray]:
    """Role -> map (z, y, x) [ms] of perfect images with ``excess`` times the noise of full sampling."""
    encoding = Encoding(
        (1, MATRIX, MATRIX), (FIELD[2] / 1e3, FIELD[1] / 1e3, FIELD[0] / 1e3), (1, MATRIX, MATRIX)
    )
    scene = make_scene(
        load_anatomy(anatomy),
        protocol,
        encoding.matrix,
        encoding.field_of_view,
        coils=COILS,
        fields=FieldSettings(b1=0.0),
        seed=seed,
    )
    dictionary = cached_dictionary(protocol)
    basis = dictionary.basis(0.9999)
    components = signal_basis(tabulate([scene], protocol), [scene.pd])
    gain = receive_gain(scene, components.axes, components.coefficients[0], snr, seed)
    images = torch.stack(
        [truncated(scene, scene.pd * gain * part.to(torch.complex64)) for part in components.coefficients[0]]
    )  # (l', y, x)
    turn = (basis.contrast.mH @ components.axes.to(basis.contrast)).to(images)  # (l, l')
    coefficients = torch.einsum("kl,lyx->xky", turn, images)[:, :, None]  # (x, k, z, y)
    noise = torch.randn(*coefficients.shape, 2, generator=torch.Generator().manual_seed(seed))
    empty = torch.zeros(0, dtype=torch.int64)
    kspace = TrajectoryKSpace(
        torch.zeros(COILS, 0),
        torch.zeros(0, 2),
        empty,
        empty,
        empty,
        None,
        0.0,
        protocol.frames,
        (1, 1, 1, 1),
    )
    problem = FingerprintProblem(encoding, protocol, kspace, basis, dictionary)
    found = fingerprint_maps(
        coefficients + (excess / 2) ** 0.5 * torch.view_as_complex(noise),
        None,
        problem,
        mask_threshold=0.05,
        groups=256,
        refine=True,
        rank=basis.rank,
        retained_energy=basis.retained_energy,
        residual_to_noise=1.0,
        standard_deviations=False,
    )
    return {role: 1e3 * found.values[role.lower()][0].numpy() for role in ROLES}


def floor(
    anatomy: str | Path, protocol: Protocol, raw: Path, snr: float, seed: int, excess: float
) -> dict[str, Any]:
    """MAPE of the perfect match in white and in grey matter."""
    truth = map_volumes(read_images(raw, "truth"))
    inside = truth["MASK"].values > 0
    return {
        role: {
            f"mape_{tissue}": mape(
                estimate, truth[role].values, inside & (truth[tissue.upper()].values > 0.5)
            )
            for tissue in ("wm", "gm")
        }
        for role, estimate in perfect_match(anatomy, protocol, snr, seed, excess).items()
    }


def sphere_floor(protocol: Protocol, raw: Path, snr: float, seed: int, excess: float) -> dict[str, Any]:
    """Slope over the spheres, and statistics of each, of the perfect match, as ``compare`` has them."""
    truth = map_volumes(read_images(raw, "truth"))
    labels = np.rint(truth["SPHERES"].values).astype(np.int64)
    result: dict[str, Any] = {}
    for role, estimate in perfect_match("nist", protocol, snr, seed, excess).items():
        spheres = sphere_statistics(estimate, truth[role].values, labels)
        line = line_through(
            np.array([sphere.mean for sphere in spheres]), np.array([sphere.reference for sphere in spheres])
        )
        statistics = [
            {name: None if value != value else value for name, value in vars(sphere).items()}
            for sphere in spheres
        ]
        result[role] = {"slope": line.slope, "list": statistics}
    return result


def receive_gain(
    scene: Scene, axes: torch.Tensor, coefficients: torch.Tensor, snr: float, seed: int
) -> torch.Tensor:
    """(v,) amplitude of unit signal in whitened, combined channels, at the simulation's SNR."""
    images = np.stack([scene.block_mean(scene.embed(scene.pd * part)) for part in coefficients])
    judged = scene.block_mean(scene.fine.mask.astype(np.float32)) >= 0.5
    level = float(np.sqrt((np.abs(images[:, judged]) ** 2).sum(0) / len(axes)).mean())
    covariance = (level / snr) ** 2 * noise_covariance(COILS, np.random.default_rng([seed, 3]))
    coils = scene.coils.numpy()  # (c, v)
    gain = np.einsum("cv,cd,dv->v", coils.conj(), np.linalg.inv(covariance), coils).real
    return torch.from_numpy(np.sqrt(gain).astype(np.float32))


def truncated(scene: Scene, values: torch.Tensor) -> torch.Tensor:
    """Fine values (v,) as an image (y, x) of the disc of k-space that spirals reach."""
    fine = torch.from_numpy(scene.embed(values)).mean(0)  # (y, x)
    size, factor = MATRIX, scene.supersampling[1]
    spectrum = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(fine)))
    first = fine.shape[0] // 2 - size // 2
    spectrum = spectrum[first : first + size, first : first + size] / factor**2
    frequency = (torch.arange(size) - size // 2) / size  # cycles per scan voxel
    # The scan's voxel n // 2 has its centre between fine voxels, half a fine voxel from fine n // 2.
    turn = torch.exp(1j * torch.pi * (factor - 1) / factor * (frequency[:, None] + frequency))
    disc = frequency[:, None] ** 2 + frequency**2 <= 0.25
    return torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(spectrum * turn * disc)))


def spheres(
    folder: Path,
    wanted: list[tuple[str, int]],
    orders: Sequence[str],
    pipelines: Sequence[str],
    seeds: Sequence[int],
    levels: Sequence[float],
    lengths: Sequence[int],
) -> list[dict[str, Any]]:
    """Bias, coefficient of variation and slope on the T2 plate."""
    columns = "schedule | points | SNR | samples | seed | order | pipeline | map | slope | CoV | worst bias"
    say(f"| {columns} | bias / CoV |")
    say("|---|---|---|---|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    raw, maps = folder / "raw.h5", folder / "maps.h5"

    def add(case: tuple[Any, ...], pipeline: str, found: dict[str, Any]) -> None:
        for role in ROLES:
            part = found[role]
            biases = [sphere["bias"] for sphere in part["list"]]
            empty = [sphere["label"] for sphere in part["list"] if sphere["variation"] is None]
            variations = [
                1.0 if sphere["variation"] is None else sphere["variation"] for sphere in part["list"]
            ]
            rows.append({"case": case, "pipeline": pipeline, "role": role, **part})
            each = ", ".join(
                f"{100 * bias:+.1f}/{100 * variation:.1f}"
                for bias, variation in zip(biases, variations, strict=True)
            )
            say(
                f"| {' | '.join(map(str, case))} | `{pipeline}` | {role} | "
                f"{part['slope']:.4f} | {100 * float(np.mean(variations)):.2f} | "
                f"{100 * max(biases, key=abs):+.1f} | {each}"
                + (f"; no estimate in sphere {', '.join(map(str, empty))} |" if empty else " |")
            )

    for (schedule, points), snr, samples, seed in itertools.product(wanted, levels, lengths, seeds):
        for number, order in enumerate(orders):
            scan = slice_of("nist", schedule, points, order, snr, samples, seed, raw)
            case = (schedule, points, f"{snr:g}", samples, seed)
            if number == 0:
                protocol = make_schedule(schedule, points, seed=seed)
                for label, excess in (("floor", 1.0), ("floor, R", scan.acceleration)):
                    add((*case, ""), label, sphere_floor(protocol, raw, snr, seed, excess))
            for pipeline in pipelines:
                method, settings = settings_of(pipeline)
                measured_replay(raw, method, maps, settings)
                add((*case, order), pipeline, compare(maps, raw)["spheres"])
    return rows


def volume(source: Path, folder: Path, pipelines: Iterable[str]) -> list[dict[str, Any]]:
    """Seconds and peak memory of a stack of spirals."""
    ((name, anatomy),) = objects([source], folder)
    raw, maps = folder / "raw.h5", folder / "maps.h5"
    simulate_fingerprint(
        output=raw,
        phantom=anatomy,
        schedule="jiang",
        points=500,
        order="shuffled",
        matrix=(96, 96, 24),
        fov=(220.0, 220.0, 30.0),
        coils=COILS,
        snr=SNR,
        seed=1,
        supersampling=(2, 2, 1),
        overwrite=True,
    )
    say("| object | pipeline | MAPE T1 | MAPE T2 | s | GB |")
    say("|---|---|---|---|---|---|")
    rows = []
    for pipeline in pipelines:
        method, settings = settings_of(pipeline)
        seconds, memory = measured_replay(raw, method, maps, settings)
        found = compare(maps, raw)["maps"]
        errors = [50 * (found[role]["mape_wm"] + found[role]["mape_gm"]) for role in ROLES]
        rows.append({"pipeline": pipeline, "seconds": seconds, "memory": memory, "maps": found})
        say(f"| {name} | `{pipeline}` | {errors[0]:.2f} | {errors[1]:.2f} | {seconds:.0f} | {memory:.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("accuracy", "spheres", "volume"))
    parser.add_argument("sources", type=Path, nargs="*", help="delics_volXX.npz, or mni")
    parser.add_argument("--scans", nargs="+", default=["jiang:500,1000", "tgas:500"])
    parser.add_argument("--orders", default=",".join(ORDERS), help="or interleaves apart: 17")
    parser.add_argument("--pipelines", default=PIPELINES, help="name[:property=value+...], ...")
    parser.add_argument("--seeds", default="1")
    parser.add_argument(
        "--snr", default=f"{SNR:g}", help="of one sample at full sampling: 10,20 (not volume)"
    )
    parser.add_argument("--samples", default=str(SAMPLES), help="of a readout: 768,1166 (not volume)")
    parser.add_argument("--folder", type=Path, help="for the raw files; a temporary folder where absent")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted, orders = list(scans(arguments.scans)), arguments.orders.split(",")
    for order in orders:
        if order not in ORDERS and not (order.isdecimal() and int(order) > 0):
            raise SystemExit(f"--orders takes {', '.join(ORDERS)}, or a number of interleaves; not '{order}'")
    pipelines, seeds = arguments.pipelines.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    levels = [float(level) for level in arguments.snr.split(",")]
    lengths = [int(samples) for samples in arguments.samples.split(",")]
    if arguments.what != "spheres" and not arguments.sources:
        parser.error(f"{arguments.what} needs an object: delics_volXX.npz, or mni")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        # The cache lies beside the raw files, so that seconds never hold the simulation of the dictionary.
        os.environ["QUANTITRON_CACHE"] = os.fspath(folder)
        for schedule, points in wanted:
            for seed in seeds:
                cached_dictionary(make_schedule(schedule, points, seed=seed))
        if arguments.what == "accuracy":
            rows = accuracy(arguments.sources, folder, wanted, orders, pipelines, seeds, levels, lengths)
        elif arguments.what == "spheres":
            rows = spheres(folder, wanted, orders, pipelines, seeds, levels, lengths)
        else:
            rows = volume(arguments.sources[0], folder, pipelines)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
