"""What ``refine`` may give. Anything else is said to be the solver's fault, and not the scan's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from fingerprint_scan import fingerprint_scan
from scan_of_ellipses import PROTOCOLS, scan_of_ellipses
from torch import Tensor

from quantitron.recon.solvers.cartesian import CartesianSolver
from quantitron.recon.solvers.coefficient_solver import CoefficientEstimate, CoefficientSolver
from quantitron.recon.solvers.fingerprint import FingerprintSolver
from quantitron.recon.solvers.solver import Progress


def hole(images: Tensor) -> Tensor:
    images = images.clone()
    images[3] = float("nan")
    return images


FAULTS = {
    "one is not finite": (hole, "values that are not finite"),
    "one is missing": (lambda images: images[1:], r"\(x, k, z, y\) \(31, .* where they are \(32, "),
    "real": (lambda images: images.abs(), "of torch.float32, where they are .* of torch.complex64"),
    "none": (lambda images: None, "refine gave NoneType, not coefficient images"),
}


@dataclass(frozen=True)
class Careless(CoefficientSolver):
    fault: str = ""

    def refine(self, estimate: CoefficientEstimate, seed: int, progress: Progress) -> Tensor:
        return FAULTS[self.fault][0](estimate.coefficients)


@dataclass(frozen=True)
class Cartesian(Careless, CartesianSolver):
    name: ClassVar[str] = "careless"


@dataclass(frozen=True)
class Fingerprint(Careless, FingerprintSolver):
    name: ClassVar[str] = "careless"


@dataclass(frozen=True)
class Unfinished(CartesianSolver):
    name: ClassVar[str] = "unfinished"


@pytest.mark.parametrize("kind", [Cartesian, Fingerprint])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_refinement_is_named(kind, fault):
    """A value that is not finite would make all of the scan look like background."""
    if kind is Cartesian:
        problem, *_ = scan_of_ellipses(PROTOCOLS["megre"])
    else:
        problem = fingerprint_scan(noise=1.0).problem
    with pytest.raises(ValueError, match=FAULTS[fault][1]):
        list(kind(fault=fault).solve(problem, lambda doing, share: None))


def test_a_solver_without_refinement_says_so():
    problem, *_ = scan_of_ellipses(PROTOCOLS["megre"])
    with pytest.raises(NotImplementedError, match="Unfinished has no refine"):
        list(Unfinished().solve(problem, lambda doing, share: None))
