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

from torch import Tensor

from quantitron.recon.algorithms.gauss_newton import gauss_newton
from quantitron.recon.data import Maps, Problem
from quantitron.recon.priors.map_variation import MapVariation, typical_differences
from quantitron.recon.signal.map_model import TIMES, normal_blocks
from quantitron.recon.solvers.cartesian import CartesianSolver, LinearEstimate
from quantitron.recon.solvers.map_estimate import MapEstimate, start_from
from quantitron.recon.solvers.map_objective import Attraction, MapObjective
from quantitron.recon.solvers.solver import Progress

logger = logging.getLogger("quantitron")

LONGEST_STEP = 0.7
"""Largest change of a logarithm or a phase [rad] in one step: a factor of two. For the off-resonance, that of
the phase of the last echo."""
LEAST_DIFFERENCE = 1e-4
"""Least typical difference of a map, in the same units: maps without any noise are not weighed by nothing."""
LEAST_SHARE = 1e-3
"""Least of what the data say of a voxel, in units of what they say of the middle one; its inverse: most."""
LARGEST_OUT_OF_SUBSPACE = 1e-3
"""Share of the signal energy outside the basis above which a warning is given."""
USUAL_ROUNDS = 4
"""Gauss-Newton steps that the progress reckons with."""


@dataclass(frozen=True)
class ModelBased(CartesianSolver):
    """Settings of the model-based reconstruction."""

    name: ClassVar[str] = "model_based"

    weight: float = field(default=0.15, metadata={"above": 0})
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
        return self.delivered(estimate, linear, found, problem)

    def delivered(
        self,
        estimate: LinearEstimate,
        linear: Maps,
        found: MapEstimate,
        problem: Problem,
        residual_to_noise: float | None = None,
    ) -> Maps:
        """The maps of the unknowns, with what their basis does not hold measured and logged.

        Args:
            estimate: the data term.
            linear: maps that the unknowns started from.
            found: the unknowns.
            problem: the slice.
            residual_to_noise: of the unknowns, where it is not that of the estimate's own operator.
        """
        lost = found.model.out_of_subspace(found.theta)
        said = "%.1e of the signal energy of the maps lies outside the basis of rank %d"
        if lost > LARGEST_OUT_OF_SUBSPACE:
            # Field that the first pass did not span is missing from the field map, and the maps go beyond.
            said += (
                ", where it is not compared with the data; raise field_range, where the off-resonance is "
                "larger, residual_field or rank"
            )
        level = logging.WARNING if lost > LARGEST_OUT_OF_SUBSPACE else logging.INFO
        logger.log(level, said, lost, estimate.basis.rank)
        if residual_to_noise is None:
            residual_to_noise = estimate.residual_to_noise(found.coefficients())
        return found.delivered(
            estimate,
            linear,
            residual_to_noise=residual_to_noise if problem.noise_known else float("nan"),
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
        """R, its scale that of the differences of the maps to start from.

        Where the data say more of a group's maps, its differences cost more: their standard deviations to the
        power of -1/2. A constant weight would be right if only the maps counted, and the power -1 would take
        away the same share of the noise everywhere; half-way between them was best for all sequences.
        """
        names = start.model.names
        angles = [names.index("phase")]
        maps, units = start.images(start.theta), start.model.units(start.theta)
        typical = typical_differences(maps, start.mask, estimate.voxel_size, LEAST_DIFFERENCE * units, angles)
        _, jacobian = start.model.jacobian(start.theta)
        blocks = normal_blocks(jacobian, estimate.operator.mean_diagonal())
        information = blocks.diagonal(dim1=1, dim2=2) * typical.square()  # (v, p), differences as units
        groups, weights = [], []
        for weight, times in ((self.weight, True), (self.amplitude_weight, False)):
            group = [number for number, name in enumerate(names) if (name in TIMES) == times]
            known = information[:, group].mean(1, keepdim=True)
            share = (known / known.median()).nan_to_num(nan=1.0).clamp(LEAST_SHARE, 1 / LEAST_SHARE)
            groups.append(group)
            weights.append(weight * estimate.noise * start.images(share**0.25))
        return MapVariation(start.mask, estimate.voxel_size, groups, weights, typical, self.smoothing, angles)
