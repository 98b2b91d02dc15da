"""What the solvers of Cartesian scans share: coil and field maps, a learnt basis, a first estimate.

    minimise over U:   1/2 sum_t ||s_t - M_t F C D_t Phi_t U||^2 + regularisation noise / 2 ||U||_P^2

U are the coefficient images, D_t = exp(2 pi j b0 TE_t) the phase of a field map and P the covariance expected
of U: at each voxel that of the components times the signal energy there, between voxels a correlation over
some millimetres. This is the linear minimum-mean-square-error estimate under that prior. It is made in three
passes, each of which tells the next what it must know (METHODS 1, 3, 4):

1. a basis wide enough to span the whole field gives the field map and the energy of each voxel;
2. with the field taken out, a narrow basis whose variances are the dictionary's gives U;
3. the second moments of that U inside the object replace the dictionary's: the components are turned to the
   principal axes of the signals that are there, each with its own variance (empirical Bayes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient
from quantitron.recon.coefficient_basis import (
    TISSUE_RANGE,
    CoefficientBasis,
    coefficient_basis,
    echo_images,
    learnt_basis,
)
from quantitron.recon.coils import coil_maps
from quantitron.recon.data import Maps, Problem
from quantitron.recon.field_map import field_map
from quantitron.recon.masks import signal_mask
from quantitron.recon.noise import noise_variance
from quantitron.recon.operators.reduced_sense import ReducedSense
from quantitron.recon.parameter_maps import parameter_maps
from quantitron.recon.priors.finite_difference import FiniteDifference
from quantitron.recon.priors.gaussian_field import GaussianField
from quantitron.recon.priors.total_variation import JointTotalVariation
from quantitron.recon.signal_energy import centre_energy, smoothed_energy
from quantitron.recon.solvers.solver import Progress, Solver

LEAST_TOLERANCE = 1e-4
"""Relative residual below which no more is asked of single precision."""


@dataclass(frozen=True)
class LinearEstimate:
    """The linear estimate and all that it was made of; iterative solvers start here."""

    operator: ReducedSense
    """A^H A in the learnt basis, the field map taken out."""
    data: Tensor
    """(x, k, z, y) complex: A^H s."""
    coefficients: Tensor
    """(x, k, z, y) complex: the estimate U."""
    basis: CoefficientBasis
    """The learnt basis: its components are uncorrelated over the object, with their variances."""
    noise: float
    """Variance of one complex sample."""
    prior: GaussianField
    """What was expected of U: the penalty beside the data term is 1/2 <U, prior.precision(U)>."""
    voxel_size: tuple[float, float, float]
    """Edges [m] along (x, z, y)."""
    b0: Tensor
    """(z, y, x) [Hz] field map."""
    mask: Tensor
    """(z, y, x) bool: where there is signal."""

    @property
    def image_noise(self) -> float:
        """Standard deviation of noise in a coefficient image, all points sampled as the mean is."""
        return float((self.noise / self.operator.mean_diagonal().mean()) ** 0.5)

    def total_variation(self, weight: float) -> JointTotalVariation:
        """Joint total variation whose strength follows from the noise and from the edges that are there.

        Differences of component k are counted in units of their root mean square in the object, so that weak
        components share the edges of strong ones. Weight 1 would be the statistical estimate if all
        differences came from one multivariate Laplace distribution.
        """
        axes = max(1, sum(n > 1 for n in self.mask.shape))
        differences = FiniteDifference(self.voxel_size)(self.coefficients)  # (3, x, k, z, y)
        mean = self.inside(differences.abs().square().sum(0)).mean(0) / axes  # (k,)
        floor = float(mean.max()) * 1e-9 or 1.0
        return JointTotalVariation(
            weight * self.noise * (axes * len(mean)) ** 0.5,
            self.voxel_size,
            component_weights=mean.clamp_min(floor).rsqrt(),
        )

    def noise_threshold(self, rows: int, columns: int) -> float:
        """Threshold of singular values, for a penalty beside the data term, that takes pure noise away.

        The largest singular value expected of a matrix of noise (Davidson and Szarek 2001) times the data
        term's curvature.
        """
        curvature = float(self.operator.mean_diagonal().mean())
        return curvature * self.image_noise * float(rows**0.5 + columns**0.5)

    def inside(self, images: Tensor) -> Tensor:
        """Values (v, k) of images (x, k, z, y) in the voxels with signal; in all, where none has."""
        mask = self.mask.permute(2, 0, 1).to(images.device)
        return images.permute(0, 2, 3, 1)[mask if mask.any() else torch.ones_like(mask)]

    def residual_to_noise(self, coefficients: Tensor) -> float:
        """||s - A U||^2 / (samples noise); 1 is pure noise."""
        residual = float(self.operator.residual_energy(coefficients, self.data))
        return residual / (self.operator.samples * self.noise)


@dataclass(frozen=True)
class CartesianSolver(Solver):
    """Settings that all solvers of Cartesian scans share; a subclass makes its own of the linear estimate."""

    sequences: ClassVar[tuple[str, ...]] = ("t2ir_gre", "vfa_gre", "megre")

    rank: int | float = field(default=0.9999, metadata={"above": 0})
    """Coefficient images: a number, or the share of the dictionary's energy to keep."""
    first_rank: int | float = field(default=0.999, metadata={"above": 0})
    """The same for the first pass, whose basis must span the whole field."""
    field_range: float = field(default=60.0, metadata={"minimum": 0})
    """Half-width [Hz] of the off-resonances that the first pass spans."""
    residual_field: float = field(default=3.0, metadata={"minimum": 0})
    """Half-width [Hz] of the off-resonances that remain once the field map is taken out."""
    first_iterations: int = field(default=4, metadata={"minimum": 1})
    """Conjugate gradient steps of the first pass."""
    learning_iterations: int = field(default=12, metadata={"minimum": 0})
    """Conjugate gradient steps of the second pass, from which the basis is learnt; 0: the dictionary's."""
    linear_iterations: int = field(default=10, metadata={"minimum": 1})
    """Conjugate gradient steps of the third pass."""
    most_iterations: int = field(default=60, metadata={"minimum": 1})
    """Most steps of any pass; above the numbers of steps, which are the least, until the tolerance is met."""
    tolerance: float = field(default=6.0, metadata={"minimum": 0})
    """Residual of the equations at which steps end, in units of what noise alone puts into their right side.

    Scans of low noise take more steps: more of what the equations say is true."""
    dictionary_regularisation: float = field(default=4.0, metadata={"above": 0})
    """Factor on the penalty as long as the variances are the dictionary's."""
    regularisation: float = field(default=1.0, metadata={"above": 0})
    """Factor on the penalty of the third pass; 1 is the statistical estimate if the prior is exact."""
    correlation_length: float = field(default=8e-3, metadata={"minimum": 0})
    """Length [m] over which coefficients are expected to be alike; 0 makes voxels independent."""
    t1_range: tuple[float, float] = field(default=TISSUE_RANGE["t1"], metadata={"above": 0})
    """T1 [s] of the tissue that is expected; widen it for phantoms with shorter ones."""
    t2_range: tuple[float, float] = field(default=TISSUE_RANGE["t2"], metadata={"above": 0})
    """T2 [s] that is expected."""
    t2star_range: tuple[float, float] = field(default=TISSUE_RANGE["t2star"], metadata={"above": 0})
    """T2* [s] that is expected."""
    mask_threshold: float = field(default=0.05, metadata={"minimum": 0})
    """Amplitude below this share of the brightest tissue counts as background."""
    standard_deviations: bool = False
    """Whether maps of the standard deviations are delivered too."""

    def __post_init__(self) -> None:
        """Refuse ranges that are none.

        Raises:
            ValueError: if the end of a range is not above its start.
        """
        for name in ("t1_range", "t2_range", "t2star_range"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name} runs from {low:g} to {high:g} s; its end must be above its start")

    def refine(self, estimate: LinearEstimate, seed: int, progress: Progress) -> Tensor:
        """Coefficient images (x, k, z, y) of this method.

        Args:
            estimate: where to start.
            seed: of everything random.
            progress: takes the share of the refinement alone, 0..1.
        """
        raise NotImplementedError  # abstract

    def solve(self, problem: Problem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slice; yields the final maps only."""
        estimate = self.linear_estimate(problem, progress)
        coefficients = self.refine(
            estimate, problem.seed, lambda doing, share: progress(doing, 0.4 + 0.45 * share)
        )
        yield self.maps(estimate, coefficients, problem, progress)
        progress("done", 1.0)

    def maps(
        self, estimate: LinearEstimate, coefficients: Tensor, problem: Problem, progress: Progress
    ) -> Maps:
        """The final maps: those that fit the coefficient images best, voxel by voxel.

        Args:
            estimate: basis, field and data term of the coefficients.
            coefficients: (x, k, z, y) what ``refine`` gave.
            problem: the slice.
            progress: takes the share of the whole, 0..1.
        """
        residual = estimate.residual_to_noise(coefficients)
        progress("parameter maps", 0.85)
        return parameter_maps(
            echo_images(coefficients.cpu(), estimate.basis),
            estimate.b0,
            problem,
            mask_threshold=self.mask_threshold,
            rank=estimate.basis.rank,
            retained_energy=estimate.basis.retained_energy,
            residual_to_noise=residual if problem.noise_known else float("nan"),
            standard_deviations=self.standard_deviations,
        )

    def linear_estimate(self, problem: Problem, progress: Progress) -> LinearEstimate:
        """The three passes."""
        protocol, reduced = problem.protocol, problem.reduced
        noise = 1.0 if problem.noise_known else noise_variance(reduced)
        ranges = {**TISSUE_RANGE, "t1": self.t1_range, "t2": self.t2_range, "t2star": self.t2star_range}
        wide = coefficient_basis(reduced.basis, protocol, self.field_range, self.first_rank, ranges)
        progress("coil maps", 0.0)
        csm = coil_maps(reduced, problem.calibration, wide, noise).to(problem.device)

        progress("first pass", 0.1)
        operator = ReducedSense(reduced, csm, wide.mixing.to(problem.device))
        energy = centre_energy(reduced, wide, noise)  # (z, y, x)
        expected = self._prior(wide, energy, self.dictionary_regularisation, noise, problem)
        # What it is for, energy and field, is there long before the equations are met.
        coefficients = replace(self, most_iterations=1)._solve(
            operator, operator.adjoint_data(), expected, noise, self.first_iterations
        )
        images = echo_images(coefficients.cpu(), wide)  # (e, l, z, y, x)
        energy = smoothed_energy(images)
        mask = signal_mask(energy.sqrt(), self.mask_threshold)
        b0 = field_map(images, protocol, mask)  # (z, y, x)

        progress("second pass", 0.2)
        basis = coefficient_basis(reduced.basis, protocol, self.residual_field, self.rank, ranges)
        operator = ReducedSense(
            reduced,
            csm,
            basis.mixing.to(problem.device),
            b0.permute(2, 0, 1).to(problem.device),  # (x, z, y)
            torch.tensor(protocol.echo_time),
            protocol.phase_sign,
        )
        return self.learnt_estimate(problem, operator, basis, energy, mask, b0, progress)

    def learnt_estimate(
        self,
        problem: Problem,
        operator: ReducedSense,
        basis: CoefficientBasis,
        energy: Tensor,
        mask: Tensor,
        b0: Tensor,
        progress: Progress,
    ) -> LinearEstimate:
        """Second and third pass: learn the basis from the scan, and estimate in it.

        Args:
            problem: the slice.
            operator: in ``basis``, with its coil maps and field.
            basis: of the dictionary.
            energy: (z, y, x) expected signal energy.
            mask: (z, y, x) bool, where there is signal.
            b0: (z, y, x) [Hz], handed on.
            progress: told of the passes.
        """
        noise = 1.0 if problem.noise_known else noise_variance(problem.reduced)
        data = operator.adjoint_data()
        prior = self._prior(basis, energy, self.dictionary_regularisation, noise, problem)
        start = None
        if self.learning_iterations:
            start = self._solve(operator, data, prior, noise, self.learning_iterations)
            energy = smoothed_energy(echo_images(start.cpu(), basis))
            basis, rotation = learnt_basis(basis, start.cpu(), energy.permute(2, 0, 1), mask.permute(2, 0, 1))
            turn = rotation.mH.to(start)  # (new k, k)
            start, data = (torch.einsum("jk,xkzy->xjzy", turn, images) for images in (start, data))
            operator = operator.in_basis(basis.mixing)
            prior = self._prior(basis, energy, self.regularisation, noise, problem)

        progress("third pass", 0.3)
        coefficients = self._solve(operator, data, prior, noise, self.linear_iterations, start)
        dz, dy, dx = problem.encoding.voxel_size
        return LinearEstimate(operator, data, coefficients, basis, noise, prior, (dx, dz, dy), b0, mask)

    def _prior(
        self, basis: CoefficientBasis, energy: Tensor, regularisation: float, noise: float, problem: Problem
    ) -> GaussianField:
        """What is expected of U, in units of the noise, from the energy (z, y, x) of each voxel."""
        dz, dy, dx = problem.encoding.voxel_size
        expected = basis.variance[:, None, None] * energy.permute(2, 0, 1)[:, None]  # (x, k, z, y)
        expected = (expected / (regularisation * noise)).to(problem.device)
        return GaussianField(expected, (dx, dz, dy), self.correlation_length)

    def _solve(
        self,
        operator: ReducedSense,
        data: Tensor,
        prior: GaussianField,
        noise: float,
        iterations: int,
        start: Tensor | None = None,
    ) -> Tensor:
        """Coefficient images (x, k, z, y) of least expected error."""
        # A weight below that of the diagonal suits the smooth images that come first (0.1 to 1 were tried).
        diagonal = operator.mean_diagonal()[:, None, None] + 0.3 * prior.diagonal()  # (x, k, z, y)
        return self.settle(
            operator, noise, lambda u: operator(u) + prior.precision(u), data, diagonal, iterations, start
        )

    def settle(
        self,
        operator: ReducedSense,
        noise: float,
        normal: Callable[[Tensor], Tensor],
        right_hand_side: Tensor,
        diagonal: Tensor,
        iterations: int,
        start: Tensor | None = None,
    ) -> Tensor:
        """Conjugate gradients until the residual is small against the noise.

        Args:
            operator: A^H A, for the noise that it puts into A^H s.
            noise: variance of one sample.
            normal: the equations' left side, A^H A and penalties.
            right_hand_side: (x, k, z, y).
            diagonal: preconditioner, divided by.
            iterations: least number of steps.
            start: where to begin.
        """
        voxels = right_hand_side[:, 0].numel()
        noise_norm = float(noise * voxels * operator.mean_diagonal().sum()) ** 0.5
        norm = float(right_hand_side.norm())
        return conjugate_gradient(
            normal,
            right_hand_side,
            start=start,
            preconditioner=lambda residual: residual / diagonal,
            iterations=max(iterations, self.most_iterations),
            tolerance=max(LEAST_TOLERANCE, self.tolerance * noise_norm / norm if norm > 0 else 0.0),
            least=iterations,
        )
