"""Fingerprinting without iterations: the density-compensated adjoint in the subspace, then matching.

    U = sum_c C_c^* F^H W Psi^H s_c

W are density compensation weights, F the transform onto all distinct readouts (McGivney 2014). What is not
sampled shows as aliasing, which differs from time point to time point and so looks much like noise after the
projection onto Psi, if the order of the interleaves is incoherent. METHODS 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from quantitron.recon.coefficient_basis import CoefficientBasis
from quantitron.recon.data import FingerprintProblem, Maps
from quantitron.recon.operators.density_compensation import density_weights, normalised
from quantitron.recon.operators.toeplitz import adjoint_images
from quantitron.recon.operators.trajectory_residual import residual_energy
from quantitron.recon.solvers.fingerprint import FingerprintMethod, Prepared
from quantitron.recon.solvers.solver import Progress
from quantitron.recon.trajectory_sums import TrajectorySums


@dataclass(frozen=True)
class DensityCompensated(FingerprintMethod):
    """Settings of the density-compensated adjoint."""

    density: str = field(default="auto", metadata={"choices": ("auto", "pipe", "voronoi")})
    """Density compensation: ``auto`` takes the weights that the scan brings, else those of Pipe and Menon.

    ``voronoi`` in 3D takes a minute for 300 000 points that do not lie in planes of constant kz."""

    def weights(self, sums: TrajectorySums) -> Tensor:
        """(n,) density weights of the points."""
        if self.density == "auto" and sums.density is not None:
            return normalised(sums.density, sums.trajectory, sums.grid)
        method = "pipe" if self.density == "auto" else self.density
        return density_weights(sums.trajectory, sums.grid, method)

    def adjoint(self, prepared: Prepared) -> Tensor:
        """U (x, k, z, y), scaled so that a fully sampled scan would give the coefficient images."""
        sums = prepared.sums
        weights = self.weights(sums)
        images = adjoint_images(
            sums,
            prepared.csm,
            prepared.basis.mixing[0].to(prepared.csm.device),
            weights.to(prepared.csm.device),
        )
        # All distinct readouts together sample k-space once; each holds the time points that fell to it.
        energy = float(sums.gram.diagonal(dim1=1, dim2=2).real.sum(0).mean())
        return images * (len(sums.count) / energy)

    def residual_to_noise(self, prepared: Prepared, basis: CoefficientBasis, images: Tensor) -> float:
        """||s - A U||^2 / (samples noise) of U (x, k, z, y) in ``basis``; aliasing puts it far above 1."""
        sums = prepared.sums
        energy = residual_energy(sums, prepared.csm, basis.mixing[0], images)
        return energy / (sums.samples * prepared.noise)


@dataclass(frozen=True)
class SvdMrf(DensityCompensated):
    """Settings of fingerprinting by density-compensated adjoint and matching."""

    name: ClassVar[str] = "svdmrf"

    def solve(self, problem: FingerprintProblem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slice; yields the final maps only."""
        prepared = self.prepare(problem, progress)
        progress("adjoint", 0.3)
        images = self.adjoint(prepared)
        progress("residual", 0.6)
        residual = self.residual_to_noise(prepared, prepared.basis, images)
        progress("matching", 0.7)
        yield self.matched(images, prepared.basis, problem, residual)
        progress("done", 1.0)
