"""Scans, settings and helpers that the tests of lorein share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from scan_of_ellipses import PROTOCOLS, scan_of_ellipses

from quantitron.recon.data import Maps, Problem
from quantitron.recon.solvers import LoREIN, Subspace
from quantitron.recon.solvers.cartesian import LinearEstimate
from quantitron.recon.solvers.map_estimate import MapEstimate, start_from

TIMES = ("t1", "t2", "t2star")
SCANS = {
    "vfa_gre": {"grid": (4, 24, 24), "acceleration": 6, "noise": 0.4},
    "t2ir_gre": {"grid": (2, 24, 24), "acceleration": 12, "noise": 0.3},
    "megre": {"grid": (4, 32, 32), "acceleration": 2, "noise": 1.0},
}
TINY = {"grid": (2, 16, 14), "acceleration": 2, "noise": 0.3, "coils": 4}
QUICK = {"levels": 6, "log2_rows": 10}
"""Small hash grids, for tests in which the accuracy does not count."""
JOINT = {"training": "joint", "epochs": 2, "low_rank_epochs": 1, "start_epochs": 1, **QUICK}
"""The same for joint training."""


def quiet(*args: Any) -> None:
    """Progress that nobody sees."""


def solve(solver, problem: Problem, **settings) -> Maps:
    *_, maps = solver(**settings).solve(problem, quiet)
    assert not maps.preview
    return maps


@cache
def scan(sequence, **changes):
    return scan_of_ellipses(PROTOCOLS[sequence], texture=0.05, **{**SCANS[sequence], **changes})


@cache
def started(sequence="vfa_gre", **changes) -> tuple[Problem, LinearEstimate, Maps, MapEstimate]:
    """Linear estimate, its maps, and the unknowns that start from them."""
    problem, *_ = scan(sequence, **{**TINY, **changes})
    solver = Subspace()
    estimate = solver.linear_estimate(problem, quiet)
    maps = solver.maps(estimate, estimate.coefficients, problem, quiet)
    return problem, estimate, maps, start_from(estimate, maps, problem)


@cache
def maps_of(sequence, **settings) -> Maps:
    return solve(LoREIN, scan(sequence)[0], **settings)


def same(one: Maps, other: Maps) -> bool:
    return all(
        torch.equal(values.nan_to_num(), other.values[name].nan_to_num())
        for name, values in one.values.items()
    )
