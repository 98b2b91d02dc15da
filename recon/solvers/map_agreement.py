"""Two estimates of the same maps brought together where the one with penalties errs more than the linear one.

T2*: few echoes tell of it, and penalties take its contrast. Most voxels gain by them, but one that they move
much further than is typical holds something that its neighbours do not: Student's t in place of a normal
distribution of the differences.

T2 where tissue and fluid meet: the signal of a voxel that holds both follows no single T2, and what fits it
is drawn further off by its neighbours than by the covariance that the linear estimate expects.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantitron.recon.priors.neighbourhood import neighbourhood_mean
from quantitron.recon.solvers.map_estimate import MapEstimate

MEDIAN_SQUARE = 0.455
"""Median of the square of a normal deviate of variance 1."""
EDGE_WIDTHS = (0.8, 0.8, 0.8)
"""Standard deviation [voxels] of the neighbourhood in which T2 is looked at for edges: the voxels next door,
whatever their size, since it is the voxel that mixes."""


def agreed(found: MapEstimate, linear: MapEstimate, t2star_distance: float, t2_edge: float) -> MapEstimate:
    """Maps found with penalties, their T2* and T2 drawn to the linear estimate's, all in logarithms.

    The share of the linear estimate is r / (1 + r): r is (distance / (t2star_distance * typical distance))^2
    for T2* and (local variance / t2_edge^2)^2 for T2.

    Args:
        found: the maps.
        linear: those of the linear estimate, of the same voxels and unknowns.
        t2star_distance: distance, in units of the typical one, at which the share is a half; 0: no share.
        t2_edge: standard deviation in a voxel's neighbourhood at which the share is a half; 0: no share.
    """
    names, theta = found.model.names, found.theta.clone()
    if "t2star" in names and t2star_distance > 0:
        column = names.index("t2star")
        square = (linear.theta[:, column] - theta[:, column]).square()
        typical = (square.nanmedian() / MEDIAN_SQUARE).clamp_min(torch.finfo(square.dtype).tiny)
        _draw(theta[:, column], linear.theta[:, column], square / typical / t2star_distance**2)
    if "t2" in names and t2_edge > 0:
        column = names.index("t2")
        steepness = (local_variance(found, column) / t2_edge**2).square()
        _draw(theta[:, column], linear.theta[:, column], steepness)
    return replace(found, theta=theta)


def _draw(values: Tensor, towards: Tensor, ratio: Tensor) -> None:
    """Values (v,) in place, by the share ratio / (1 + ratio) of the way."""
    values.lerp_(towards, 1 - 1 / (1 + ratio))


def local_variance(maps: MapEstimate, column: int) -> Tensor:
    """Variance of an unknown over each voxel and its neighbours inside the mask: (v,), its unit squared."""
    inside = maps.mask.to(maps.theta)[:, None]  # (x, 1, z, y)
    unknown = maps.theta[:, column, None]
    moments = maps.images(torch.cat([unknown, unknown.square()], 1))  # (x, 2, z, y)
    sums = neighbourhood_mean(torch.cat([moments, inside], 1), EDGE_WIDTHS)
    first, second, weight = maps.values(sums).T  # (v,) each
    variance: Tensor = second / weight - (first / weight).square()
    return variance.clamp_min(0)
