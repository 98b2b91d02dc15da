"""``make demo``: simulate undersampled scans of a brain, reconstruct each by several methods, print the
errors and draw the maps."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_file import TRUTH_GROUP, read_images
from quantitron.gadgets.map_volume import map_volumes
from quantitron.host.compare import compare
from quantitron.host.replay import replay
from quantitron.phantoms.simulate import Simulation, simulate
from quantitron.phantoms.simulate_fingerprint import simulate_fingerprint
from quantitron.reports.map_figure import figure_beside_truth

logger = logging.getLogger("quantitron")

PIPELINES = {"subspace": "subspace", "lorein": "LoREIN"}
"""Pipeline -> its name in tables and pictures, for Cartesian scans."""
FINGERPRINT_PIPELINES = {"svdmrf": "SVDMRF", "joint_inr": "joint INR", "llr": "LLR"}
"""The same for fingerprints."""
TIMES = {"T1": "T1", "T2": "T2", "T2STAR": "T2*"}
"""Maps that are compared -> their names in tables."""


@dataclass(frozen=True)
class Scan:
    """One simulated scan of the MNI brain, small enough for two cores."""

    sequence: str
    matrix: tuple[int, int, int]
    """x, y, z."""
    field_of_view: tuple[float, float, float]
    """x, y, z [mm]."""
    acceleration: float
    excitations: int | None = None
    coils: int = 8
    snr: float = 30.0
    points: int | None = None
    """Time points of a fingerprint, one of ``acceleration`` spirals each, in shuffled order."""

    @property
    def pipelines(self) -> dict[str, str]:
        """Pipelines that are compared, with their names."""
        return PIPELINES if self.points is None else FINGERPRINT_PIPELINES

    def simulate(self, raw: Path) -> Simulation:
        """Write the raw data."""
        if self.points is None:
            return simulate(
                sequence=self.sequence,
                output=raw,
                matrix=self.matrix,
                fov=self.field_of_view,
                coils=self.coils,
                acceleration=self.acceleration,
                snr=self.snr,
                excitations=self.excitations,
                overwrite=True,
            )
        return simulate_fingerprint(
            output=raw,
            matrix=self.matrix,
            fov=self.field_of_view,
            coils=self.coils,
            points=self.points,
            interleaves=round(self.acceleration),
            order="shuffled",
            snr=self.snr,
            overwrite=True,
        )


@dataclass(frozen=True)
class Result:
    """What one method made of one scan."""

    scan: str
    method: str
    nrmse: dict[str, float]
    """Role -> error inside the brain, relative to the truth."""
    tissue: dict[str, float]
    """Role -> mean absolute percentage error, mean of white and grey matter (a fraction)."""
    seconds: float
    """From raw file to maps."""


SCANS = (
    Scan("vfa_gre", (64, 80, 6), (160.0, 200.0, 24.0), 27.0),
    Scan("t2ir_gre", (64, 80, 6), (160.0, 200.0, 24.0), 160.0, excitations=40),
    Scan("fisp_mrf", (128, 128, 1), (210.0, 210.0, 5.0), 32.0, points=400, snr=10.0),
)


def demo(folder: Path, scans: tuple[Scan, ...] = SCANS) -> str:
    """Run all scans; raw data, maps of each method and a picture of each scan go into the folder.

    Args:
        folder: where to write; what an earlier run left there is replaced.
        scans: what to simulate.

    Returns:
        The errors of all methods, and where the pictures lie, as text.

    Raises:
        ScanError: if the folder cannot be written or a step fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScanError(f"cannot make the folder {folder}: {error.strerror}") from error
    results: list[Result] = []
    pictures = []
    for scan in scans:
        results += _run(scan, folder)
        pictures.append(f"truth, maps and errors side by side: {_picture(scan, folder)}")
    return "\n".join([_table(results), "", *pictures])


def _picture(scan: Scan, folder: Path) -> Path:
    return folder / f"{scan.sequence}.png"


def _run(scan: Scan, folder: Path) -> list[Result]:
    raw = folder / f"{scan.sequence}_raw.h5"
    simulated = scan.simulate(raw)
    size = " x ".join(str(points) for points in scan.matrix)
    headline = (
        f"{scan.sequence}, {size}, {scan.coils} coils, SNR {scan.snr:g}, R = {simulated.acceleration:.0f}"
    )
    results, methods = [], {}
    for pipeline, method in scan.pipelines.items():
        maps = folder / f"{scan.sequence}_{pipeline}.h5"
        logger.info("%s: %s", headline, method)
        begun = time.monotonic()
        replay(raw, pipeline, maps, overwrite=True)
        seconds = time.monotonic() - begun
        errors = compare(maps, raw)["maps"]
        roles = [role for role in TIMES if role in errors]
        results.append(
            Result(
                headline,
                method,
                {role: errors[role]["nrmse"] for role in roles},
                {role: 0.5 * (errors[role]["mape_wm"] + errors[role]["mape_gm"]) for role in roles},
                seconds,
            )
        )
        methods[method] = map_volumes(read_images(maps))
    middle = scan.matrix[2] // 2
    figure_beside_truth(
        _picture(scan, folder),
        methods,
        map_volumes(read_images(raw, TRUTH_GROUP)),
        headline if scan.matrix[2] == 1 else f"{headline}, partition {middle + 1} of {scan.matrix[2]}",
        middle,
        tuple(TIMES),
    )
    return results


def _table(results: list[Result]) -> str:
    """One line a method, under a line for each scan."""
    names = "".join(f"{name:>8}" for name in TIMES.values())
    width = max(len(result.method) for result in results)
    brain, tissue = (f"{head:>{len(names)}}" for head in ("NRMSE in the brain [%]", "error in tissue [%]"))
    lines = [f"{'':{width}}  {brain}    {tissue}      time", f"{'':{width}}  {names}    {names}       [s]"]
    scan = ""
    for result in results:
        if result.scan != scan:
            scan = result.scan
            lines.append(scan)
        errors = f"{_cells(result.nrmse)}    {_cells(result.tissue)}"
        lines.append(f"{result.method:{width}}  {errors}    {result.seconds:6.1f}")
    return "\n".join(lines)


def _cells(errors: dict[str, float]) -> str:
    return "".join(f"{100 * errors[role]:8.2f}" if role in errors else f"{'-':>8}" for role in TIMES)


def main() -> None:
    """Entry point of ``python -m quantitron.host.demo [FOLDER]``."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    try:
        text = demo(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except ScanError as error:
        sys.stderr.write(f"quantitron demo: {error}\n")
        sys.exit(1)
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
