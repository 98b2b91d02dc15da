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

Methods whose ``neighbourhood`` is not 0 make a fourth, with the variances around each voxel in place of the
whole object's: what is rare, such as fluid, is then not drawn to what is common.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

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
from quantitron.recon.signal_energy import centre_energy, smoothed_energy
from quantitron.recon.solvers.coefficient_solver import CoefficientEstimate, CoefficientSolver
from quantitron.recon.solvers.solver import Progress


@dataclass(frozen=True)
class LinearEstimate(CoefficientEstimate):
    """The linear estimate of a Cartesian scan."""

    operator: ReducedSense
    """A^H A in the learnt basis, the field map taken out."""
    basis: CoefficientBasis
    """The learnt basis: its components are uncorrelated over the object, with their variances."""
    b0: Tensor
    """(z, y, x) [Hz] field map."""
    problem: Problem
    """The slice, for its protocol and its basis over the contrasts."""


@dataclass(frozen=True)
class CartesianSolver(CoefficientSolver):
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
    t1_range: tuple[float, float] = field(default=TISSUE_RANGE["t1"], metadata={"above": 0})
    """T1 [s] of the tissue that is expected; widen it for phantoms with shorter ones."""
    t2_range: tuple[float, float] = field(default=TISSUE_RANGE["t2"], metadata={"above": 0})
    """T2 [s] that is expected."""
    t2star_range: tuple[float, float] = field(default=TISSUE_RANGE["t2star"], metadata={"above": 0})
    """T2* [s] that is expected."""
    mask_threshold: float = field(default=0.05, metadata={"minimum": 0, "below": 1})
    """Amplitude below this share of the brightest tissue counts as background."""
    standard_deviations: bool = False
    """Whether maps of the standard deviations are delivered too."""
    efficiency: str = field(default="mean", metadata={"choices": ("mean", "agreement")})
    """Where an inversion efficiency that the header does not tell comes from: ``mean`` of fits that leave it
    free in each voxel, which noise and short T1 bias; ``agreement`` of neighbours, which errors of the images
    move where few excitations tell little of it. It is that of the maps: ``mri2qmap`` matches at the mean."""

    def __post_init__(self) -> None:
        """Refuse ranges that are none.

        Raises:
            ValueError: if the end of a range is not above its start.
        """
        super().__post_init__()
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
        raise NotImplementedError(f"{type(self).__name__} has no refine")

    def solve(self, problem: Problem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slice; yields the final maps only."""
        estimate = self.linear_estimate(problem, progress)
        coefficients = self.refined(
            self.refine(estimate, problem.seed, lambda doing, share: progress(doing, 0.4 + 0.45 * share)),
            estimate,
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
            components=estimate.basis,
            noise_variance=estimate.image_noise**2,
            agreement=self.efficiency == "agreement",
        )

    def linear_estimate(self, problem: Problem, progress: Progress) -> LinearEstimate:
        """All passes."""
        protocol, reduced = problem.protocol, problem.reduced
        noise = 1.0 if problem.noise_known else noise_variance(reduced)
        ranges = {**TISSUE_RANGE, "t1": self.t1_range, "t2": self.t2_range, "t2star": self.t2star_range}
        wide = coefficient_basis(reduced.basis, protocol, self.field_range, self.first_rank, ranges)
        progress("coil maps", 0.0)
        csm = coil_maps(reduced, problem.calibration, wide, noise).to(problem.device)

        progress("first pass", 0.1)
        operator = ReducedSense(reduced, csm, wide.mixing.to(problem.device))
        energy = centre_energy(reduced, wide, noise)  # (z, y, x)
        expected = self.expected(wide, energy, self.dictionary_regularisation, noise, problem)
        # What it is for, energy and field, is there long before the equations are met.
        coefficients = replace(self, most_iterations=1).solve_with_prior(
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
        """From the second pass on: learn the basis from the scan, and estimate in it.

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
        prior = self.expected(basis, energy, self.dictionary_regularisation, noise, problem)
        start = None
        if self.learning_iterations:
            start = self.solve_with_prior(operator, data, prior, noise, self.learning_iterations)
            energy = smoothed_energy(echo_images(start.cpu(), basis))
            basis, rotation = learnt_basis(basis, start.cpu(), energy.permute(2, 0, 1), mask.permute(2, 0, 1))
            turn = rotation.mH.to(start)  # (new k, k)
            start, data = (torch.einsum("jk,xkzy->xjzy", turn, images) for images in (start, data))
            operator = operator.in_basis(basis.mixing)
            prior = self.expected(basis, energy, self.regularisation, noise, problem)

        progress("third pass", 0.3)
        coefficients = self.solve_with_prior(operator, data, prior, noise, self.linear_iterations, start)
        dz, dy, dx = problem.encoding.voxel_size
        estimate = LinearEstimate(
            operator=operator,
            data=data,
            coefficients=coefficients,
            basis=basis,
            noise=noise,
            prior=prior,
            voxel_size=(dx, dz, dy),
            b0=b0,
            problem=problem,
            mask=mask,
        )
        return self.learnt_around(estimate)
