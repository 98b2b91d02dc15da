"""The commands that train networks. Whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from quantitron.gadgets.settings import LARGEST_SEED
from quantitron.host.options import Json, Overwrite, Seed, noise_levels, numbers

logger = logging.getLogger("quantitron")

# Not 0, which would pass for no limit.
Minutes = Annotated[float | None, typer.Option(min=0.01, help="Minutes in all.")]


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
    minutes: Minutes = None,
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
    seed: Seed = 0,
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
            "levels": noise_levels(levels, "--levels"),
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
    _say(card, output, as_json)


@dataclass(frozen=True)
class SeriesOptions:
    """What both trainings of networks for coefficient images ask."""

    phantoms: Annotated[list[str], typer.Argument(metavar="PHANTOM...", help="mni, or a FILE.npz; several.")]
    output: Annotated[Path, typer.Option("-o", "--output", help="Weights to write (.safetensors).")]
    schedule: Annotated[str, typer.Option(help="jiang, tgas or a FILE.csv: the network is for it alone.")] = (
        "jiang"
    )
    points: Annotated[int | None, typer.Option(min=1, help="Time points.  [default: the schedule's]")] = None
    schedule_seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of jiang: what simulate had as --seed.")
    ] = 0
    matrix: Annotated[str, typer.Option(help="x,y voxels of a slice.")] = "192,192"
    fov: Annotated[str, typer.Option(help="x,y and thickness in mm.")] = "220,220,5"
    coils: Annotated[int, typer.Option(min=1, help="Receive channels.")] = 8
    slices: Annotated[int, typer.Option(min=1, help="Slices of each phantom.")] = 8
    extent: Annotated[float, typer.Option(min=0.0, help="mm along z over which they are spread.")] = 24.0
    components: Annotated[int, typer.Option(min=1, help="Coefficient images.")] = 5
    steps: Annotated[
        int | None, typer.Option(min=1, help="In all.  [default: 10000, or as fit --minutes]")
    ] = None
    minutes: Minutes = None
    channels: Annotated[str, typer.Option(help="Features of each resolution level.")] = "32,64,96"
    patch: Annotated[str, typer.Option(help="y,x voxels of a patch.")] = "96,96"
    batch: Annotated[int, typer.Option(min=1, help="Patches of a step.")] = 12
    rate: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 1e-3
    held_out: Annotated[
        float, typer.Option(help="Share that validates: an end of each phantom, or of 5 and more whole ones.")
    ] = 0.1
    validate_every: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 500
    seed: Seed = 0
    resume: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="Folder of the checkpoint to go on from.")
    ] = None
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.  [default: all]")] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto"
    note: Annotated[str, typer.Option(help="For the card, such as the licence of the data.")] = ""
    overwrite: Overwrite = False
    as_json: Json = False


def _series_command(**defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command of ``SeriesOptions`` and of the options of a function that takes those as its first argument.

    Args:
        defaults: those that are this command's own.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(SeriesOptions, include_extras=True)
        shared = {
            part.name: Parameter(
                part.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if part.default is MISSING else defaults.get(part.name, part.default),
                annotation=hints[part.name],
            )
            for part in fields(SeriesOptions)
        }
        own = list(signature(command, eval_str=True).parameters.values())[1:]

        @wraps(command)
        def run(**values: Any) -> None:
            options = SeriesOptions(**{name: values.pop(name) for name in shared})
            command(options, **values)

        every = [*shared.values(), *(part.replace(kind=Parameter.KEYWORD_ONLY) for part in own)]
        run.__signature__ = Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {part.name: part.annotation for part in every}
        return run

    return decorated


@_series_command()
def train_arnet(
    options: SeriesOptions,
    interleaves: Annotated[int, typer.Option(min=1, help="Spirals that fill k-space.")] = 48,
    acquired: Annotated[
        str | None, typer.Option(help="How many are played, several with commas between.  [default: all]")
    ] = None,
    order: Annotated[str, typer.Option(help="sequential or shuffled interleaves")] = "shuffled",
    calibration: Annotated[
        bool, typer.Option("--calibration", help="All spirals at low resolution beforehand, for coil maps.")
    ] = False,
    snr: Annotated[float, typer.Option(min=0.0, help="As of simulate; 0 is noise-free.")] = 10.0,
) -> None:
    """Train the network of arnet: simulates pairs of undersampled and perfect images of one protocol."""
    played = numbers(acquired, int, None, "--acquired") or (None,)
    scan = {"interleaves": interleaves, "order": order, "calibration": calibration, "snr": snr}
    _train_series("artifact_removal", options, scan, played)


@_series_command(slices=24)
def train_series_denoiser(
    options: SeriesOptions,
    levels: Annotated[
        str, typer.Option(help="Lowest and highest noise level (1 is the intensity), and how many.")
    ] = "0.002,0.5,16",
) -> None:
    """Train the network of mrf_pnp: what the coefficient images of one protocol look like without noise."""
    _train_series("series_denoiser", options, levels=noise_levels(levels, "--levels"))


def _train_series(
    kind: str,
    options: SeriesOptions,
    scan: Mapping[str, Any] | None = None,
    acquired: tuple[Any, ...] = (None,),
    **further: Any,
) -> None:
    """What both commands have in common.

    Args:
        kind: of the training.
        options: that they share.
        scan: of the scan, beside those.
        acquired: numbers of interleaves, a scan each.
        further: of the training, beside those.
    """
    from quantitron.host.train_series import run_series_training

    steps, minutes, seed = options.steps, options.minutes, options.seed
    card = run_series_training(
        kind,
        options.phantoms,
        options.output,
        {
            "schedule": options.schedule,
            "points": options.points,
            "schedule_seed": options.schedule_seed,
            "matrix": numbers(options.matrix, int, 2, "--matrix"),
            "fov": numbers(options.fov, float, 3, "--fov"),
            "coils": options.coils,
            **(scan or {}),
        },
        acquired,
        {
            "slices": options.slices,
            "extent": options.extent,
            "components": options.components,
            "seed": seed,
        },
        {"size": numbers(options.patch, int, 2, "--patch"), "batch": options.batch},
        {
            "steps": steps if steps is not None else (0 if minutes else 10000),
            "minutes": minutes or 0.0,
            "rate": options.rate,
            "validate_every": options.validate_every,
            "seed": seed,
        },
        {
            "channels": numbers(options.channels, int, None, "--channels"),
            "held_out": options.held_out,
            "note": options.note,
            **further,
        },
        device=options.device,
        threads=options.threads,
        resume=options.resume,
        overwrite=options.overwrite,
        shown=logger.isEnabledFor(logging.INFO),
    )
    _say(card, options.output, options.as_json)


def _say(card: Mapping[str, Any], output: Path, as_json: bool) -> None:
    """What came of a training."""
    if as_json:
        typer.echo(json.dumps({"output": str(output), **card}))
        return
    gain = card["validation"]["score"]
    typer.echo(
        f"{output}: {card['weights']} weights, {card['steps']} steps, {card['minutes']} min, {gain:+.2f} dB"
    )
