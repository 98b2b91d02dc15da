"""What the artifacts of a reconstruction depend on beside the protocol, of a scan and of those in a training.

A network that removes artifacts has seen those of its training only: as much of k-space visited, as many
coils, as much noise, the same settings of the linear estimate. Another scan is no error; it is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantitron.recon.data import TrajectoryKSpace

VISITED_FACTOR = 1.2
"""By how much the share of k-space may lie outside that of the training."""
SIGNAL_FACTOR = 1.5
"""By how much the signal-to-noise ratio may."""

_ROUNDING = 4
"""Decimals of a trajectory [cycles per voxel] by which readouts are told apart."""


@dataclass(frozen=True)
class ScanConditions:
    """Those of one scan."""

    coils: int
    """Channels that the reconstruction takes."""
    calibrated: bool
    """Whether coil maps come from calibration readouts, and not from the undersampled scan itself."""
    visited: float
    """Samples of all distinct readouts over voxels: what was played, not how often."""
    signal_to_noise: float
    """Intensity of the strongest coefficient image over the standard deviation of a whitened sample."""
    solver: Mapping[str, object]
    """Settings of the linear estimate."""


def conditions_card(conditions: Sequence[ScanConditions]) -> dict[str, object]:
    """Those of the scans of a training, one solver's, as a card holds them.

    Args:
        conditions: at least one.
    """
    signals = [one.signal_to_noise for one in conditions]
    return {
        "coils": sorted({one.coils for one in conditions}),
        "calibrated": sorted({one.calibrated for one in conditions}),
        "visited": sorted({round(one.visited, 4) for one in conditions}),
        "signal_to_noise": [round(min(signals), 2), round(max(signals), 2)],
        "solver": {name: _plain(value) for name, value in conditions[0].solver.items()},
    }


def differences(card: object, scan: ScanConditions) -> list[str]:
    """In what a scan differs from those of a training.

    Args:
        card: what ``conditions_card`` made, from a file that nobody vouches for.
        scan: of the scan.

    Returns:
        Each with both values; empty where nothing does.
    """
    if not isinstance(card, Mapping):
        return ["its card does not say what scans it was trained on"]
    found = []
    coils = _numbers(card.get("coils"))
    if scan.coils not in coils:
        found.append(f"{_spoken(coils)} coils, here {scan.coils}")
    calibrated = card.get("calibrated")
    if scan.calibrated not in (calibrated if isinstance(calibrated, list) else ()):
        here = "with" if scan.calibrated else "without"
        found.append(f"{_calibration(calibrated)} calibration readouts, here {here}")
    visited = _numbers(card.get("visited"))
    if not _within(scan.visited, visited, VISITED_FACTOR):
        found.append(f"{_spoken(visited)} samples of distinct readouts a voxel, here {scan.visited:.3g}")
    signal = _numbers(card.get("signal_to_noise"))
    if not _within(scan.signal_to_noise, signal, SIGNAL_FACTOR):
        found.append(f"a signal of {_spoken(signal, '..')} times the noise, here {scan.signal_to_noise:.3g}")
    solver = card.get("solver")
    trained = solver if isinstance(solver, Mapping) else {}
    for name, value in scan.solver.items():
        if trained.get(name) != _plain(value):
            found.append(f"{name} {str(trained.get(name, 'not told'))[:40]}, here {_plain(value)}")
    return found


def visited_share(kspace: TrajectoryKSpace) -> float:
    """Samples of the distinct readouts of a scan over its voxels."""
    trajectory = kspace.trajectory.cpu().numpy().round(_ROUNDING) + 0.0  # no zero below zero
    distinct: dict[bytes, int] = {}
    first = 0
    for length in kspace.readout_length.tolist():
        distinct[trajectory[first : first + length].tobytes()] = length
        first += length
    return sum(distinct.values()) / math.prod(kspace.grid)


def _within(value: float, trained: Sequence[float], factor: float) -> bool:
    return bool(trained) and min(trained) / factor <= value <= max(trained) * factor


def _numbers(value: object) -> list[float]:
    """Those of a list; none of anything else."""
    if not isinstance(value, list | tuple):
        return []
    return [number for number in value if isinstance(number, int | float)]


def _calibration(trained: object) -> str:
    """With or without, of a card's list."""
    known = [value for value in trained if isinstance(value, bool)] if isinstance(trained, list) else []
    return " and ".join("with" if value else "without" for value in known) or "unknown"


def _plain(value: object) -> object:
    """As it comes back from JSON."""
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _spoken(values: Sequence[float], between: str = ", ") -> str:
    return between.join(f"{value:.3g}" for value in values) or "unknown"
