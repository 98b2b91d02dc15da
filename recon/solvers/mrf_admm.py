"""Fingerprinting between k-space and the dictionary: ADMM (Asslaender 2018).

    minimise 1/2 ||s - A U||^2 + field_share Q(U)  subject to  U(r) = PD(r) d(T1(r), T2(r))

in turns: conjugate gradients for U, pulled towards the fingerprints that were found; matching of U plus the
multipliers; the multipliers. Q is the Gaussian prior of the linear estimate, without which noise is fitted
after some rounds. The set of fingerprints is not convex, and the penalty decides how quickly the
iterates commit to atoms. METHODS 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from quantitron.recon.algorithms.admm import admm
from quantitron.recon.solvers.fingerprint import FingerprintEstimate, FingerprintSolver
from quantitron.recon.solvers.nearest_fingerprint import NearestFingerprint
from quantitron.recon.solvers.solver import Progress


@dataclass(frozen=True)
class FingerprintAdmm(FingerprintSolver):
    """Settings of the splitting between k-space and the dictionary."""

    name: ClassVar[str] = "mrf_admm"

    linear_iterations: int = field(default=4, metadata={"minimum": 1})
    """Conjugate gradient steps of the second pass: only a start is wanted here."""
    penalty: float = field(default=0.2, metadata={"above": 0})
    """Pull towards the fingerprints, in units of the mean curvature of the data term."""
    field_share: float = field(default=1.0, metadata={"minimum": 0})
    """Share of the linear estimate's prior that is kept; 0, as published: none, voxels are on their own."""
    rounds: int = field(default=7, metadata={"minimum": 1})
    """Rounds of the splitting; with more of them, undersampled scans have noise fitted."""
    iterations: int = field(default=5, metadata={"minimum": 1})
    """Conjugate gradient steps in each of them."""

    def refine(self, estimate: FingerprintEstimate, seed: int, progress: Progress) -> Tensor:
        """U (x, k, z, y) where both agree."""
        del seed
        nearest = NearestFingerprint(estimate, self.match_groups)

        def closest(target: Tensor, factor: float, last: Tensor) -> Tensor:
            return estimate.proximal(target, factor, last, self.iterations, self.field_share)

        def stop(_u: Tensor, iteration: int) -> bool:
            progress("fingerprints", (iteration + 1) / self.rounds)
            return False

        return admm(
            closest,
            lambda images, _step: nearest(images),
            estimate.coefficients,
            penalty=self.penalty * float(estimate.operator.mean_diagonal().mean()),
            iterations=self.rounds,
            tolerance=0.0,
            stop=stop,
        ).x
