"""What the solvers of fingerprints share: coil maps, a learnt basis, a first estimate, matching.

    minimise over U:   1/2 sum_t ||s_t - F_t C Psi_t U||^2 + regularisation noise / 2 ||U||_P^2

F_t is the Fourier transform to the trajectory of time point t, U the coefficient images in the dictionary's
basis Psi and P the covariance expected of them: at each voxel that of the components times the signal energy
there, between voxels a correlation over some millimetres. As for Cartesian scans (``cartesian.py``) a first
estimate with the dictionary's variances tells those of the scan, and the axes of its signals; the second is
made with them. Readouts of equal trajectory are summed beforehand and A^H A is a convolution: no step depends
on the number of time points (METHODS 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.coefficient_basis import CoefficientBasis, learnt_basis
from quantitron.recon.coils import energy_on_grid
from quantitron.recon.data import FingerprintProblem, Maps
from quantitron.recon.fingerprint_basis import fingerprint_basis
from quantitron.recon.fingerprint_maps import fingerprint_maps
from quantitron.recon.masks import signal_mask
from quantitron.recon.noise import trajectory_noise_variance
from quantitron.recon.operators.toeplitz import ToeplitzSense
from quantitron.recon.signal_energy import smoothed_energy, with_floor
from quantitron.recon.solvers.coefficient_solver import CoefficientEstimate, CoefficientSolver
from quantitron.recon.solvers.solver import Progress, Solver
from quantitron.recon.trajectory_coils import centre_block, trajectory_coil_maps
from quantitron.recon.trajectory_gram import sum_readouts
from quantitron.recon.trajectory_sums import TrajectorySums

LEAST_COMPONENTS = 3
"""T1, T2 and PD take as many numbers: fewer components fit one tissue as well as another."""


@dataclass(frozen=True)
class Prepared:
    """What a scan tells before any estimate."""

    sums: TrajectorySums
    """The data, readouts of equal trajectory summed."""
    basis: CoefficientBasis
    """The dictionary's, mixing (1, l, k), turned to the principal axes of tissue."""
    noise: float
    """Variance of one complex sample."""
    csm: Tensor
    """(x, c, z, y) coil maps."""
    energy: Tensor
    """(z, y, x) signal energy of each voxel, of low resolution, from the k-space centre."""


@dataclass(frozen=True)
class FingerprintEstimate(CoefficientEstimate):
    """The linear estimate of a fingerprint scan."""

    operator: ToeplitzSense
    """A^H A in the learnt basis."""
    basis: CoefficientBasis
    """The learnt basis, mixing (1, l, k): its components are uncorrelated over the object."""
    problem: FingerprintProblem
    """The slice, for its dictionary."""


@dataclass(frozen=True)
class FingerprintMethod(Solver):
    """Settings of what comes before and after the coefficient images, whatever makes those."""

    sequences: ClassVar[tuple[str, ...]] = ("fisp_mrf",)

    t1_range: tuple[float, float] = field(default=(0.4, 4.5), metadata={"above": 0})
    """T1 [s] of the tissue that is expected. It sets variances before any are known and, where few components
    are kept, which: tissue outside of the range is matched all the same, with more noise."""
    t2_range: tuple[float, float] = field(default=(0.03, 2.0), metadata={"above": 0})
    """T2 [s] that is expected; likewise."""
    mask_threshold: float = field(default=0.05, metadata={"minimum": 0, "below": 1})
    """Amplitude below this share of the brightest tissue counts as background."""
    match_groups: int = field(default=256, metadata={"minimum": 0})
    """Groups of atoms for fast matching (Cauley 2015); 0 compares with every atom."""
    off_grid: bool = True
    """Whether T1 and T2 are refined between the dictionary's values."""
    standard_deviations: bool = False
    """Whether maps of the standard deviations are delivered too."""

    def __post_init__(self) -> None:
        """Refuse ranges that are none.

        Raises:
            ValueError: if the end of a range is not above its start.
        """
        for name in ("t1_range", "t2_range"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name} runs from {low:g} to {high:g} s; its end must be above its start")

    def prepare(self, problem: FingerprintProblem, progress: Progress) -> Prepared:
        """Sum the readouts, and find what the scan tells without an estimate."""
        progress("summing readouts", 0.0)
        sums = sum_readouts(problem.kspace, problem.basis)
        noise = 1.0 if problem.noise_known else trajectory_noise_variance(sums, problem.kspace)
        basis = fingerprint_basis(
            problem.basis, problem.dictionary, {"t1": self.t1_range, "t2": self.t2_range}, problem.b1
        )
        progress("coil maps", 0.02)
        centre = centre_block(sums, basis, noise)
        csm = trajectory_coil_maps(sums, basis, noise, problem.calibration, centre)
        energy = energy_on_grid(centre, sums.grid)  # (z, y, x)
        return Prepared(sums, basis, noise, csm.to(problem.device), with_floor(energy))

    def matched(
        self,
        coefficients: Tensor,
        basis: CoefficientBasis,
        problem: FingerprintProblem,
        residual_to_noise: float = float("nan"),
        noise_variance: float | None = None,
    ) -> Maps:
        """The final maps: the dictionary's best match to the coefficients of each voxel.

        Args:
            coefficients: U (x, k, z, y).
            basis: of U, mixing (1, l, k).
            problem: the slice.
            residual_to_noise: of U, handed on.
            noise_variance: of each coefficient, for the standard deviations; None: from the fit's residual.
        """
        return fingerprint_maps(
            coefficients.cpu(),
            basis.mixing[0].cpu(),
            problem,
            mask_threshold=self.mask_threshold,
            groups=self.match_groups,
            refine=self.off_grid,
            rank=basis.rank,
            retained_energy=basis.retained_energy,
            residual_to_noise=residual_to_noise if problem.noise_known else float("nan"),
            standard_deviations=self.standard_deviations,
            noise_variance=noise_variance,
        )


@dataclass(frozen=True)
class FingerprintSolver(CoefficientSolver, FingerprintMethod):
    """Settings of the linear estimate; a subclass makes its own of that."""

    learning_iterations: int = field(default=12, metadata={"minimum": 0})
    """Conjugate gradient steps of the first pass, from which the basis is learnt; 0: the dictionary's."""
    detectable: float = field(default=0.03, metadata={"minimum": 0})
    """Expected energy of a component over that of the noise in its image, below which it is left out: it
    would come out as nothing, and all steps cost as much as there are components. Methods that ask the
    dictionary what an image must hold find more."""

    def refine(self, estimate: FingerprintEstimate, seed: int, progress: Progress) -> Tensor:
        """Coefficient images (x, k, z, y) of this method.

        Args:
            estimate: where to start.
            seed: of everything random.
            progress: takes the share of the refinement alone, 0..1.
        """
        raise NotImplementedError(f"{type(self).__name__} has no refine")

    def solve(self, problem: FingerprintProblem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slice; yields the final maps only."""
        estimate = self.linear_estimate(problem, progress)
        coefficients = self.refined(
            self.refine(estimate, problem.seed, lambda doing, share: progress(doing, 0.4 + 0.45 * share)),
            estimate,
        )
        residual = estimate.residual_to_noise(coefficients)
        progress("matching", 0.85)
        yield self.matched(coefficients, estimate.basis, problem, residual, estimate.image_noise**2)
        progress("done", 1.0)

    def linear_estimate(self, problem: FingerprintProblem, progress: Progress) -> FingerprintEstimate:
        """All passes."""
        prepared = self.prepare(problem, progress)
        noise, energy = prepared.noise, prepared.energy
        density = _mean_density(prepared.sums)
        basis = _detectable(prepared.basis, energy * density / noise, self.detectable / 10)
        progress("point spread functions", 0.1)
        operator = ToeplitzSense(prepared.sums, prepared.csm, basis.mixing[0].to(problem.device))
        data = operator.adjoint_data()
        progress("first pass", 0.15)
        prior = self.expected(basis, energy, self.dictionary_regularisation, noise, problem)
        start = None
        if self.learning_iterations:
            start = self.solve_with_prior(operator, data, prior, noise, self.learning_iterations)
            images = torch.einsum("lk,xkzy->lzyx", basis.mixing[0], start.cpu())
            energy = smoothed_energy(images[None])
            mask = signal_mask(energy.sqrt(), self.mask_threshold)
            basis, rotation = learnt_basis(basis, start.cpu(), energy.permute(2, 0, 1), mask.permute(2, 0, 1))
            curvature = float(operator.mean_diagonal().mean())
            basis = _detectable(basis, energy * curvature / noise, self.detectable)
            turn = rotation[:, : basis.rank].mH.to(start)  # (new k, k)
            start, data = (torch.einsum("jk,xkzy->xjzy", turn, images) for images in (start, data))
            progress("point spread functions", 0.23)
            del operator  # most of the memory: never the kernels of both
            operator = ToeplitzSense(prepared.sums, prepared.csm, basis.mixing[0].to(problem.device))
            prior = self.expected(basis, energy, self.regularisation, noise, problem)
        mask = signal_mask(energy.sqrt(), self.mask_threshold)
        progress("second pass", 0.25)
        coefficients = self.solve_with_prior(operator, data, prior, noise, self.linear_iterations, start)
        dz, dy, dx = problem.encoding.voxel_size
        estimate = FingerprintEstimate(
            operator=operator,
            data=data,
            coefficients=coefficients,
            basis=basis,
            problem=problem,
            noise=noise,
            prior=prior,
            voxel_size=(dx, dz, dy),
            mask=mask,
        )
        return self.learnt_around(estimate)


def _detectable(basis: CoefficientBasis, signal_to_noise: Tensor, least: float) -> CoefficientBasis:
    """The leading components that stand out from the noise, and as many as maps take at least.

    Args:
        basis: mixing (1, l, k), strongest first.
        signal_to_noise: (z, y, x) energy of all components over the noise's of one.
        least: of the energy of a component over the noise's, in the brighter half of the object.
    """
    bright = float(signal_to_noise[signal_to_noise >= signal_to_noise.mean()].mean())
    kept = max(LEAST_COMPONENTS, int((basis.variance / basis.variance.sum() * bright > least).sum()))
    kept = min(kept, basis.rank)
    share = float(basis.variance[:kept].sum() / basis.variance.sum())
    return CoefficientBasis(basis.mixing[:, :, :kept], basis.variance[:kept], basis.retained_energy * share)


def _mean_density(sums: TrajectorySums) -> float:
    """Samples of a channel over voxels and time points: the mean diagonal of A^H A for even sampling."""
    time_points, coils = sums.basis.contrast.shape[0], sums.projected.channels
    return sums.samples / (coils * math.prod(sums.grid) * time_points)
