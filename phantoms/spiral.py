"""Variable-density spirals: the fastest way out along a given curve that the gradients allow.

The curve is k(r) = r exp(i theta(r)) with

    d theta / d r = 2 pi N F(r) / interleaves        r in cycles per voxel, 0..0.5; N voxels an edge

so that arms of all interleaves together lie 1 / (N F) apart: F(r) is the field of view they support, over the
field of view of the image. It is played as fast as amplitude and slew rate of the gradient permit (Lustig,
Kim and Pauly, IEEE TMI 27:866, 2008).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from quantitron.gadgets.errors import ScanError

GYROMAGNETIC_RATIO = 42.577478518e6
"""gamma / 2 pi of hydrogen [Hz / T]."""
MARGIN = 0.985
"""Share of the gradient limits that is used: sampling a curve in time rounds its corners."""
NODES = 8000
"""Steps along the curve; the time that it takes is then right to 1e-4."""


@dataclass(frozen=True)
class SpiralDesign:
    """What a spiral must achieve, and what the gradients can do."""

    matrix: int = 192
    """Voxels along an edge."""
    field_of_view: float = 0.224
    """Edge of the image [m]."""
    interleaves: int = 48
    """Rotated copies that together fill k-space."""
    gradient: float = 40e-3
    """Largest gradient amplitude [T/m]."""
    slew: float = 150.0
    """Largest slew rate [T/m/s]."""
    dwell_time: float = 2.5e-6
    """Time between samples [s]."""
    centre: float = 1.0
    """Field of view that the arms support at the centre, over that of the image; 1 is Nyquist."""
    edge: float = 0.5
    """The same at r = 0.5."""
    constant: float = 0.2
    """Radius [cycles per voxel] up to which it stays at ``centre``; from there it falls linearly."""

    def supported(self, radius: NDArray[np.float64]) -> NDArray[np.float64]:
        """F: field of view that the arms support at ``radius``, over the field of view."""
        return np.interp(radius, [0.0, self.constant, 0.5], [self.centre, self.centre, self.edge])


def design_spiral(design: SpiralDesign) -> NDArray[np.float64]:
    """One spiral-out, from rest at k = 0 to |k| = 0.5.

    Returns:
        (m, 2) kx, ky in cycles per voxel, one a dwell time. The first is 0, the last one at 0.5.

    Raises:
        ScanError: if a number of the design makes no sense, or the spiral takes more than 65535 samples.
    """
    _check(design)
    voxel = design.field_of_view / design.matrix
    fastest = MARGIN * GYROMAGNETIC_RATIO * design.gradient * voxel  # cycles per voxel and second
    steepest = MARGIN * GYROMAGNETIC_RATIO * design.slew * voxel
    radius = 0.5 * np.linspace(0, 1, NODES + 1) ** 1.5  # finer at the centre, where the curve bends most
    turn = 2 * np.pi * design.matrix * design.supported(radius) / design.interleaves
    steps = np.diff(radius)
    angle = np.concatenate([[0.0], np.cumsum(steps * (turn[1:] + turn[:-1]) / 2)])
    fall = (design.edge - design.centre) / max(0.5 - design.constant, 1e-12)
    slope = 2 * np.pi * design.matrix / design.interleaves * np.where(radius > design.constant, fall, 0.0)
    # Length and curvature of r exp(i theta(r)).
    stretch = np.sqrt(1 + (radius * turn) ** 2)
    curvature = np.abs(2 * turn + radius * slope + radius**2 * turn**3) / stretch**3
    length = np.concatenate([[0.0], np.cumsum(steps * (stretch[1:] + stretch[:-1]) / 2)])
    square = _fastest_squared_speed(length, curvature, fastest, steepest)
    speed = np.sqrt(square)
    time = np.concatenate([[0.0], np.cumsum(2 * np.diff(length) / (speed[1:] + speed[:-1]))])

    samples = int(time[-1] / design.dwell_time) + 1
    if samples > 65535:
        raise ScanError(
            f"the spiral would take {1e3 * time[-1]:.0f} ms, {samples} samples; use more interleaves"
        )
    # Stretched by less than one dwell time, so that the last sample lies at the edge.
    grid = np.linspace(0, time[-1], samples)
    along = CubicSpline(time, radius)(grid)
    phase = CubicSpline(radius, angle)(along)
    return np.stack([along * np.cos(phase), along * np.sin(phase)], axis=1)


def _fastest_squared_speed(
    length: NDArray[np.float64], curvature: NDArray[np.float64], fastest: float, steepest: float
) -> NDArray[np.float64]:
    """Squared speed along a curve that starts at rest: forward, then backward, under all limits.

    With w = v^2: |acceleration|^2 = (curvature w)^2 + (dw/ds / 2)^2 <= steepest^2.
    """
    ceiling = np.minimum(fastest**2, steepest / np.maximum(curvature, 1e-12))
    square = ceiling.copy()
    square[0] = 0.0
    steps = np.diff(length)
    for i in range(len(steps)):
        left = steepest**2 - (curvature[i] * square[i]) ** 2
        square[i + 1] = min(ceiling[i + 1], square[i] + 2 * steps[i] * math.sqrt(max(left, 0.0)))
    for i in range(len(steps) - 1, -1, -1):
        left = steepest**2 - (curvature[i + 1] * square[i + 1]) ** 2
        square[i] = min(square[i], square[i + 1] + 2 * steps[i] * math.sqrt(max(left, 0.0)))
    return square


def rotate(arm: NDArray[np.float64], interleaves: int) -> NDArray[np.float32]:
    """All interleaves of a spiral: (interleaves, m, 2), number i turned by 2 pi i / interleaves."""
    angle = 2 * np.pi * np.arange(interleaves) / interleaves
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x, y = arm.T
    return np.stack([cosine * x - sine * y, sine * x + cosine * y], axis=2).astype(np.float32)


def tilt(
    arms: NDArray[np.float32], interleaf: NDArray[np.int64], angle: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Interleaves stood upright and turned about kz: kx and ky of an arm become the radius in the plane at
    ``angle`` and kz. Planes over half a turn fill a ball, densely about the kz axis.

    Args:
        arms: (interleaves, m, 2) kx, ky.
        interleaf: (n,) which of them.
        angle: (n,) of the plane about kz [rad].

    Returns:
        (n, m, 3) kx, ky, kz.
    """
    result = np.empty((len(interleaf), arms.shape[1], 3), dtype=np.float32)
    for row, (number, turn) in enumerate(zip(interleaf, angle, strict=True)):
        across, along = arms[number].T
        result[row] = np.stack([across * math.cos(turn), across * math.sin(turn), along], axis=1)
    return result


def _check(design: SpiralDesign) -> None:
    if design.matrix < 2 or not design.field_of_view > 0:
        raise ScanError(f"a spiral cannot have {design.matrix} voxels in {design.field_of_view} m")
    if not 1 <= design.interleaves <= 65536:
        raise ScanError(f"interleaves is {design.interleaves}; it must be in 1..65536")
    for name in ("gradient", "slew", "dwell_time", "centre", "edge"):
        if not 0 < getattr(design, name) < math.inf:
            raise ScanError(f"{name} of the spiral is {getattr(design, name):g}; it must be positive")
    if not 0 <= design.constant <= 0.5:
        raise ScanError(f"constant of the spiral is {design.constant:g}; it must be in 0..0.5")
