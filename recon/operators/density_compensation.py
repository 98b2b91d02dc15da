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
_APART = 0.1 * SAME_POINT
"""How far points in 3D are moved, so that no more than four are on one sphere [cycles per voxel]."""
_THICKNESS = 0.05
"""Of the planes of a stack at most, in units of 1 / partitions, which is how far planes are apart."""


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
    """Weights from the sizes of Voronoi cells (Rasche et al. 1999): areas in 2D, volumes in 3D.

    Points closer than ``SAME_POINT`` are one cell that they share. Cells that reach beyond the convex hull of
    the points have no end there; they get the size of the nearest cell that has. A stack, points in planes of
    constant kz, takes the areas within each plane times the share of kz that the plane stands for; the first
    and the last plane stand for as much as their neighbours.

    Args:
        trajectory: (n, d) points of the distinct readouts, cycles per voxel, columns x, y[, z].
        grid: (z, y, x) of the images; z does not enter in 2D.

    Returns:
        (n,) float32, on the device of the trajectory.

    Raises:
        ValueError: if the trajectory is of other columns, or all points lie on a line, or, in 3D, in a plane
            that is none of constant kz.
    """
    if trajectory.ndim != 2 or trajectory.shape[1] not in (2, 3) or not len(trajectory):
        raise ValueError(
            f"Voronoi cells are made for trajectories (n, 2) and (n, 3), not {tuple(trajectory.shape)}"
        )
    points = trajectory.detach().cpu().double().numpy()
    voxels = grid[1] * grid[2] * (grid[0] if points.shape[1] == 3 else 1)
    planes = _planes(points[:, 2], grid[0]) if points.shape[1] == 3 else None
    if planes is None or any(_are_flat(points[members, :2]) for members in planes[0]):
        weights = _shares(points)
    else:
        weights = np.empty(len(points))
        for members, thickness in zip(*planes, strict=True):
            weights[members] = _shares(points[members, :2]) * (thickness or 1 / grid[0])
    return torch.from_numpy((weights * voxels).astype(np.float32)).to(trajectory.device)


def _planes(
    kz: NDArray[np.float64], partitions: int
) -> tuple[list[NDArray[np.int64]], NDArray[np.float64]] | None:
    """Members of each plane of a stack, and the length of kz that it stands for; 0 where it is the only one.

    None where points are in no planes: where gaps as wide as those between planes are not all there is.
    """
    order = kz.argsort(kind="stable")
    apart = _THICKNESS / partitions
    members = np.split(order, np.flatnonzero(np.diff(kz[order]) > apart) + 1)
    if any(np.ptp(kz[plane]) > apart for plane in members):
        return None
    if len(members) == 1:
        return members, np.zeros(1)
    between = np.diff([float(kz[plane].mean()) for plane in members])
    return members, (np.append(between[:1], between) + np.append(between, between[-1:])) / 2


def _are_flat(points: NDArray[np.float64]) -> bool:
    """Whether points (n, d) have no extent along some direction: on a line in 2D, in a plane in 3D."""
    spread = points - points.mean(0)
    least = SAME_POINT * len(points) ** 0.5
    return len(points) < points.shape[1] + 2 or bool(np.linalg.svd(spread, compute_uv=False)[-1] < least)


def _shares(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Size of the cell of each of the points (n, d), shared among points at one place."""
    dimensions = points.shape[1]
    places, which = np.unique(np.round(points / SAME_POINT), axis=0, return_inverse=True)
    which = which.reshape(-1)
    places *= SAME_POINT
    if _are_flat(places):
        flat = "on a line" if dimensions == 2 else "in a plane"
        raise ValueError(f"Voronoi cells need points that do not all lie {flat}")
    sizes = _cell_sizes(places)
    inside = np.isfinite(sizes)
    if not inside.any():
        raise ValueError(
            f"Voronoi cells of all {len(places)} points reach beyond their convex hull; take density 'pipe'"
        )
    if not inside.all():
        _, nearest = cKDTree(places[inside]).query(places[~inside])
        sizes[~inside] = sizes[inside][nearest]
    shares: NDArray[np.float64] = sizes[which] / np.bincount(which)[which]
    return shares


def _cell_sizes(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sizes of the Voronoi cells of (n, d); infinite for those that reach beyond the convex hull.

    A cell is made of the pyramids from its point to its faces, each half of the way to a neighbour away.
    """
    count, dimensions = places.shape
    if dimensions == 3:
        # Of eight points on a sphere, as in a grid, Qhull does not put the corners of faces in order.
        shift = np.random.default_rng(0).uniform(-0.5, 0.5, places.shape)
        places = places + _APART * shift
    diagram = Voronoi(places)
    beyond = _beyond_hull(diagram.vertices, places)
    faces = [face for face in diagram.ridge_vertices if -1 not in face]
    if not faces:
        return np.full(count, np.inf)
    bounded = np.array([-1 not in face for face in diagram.ridge_vertices])
    neighbours = diagram.ridge_points
    open_cell = np.zeros(count, dtype=bool)
    open_cell[neighbours[~bounded].ravel()] = True
    neighbours = neighbours[bounded]
    lengths = np.array([len(face) for face in faces])
    corners = np.concatenate([np.asarray(face) for face in faces])
    starts = np.concatenate([[0], lengths.cumsum()[:-1]]).astype(np.int64)
    open_cell[neighbours[np.logical_or.reduceat(beyond[corners], starts)].ravel()] = True
    # Corners from the first one of their face, to keep digits.
    here = diagram.vertices[corners] - diagram.vertices[corners[starts]].repeat(lengths, axis=0)
    if dimensions == 2:
        measure = np.linalg.norm(here[starts + 1], axis=1)
    else:
        there = np.roll(here, -1, axis=0)
        there[starts + lengths - 1] = 0  # back to the first one
        measure = np.linalg.norm(np.add.reduceat(np.cross(here, there), starts, axis=0), axis=1) / 2
    distance = np.linalg.norm(places[neighbours[:, 0]] - places[neighbours[:, 1]], axis=1) / 2
    sizes = np.zeros(count)
    for side in (0, 1):
        sizes += np.bincount(neighbours[:, side], measure * distance / dimensions, minlength=count)
    sizes[open_cell] = np.inf
    return sizes


def _beyond_hull(vertices: NDArray[np.float64], places: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the vertices (v, d) lie outside the convex hull of the places."""
    faces = ConvexHull(places).equations  # normal, offset: <= 0 inside
    normal, offset = faces[:, :-1], faces[:, -1]
    centre = places.mean(0)
    # Most vertices lie within a sphere that the hull encloses; only the others are held against each face.
    enclosed = float(-(normal @ centre + offset).max())
    outer = np.flatnonzero(np.linalg.norm(vertices - centre, axis=1) > enclosed)
    beyond = np.zeros(len(vertices), dtype=bool)
    for start in range(0, len(outer), 4096):
        chosen = outer[start : start + 4096]
        beyond[chosen] = (vertices[chosen] @ normal.T + offset).max(1) > SAME_POINT
    return beyond
