"""What all solvers of coefficient images share: an estimate to start from, and the steps that settle one.

    minimise over U:   1/2 ||s - A U||^2 + penalties

A holds sampling, Fourier transform, coils and basis; it is made in one way for scans on a Cartesian grid
(``cartesian.py``), in another for those on any trajectory (``fingerprint.py``). A method that is written in
terms of the estimate alone works for both: see ``llr.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient
from quantitron.recon.coefficient_basis import CoefficientBasis
from quantitron.recon.data import FingerprintProblem, Problem
from quantitron.recon.operators.spectral_preconditioner import SpectralPreconditioner
from quantitron.recon.operators.toeplitz import ToeplitzSense
from quantitron.recon.priors.finite_difference import FiniteDifference
from quantitron.recon.priors.gaussian_field import GaussianField
from quantitron.recon.priors.total_variation import JointTotalVariation
from quantitron.recon.solvers.solver import Solver

LEAST_TOLERANCE = 1e-4
"""Relative residual below which no more is asked of single precision."""
LEAST_DENSITY = 1e-3
"""Of the sampling, over the mean one, below which a preconditioner counts no frequency."""
SMOOTH = 0.3
"""Share of its mean that the prior's curvature weighs in smooth images (0.1 to 1 were tried)."""
EXPECTATION_VOXELS = 10.0
"""Voxels of evidence that the whole object counts for where variances are learnt around each voxel."""


Preconditioner = Callable[[Tensor], Tensor]
"""Residuals (x, k, z, y) to steps."""


class NormalOperator(Protocol):
    """A^H A of a scan in a subspace, (x, k, z, y) -> (x, k, z, y), and what else the data term is made of."""

    def __call__(self, x: Tensor) -> Tensor:
        """A^H A U."""
        ...

    def mean_diagonal(self) -> Tensor:
        """(k,) mean over the voxels of the diagonal of A^H A."""
        ...

    def residual_energy(self, coefficients: Tensor, adjoint_data: Tensor | None = None, /) -> float:
        """||s - A U||^2 for U (x, k, z, y) and, where it is at hand, A^H s."""
        ...

    @property
    def samples(self) -> int:
        """Complex samples acquired."""
        ...


@dataclass(frozen=True)
class CoefficientEstimate:
    """An estimate of the coefficient images and all that it was made of; iterative methods start here."""

    operator: NormalOperator
    """A^H A in the basis of the coefficients."""
    data: Tensor
    """(x, k, z, y) complex: A^H s."""
    coefficients: Tensor
    """(x, k, z, y) complex: the estimate U."""
    noise: float
    """Variance of one complex sample."""
    prior: GaussianField
    """What was expected of U: the penalty beside the data term is 1/2 <U, prior.precision(U)>."""
    voxel_size: tuple[float, float, float]
    """Edges [m] along (x, z, y)."""
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

    def proximal(
        self, target: Tensor, penalty: float, start: Tensor | None, iterations: int, share: float
    ) -> Tensor:
        """U that minimises 1/2 ||s - A U||^2 + share/2 <U, prior.precision(U)> + penalty/2 ||U - target||^2.

        Args:
            target: (x, k, z, y) where U is pulled to.
            penalty: how strongly; 0 not at all.
            start: where conjugate gradients begin; None: at zero.
            iterations: most steps of them.
            share: of the prior of the linear estimate that is kept.
        """
        operator, prior = self.operator, self.prior
        return conjugate_gradient(
            lambda u: operator(u) + penalty * u + (share * prior.precision(u) if share else 0.0),
            self.data + penalty * target,
            start=start,
            preconditioner=self.preconditioner(penalty, share),
            iterations=iterations,
            tolerance=LEAST_TOLERANCE,
        )

    def preconditioner(self, penalties: Tensor | float, share: float) -> Preconditioner:
        """Of the data term and penalties: in the density of the sampling where there is a trajectory.

        Args:
            penalties: (x, k, z, y) real, diagonal of their curvature, without the prior's.
            share: of the linear estimate's prior among them. Its curvature spans decades; where it stands
                alone a factor for each voxel is better (``CoefficientSolver.solve_with_prior``).
        """
        weight = penalties + SMOOTH * share * self.prior.diagonal()  # (x, k, z, y)
        if self.spectrum is not None and bool((weight > 0).all()):
            mask = self.mask.permute(2, 0, 1).to(weight.device)  # (x, z, y)
            return SpectralPreconditioner(self.spectrum, weight, mask)
        diagonal = self.operator.mean_diagonal()[:, None, None] + weight
        return lambda residual: residual / diagonal

    @cached_property
    def spectrum(self) -> Tensor | None:
        """(x, k, z, y) what the data term does to waves, above zero; None for scans on a Cartesian grid."""
        if not isinstance(self.operator, ToeplitzSense):
            return None
        spectrum = self.operator.spectrum()
        return spectrum.clamp_min(LEAST_DENSITY * float(spectrum.mean()))

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
        residual = self.operator.residual_energy(coefficients, self.data)
        return residual / (self.operator.samples * self.noise)


AnyEstimate = TypeVar("AnyEstimate", bound=CoefficientEstimate)


@dataclass(frozen=True)
class CoefficientSolver(Solver):
    """Settings of the steps by which coefficient images are found."""

    linear_iterations: int = field(default=10, metadata={"minimum": 1})
    """Conjugate gradient steps of the last pass of the linear estimate."""
    most_iterations: int = field(default=60, metadata={"minimum": 1})
    """Most steps of any pass; above the numbers of steps, which are the least, until the tolerance is met."""
    tolerance: float = field(default=6.0, metadata={"minimum": 0})
    """Residual of the equations at which steps end, in units of what noise alone puts into their right side.

    Scans of low noise take more steps: more of what the equations say is true."""
    dictionary_regularisation: float = field(default=4.0, metadata={"above": 0})
    """Factor on the penalty as long as the variances are the dictionary's."""
    regularisation: float = field(default=1.0, metadata={"above": 0})
    """Factor on the penalty of the last pass; 1 is the statistical estimate if the prior is exact."""
    correlation_length: float = field(default=8e-3, metadata={"minimum": 0})
    """Length [m] over which coefficients are expected to be alike; 0 makes voxels independent."""
    neighbourhood: float = field(default=0.0, metadata={"minimum": 0})
    """Standard deviation [voxels of the shortest edge] of the neighbourhood whose variances a last pass
    expects in each voxel; 0 takes those of the whole object everywhere, and there is no such pass."""

    def refined(self, coefficients: Tensor, estimate: CoefficientEstimate) -> Tensor:
        """What ``refine`` gave, if it is an estimate of the same coefficient images.

        Args:
            coefficients: of ``refine``.
            estimate: that it began with.

        Raises:
            ValueError: if it is something else, or holds a value that is not finite: one makes every voxel
                look like background.
        """
        start = estimate.coefficients
        if not isinstance(coefficients, Tensor):
            raise ValueError(f"refine gave {type(coefficients).__name__}, not coefficient images")
        if coefficients.shape != start.shape or coefficients.dtype != start.dtype:
            found, wanted = (f"{tuple(one.shape)} of {one.dtype}" for one in (coefficients, start))
            raise ValueError(f"refine gave coefficient images (x, k, z, y) {found}, where they are {wanted}")
        if not bool(coefficients.isfinite().all()):
            raise ValueError("refine gave coefficient images with values that are not finite")
        return coefficients

    def expected(
        self,
        basis: CoefficientBasis,
        energy: Tensor,
        regularisation: float,
        noise: float,
        problem: Problem | FingerprintProblem,
    ) -> GaussianField:
        """What is expected of U, in units of the noise.

        Args:
            basis: of U, for the variances of its components.
            energy: (z, y, x) signal energy of each voxel.
            regularisation: factor on the penalty.
            noise: variance of one sample.
            problem: the slice, for its voxels and its device.
        """
        dz, dy, dx = problem.encoding.voxel_size
        variance = basis.variance[:, None, None] * energy.permute(2, 0, 1)[:, None]  # (x, k, z, y)
        variance = (variance / (regularisation * noise)).to(problem.device)
        return GaussianField(variance, (dx, dz, dy), self.correlation_length)

    def learnt_around(self, estimate: AnyEstimate) -> AnyEstimate:
        """The estimate once more, with the variances that each voxel's neighbourhood showed in the first.

        Args:
            estimate: the linear estimate with variances of the whole object.

        Returns:
            The same where ``neighbourhood`` is 0.
        """
        if self.neighbourhood == 0:
            return estimate
        # The prior counts in units of the noise.
        unit = (self.regularisation * estimate.noise) ** 0.5
        prior = estimate.prior.learnt_around(
            estimate.coefficients / unit, self.neighbourhood, EXPECTATION_VOXELS
        )
        coefficients = self.solve_with_prior(
            estimate.operator,
            estimate.data,
            prior,
            estimate.noise,
            self.linear_iterations,
            estimate.coefficients,
        )
        return replace(estimate, prior=prior, coefficients=coefficients)

    def settle(
        self,
        operator: NormalOperator,
        noise: float,
        normal: Callable[[Tensor], Tensor],
        right_hand_side: Tensor,
        preconditioner: Preconditioner,
        iterations: int,
        start: Tensor | None = None,
    ) -> Tensor:
        """Conjugate gradients until the residual is small against the noise.

        Args:
            operator: A^H A, for the noise that it puts into A^H s.
            noise: variance of one sample.
            normal: the equations' left side, A^H A and penalties.
            right_hand_side: (x, k, z, y).
            preconditioner: about the inverse of the left side.
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
            preconditioner=preconditioner,
            iterations=max(iterations, self.most_iterations),
            tolerance=max(LEAST_TOLERANCE, self.tolerance * noise_norm / norm if norm > 0 else 0.0),
            least=iterations,
        )

    def solve_with_prior(
        self,
        operator: NormalOperator,
        data: Tensor,
        prior: GaussianField,
        noise: float,
        iterations: int,
        start: Tensor | None = None,
    ) -> Tensor:
        """Coefficient images (x, k, z, y) of least expected error.

        Args:
            operator: A^H A.
            data: A^H s (x, k, z, y).
            prior: what is expected of them.
            noise: variance of one sample.
            iterations: least number of steps.
            start: where to begin.
        """
        # A weight below that of the diagonal suits the smooth images that come first.
        diagonal = operator.mean_diagonal()[:, None, None] + SMOOTH * prior.diagonal()  # (x, k, z, y)
        return self.settle(
            operator,
            noise,
            lambda u: operator(u) + prior.precision(u),
            data,
            lambda residual: residual / diagonal,
            iterations,
            start,
        )
