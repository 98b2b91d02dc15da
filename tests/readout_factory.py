"""Fingerprint scans made in memory: readouts on a trajectory with given counters, flags and samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from line_factory import LAST, block, noise
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.header import make_context, make_header
from quantitron.recon.data import Encoding, Protocol


def fingerprint(points: int = 6, **changes: Any) -> Protocol:
    angles = tuple(math.radians(5 + 7 * (w % 9)) for w in range(points))
    protocol = Protocol("fisp_mrf", (0.7e-3,), (0.012,), angles, inversion_time=(0.02,), field_strength=3.0)
    return replace(protocol, **changes)


def images(
    matrix: tuple[int, int, int] = (1, 16, 16), coils: int = 2, slices: int = 1, trajectory: str = "spiral"
) -> Encoding:
    size = (0.004 * matrix[0], 0.002 * matrix[1], 0.002 * matrix[2])
    return Encoding(matrix, size, matrix, slices, coils, trajectory)


def context(protocol: Protocol | None = None, grid: Encoding | None = None, **options: Any) -> Context:
    return make_context(make_header(grid or images(), protocol or fingerprint(), **options))


def spirals(
    number: int, samples: int = 20, columns: int = 2, seed: int = 3, reach: float = 0.48
) -> NDArray[np.float32]:
    """(number, sample, columns) positions from the centre outwards, in cycles per voxel."""
    random = np.random.default_rng(seed)
    directions = random.standard_normal((number, samples, columns))
    directions /= np.abs(directions).max(axis=2, keepdims=True)
    return (directions * np.linspace(0, reach, samples)[:, np.newaxis]).astype(np.float32)


def readouts(
    trajectory: NDArray[Any], coils: int = 2, flags: Sequence[int] = (), seed: int = 0, **fields: Any
) -> AcquisitionBlock:
    """Readouts of random samples at positions (n, sample, d)."""
    trajectory = np.asarray(trajectory, dtype=np.float32)
    lines = block(noise((len(trajectory), coils, trajectory.shape[1]), seed), flags, **fields)
    lines.head["center_sample"] = 0
    lines.head["trajectory_dimensions"] = trajectory.shape[2]
    return replace(lines, trajectory=trajectory)


def whole_scan(
    points: int = 6, slices: int = 1, samples: int = 20, columns: int = 2, **fields: Any
) -> AcquisitionBlock:
    """Each time point of each slice once, the last one flagged."""
    s, w = (axis.ravel() for axis in np.meshgrid(range(slices), range(points), indexing="ij"))
    scan = readouts(spirals(len(s), samples, columns), slice=s, repetition=w, **fields)
    scan.head["flags"][-1] |= np.uint64(1 << (LAST - 1))
    return scan
