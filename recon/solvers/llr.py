"""Locally low rank: in a small block of voxels only few signal shapes occur.

    minimise over U:   1/2 ||s - A U||^2 + field_share Q(U) + R(U),     R(U) = weight sum_b ||C_b(U)||_*

A holds sampling, Fourier transform, coils, field and basis (the linear estimate brings all of them), C_b is
the matrix (k, voxels) of block b, ||.||_* the sum of its singular values; the blocks tile the volume and are
shifted at random (Trzasko and Manduca 2011; Zhang 2015; Tamir 2017). Q is the Gaussian prior of the linear
estimate, its variances learnt around each voxel: low rank says which signals are together in a block, and
nothing about their places in it. The weight is in units of the largest singular value of noise: one preset
serves all accelerations. METHODS 4.

Two algorithms:

reweighted   R is bounded from above by a quadratic that touches it at the present U: each block gets the
             covariance of its own signals. Each quadratic problem takes some conjugate gradient steps (Mohan
             and Fazel 2012). New blocks in each round.
fista        singular value thresholding after gradient steps (Beck and Teboulle 2009), new blocks in each;
             without Q, whose curvature would make the steps tiny.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.algorithms.fista import fista
from quantitron.recon.algorithms.power_iteration import largest_eigenvalue
from quantitron.recon.priors.low_rank import BlockLowRank, BlockPrecision
from quantitron.recon.solvers.cartesian import CartesianSolver
from quantitron.recon.solvers.coefficient_solver import CoefficientEstimate, CoefficientSolver
from quantitron.recon.solvers.fingerprint import FingerprintSolver
from quantitron.recon.solvers.solver import Progress


@dataclass(frozen=True)
class LowRankBlocks(CoefficientSolver):
    """Settings of the locally low-rank reconstruction, of any kind of scan."""

    linear_iterations: int = field(default=4, metadata={"minimum": 1})
    """Conjugate gradient steps of the linear estimate's passes: only a start is wanted here."""
    neighbourhood: float = field(default=1.0, metadata={"minimum": 0})
    """Of the linear estimate's prior [voxels]: see there."""
    weight: float = field(default=0.1, metadata={"above": 0})
    """Threshold of the singular values, in units of the largest one of pure noise."""
    block: int = field(default=3, metadata={"minimum": 1})
    """Edge of a block [voxels]."""
    field_share: float = field(default=0.8, metadata={"minimum": 0})
    """Share of the linear estimate's prior that is kept; 0 is locally low rank alone."""
    random_shifts: bool = True
    """Whether the blocks move from round to round."""
    tilings: int = field(default=4, metadata={"minimum": 1})
    """Tilings by blocks that share the penalty of a round, each shifted at random and no two alike;
    ``reweighted`` only.

    Several leave no trace of the blocks' borders, and conjugate gradients take fewer steps."""
    algorithm: str = field(default="reweighted", metadata={"choices": ("reweighted", "fista")})
    """How the objective is minimised."""
    rounds: int = field(default=3, metadata={"minimum": 1})
    """Quadratic problems of ``reweighted``."""
    iterations: int = field(default=5, metadata={"minimum": 1})
    """Conjugate gradient steps in each of them, at least."""
    smoothing: float = field(default=0.3, metadata={"above": 0})
    """Singular values below this share of the noise's cost their square; ``reweighted`` only."""
    fista_iterations: int = field(default=120, metadata={"minimum": 1})
    """Most steps of ``fista``."""
    change: float = field(default=1e-4, metadata={"minimum": 0})
    """Relative change of U at which ``fista`` ends."""
    discrepancy: float = field(default=0.0, metadata={"minimum": 0})
    """Data residual over noise at which ``fista`` ends (Morozov's principle); 0 never."""

    def __post_init__(self) -> None:
        """Refuse what ``fista`` cannot do.

        Raises:
            ValueError: if it should keep the linear estimate's prior, or as for all solvers of such scans.
        """
        super().__post_init__()
        if self.algorithm == "fista" and self.field_share > 0:
            raise ValueError("algorithm fista is for locally low rank alone; set field_share to 0 with it")

    def refine(self, estimate: CoefficientEstimate, seed: int, progress: Progress) -> Tensor:
        """Minimise the objective from the linear estimate on."""
        x, components, z, y = estimate.coefficients.shape
        voxels = prod(min(self.block, n) for n in (x, z, y))
        threshold = estimate.noise_threshold(components, voxels)
        penalty = BlockLowRank(self.weight * threshold, (self.block,) * 3)
        generator = torch.Generator().manual_seed(seed)
        if self.algorithm == "fista":
            return self._fista(estimate, penalty, generator)
        return self._reweighted(estimate, penalty, generator, progress)

    def _shift(self, penalty: BlockLowRank, u: Tensor, generator: torch.Generator) -> tuple[int, int, int]:
        return penalty.random_shift(u.shape, generator) if self.random_shifts else (0, 0, 0)

    def _reweighted(
        self,
        estimate: CoefficientEstimate,
        penalty: BlockLowRank,
        generator: torch.Generator,
        progress: Progress,
    ) -> Tensor:
        operator, prior, share, u = estimate.operator, estimate.prior, self.field_share, estimate.coefficients
        for number in range(self.rounds):
            progress("locally low rank", number / self.rounds)
            blocks = penalty.mean_reweighting(
                u,
                self.smoothing * estimate.image_noise,
                self.tilings,
                generator if self.random_shifts else None,
            )
            preconditioner = estimate.preconditioner(blocks.diagonal(u), share)

            def normal(image: Tensor, blocks: BlockPrecision = blocks) -> Tensor:
                total = operator(image) + blocks(image)
                return total + share * prior.precision(image) if share else total

            u = self.settle(
                operator, estimate.noise, normal, estimate.data, preconditioner, self.iterations, u
            )
        return u

    def _fista(
        self, estimate: CoefficientEstimate, penalty: BlockLowRank, generator: torch.Generator
    ) -> Tensor:
        operator, start = estimate.operator, estimate.coefficients
        step = 1 / (1.05 * largest_eigenvalue(operator, start, generator))

        def agrees(image: Tensor, _iteration: int) -> bool:
            if not self.discrepancy:
                return False
            return estimate.residual_to_noise(image) <= self.discrepancy

        return fista(
            lambda image: operator(image) - estimate.data,
            lambda image, size: penalty.proximal(image, float(size), self._shift(penalty, image, generator)),
            start,
            step,
            iterations=self.fista_iterations,
            tolerance=self.change,
            stop=agrees,
        )


@dataclass(frozen=True)
class LocallyLowRank(LowRankBlocks, CartesianSolver):
    """Settings for Cartesian scans."""

    name: ClassVar[str] = "llr"


@dataclass(frozen=True)
class FingerprintLocallyLowRank(LowRankBlocks, FingerprintSolver):
    """Settings for fingerprints."""

    name: ClassVar[str] = "llr"
