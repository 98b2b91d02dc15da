"""The commands that train networks. Whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from quantitron.host.options import Json, Overwrite, numbers

logger = logging.getLogger("quantitron")


def add_training_commands(app: typer.Typer) -> None:
    """Give the ``quantitron`` command those that train."""
    app.command(name="train-denoiser")(train_denoiser)
    app.command(name="train-arnet")(train_arnet)
    app.command(name="train-series-denoiser")(train_series_denoiser)


def train_denoiser(
    data: Annotated[
        Path,
        typer.Option(
            help="Folder of NIfTI files with BIDS names, or a table (.csv): file, modality[, weight]."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Weights to write (.safetensors).")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps in all.  [default: 20000, or as many as fit --minutes]")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Minutes in all.")] = None,
    channels: Annotated[str, typer.Option(help="Features of each resolution level.")] = "32,64,96",
    blocks: Annotated[int, typer.Option(min=1, help="Residual blocks of a level.")] = 2,
    attention: Annotated[
        str, typer.Option(help="Levels with self-attention, 0 the finest; 'none' for none.")
    ] = "2",
    slices: Annotated[int, typer.Option(min=1, help="Single slices of a batch.")] = 12,
    slice_size: Annotated[str, typer.Option(help="y,x voxels of single slices.")] = "96,96",
    slabs: Annotated[int, typer.Option(min=1, help="Slabs of a batch.")] = 3,
    slab_size: Annotated[str, typer.Option(help="z,y,x voxels of slabs.")] = "16,48,48",
    slab_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the steps that learn from slabs.")
    ] = 0.3,
    levels: Annotated[
        str, typer.Option(help="Lowest and highest noise level (1 is the intensity), and how many.")
    ] = "0.005,0.5,25",
    rate: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 1e-3,
    held_out: Annotated[float, typer.Option(help="Share of the data that validates.")] = 0.1,
    voxel_size: Annotated[
        float | None, typer.Option(help="Isotropic mm to bring volumes to.  [default: as they are]")
    ] = None,
    intensity: Annotated[str, typer.Option(help="Range of the random factor on intensities.")] = "0.5,1.5",
    bias: Annotated[float, typer.Option(min=0.0, help="Strength of the random shading.")] = 0.3,
    turned: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the patches that are turned and zoomed.")
    ] = 0.5,
    validate_every: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 500,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    resume: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="Folder of the checkpoint to go on from.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.  [default: all]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    note: Annotated[str, typer.Option(help="For the card, such as the licence of the data.")] = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train the network that removes noise from weighted images."""
    from quantitron.host.train import run_training

    plane = numbers(slice_size, int, 2, "--slice-size")
    slab = numbers(slab_size, int, 3, "--slab-size")
    low, high, count = numbers(levels, float, 3, "--levels") or ()
    factor = numbers(intensity, float, 2, "--intensity")
    features = numbers(channels, int, None, "--channels")
    attended = (
        () if attention.strip().lower() in ("", "none") else numbers(attention, int, None, "--attention")
    )
    card = run_training(
        data,
        output,
        shape={"channels": features, "blocks": blocks, "attention": attended},
        loop={
            "steps": steps if steps is not None else (0 if minutes else 20000),
            "minutes": minutes or 0.0,
            "rate": rate,
            "validate_every": validate_every,
            "seed": seed,
        },
        plan={
            "slice_size": (1, *(plane or ())),
            "slices": slices,
            "slab_size": slab,
            "slabs": slabs,
            "slab_share": slab_share,
        },
        augmentation={"intensity": factor, "bias": bias, "turned": turned},
        options={
            "levels": (low, high, int(count)),
            "held_out": held_out,
            "voxel_size": voxel_size,
            "note": note,
        },
        device=device,
        threads=threads,
        resume=resume,
        overwrite=overwrite,
        shown=logger.isEnabledFor(logging.INFO),
    )
    if as_json:
        typer.echo(json.dumps({"output": str(output), **card}))
        return
    gain = card["validation"]["score"]
    typer.echo(
        f"{output}: {card['weights']} weights, {card['steps']} steps, {card['minutes']} min, {gain:+.2f} dB"
    )


Phantoms = Annotated[list[str], typer.Argument(metavar="PHANTOM...", help="mni, or a FILE.npz; several.")]
Weights = Annotated[Path, typer.Option("-o", "--output", help="Weights to write (.safetensors).")]
Schedule = Annotated[str, typer.Option(help="jiang, tgas or a FILE.csv: the network is for it alone.")]
SchedulePoints = Annotated[int | None, typer.Option(min=1, help="Time points.  [default: the schedule's]")]
ScheduleSeed = Annotated[int, typer.Option(help="Of jiang: what simulate had as --seed.")]
SliceMatrix = Annotated[str, typer.Option(help="x,y voxels of a slice.")]
SliceFov = Annotated[str, typer.Option(help="x,y and thickness in mm.")]
Slices = Annotated[int, typer.Option(min=1, help="Slices of each phantom.")]
Extent = Annotated[float, typer.Option(min=0.0, help="mm along z over which they are spread.")]
Components = Annotated[int, typer.Option(min=1, help="Coefficient images.")]
Steps = Annotated[int | None, typer.Option(min=1, help="In all.  [default: 10000, or as fit --minutes]")]
Minutes = Annotated[float | None, typer.Option(min=0.0, help="Minutes in all.")]
Channels = Annotated[str, typer.Option(help="Features of each resolution level.")]
Patch = Annotated[str, typer.Option(help="y,x voxels of a patch.")]
BatchSize = Annotated[int, typer.Option("--batch", min=1, help="Patches of a step.")]
Rate = Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")]
HeldOut = Annotated[float, typer.Option(help="Share of the slices that validates.")]
ValidateEvery = Annotated[int, typer.Option(min=1, help="Steps between validations.")]
Resume = Annotated[
    Path | None, typer.Option(metavar="CHECKPOINT", help="Folder of the checkpoint to go on from.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.  [default: all]")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Note = Annotated[str, typer.Option(help="For the card, such as the licence of the data.")]
Coils = Annotated[int, typer.Option(min=1, help="Receive channels.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]


def train_arnet(
    phantoms: Phantoms,
    output: Weights,
    schedule: Schedule = "jiang",
    points: SchedulePoints = None,
    schedule_seed: ScheduleSeed = 0,
    interleaves: Annotated[int, typer.Option(min=1, help="Spirals that fill k-space.")] = 48,
    acquired: Annotated[
        str | None, typer.Option(help="How many are played, several with commas between.  [default: all]")
    ] = None,
    order: Annotated[str, typer.Option(help="sequential or shuffled interleaves")] = "shuffled",
    calibration: Annotated[
        bool, typer.Option("--calibration", help="All spirals at low resolution beforehand, for coil maps.")
    ] = False,
    matrix: SliceMatrix = "192,192",
    fov: SliceFov = "220,220,5",
    coils: Coils = 8,
    snr: Annotated[float, typer.Option(min=0.0, help="As of simulate; 0 is noise-free.")] = 10.0,
    slices: Slices = 8,
    extent: Extent = 24.0,
    components: Components = 5,
    steps: Steps = None,
    minutes: Minutes = None,
    channels: Channels = "32,64,96",
    patch: Patch = "96,96",
    batch: BatchSize = 12,
    rate: Rate = 1e-3,
    held_out: HeldOut = 0.1,
    validate_every: ValidateEvery = 500,
    seed: Seed = 0,
    resume: Resume = None,
    threads: Threads = None,
    device: Device = "auto",
    note: Note = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train the network of arnet: simulates pairs of undersampled and perfect images of one protocol."""
    played = numbers(acquired, int, None, "--acquired") or (None,)
    _train_series(
        "artifact_removal",
        phantoms,
        output,
        {
            "schedule": schedule,
            "points": points,
            "schedule_seed": schedule_seed,
            "interleaves": interleaves,
            "order": order,
            "calibration": calibration,
            "matrix": numbers(matrix, int, 2, "--matrix"),
            "fov": numbers(fov, float, 3, "--fov"),
            "coils": coils,
            "snr": snr,
        },
        played,
        {"slices": slices, "extent": extent, "components": components, "seed": seed},
        {"size": numbers(patch, int, 2, "--patch"), "batch": batch},
        {"steps": steps, "minutes": minutes, "rate": rate, "validate_every": validate_every, "seed": seed},
        {"channels": numbers(channels, int, None, "--channels"), "held_out": held_out, "note": note},
        {"device": device, "threads": threads, "resume": resume, "overwrite": overwrite},
        as_json,
    )


def train_series_denoiser(
    phantoms: Phantoms,
    output: Weights,
    schedule: Schedule = "jiang",
    points: SchedulePoints = None,
    schedule_seed: ScheduleSeed = 0,
    matrix: SliceMatrix = "192,192",
    fov: SliceFov = "220,220,5",
    coils: Coils = 8,
    slices: Slices = 24,
    extent: Extent = 24.0,
    components: Components = 5,
    levels: Annotated[
        str, typer.Option(help="Lowest and highest noise level (1 is the intensity), and how many.")
    ] = "0.002,0.1,12",
    steps: Steps = None,
    minutes: Minutes = None,
    channels: Channels = "32,64,96",
    patch: Patch = "96,96",
    batch: BatchSize = 12,
    rate: Rate = 1e-3,
    held_out: HeldOut = 0.1,
    validate_every: ValidateEvery = 500,
    seed: Seed = 0,
    resume: Resume = None,
    threads: Threads = None,
    device: Device = "auto",
    note: Note = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train the network of mrf_pnp: what the coefficient images of one protocol look like without noise."""
    low, high, count = numbers(levels, float, 3, "--levels") or ()
    _train_series(
        "series_denoiser",
        phantoms,
        output,
        {
            "schedule": schedule,
            "points": points,
            "schedule_seed": schedule_seed,
            "matrix": numbers(matrix, int, 2, "--matrix"),
            "fov": numbers(fov, float, 3, "--fov"),
            "coils": coils,
        },
        (None,),
        {"slices": slices, "extent": extent, "components": components, "seed": seed},
        {"size": numbers(patch, int, 2, "--patch"), "batch": batch},
        {"steps": steps, "minutes": minutes, "rate": rate, "validate_every": validate_every, "seed": seed},
        {
            "channels": numbers(channels, int, None, "--channels"),
            "held_out": held_out,
            "levels": (low, high, int(count)),
            "note": note,
        },
        {"device": device, "threads": threads, "resume": resume, "overwrite": overwrite},
        as_json,
    )


def _train_series(
    kind: str,
    phantoms: list[str],
    output: Path,
    scan: dict[str, Any],
    acquired: tuple[Any, ...],
    slices: dict[str, Any],
    patches: dict[str, Any],
    loop: dict[str, Any],
    options: dict[str, Any],
    run: dict[str, Any],
    as_json: bool,
) -> None:
    """What both commands have in common."""
    from quantitron.host.train_series import run_series_training

    steps, minutes = loop.pop("steps"), loop.pop("minutes")
    loop |= {
        "steps": steps if steps is not None else (0 if minutes else 10000),
        "minutes": minutes or 0.0,
    }
    shown = logger.isEnabledFor(logging.INFO)
    card = run_series_training(
        kind, phantoms, output, scan, acquired, slices, patches, loop, options, shown=shown, **run
    )
    if as_json:
        typer.echo(json.dumps({"output": str(output), **card}))
        return
    gain = card["validation"]["score"]
    typer.echo(
        f"{output}: {card['weights']} weights, {card['steps']} steps, {card['minutes']} min, {gain:+.2f} dB"
    )
