"""Total variation of parameter maps, in groups of maps whose edges lie in the same places.

    R(theta) = sum_g n_g sum_r weight_g(r) sqrt( sum_(a, j in g) |(D_a theta_j)(r) / s_j|^2 + (eps n_g)^2 )

s_j is a typical difference of map j between neighbours and n_g the length of a typical difference of group g,
sqrt(directions * maps in it): maps of any unit weigh alike, and differences below the share eps of the
typical one cost their square. Only differences between two voxels that are both in the mask count, and
differences of phases are taken the short way round the circle.

R is bounded from above by a quadratic that touches it at the present maps, of weights w (Wohlberg and
Rodriguez 2007): 1/2 <v, D^T w D v> is what second-order methods take in its place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from quantitron.recon.priors.finite_difference import AXES, FiniteDifference


class MapVariation:
    """R, its gradient, and quadratics that bound it from above. Maps are (x, p, z, y) real."""

    def __init__(
        self,
        mask: Tensor,
        voxel_size: tuple[float, float, float],
        groups: Sequence[Sequence[int]],
        weights: Sequence[float | Tensor],
        scale: Tensor,
        smoothing: float = 0.1,
        angles: Collection[int] = (),
    ) -> None:
        """Set up R.

        Args:
            mask: (x, z, y) bool, the voxels that count.
            voxel_size: edges [m] along (x, z, y). Only their ratios count.
            groups: numbers of the maps that share edges; a map in no group is not penalised.
            weights: one a group, not negative; a tensor (x, 1, z, y) varies in space.
            scale: s (p,), typical differences, above zero.
            smoothing: eps, above zero.
            angles: numbers of the maps that are phases [rad].

        Raises:
            ValueError: if there is not one weight a group, a map is in two groups, or the smoothing or a
                typical difference is not above zero.
        """
        members = [number for group in groups for number in group]
        if len(weights) != len(groups) or len(set(members)) != len(members):
            raise ValueError("total variation of maps needs one weight a group, and each map in one group")
        if not smoothing > 0 or not bool((scale > 0).all()):
            raise ValueError("the smoothing and the typical differences must be above zero")
        self._difference = FiniteDifference(voxel_size)
        self._angles = tuple(angles)
        self._mask = mask[:, None]
        self._pairs = inner_pairs(mask)  # (3, x, 1, z, y)
        self._inverse_scale = (1 / scale)[:, None, None]
        axes = max(1, sum(n > 1 for n in mask.shape))
        self._groups = [
            (list(group), weight, math.sqrt(axes * len(group)))
            for group, weight in zip(groups, weights, strict=True)
        ]
        self._smoothing = smoothing

    def value(self, theta: Tensor) -> float:
        """R(theta) for maps (x, p, z, y)."""
        scaled = self._differences(theta) * self._inverse_scale
        total = 0.0
        for group, weight, typical in self._groups:
            length = weight * self._length(scaled, group, typical)
            total += typical * float((length * self._mask).sum(dtype=torch.float64))
        return total

    def reweighting(self, theta: Tensor) -> Tensor:
        """Weights w (3, x, p, z, y) of the quadratic that touches R at theta (x, p, z, y)."""
        scaled = self._differences(theta) * self._inverse_scale
        weights = torch.zeros_like(theta)
        for group, weight, typical in self._groups:
            weights[:, group] = weight * typical / self._length(scaled, group, typical)
        return weights * self._inverse_scale.square() * self._pairs

    def gradient(self, theta: Tensor, weights: Tensor | None = None) -> Tensor:
        """Gradient of R at theta: (x, p, z, y); ``weights``, its reweighting, where they are at hand."""
        weights = self.reweighting(theta) if weights is None else weights
        return self._difference.adjoint(weights * self._differences(theta))

    def quadratic(self, direction: Tensor, weights: Tensor) -> Tensor:
        """D^T w D of a change of the maps: (x, p, z, y) -> (x, p, z, y)."""
        return self._difference.adjoint(self._difference(direction).mul_(weights))

    def diagonal(self, weights: Tensor) -> Tensor:
        """Diagonal of D^T w D: (x, p, z, y)."""
        return self._difference.weighted_diagonal(weights)

    def _differences(self, theta: Tensor) -> Tensor:
        return map_differences(theta, self._difference, self._angles).mul_(self._pairs)

    def _length(self, scaled: Tensor, group: list[int], typical: float) -> Tensor:
        """Smoothed length of the scaled differences (3, x, p, z, y) of a group: (x, 1, z, y)."""
        square = torch.full_like(scaled[0, :, :1], (self._smoothing * typical) ** 2)
        for number in group:
            for axis in scaled[:, :, number : number + 1]:
                square.addcmul_(axis, axis)
        return square.sqrt_()


def map_differences(theta: Tensor, difference: FiniteDifference, angles: Collection[int]) -> Tensor:
    """D theta (3, x, p, z, y) of maps (x, p, z, y), phases (numbers ``angles``) the short way round."""
    differences = difference(theta)
    for number in angles:
        for axis, spacing in zip(differences, difference.spacing, strict=True):
            turn = axis[:, number]
            turn.copy_((torch.remainder(turn * spacing + math.pi, 2 * math.pi) - math.pi) / spacing)
    return differences


def typical_differences(
    theta: Tensor,
    mask: Tensor,
    voxel_size: tuple[float, float, float],
    least: Tensor,
    angles: Collection[int] = (),
) -> Tensor:
    """1.5 times the median of the absolute differences between neighbours in the mask.

    Close to the standard deviation of normally distributed ones (1.48 times the median), edges left out.

    Args:
        theta: maps (x, p, z, y).
        mask: (x, z, y) bool.
        voxel_size: edges [m] along (x, z, y).
        least: (p,), returned where typical differences are smaller, or there are no two neighbours.
        angles: numbers of the maps that are phases [rad].

    Returns:
        (p,), above zero where ``least`` is.
    """
    pairs = inner_pairs(mask)[:, :, 0] > 0
    if not pairs.any():
        return least
    differences = map_differences(theta, FiniteDifference(voxel_size), angles).abs_()
    median = torch.stack([differences[:, :, number][pairs].median() for number in range(theta.shape[1])])
    return torch.maximum(1.5 * median, least)


def inner_pairs(mask: Tensor) -> Tensor:
    """1 where a voxel and its neighbour in each direction are both in the mask (x, z, y): (3, x, 1, z, y)."""
    inside = mask[:, None].to(torch.get_default_dtype())
    pairs = torch.zeros((len(AXES), *inside.shape), device=mask.device)
    for pair, axis in zip(pairs, AXES, strict=True):
        n = inside.shape[axis]
        torch.mul(
            inside.narrow(axis, 1, n - 1), inside.narrow(axis, 0, n - 1), out=pair.narrow(axis, 0, n - 1)
        )
    return pairs
