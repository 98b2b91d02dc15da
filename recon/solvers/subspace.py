"""Linear subspace reconstruction, off-resonance taken out of the basis: the fast baseline and preview.

    minimise over U:   1/2 sum_t ||s_t - M_t F C D_t Phi_t U||^2 + regularisation noise / 2 ||U||_P^2

U are the coefficient images, D_t = exp(2 pi j b0 TE_t) the phase of a field map that a first pass finds with
a basis wide enough to span it, and P the covariance expected of U: at each voxel the dictionary's variance of
component k times the signal energy there, which a low-resolution image of the k-space centre gives and the
first pass refines; between voxels a correlation over some millimetres. This is the linear
minimum-mean-square-error estimate under that prior, up to the factor ``regularisation``. METHODS 1, 3, 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient
from quantitron.recon.coefficient_basis import (
    TISSUE_RANGE,
    CoefficientBasis,
    coefficient_basis,
    echo_images,
)
from quantitron.recon.coils import coil_maps
from quantitron.recon.data import Maps, Problem
from quantitron.recon.field_map import field_map
from quantitron.recon.masks import signal_mask
from quantitron.recon.noise import noise_variance
from quantitron.recon.operators.reduced_sense import ReducedSense
from quantitron.recon.parameter_maps import parameter_maps
from quantitron.recon.priors.gaussian_field import GaussianField
from quantitron.recon.signal_energy import centre_energy, smoothed_energy
from quantitron.recon.solvers.solver import Progress, Solver


@dataclass(frozen=True)
class Subspace(Solver):
    """Settings of the linear subspace reconstruction."""

    name: ClassVar[str] = "subspace"
    sequences: ClassVar[tuple[str, ...]] = ("t2ir_gre", "vfa_gre", "megre")

    rank: int | float = field(default=0.9999, metadata={"above": 0})
    """Coefficient images of the final pass: a number, or the share of the dictionary's energy to keep."""
    first_rank: int | float = field(default=0.999, metadata={"above": 0})
    """The same for the first pass, whose basis must span the whole field."""
    field_range: float = field(default=60.0, metadata={"minimum": 0})
    """Half-width [Hz] of the off-resonances that the first pass spans."""
    residual_field: float = field(default=3.0, metadata={"minimum": 0})
    """Half-width [Hz] of the off-resonances that remain for the final pass."""
    first_iterations: int = field(default=4, metadata={"minimum": 1})
    """Conjugate gradient steps of the first pass."""
    iterations: int = field(default=20, metadata={"minimum": 1})
    """Conjugate gradient steps of the final pass."""
    tolerance: float = field(default=1e-4, metadata={"minimum": 0})
    """Relative residual at which the steps end earlier."""
    regularisation: float = field(default=4.0, metadata={"above": 0})
    """Factor on the penalty; 1 would be the statistical estimate if the prior were exact."""
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

    def solve(self, problem: Problem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slice; yields the final maps only."""
        protocol, reduced, size = problem.protocol, problem.reduced, problem.encoding.voxel_size
        noise = 1.0 if problem.noise_known else noise_variance(reduced)
        wide = coefficient_basis(
            reduced.basis, protocol, self.field_range, self.first_rank, self._tissue_range()
        )
        progress("coil maps", 0.0)
        csm = coil_maps(reduced, problem.calibration, wide, noise).to(problem.device)
        energy = centre_energy(reduced, wide, noise)  # (z, y, x)
        echo_time = torch.tensor(protocol.echo_time)

        progress("first pass", 0.1)
        first = ReducedSense(reduced, csm, wide.mixing.to(problem.device))
        coefficients = self._estimate(first, wide, energy, size, noise, self.first_iterations)
        images = echo_images(coefficients.cpu(), wide)  # (e, l, z, y, x)
        energy = smoothed_energy(images)
        mask = signal_mask(energy.sqrt(), self.mask_threshold)
        b0 = field_map(images, protocol, mask)  # (z, y, x)

        progress("final pass", 0.35)
        narrow = coefficient_basis(
            reduced.basis, protocol, self.residual_field, self.rank, self._tissue_range()
        )
        b0_field = b0.permute(2, 0, 1).to(problem.device)  # (x, z, y)
        final = ReducedSense(
            reduced, csm, narrow.mixing.to(problem.device), b0_field, echo_time, protocol.phase_sign
        )
        data = final.adjoint_data()
        coefficients = self._estimate(final, narrow, energy, size, noise, self.iterations, data)
        residual = final.residual_energy(coefficients, data) / reduced.samples
        images = echo_images(coefficients.cpu(), narrow)

        progress("parameter maps", 0.85)
        yield parameter_maps(
            images,
            b0,
            problem,
            mask_threshold=self.mask_threshold,
            rank=narrow.rank,
            retained_energy=narrow.retained_energy,
            residual_to_noise=residual if problem.noise_known else float("nan"),
            standard_deviations=self.standard_deviations,
        )
        progress("done", 1.0)

    def _tissue_range(self) -> dict[str, tuple[float, float]]:
        return {**TISSUE_RANGE, "t1": self.t1_range, "t2": self.t2_range, "t2star": self.t2star_range}

    def _estimate(
        self,
        operator: ReducedSense,
        basis: CoefficientBasis,
        energy: Tensor,
        voxel_size: tuple[float, float, float],
        noise: float,
        iterations: int,
        data: Tensor | None = None,
    ) -> Tensor:
        """Coefficient images (x, k, z, y) of least expected error."""
        expected = basis.variance[:, None, None] * energy.permute(2, 0, 1)[:, None]  # (x, k, z, y)
        expected = (expected / (self.regularisation * noise)).to(operator.device)
        dz, dy, dx = voxel_size
        prior = GaussianField(expected, (dx, dz, dy), self.correlation_length)
        # A weight below that of the diagonal suits the smooth images that come first (0.1 to 1 were tried).
        diagonal = operator.mean_diagonal()[:, None, None] + 0.3 * prior.diagonal()  # (x, k, z, y)
        return conjugate_gradient(
            lambda u: operator(u) + prior.precision(u),
            operator.adjoint_data() if data is None else data,
            preconditioner=lambda residual: residual / diagonal,
            iterations=iterations,
            tolerance=self.tolerance,
        )
