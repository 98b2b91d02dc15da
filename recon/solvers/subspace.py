"""Linear subspace reconstruction: the fast baseline and preview.

The linear minimum-mean-square-error estimate of the coefficient images, off-resonance taken out of the basis,
variances learnt from the scan: see ``cartesian.py``, which makes it for all Cartesian solvers. METHODS 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quantitron.recon.solvers.cartesian import CartesianSolver, LinearEstimate
from quantitron.recon.solvers.solver import Progress


@dataclass(frozen=True)
class Subspace(CartesianSolver):
    """Settings of the linear subspace reconstruction."""

    name: ClassVar[str] = "subspace"

    def refine(self, estimate: LinearEstimate, seed: int, progress: Progress) -> Tensor:
        """The linear estimate itself."""
        del seed, progress
        return estimate.coefficients
