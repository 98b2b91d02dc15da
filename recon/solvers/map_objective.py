"""The objective of parameter maps that are fitted to k-space: data term, prior, and its linearisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.algorithms.gauss_newton import Linearisation
from quantitron.recon.priors.map_variation import MapVariation
from quantitron.recon.signal.map_model import normal_blocks, pull_back, push_forward
from quantitron.recon.solvers.cartesian import LinearEstimate
from quantitron.recon.solvers.map_estimate import MapEstimate

DAMPING = 1e-3
"""Share of the diagonal of J^H A^H A J that is added to it (Marquardt 1963)."""


@dataclass(frozen=True)
class Attraction:
    """1/2 sum strength (theta - centre)^2: what another source says of the unknowns."""

    centre: Tensor
    """(v, p), in the units of theta."""
    strength: Tensor
    """(v, p), in units of the data term's curvature; 0 where nothing is said."""

    def value(self, theta: Tensor) -> float:
        """At theta (v, p)."""
        return 0.5 * float((self.strength * (theta - self.centre).square()).sum(dtype=torch.float64))


class MapObjective:
    """Data term and R of the unknowns inside the mask; the coefficients outside it are held.

    The data term is counted from the start on, which keeps the digits that its changes need:
    f(U) - f(U0) = Re <U - U0, slope(U0) + 1/2 A^H A (U - U0)>.
    """

    def __init__(
        self,
        estimate: LinearEstimate,
        start: MapEstimate,
        variation: MapVariation,
        attraction: Attraction | None = None,
    ) -> None:
        """Set up.

        Args:
            estimate: the data term.
            start: mask, model and background; any unknowns can be asked about.
            variation: R.
            attraction: a further term; none by default.
        """
        nothing = torch.zeros_like(start.theta)
        self.start, self.variation = start, variation
        self.attraction = attraction or Attraction(nothing, nothing)
        self._operator = estimate.operator
        with torch.no_grad():
            self._origin = start.model.coefficients(start.theta)  # (v, k)
        images = start.background + start.images(self._origin)
        self._slope = start.values(estimate.operator(images) - estimate.data)  # (v, k)

    def __call__(self, theta: Tensor) -> MapPoint:
        """The objective at theta (v, p), less the data term at the start."""
        with torch.no_grad():
            way = self.start.model.coefficients(theta) - self._origin
        image = self.gram(way)
        value = _inner(way, self._slope + 0.5 * image) + self.variation.value(self.start.images(theta))
        value += self.attraction.value(theta)
        return MapPoint(self, theta, value, self._slope + image)

    def gram(self, u: Tensor) -> Tensor:
        """A^H A within the mask: (v, k) -> (v, k)."""
        return self.start.values(self._operator(self.start.images(u)))

    def mean_diagonal(self) -> Tensor:
        """Mean over k-space of the diagonal of A^H A: (k,)."""
        return self._operator.mean_diagonal()


@dataclass(frozen=True)
class MapPoint:
    """The objective at one theta."""

    objective: MapObjective
    theta: Tensor
    """(v, p)."""
    value: float
    """Data term, R and attraction."""
    slope: Tensor
    """(v, k): gradient of the data term by the coefficients."""

    def linearise(self) -> Linearisation:
        """Gradient, Gauss-Newton curvature, and blocks of each voxel by itself to precondition with."""
        objective, start, variation = self.objective, self.objective.start, self.objective.variation
        _, jacobian = start.model.jacobian(self.theta)
        maps = start.images(self.theta)
        weights = variation.reweighting(maps)
        blocks = normal_blocks(jacobian, objective.mean_diagonal())  # (v, p, p)
        size = blocks.diagonal(dim1=1, dim2=2)
        # What leaves no trace in the signal is damped as well.
        attraction = objective.attraction
        damping = DAMPING * (size + 1e-3 * size.mean(1, keepdim=True)) + 1e-9 * size.mean()
        damping = damping + attraction.strength
        # As for the images, a weight below that of the diagonal suits what is smooth.
        diagonal = damping + 0.5 * start.values(variation.diagonal(weights))
        inverse = torch.linalg.inv_ex(blocks + torch.diag_embed(diagonal))[0]

        def normal(step: Tensor) -> Tensor:
            data = pull_back(jacobian, objective.gram(push_forward(jacobian, step)))
            edges = start.values(variation.quadratic(start.images(step), weights))
            return data + edges + damping * step

        return Linearisation(
            pull_back(jacobian, self.slope)
            + start.values(variation.gradient(maps, weights))
            + attraction.strength * (self.theta - attraction.centre),
            normal,
            lambda residual: (inverse @ residual[:, :, None])[:, :, 0],
        )


def _inner(left: Tensor, right: Tensor) -> float:
    """Re <left, right>, summed in double precision: terms of it nearly cancel."""
    double = torch.complex128
    return float(torch.vdot(left.flatten().to(double), right.flatten().to(double)).real)
