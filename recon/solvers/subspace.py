"""Linear subspace reconstruction: the fast baseline and preview.

The linear minimum-mean-square-error estimate of the coefficient images, off-resonance taken out of the basis,
variances learnt from the scan: see ``cartesian.py`` and ``fingerprint.py``, which make it for all solvers of
their scans. METHODS 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quantitron.recon.solvers.cartesian import CartesianSolver
from quantitron.recon.solvers.coefficient_solver import CoefficientEstimate, CoefficientSolver
from quantitron.recon.solvers.fingerprint import FingerprintSolver
from quantitron.recon.solvers.solver import Progress


@dataclass(frozen=True)
class Linear(CoefficientSolver):
    """The linear estimate, of any kind of scan."""

    def refine(self, estimate: CoefficientEstimate, seed: int, progress: Progress) -> Tensor:
        """The linear estimate itself."""
        del seed, progress
        return estimate.coefficients


@dataclass(frozen=True)
class Subspace(Linear, CartesianSolver):
    """Settings for Cartesian scans."""

    name: ClassVar[str] = "subspace"


@dataclass(frozen=True)
class FingerprintSubspace(Linear, FingerprintSolver):
    """Settings for fingerprints."""

    name: ClassVar[str] = "subspace"
