"""``make demo``: simulate undersampled scans of a brain, reconstruct them, print the errors and draw the
maps."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_file import TRUTH_GROUP, read_images
from quantitron.gadgets.map_volume import map_volumes
from quantitron.host.compare import compare, table
from quantitron.host.replay import replay
from quantitron.phantoms.simulate import simulate
from quantitron.reports.map_figure import figure_beside_truth

logger = logging.getLogger("quantitron")

PIPELINE = "subspace"


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


SCANS = (
    Scan("vfa_gre", (64, 64, 8), (224.0, 224.0, 32.0), 8.0),
    Scan("t2ir_gre", (64, 64, 8), (224.0, 224.0, 32.0), 40.0, excitations=40),
)


def demo(folder: Path, scans: tuple[Scan, ...] = SCANS) -> str:
    """Run all scans; raw data, maps, the comparison and a picture of each go into the folder.

    Args:
        folder: where to write; what an earlier run left there is replaced.
        scans: what to simulate.

    Returns:
        The errors of all maps, as text.

    Raises:
        ScanError: if the folder cannot be written or a step fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScanError(f"cannot make the folder {folder}: {error.strerror}") from error
    return "\n\n".join(_run(scan, folder) for scan in scans)


def _run(scan: Scan, folder: Path) -> str:
    raw, maps, picture = (folder / f"{scan.sequence}{suffix}" for suffix in ("_raw.h5", "_maps.h5", ".png"))
    simulated = simulate(
        sequence=scan.sequence,
        output=raw,
        matrix=scan.matrix,
        fov=scan.field_of_view,
        coils=scan.coils,
        acceleration=scan.acceleration,
        snr=scan.snr,
        excitations=scan.excitations,
        overwrite=True,
    )
    begun = time.monotonic()
    replay(raw, PIPELINE, maps, overwrite=True)
    seconds = time.monotonic() - begun
    result: dict[str, Any] = compare(maps, raw)
    size = " x ".join(str(points) for points in scan.matrix)
    headline = (
        f"{scan.sequence}, {size}, {scan.coils} coils, SNR {scan.snr:g}, R = {simulated.acceleration:.1f}: "
        f"'{PIPELINE}' in {seconds:.0f} s"
    )
    found, truth = map_volumes(read_images(maps)), map_volumes(read_images(raw, TRUTH_GROUP))
    figure_beside_truth(picture, found, truth, headline)
    return f"{headline}\n{table(result)}\nmaps beside truth: {picture}"


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
