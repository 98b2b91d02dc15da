"""Density compensation: weights that turn the adjoint of a non-uniform Fourier transform into an inverse.

Convention: with A the transform that is unitary by the voxel count (``NonuniformFourier``), the weight of a
point is the area of k-space that it stands for, in units of the area of one sample of the Cartesian grid
(1 / (z y x) in cycles per voxel). So a fully sampled Cartesian grid has weights 1, A^H W A is about the
identity for images whose spectrum lies where samples are, and from the samples of such an image A^H W gives
the image back, its peak included. Weights belong to the distinct readouts: one that is repeated is to be
averaged, or its weight to be divided by the count.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, Voronoi, cKDTree
from torch import Tensor

from quantitron.recon.operators.nonuniform_fourier import NonuniformFourier

SAME_POINT = 1e-6
"""Distance [cycles per voxel] below which two points are one."""
_PRECISION = 1e-4
"""Of the transforms that tell densities."""


def density_weights(trajectory: Tensor, grid: tuple[int, int, int], method: str = "pipe") -> Tensor:
    """Weights (n,) float32 of the points (n, d) of the distinct readouts.

    Args:
        trajectory: in cycles per voxel, columns x, y[, z].
        grid: (z, y, x) of the images.
        method: ``pipe`` for ``pipe_menon``, ``voronoi`` for ``voronoi``.

    Raises:
        ValueError: if there is no such method, or it cannot work with this trajectory.
    """
    if method == "pipe":
        return pipe_menon(NonuniformFourier(trajectory, grid))
    if method == "voronoi":
        return voronoi(trajectory, grid)
    raise ValueError(f"density compensation '{method}' is none of pipe, voronoi")


def pipe_menon(fourier: NonuniformFourier, iterations: int = 10) -> Tensor:
    """Weights whose density, seen through a kernel as wide as a Cartesian sample, is 1 (Pipe, Menon 1999).

    Iterates w <- w / (K w) from the start w = 1; K convolves with the Fejer kernel of the field of view. That
    is positive; the spectrum of a box is not, and the iteration ends up anywhere with it. Needs no geometry:
    2D and 3D, any order of points.

    Args:
        fourier: transform onto the points of the distinct readouts.
        iterations: how often.

    Returns:
        (n,) float32, on the device of the trajectory.

    Raises:
        ValueError: if there is no iteration.
    """
    if iterations < 1:
        raise ValueError(f"Pipe-Menon weights need at least one iteration, not {iterations}")
    density_of = _density(fourier)
    weights = torch.ones(len(fourier.trajectory), device=fourier.trajectory.device)
    for _ in range(iterations):
        weights = weights / density_of(weights).clamp_min(1e-6)  # positive but for rounding
    return _of_unit_density(weights, density_of)


def normalised(weights: Tensor, trajectory: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Weights of any scale, as scans bring them, scaled to a mean density of 1 like those of ``pipe_menon``.

    Args:
        weights: (n,), not negative.
        trajectory: (n, d) in cycles per voxel.
        grid: (z, y, x) of the images.

    Returns:
        (n,) float32; all zero where all are zero.
    """
    return _of_unit_density(weights.float(), _density(NonuniformFourier(trajectory, grid, _PRECISION)))


def _density(fourier: NonuniformFourier) -> Callable[[Tensor], Tensor]:
    """Maps weights (n,) to the density of the weighted points at each, through the Fejer kernel."""
    trajectory = fourier.trajectory
    nz, ny, nx = fourier.grid
    dimensions = trajectory.shape[1]
    doubled = (2 * nz if dimensions == 3 else 1, 2 * ny, 2 * nx)
    wide = NonuniformFourier(trajectory, doubled, _PRECISION)
    window = torch.full((), 2.0**dimensions, device=trajectory.device)
    for axis, size in enumerate(doubled):
        if size > 1:
            triangle = 1 - (torch.arange(size, device=trajectory.device) - size // 2).abs() / (size // 2)
            window = window * triangle.reshape(-1, *[1] * (2 - axis))
    return lambda weights: wide.forward(wide.adjoint(weights.to(torch.complex64)) * window).real


def _of_unit_density(weights: Tensor, density_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights (n,) times the factor that makes their density 1 in the mean over what they weigh."""
    total = weights.sum()
    if not total > 0:
        return torch.zeros_like(weights)
    weights = weights / total  # their squares stay within single precision, whatever their unit
    return weights / (weights * density_of(weights)).sum()


def voronoi(trajectory: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Weights from the areas of Voronoi cells, in 2D (Rasche et al. 1999).

    Points closer than ``SAME_POINT`` are one cell that they share. Cells that reach beyond the convex hull of
    the points have no end there; they get the area of the nearest cell that has.

    Args:
        trajectory: (n, 2) points of the distinct readouts, cycles per voxel.
        grid: (z, y, x) of the images; z does not enter.

    Returns:
        (n,) float32, on the device of the trajectory.

    Raises:
        ValueError: if the trajectory is not of two columns, or all points lie on a line.
    """
    if trajectory.ndim != 2 or trajectory.shape[1] != 2:
        raise ValueError(f"Voronoi cells are made for trajectories (n, 2), not {tuple(trajectory.shape)}")
    points = trajectory.detach().cpu().double().numpy()
    places, which = np.unique(np.round(points / SAME_POINT), axis=0, return_inverse=True)
    which = which.reshape(-1)
    places *= SAME_POINT
    spread = places - places.mean(0)
    if len(places) < 4 or np.linalg.svd(spread, compute_uv=False)[-1] < SAME_POINT * len(places) ** 0.5:
        raise ValueError("Voronoi cells need points that do not all lie on a line")
    areas = _cell_areas(places)
    inside = np.isfinite(areas)
    if not inside.any():
        raise ValueError("Voronoi cells need points inside the convex hull of the others")
    if not inside.all():
        _, nearest = cKDTree(places[inside]).query(places[~inside])
        areas[~inside] = areas[inside][nearest]
    weights = areas[which] / np.bincount(which)[which] * (grid[1] * grid[2])
    return torch.from_numpy(weights.astype(np.float32)).to(trajectory.device)


def _cell_areas(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Areas of the Voronoi cells (n,); infinite for those that reach beyond the convex hull."""
    diagram = Voronoi(places)
    faces = ConvexHull(places).equations  # normal, offset: <= 0 inside
    centre = places.mean(0)
    # Most vertices lie within a circle that the hull encloses; only the others are held against each face.
    enclosed = float(-(faces[:, :2] @ centre + faces[:, 2]).max())
    outer = np.flatnonzero(np.linalg.norm(diagram.vertices - centre, axis=1) > enclosed)
    beyond = np.zeros(len(diagram.vertices), dtype=bool)
    for start in range(0, len(outer), 4096):
        chosen = outer[start : start + 4096]
        beyond[chosen] = (diagram.vertices[chosen] @ faces[:, :2].T + faces[:, 2]).max(1) > SAME_POINT
    areas = np.full(len(places), np.inf)
    regions = [diagram.regions[region] for region in diagram.point_region]
    bounded = np.array([bool(region) and -1 not in region for region in regions])
    chosen = np.flatnonzero(bounded)
    if not len(chosen):
        return areas
    lengths = np.array([len(regions[number]) for number in chosen])
    corners = np.concatenate([regions[number] for number in chosen])
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    # Shoelace formula, all cells at once, about their points to keep digits.
    owner = chosen.repeat(lengths)
    here = diagram.vertices[corners] - places[owner]
    following = np.arange(1, len(corners) + 1)
    following[starts + lengths - 1] = starts
    there = here[following]
    area = np.add.reduceat(here[:, 0] * there[:, 1] - here[:, 1] * there[:, 0], starts) / 2
    outside = np.add.reduceat(beyond[corners].astype(int), starts) > 0
    areas[chosen] = np.where(outside, np.inf, np.abs(area))
    return areas
