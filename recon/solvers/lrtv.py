"""Low rank and total variation: a subspace, and edges that all coefficient images have in common.

    minimise over U:   1/2 ||s - A U||^2 + field_share Q(U) + R(U),     R(U) = weight sum_r |c (D U)(r)|

A holds sampling, Fourier transform, coils, field and basis (the linear estimate brings all of them), D the
differences between neighbours and |.| the length over directions and components together: joint (vectorial)
total variation (Bresson and Chan 2008). c counts the differences of each component in units of their size in
the linear estimate: an edge that the strong components show at high signal-to-noise ratio is free for the
weak ones that carry T2 and T2*. Q is the Gaussian prior of the linear estimate, its variances learnt around
each voxel: total variation is about differences only, and says nothing of how large a component is where.
METHODS 4.

Three algorithms reach the same minimiser:

reweighted   R is bounded from above by a quadratic that touches it at the present U, and each quadratic
             problem takes some conjugate gradient steps (Wohlberg and Rodriguez 2007). Differences below
             ``smoothing`` of the typical one cost their square.
admm         R is split off (Boyd 2011); no smoothing, each round as dear as one above, and more of them.
primal_dual  Condat 2013 and Vu 2013; no inner problem, hundreds of steps; without Q, whose curvature would
             make them tiny.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.algorithms.admm import admm
from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient
from quantitron.recon.algorithms.power_iteration import largest_eigenvalue
from quantitron.recon.algorithms.primal_dual import primal_dual, primal_dual_steps
from quantitron.recon.priors.total_variation import JointTotalVariation
from quantitron.recon.solvers.cartesian import CartesianSolver
from quantitron.recon.solvers.coefficient_solver import (
    LEAST_TOLERANCE,
    CoefficientEstimate,
    CoefficientSolver,
)
from quantitron.recon.solvers.fingerprint import FingerprintSolver
from quantitron.recon.solvers.solver import Progress

SPLITTING_PENALTY = 0.1
"""Penalty of the splitting in units of the noise, for differences in units of their typical size."""


@dataclass(frozen=True)
class SharedEdges(CoefficientSolver):
    """Settings of the reconstruction with total variation on the coefficient images, of any kind of scan."""

    linear_iterations: int = field(default=4, metadata={"minimum": 1})
    """Conjugate gradient steps of the linear estimate's passes: only a start is wanted here."""
    neighbourhood: float = field(default=1.0, metadata={"minimum": 0})
    """Of the linear estimate's prior [voxels]: see there."""
    weight: float = field(default=0.1, metadata={"above": 0})
    """Factor on total variation, whose scale follows from the noise and the edges of the scan."""
    field_share: float = field(default=0.5, metadata={"minimum": 0})
    """Share of the linear estimate's prior that is kept; 0 is total variation alone."""
    algorithm: str = field(default="reweighted", metadata={"choices": ("reweighted", "admm", "primal_dual")})
    """How the objective is minimised."""
    rounds: int = field(default=2, metadata={"minimum": 1})
    """Quadratic problems of ``reweighted`` and ``admm``; the latter wants five times as many."""
    iterations: int = field(default=7, metadata={"minimum": 1})
    """Conjugate gradient steps in each of them, at least."""
    smoothing: float = field(default=0.1, metadata={"above": 0})
    """Share of the typical difference below which differences cost their square."""
    primal_dual_iterations: int = field(default=300, metadata={"minimum": 1})
    """Most steps of ``primal_dual``."""
    change: float = field(default=1e-4, metadata={"minimum": 0})
    """Relative change of U at which either algorithm ends."""

    def __post_init__(self) -> None:
        """Refuse what ``primal_dual`` cannot do.

        Raises:
            ValueError: if it should keep the linear estimate's prior, or as for all solvers of such scans.
        """
        super().__post_init__()
        if self.algorithm == "primal_dual" and self.field_share > 0:
            raise ValueError(
                "algorithm primal_dual is for total variation alone; set field_share to 0 with it"
            )

    def refine(self, estimate: CoefficientEstimate, seed: int, progress: Progress) -> Tensor:
        """Minimise the objective from the linear estimate on."""
        penalty = estimate.total_variation(self.weight)
        if self.algorithm == "admm":
            return self._admm(estimate, penalty)
        if self.algorithm == "primal_dual":
            return self._primal_dual(estimate, penalty, seed)
        return self._reweighted(estimate, penalty, progress)

    def _reweighted(
        self, estimate: CoefficientEstimate, penalty: JointTotalVariation, progress: Progress
    ) -> Tensor:
        operator, prior, share, u = estimate.operator, estimate.prior, self.field_share, estimate.coefficients
        # The typical length of a difference: every component and direction adds 1 to its square.
        axes = sum(n > 1 for n in (u.shape[0], *u.shape[2:]))
        typical = float(max(axes, 1) * u.shape[1]) ** 0.5
        for number in range(self.rounds):
            progress("total variation", number / self.rounds)
            weights = penalty.reweighting(u, self.smoothing * typical)
            preconditioner = estimate.preconditioner(0.3 * penalty.diagonal(weights), share)

            def normal(image: Tensor, weights: Tensor = weights) -> Tensor:
                total = operator(image) + penalty.precision(image, weights)
                return total + share * prior.precision(image) if share else total

            previous = u
            u = self.settle(
                operator, estimate.noise, normal, estimate.data, preconditioner, self.iterations, u
            )
            if float((u - previous).norm()) <= self.change * float(u.norm()):
                break
        return u

    def _admm(self, estimate: CoefficientEstimate, penalty: JointTotalVariation) -> Tensor:
        operator, prior, share = estimate.operator, estimate.prior, self.field_share
        scale = SPLITTING_PENALTY * estimate.noise
        ones = torch.ones_like(estimate.coefficients[:, :1].real)
        diagonal = operator.mean_diagonal()[:, None, None] + 0.3 * (
            scale * penalty.diagonal(ones) + share * prior.diagonal()
        )

        def closest(target: Tensor, factor: float, last: Tensor) -> Tensor:
            return conjugate_gradient(
                lambda image: (
                    operator(image)
                    + factor * penalty.adjoint(penalty.operator(image))
                    + (share * prior.precision(image) if share else 0.0)
                ),
                estimate.data + factor * penalty.adjoint(target),
                start=last,
                preconditioner=lambda residual: residual / diagonal,
                iterations=self.iterations,
                tolerance=LEAST_TOLERANCE,
            )

        return admm(
            closest,
            penalty.shrink,
            estimate.coefficients,
            operator=penalty.operator,
            penalty=scale,
            iterations=self.rounds,
            tolerance=self.change,
        ).x

    def _primal_dual(self, estimate: CoefficientEstimate, penalty: JointTotalVariation, seed: int) -> Tensor:
        operator, start = estimate.operator, estimate.coefficients
        generator = torch.Generator(device=start.device).manual_seed(seed)
        lipschitz = 1.05 * largest_eigenvalue(operator, start, generator)
        norm = penalty.norm(start.shape)
        u, _ = primal_dual(
            penalty.operator,
            penalty.adjoint,
            norm,
            lambda dual, _step: penalty.project(dual),
            start,
            primal_dual_steps(lipschitz, norm),
            gradient=lambda image: operator(image) - estimate.data,
            lipschitz=lipschitz,
            iterations=self.primal_dual_iterations,
            tolerance=self.change,
        )
        return u


@dataclass(frozen=True)
class LowRankTotalVariation(SharedEdges, CartesianSolver):
    """Settings for Cartesian scans."""

    name: ClassVar[str] = "lrtv"


@dataclass(frozen=True)
class FingerprintTotalVariation(SharedEdges, FingerprintSolver):
    """Settings for fingerprints."""

    name: ClassVar[str] = "lrtv"
