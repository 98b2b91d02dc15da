"""Model-based reconstruction: the parameter maps themselves are fitted to k-space.

    minimise over theta:   1/2 sum_t ||s_t - M_t F C D_t Phi_t U(theta)||^2 + R(theta)

theta are the unknowns of each voxel (``map_model.py``), U(theta) = Phi^H I(theta) their coefficients, and R
the total variation of the maps (``map_variation.py``), relaxation times in one group, amplitude, phase and
off-resonance in another, its weight in units of the noise. No other signals than those of the model are
reckoned with, and smoothness is asked of the maps themselves (Block 2009; Wang 2018): fewer unknowns than the
coefficient images have, and priors where they belong.

Regularised Gauss-Newton steps begin at the maps of the linear estimate. In its reduced form the data term
costs in each of their inner steps what it costs in one of a linear reconstruction. METHODS 1, 2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.algorithms.gauss_newton import Linearisation, gauss_newton
from quantitron.recon.data import Maps, Problem
from quantitron.recon.priors.map_variation import MapVariation, typical_differences
from quantitron.recon.signal.map_model import TIMES, normal_blocks, pull_back, push_forward
from quantitron.recon.solvers.cartesian import CartesianSolver, LinearEstimate
from quantitron.recon.solvers.map_estimate import MapEstimate, start_from
from quantitron.recon.solvers.solver import Progress

logger = logging.getLogger("quantitron")

LONGEST_STEP = 0.7
"""Largest change of a logarithm or a phase [rad] in one step: a factor of two. For the off-resonance, that of
the phase of the last echo."""
LEAST_DIFFERENCE = 1e-4
"""Least typical difference of a map, in the same units: maps without any noise are not weighed by nothing."""
USUAL_ROUNDS = 4
"""Gauss-Newton steps that the progress reckons with."""
DAMPING = 1e-3
"""Share of the diagonal of J^H A^H A J that is added to it (Marquardt 1963)."""


@dataclass(frozen=True)
class ModelBased(CartesianSolver):
    """Settings of the model-based reconstruction."""

    name: ClassVar[str] = "model_based"

    weight: float = field(default=0.12, metadata={"above": 0})
    """Factor on the total variation of the relaxation times; its scale follows from noise and edges."""
    amplitude_weight: float = field(default=0.12, metadata={"above": 0})
    """The same for log amplitude, phase and off-resonance."""
    smoothing: float = field(default=0.1, metadata={"above": 0})
    """Share of the typical difference below which differences cost their square."""
    rounds: int = field(default=12, metadata={"minimum": 1})
    """Gauss-Newton steps at most; scans of low noise take more than others."""
    iterations: int = field(default=5, metadata={"minimum": 1})
    """Conjugate gradient steps in each of them."""
    change: float = field(default=0.01, metadata={"minimum": 0})
    """Fall of the objective for each unknown, in units of the noise, below which a step is the last one."""

    def refine(self, estimate: LinearEstimate, seed: int, progress: Progress) -> Tensor:
        """The linear estimate, whose maps are the start."""
        del seed, progress
        return estimate.coefficients

    def maps(
        self, estimate: LinearEstimate, coefficients: Tensor, problem: Problem, progress: Progress
    ) -> Maps:
        """Maps of the coefficients, then Gauss-Newton steps from them on."""
        linear = super().maps(estimate, coefficients, problem, lambda doing, _share: progress(doing, 0.45))
        start = start_from(replace(estimate, coefficients=coefficients), linear, problem)
        if not len(start.theta):
            return linear
        progress("model-based steps", 0.5)
        found = self.descend(estimate, start, lambda share: progress("model-based steps", 0.5 + 0.5 * share))
        residual = estimate.residual_to_noise(found.coefficients())
        return found.delivered(
            estimate,
            linear,
            residual_to_noise=residual if problem.noise_known else float("nan"),
            standard_deviations=self.standard_deviations,
        )

    def descend(
        self,
        estimate: LinearEstimate,
        start: MapEstimate,
        progress: Callable[[float], None],
        rounds: int | None = None,
        variation: MapVariation | None = None,
        attraction: Attraction | None = None,
    ) -> MapEstimate:
        """Gauss-Newton steps: the unknowns of the least objective that they reach.

        Args:
            estimate: the data term.
            start: where to begin.
            progress: called with the share of the steps that are done.
            rounds: steps at most; by default the settings'.
            variation: R; by default with the scale of the maps to start from.
            attraction: a further term, towards maps that are expected.
        """
        rounds = self.rounds if rounds is None else rounds
        objective = MapObjective(estimate, start, variation or self.variation(estimate, start), attraction)
        low, high = start.model.limits(start.theta)
        descent = gauss_newton(
            objective,
            start.theta,
            low,
            high,
            LONGEST_STEP * start.model.units(start.theta),
            rounds=rounds,
            iterations=self.iterations,
            change=self.change * estimate.noise * start.theta.numel(),
            callback=lambda number, _value: progress(min(1.0, (number + 1) / min(rounds, USUAL_ROUNDS))),
        )
        if descent.stopped == "not finite":
            logger.warning(
                "the objective of the maps was not finite in step %d; the maps before it are kept",
                len(descent.values),
            )
        return replace(start, theta=descent.x)

    def variation(self, estimate: LinearEstimate, start: MapEstimate) -> MapVariation:
        """R, its scale that of the differences of the maps to start from."""
        names = start.model.names
        angles = [names.index("phase")]
        groups = [
            [number for number, name in enumerate(names) if (name in TIMES) == times]
            for times in (True, False)
        ]
        weights = [self.weight * estimate.noise, self.amplitude_weight * estimate.noise]
        typical = typical_differences(
            start.images(start.theta),
            start.mask,
            estimate.voxel_size,
            LEAST_DIFFERENCE * start.model.units(start.theta),
            angles,
        )
        return MapVariation(start.mask, estimate.voxel_size, groups, weights, typical, self.smoothing, angles)


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
    """Data term and R of the unknowns inside the mask; the background's part is taken out of the data."""

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
        self._data = start.values(estimate.data - estimate.operator(start.background))  # (v, k)

    def __call__(self, theta: Tensor) -> _Point:
        """The objective at theta (v, p); 1/2 ||s - A background||^2 of it is left out."""
        with torch.no_grad():
            u = self.start.model.coefficients(theta)
        image = self.gram(u)
        value = _inner(u, 0.5 * image - self._data) + self.variation.value(self.start.images(theta))
        value += self.attraction.value(theta)
        return _Point(self, theta, value, image - self._data)

    def gram(self, u: Tensor) -> Tensor:
        """A^H A within the mask: (v, k) -> (v, k)."""
        return self.start.values(self._operator(self.start.images(u)))

    def mean_diagonal(self) -> Tensor:
        """Mean over k-space of the diagonal of A^H A: (k,)."""
        return self._operator.mean_diagonal()


@dataclass(frozen=True)
class _Point:
    objective: MapObjective
    theta: Tensor
    value: float
    slope: Tensor
    """(v, k): gradient of the data term by the coefficients."""

    def linearise(self) -> Linearisation:
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
