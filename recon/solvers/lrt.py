"""Low-rank tensor: contrast and echo axes of low rank each in every neighbourhood, and total variation.

    minimise over U:   1/2 ||s - A U||^2 + field_share Q(U) + TV(U)
                       + sum_b ( ||T_b(U)_(contrast)||_* + ||T_b(U)_(echo)||_* )

A holds sampling, Fourier transform, coils, field and basis (the linear estimate brings them all), Q is the
Gaussian prior and TV the joint total variation of ``lrtv.py``. The images over (voxel, contrast, echo) are a
tensor of Tucker form: its factors along contrast and echo are found by a higher-order SVD of the linear
estimate (He 2016 finds them in training data), and in each block of voxels the core T_b, unfolded along
either of them, should be of low rank still (sum of nuclear norms: Liu 2013). Solved by the alternating
direction method of multipliers with conjugate gradients inside, as in He 2016. Weights are in units of the
noise. METHODS 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.algorithms.admm import admm
from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient
from quantitron.recon.priors.low_rank_tensor import TuckerBasis, UnfoldedLowRank
from quantitron.recon.solvers.cartesian import CartesianSolver, LinearEstimate
from quantitron.recon.solvers.coefficient_solver import LEAST_TOLERANCE
from quantitron.recon.solvers.lrtv import SPLITTING_PENALTY
from quantitron.recon.solvers.solver import Progress


@dataclass(frozen=True)
class LowRankTensor(CartesianSolver):
    """Settings of the low-rank tensor reconstruction."""

    name: ClassVar[str] = "lrt"

    linear_iterations: int = field(default=4, metadata={"minimum": 1})
    """Conjugate gradient steps of the linear estimate's passes: only a start is wanted here."""
    neighbourhood: float = field(default=1.0, metadata={"minimum": 0})
    """Of the linear estimate's prior [voxels]: see there."""
    field_share: float = field(default=0.5, metadata={"minimum": 0})
    """Share of the linear estimate's prior that is kept."""
    total_variation: float = field(default=0.07, metadata={"above": 0})
    """Factor on total variation, whose scale follows from the noise and the edges of the scan."""
    weight: float = field(default=0.03, metadata={"above": 0})
    """Threshold of the unfoldings' singular values, in units of the largest one of pure noise."""
    block: int = field(default=4, metadata={"minimum": 1})
    """Edge of a block [voxels]."""
    tensor_rank: int | float = field(default=0.999999, metadata={"above": 0})
    """Length of the core along contrast and echo: a number, or the share of the energy to keep along each."""
    rounds: int = field(default=6, metadata={"minimum": 1})
    """Rounds of the splitting, at least."""
    most_rounds: int = field(default=30, metadata={"minimum": 1})
    """Rounds at most."""
    iterations: int = field(default=3, metadata={"minimum": 1})
    """Conjugate gradient steps in each of them."""
    change: float = field(default=0.5, metadata={"minimum": 0})
    """Change of the images in a round at which it ends, in units of the noise in an image."""

    def refine(self, estimate: LinearEstimate, seed: int, progress: Progress) -> Tensor:
        """Minimise the objective from the linear estimate on."""
        operator, noise = estimate.operator, estimate.noise
        prior, share = estimate.prior, self.field_share
        generator = torch.Generator().manual_seed(seed)
        edges = estimate.total_variation(self.total_variation)
        tensor = TuckerBasis(
            estimate.basis.mixing.to(estimate.coefficients),
            estimate.inside(estimate.coefficients),  # (v, k)
            self.tensor_rank,
        )
        low_rank = [self._unfolded(estimate, tensor.lengths, axis) for axis in (0, 1)]
        # Split variables in units of their own: differences of their typical size, coefficients of the noise.
        unit = 1 / estimate.image_noise
        scale = SPLITTING_PENALTY * noise
        images = estimate.coefficients
        split = 3 * images.numel()
        core = tensor.core(images)

        def stack(u: Tensor) -> Tensor:
            part = (unit * tensor.core(u)).flatten()
            return torch.cat([edges.operator(u).flatten(), part, part])

        def unstack(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            first, second = v[split:].chunk(2)
            return v[:split].reshape(3, *images.shape), first.reshape(core.shape), second.reshape(core.shape)

        def proximal(v: Tensor, step: float) -> Tensor:
            differences, *unfoldings = unstack(v)
            shift = low_rank[0].random_shift(core.shape, generator)
            shrunk = [
                penalty.proximal(part, step / unit, shift)
                for penalty, part in zip(low_rank, unfoldings, strict=True)
            ]
            return torch.cat([part.flatten() for part in (edges.shrink(differences, step), *shrunk)])

        ones = torch.ones_like(images[:, :1].real)
        diagonal = (
            operator.mean_diagonal()[:, None, None]
            + scale * (0.3 * edges.diagonal(ones) + 2 * unit**2)
            + 0.3 * share * prior.diagonal()
        )

        def closest(v: Tensor, factor: float, last: Tensor) -> Tensor:
            differences, first, second = unstack(v)
            target = edges.adjoint(differences) + unit * tensor.images(first + second)
            return conjugate_gradient(
                lambda u: (
                    operator(u)
                    + factor
                    * (edges.adjoint(edges.operator(u)) + 2 * unit**2 * tensor.images(tensor.core(u)))
                    + (share * prior.precision(u) if share else 0.0)
                ),
                estimate.data + factor * target,
                start=last,
                preconditioner=lambda residual: residual / diagonal,
                iterations=self.iterations,
                tolerance=LEAST_TOLERANCE,
            )

        settled = self.change * estimate.image_noise * images.numel() ** 0.5
        previous = images

        def stop(u: Tensor, iteration: int) -> bool:
            nonlocal previous
            progress("low-rank tensor", min(1.0, (iteration + 1) / self.rounds))
            change, previous = float((u - previous).norm()), u
            return iteration + 1 >= self.rounds and change <= settled

        return admm(
            closest,
            proximal,
            images,
            operator=stack,
            penalty=scale,
            iterations=max(self.rounds, self.most_rounds),
            tolerance=0.0,
            stop=stop,
        ).x

    def _unfolded(self, estimate: LinearEstimate, lengths: tuple[int, int], axis: int) -> UnfoldedLowRank:
        x, _, z, y = estimate.coefficients.shape
        voxels = prod(min(self.block, n) for n in (x, z, y))
        threshold = estimate.noise_threshold(lengths[axis], voxels * lengths[1 - axis])
        return UnfoldedLowRank(self.weight * threshold, self.block, axis)
