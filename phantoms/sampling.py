"""Which ky-kz points each frame samples: random, densest at the centre, different in every frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.errors import ScanError

CALIBRATION_MODES = ("embedded", "separate", "none")


@dataclass(frozen=True)
class Sampling:
    """Points of all frames of one slab."""

    frame: NDArray[np.int64]
    """(line,) frame of each line, ascending."""
    kz: NDArray[np.int64]
    """(line,) 0..z-1."""
    ky: NDArray[np.int64]
    """(line,) 0..y-1."""
    calibration: NDArray[np.bool_]
    """(line,) whether the line is also a calibration line."""
    separate: NDArray[np.int64]
    """(n, 2) kz, ky of calibration lines that belong to no frame."""
    acceleration: float
    """Points of all frames over points acquired, calibration included."""


def calibration_box(grid: tuple[int, int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """(z, y) True in the box of ``size`` about k = 0 (index n // 2), cut to the grid."""
    box = np.zeros(grid, dtype=bool)
    starts = [n // 2 - min(s, n) // 2 for n, s in zip(grid, size, strict=True)]
    box[starts[0] : starts[0] + min(size[0], grid[0]), starts[1] : starts[1] + min(size[1], grid[1])] = True
    return box


def sampling_density(
    grid: tuple[int, int], power: float, width: float, elliptical: bool
) -> NDArray[np.float64]:
    """Relative density (z, y): ``(1 + (k / width)^2)^(-power/2)``, k = 1 at the edge of the grid.

    Args:
        grid: points (z, y).
        power: how fast the density falls; 0 is uniform.
        width: radius within which the density is flat, in units of the edge.
        elliptical: leave the corners beyond k = 1 out.
    """
    kz, ky = ((np.arange(n) - n // 2) / max(n / 2, 1) for n in grid)
    radius = np.sqrt(kz[:, None] ** 2 + ky[None, :] ** 2)
    density = (1 + (radius / width) ** 2) ** (-power / 2)
    return np.where(radius <= 1, density, 0) if elliptical else density


def random_sampling(
    grid: tuple[int, int],
    frames: int,
    acceleration: float,
    seed: int | list[int],
    *,
    calibration: str = "embedded",
    calibration_frame: int = 0,
    calibration_size: tuple[int, int] = (8, 24),
    power: float = 2.0,
    width: float = 0.3,
    elliptical: bool = False,
) -> Sampling:
    """Draw points without replacement for every frame, so that the whole scan has the given acceleration.

    The number of lines is ``frames * points / acceleration``, rounded; calibration lines come out of that
    budget and the rest is shared evenly by the frames. ``acceleration=1`` samples every point of every
    frame, whatever the calibration. The draw is exact weighted sampling (the largest keys log(density) +
    Gumbel noise).

    Args:
        grid: points (z, y); z = 1 for 2D.
        frames: number of frames T.
        acceleration: R, at least 1.
        seed: equal seeds give equal points.
        calibration: ``embedded`` (the box is acquired in ``calibration_frame``, as calibration-and-imaging
            lines), ``separate`` (as calibration-only lines, of no frame) or ``none``.
        calibration_frame: the frame that the embedded lines belong to.
        calibration_size: lines (z, y) of the box.
        power: of the density, see ``sampling_density``.
        width: of the density.
        elliptical: leave out the corners of the grid.

    Raises:
        ScanError: if the acceleration is below 1, not reachable inside the ellipse, or leaves a frame
            without lines.
    """
    if calibration not in CALIBRATION_MODES:
        raise ScanError(f"calibration is '{calibration}'; it must be one of {', '.join(CALIBRATION_MODES)}")
    if not acceleration >= 1:
        raise ScanError(f"acceleration is {acceleration:g}; it must be at least 1")
    density = sampling_density(grid, power, width, elliptical).ravel()
    box = calibration_box(grid, calibration_size).ravel()
    if calibration == "none":
        box[:] = False
    points = density.size
    allowed = int(np.count_nonzero(density))
    budget = round(frames * points / acceleration)
    boxed = int(box.sum())
    embedded = boxed if calibration == "embedded" else 0

    # How many lines each frame gets besides the embedded box.
    room = np.full(frames, allowed)
    room[calibration_frame] -= int((box & (density > 0)).sum()) if embedded else 0
    remaining = budget - boxed if acceleration > 1 else budget - embedded
    if remaining < frames:
        raise ScanError(
            f"acceleration {acceleration:g} allows {budget} lines for {frames} frames and {boxed} "
            "calibration lines; every frame needs one at least"
        )
    if remaining > room.sum():
        raise ScanError(
            f"acceleration {acceleration:g} cannot be reached inside the ellipse; "
            f"at least {frames * points / room.sum():.2f} can"
        )
    share = np.zeros(frames, dtype=np.int64)
    rng = np.random.default_rng(seed)
    order = rng.permutation(frames)
    while (left := remaining - int(share.sum())) > 0:
        open_frames = order[share[order] < room[order]]
        even, odd = divmod(left, len(open_frames))
        extra = np.full(len(open_frames), even)
        extra[:odd] += 1
        share[open_frames] = np.minimum(share[open_frames] + extra, room[open_frames])

    log_density = np.log(density, out=np.full(points, -np.inf), where=density > 0)
    frame_numbers, chosen_points, flags = [], [], []
    for frame in range(frames):
        keys = log_density + rng.gumbel(size=points)
        inside = np.zeros(points, dtype=bool)
        if embedded and frame == calibration_frame:
            keys[box] = -np.inf
            inside |= box
        count = int(share[frame])
        if count:
            inside[np.argpartition(keys, points - count)[points - count :]] = True
        chosen = np.flatnonzero(inside)
        frame_numbers.append(np.full(len(chosen), frame))
        chosen_points.append(chosen)
        flags.append(
            box[chosen] if embedded and frame == calibration_frame else np.zeros(len(chosen), dtype=bool)
        )
    where = np.concatenate(chosen_points)
    separate = np.flatnonzero(box) if calibration == "separate" else np.zeros(0, dtype=np.int64)
    return Sampling(
        frame=np.concatenate(frame_numbers),
        kz=where // grid[1],
        ky=where % grid[1],
        calibration=np.concatenate(flags),
        separate=np.stack([separate // grid[1], separate % grid[1]], axis=1),
        acceleration=frames * points / (len(where) + len(separate)),
    )
