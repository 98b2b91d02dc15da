"""The ``quantitron`` command.

Results go to stdout, progress and log to stderr; exit codes are 0 done, 1 failed, 2 wrong usage.

Whatever is heavy is imported by the command that needs it, so that help comes at once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.output_file import check_no_input
from quantitron.host.options import Json, Overwrite, Seed, numbers
from quantitron.host.training_commands import add_training_commands

app = typer.Typer(
    name="quantitron",
    help="Quantitative MRI, inline on the scanner: raw ISMRMRD data in, maps out. For research use only.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # it takes [default: ...] in help for a style and leaves it out
    context_settings={"help_option_names": ["-h", "--help"]},
)
logger = logging.getLogger("quantitron")
_state = {"debug": False}


def main() -> None:
    """Entry point: one sentence and exit code 1 for every failure."""
    # Batch systems stop their jobs so: unfinished files are to be cleared away as they are after Ctrl-C.
    signal.signal(signal.SIGTERM, _stopped)
    try:
        app()
    except ScanError as error:
        _fail(str(error), error)
    except MemoryError as error:
        _fail("not enough memory", error)
    except BrokenPipeError:
        # whoever read the results has gone; nothing is left to say, and Python must not try to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        text = (str(error).strip().splitlines() or ["no message"])[0]
        _fail(f"unexpected {type(error).__name__}: {text} (--debug shows where)", error)


def _stopped(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _fail(sentence: str, error: BaseException) -> None:
    if _state["debug"]:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    print(f"quantitron: {sentence}", file=sys.stderr)
    sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"quantitron {version('quantitron')}")
        except PackageNotFoundError:
            print("quantitron (not installed)")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Log everything, with tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log only what failed.")] = False,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command."""
    _state["debug"] = debug
    level = logging.DEBUG if debug else logging.ERROR if quiet else logging.INFO
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s [%(process)d] %(message)s"
    )
    logger.setLevel(level)


@app.command()
def simulate(
    sequence: Annotated[str, typer.Argument(help="vfa_gre, t2ir_gre, megre or fisp_mrf")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Raw file to write.")],
    phantom: Annotated[str, typer.Option(help="mni, nist or a FILE.npz")] = "mni",
    matrix: Annotated[
        str | None, typer.Option(help="x,y,z points  [default: 112,112,16; fisp_mrf 192,192,1]")
    ] = None,
    fov: Annotated[str | None, typer.Option(help="x,y,z in mm")] = None,
    coils: Annotated[int, typer.Option(min=1, help="Receive channels.")] = 8,
    acceleration: Annotated[
        float | None,
        typer.Option("-R", "--acceleration", min=1.0, help="All points over points.  [default: 1]"),
    ] = None,
    snr: Annotated[
        float | None,
        typer.Option(min=0.0, help="As DESIGN defines it; 0 is noise-free.  [default: 30; fisp_mrf 10]"),
    ] = None,
    seed: Seed = 0,
    slices: Annotated[int, typer.Option(min=1, help="Slices, each with a k-space of its own.")] = 1,
    excitations: Annotated[
        int | None, typer.Option(min=1, help="Excitations after each preparation.")
    ] = None,
    te: Annotated[str | None, typer.Option(help="Echo times in ms, with commas between.")] = None,
    tr: Annotated[float | None, typer.Option(help="Repetition time in ms.")] = None,
    flip: Annotated[str | None, typer.Option(help="Flip angles in degrees, with commas between.")] = None,
    tau: Annotated[str | None, typer.Option(help="T2 preparation times in ms, with commas between.")] = None,
    supersampling: Annotated[int, typer.Option(min=1, help="Object points along a voxel's edge.")] = 2,
    point_spread: Annotated[
        str, typer.Option(help="truncation (rings, as a scanner does) or average (mean of each voxel)")
    ] = "truncation",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="embedded, separate or none; fisp_mrf: separate or none  [default: embedded; fisp_mrf none]"
        ),
    ] = None,
    b0: Annotated[float | None, typer.Option(help="Field spread in Hz.  [default: 40]")] = None,
    b1: Annotated[float, typer.Option(help="Spread of the transmit field.")] = 0.0,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="fisp_mrf: jiang, tgas or a FILE.csv (flip_angle_deg, tr_ms[, phase_deg])  [default: jiang]"
        ),
    ] = None,
    points: Annotated[
        int | None, typer.Option(min=1, help="fisp_mrf: time points.  [default: the schedule's own]")
    ] = None,
    interleaves: Annotated[
        int | None, typer.Option(min=1, help="fisp_mrf: spirals that fill k-space.  [default: 48]")
    ] = None,
    acquired: Annotated[
        int | None,
        typer.Option(min=1, help="fisp_mrf: how many of them are played, evenly spread.  [default: all]"),
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="fisp_mrf: sequential or shuffled interleaves.  [default: sequential]")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="fisp_mrf: from one interleaf to the next.  [default: 1]")
    ] = None,
    volume: Annotated[
        str | None, typer.Option(help="fisp_mrf: a stack of spirals, or tilted ones.  [default: stack]")
    ] = None,
    trains: Annotated[
        int | None, typer.Option(min=1, help="fisp_mrf: trains of tilted spirals.  [default: partitions]")
    ] = None,
    ti: Annotated[
        float | None,
        typer.Option(min=0.0, help="fisp_mrf: ms from the inversion to the first pulse.  [default: 20]"),
    ] = None,
    height: Annotated[
        float | None,
        typer.Option(help="fisp_mrf: centre of the middle slice in mm (nist: T1 plate 20, T2 plate 0)."),
    ] = None,
    b1_map: Annotated[
        Path | None, typer.Option(help="fisp_mrf: FILE.npz to write the true transmit field to.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Simulate a scan: a raw file with its ground truth."""
    import math

    grid = numbers(matrix, int, 3, "--matrix")
    field_of_view = numbers(fov, float, 3, "--fov")
    echo_times = numbers(te, float, None, "--te")
    angles = numbers(flip, float, None, "--flip")
    preparations = numbers(tau, float, None, "--tau")
    given: dict[str, Any] = {
        "matrix": grid,
        "fov": field_of_view,
        "snr": None if snr is None else snr if snr > 0 else math.inf,
        "calibration": calibration,
    }
    cartesian: dict[str, Any] = {
        "acceleration": acceleration,
        "excitations": excitations,
        "tr": tr,
        "flip": flip,
        "tau": tau,
        "b0": b0,
    }
    fingerprint: dict[str, Any] = {
        "schedule": schedule,
        "points": points,
        "interleaves": interleaves,
        "acquired": acquired,
        "order": order,
        "step": step,
        "volume": volume,
        "trains": trains,
        "ti": ti,
        "height": height,
        "b1_map": b1_map,
    }
    is_fingerprint = sequence == "fisp_mrf"
    foreign = [
        name for name, value in (cartesian if is_fingerprint else fingerprint).items() if value is not None
    ]
    if foreign:
        raise typer.BadParameter(
            f"{sequence} has no such option", param_hint=f"--{foreign[0].replace('_', '-')}"
        )
    if is_fingerprint:
        if echo_times is not None and len(echo_times) != 1:
            raise typer.BadParameter("fisp_mrf has one echo time", param_hint="--te")
        own = fingerprint | {
            "ti": None,
            "inversion_time": None if ti is None else 1e-3 * ti,
            "echo_time": None if echo_times is None else 1e-3 * echo_times[0],
        }
    else:
        own = {
            "sequence": sequence,
            "acceleration": acceleration,
            "excitations": excitations,
            "echo_times": tuple(1e-3 * value for value in echo_times) if echo_times else None,
            "repetition_time": 1e-3 * tr if tr is not None else None,
            "flip_angles": tuple(math.radians(value) for value in angles) if angles else None,
            "preparation_times": tuple(1e-3 * value for value in preparations) if preparations else None,
            "b0": b0,
        }
    arguments = {name: value for name, value in (given | own).items() if value is not None}
    arguments |= {
        "output": output,
        "phantom": phantom,
        "coils": coils,
        "seed": seed,
        "slices": slices,
        "supersampling": supersampling,
        "point_spread": point_spread,
        "b1": b1,
        "overwrite": overwrite,
    }
    if is_fingerprint:
        from quantitron.phantoms.simulate_fingerprint import simulate_fingerprint

        made = simulate_fingerprint(**arguments)
        what = "spirals"
    else:
        from quantitron.phantoms.simulate import simulate as simulate_lines

        made = simulate_lines(**arguments)
        what = "lines"
    print(f"{made.output}: {made.lines} {what}, {made.noise_lines} of noise, R = {made.acceleration:.2f}")


@app.command()
def replay(
    raw: Annotated[Path, typer.Argument(help="ISMRMRD raw file.")],
    pipeline: Annotated[
        str, typer.Option("-p", "--pipeline", help="Name of a pipeline, or path of an XML file.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Map file to write.")] = Path("maps.h5"),
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="GADGET.PROPERTY=VALUE", help="Repeat for more.")
    ] = None,
    gadgetron: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Let this Gadgetron reconstruct.")
    ] = None,
    group: Annotated[str, typer.Option(help="Group of the raw file.")] = "dataset",
    noise: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Raw file whose noise lines are used in place of the scan's own."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Run a raw file through a pipeline."""
    from rich.console import Console
    from rich.progress import Progress

    from quantitron.host.replay import replay as run

    console = Console(stderr=True)
    shown = console.is_terminal and logger.isEnabledFor(logging.INFO)
    with Progress(console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("reading")

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            if done == total:
                progress.update(task, description="reconstructing")

        result = run(raw, pipeline, output, settings or (), overwrite, gadgetron, group, advance, noise)
    if as_json:
        roles = {str(series): role for series, role in sorted(result.series.items())}
        print(
            json.dumps(
                {
                    "output": str(result.output),
                    "images": result.images,
                    "series": roles,
                    "notes": result.notes,
                    "seconds": round(result.seconds, 3),
                }
            )
        )
        return
    roles_text = ", ".join(role for _, role in sorted(result.series.items()) if role)
    print(f"{result.output}: {result.images} images ({roles_text}) in {result.seconds:.1f} s")


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 9002,
    default_pipeline: Annotated[
        str | None, typer.Option(help="Pipeline that the config name 'openrecon' stands for.")
    ] = None,
    text_errors: Annotated[
        bool,
        typer.Option(
            "--text-errors",
            help="Report failures as TEXT only: Gadgetron's own client aborts at ERROR and loses its images.",
        ),
    ] = False,
) -> None:
    """Serve scans over Gadgetron's protocol, each connection in its own process."""
    from quantitron.host.configuration import known_pipeline
    from quantitron.host.connections import accept_connections
    from quantitron.host.server import Server

    pipeline = known_pipeline(default_pipeline) if default_pipeline is not None else None
    accept_connections(
        host, port, Server(pipeline, text_errors), lambda bound: _ready("serving", host, bound)
    )


@app.command()
def listen(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of <connect>; 0 takes a free one.")],
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
) -> None:
    """Wait for a Gadgetron that has <connect address=... port=.../> in its pipeline."""
    from quantitron.host.connections import accept_connections
    from quantitron.host.listen import serve_gadgetron

    accept_connections(host, port, serve_gadgetron, lambda bound: _ready("listening", host, bound))


def _ready(what: str, host: str, port: int) -> None:
    logger.info("%s on %s:%d", what, host, port)


@app.command()
def compare(
    maps: Annotated[Path, typer.Argument(help="Map file.")],
    truth: Annotated[Path, typer.Argument(help="Raw file with ground truth, or a map file.")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write JSON too.")] = None,
) -> None:
    """Compare maps with the truth."""
    from quantitron.host.compare import compare as run
    from quantitron.host.compare import table

    if json_file is not None:
        check_no_input(json_file, maps, truth)
    result = run(maps, truth)
    print(table(result))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ScanError(f"{json_file} cannot be written: {error.strerror}") from error


@app.command()
def pipelines(as_json: Json = False) -> None:
    """List the pipelines and their settings."""
    from quantitron.gadgets.chain import check_configuration
    from quantitron.host.configuration import external_configuration, load_pipeline, parse_pipeline
    from quantitron.pipelines import pipeline_names

    listed = {}
    for name in pipeline_names():
        text, where = load_pipeline(name)
        listed[name] = check_configuration(external_configuration(parse_pipeline(text, where), where), where)
    if as_json:
        print(json.dumps(listed, indent=2, default=str))
        return
    for name, sequences in listed.items():
        print(name)
        names = list(sequences)
        for gadget in sequences[names[0]]:
            print(f"  {gadget}")
            # Where several solvers share a name, each sequence has the settings of its own.
            for key in dict.fromkeys(key for sequence in names for key in sequences[sequence][gadget]):
                having = [sequence for sequence in names if key in sequences[sequence][gadget]]
                values = {sequence: str(sequences[sequence][gadget][key]) for sequence in having}
                first = values[having[0]]
                said = [f"{sequence} {value}" for sequence, value in values.items() if value != first]
                if len(having) < len(names):
                    said.append(f"only {', '.join(having)}")
                print(f"    {key} = {first}" + (f"  ({'; '.join(said)})" if said else ""))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check whether this machine is fit to reconstruct."""
    from quantitron.host.doctor import examine

    findings = examine()
    broken = [finding for finding in findings if finding.state == "broken"]
    if as_json:
        print(
            json.dumps({"ok": not broken, "findings": [finding.as_json() for finding in findings]}, indent=2)
        )
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            print(f"{finding.state:6} {finding.what:{width}}  {finding.detail}")
    if broken:
        raise ScanError(
            f"{len(broken)} of {len(findings)} checks failed: {', '.join(f.what for f in broken)}"
        )


add_training_commands(app)

if __name__ == "__main__":
    main()
