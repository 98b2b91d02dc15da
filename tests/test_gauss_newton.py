"""Gauss-Newton steps: exact on quadratics, within bounds, never uphill, and outspoken about NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from quantitron.recon.algorithms.gauss_newton import Linearisation, gauss_newton

FREE = torch.tensor(math.inf, dtype=torch.float64)


@dataclass
class LeastSquares:
    """1/2 ||f(x)||^2 with the Jacobian by automatic differentiation; counts how often it is asked."""

    function: Any
    calls: int = 0

    def __call__(self, x: Tensor) -> LeastSquares.At:
        self.calls += 1
        return self.At(self.function, x)

    @dataclass
    class At:
        function: Any
        x: Tensor

        @property
        def value(self) -> float:
            return 0.5 * float(self.function(self.x).square().sum())

        def linearise(self) -> Linearisation:
            jacobian = torch.func.jacrev(self.function)(self.x)
            normal = jacobian.T @ jacobian + 1e-12 * torch.eye(len(self.x), dtype=self.x.dtype)
            gradient, diagonal = jacobian.T @ self.function(self.x), normal.diagonal()
            return Linearisation(gradient, lambda step: normal @ step, lambda rest: rest / diagonal)


def _matrix(rows=9, columns=5, seed=0):
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _minimise(function, start, low=-FREE, high=FREE, longest=FREE, **settings):
    settings = {"rounds": 30, "iterations": 20, "tolerance": 1e-12, **settings}
    return gauss_newton(LeastSquares(function), start, low, high, longest, **settings)


def test_a_linear_problem_takes_one_step():
    matrix, right = _matrix(), _matrix(9, 1, 1)[:, 0]
    start = torch.zeros(5, dtype=torch.float64)
    descent = _minimise(lambda x: matrix @ x - right, start, rounds=1)
    torch.testing.assert_close(descent.x, torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0])
    assert descent.stopped == "rounds"
    assert len(descent.values) == 2


def _valley(x):
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])  # Rosenbrock


def test_a_curved_valley_is_walked_down_to_its_end():
    start = torch.tensor([-1.9, 2.0], dtype=torch.float64)
    descent = _minimise(_valley, start, longest=torch.tensor(0.5, dtype=torch.float64), rounds=200)
    torch.testing.assert_close(descent.x, torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert all(left >= right for left, right in zip(descent.values, descent.values[1:], strict=False))


def test_steps_are_halved_as_long_as_the_objective_rises():
    """Where the arc tangent is flat, a whole step goes far beyond the minimum."""
    start = torch.tensor([4.0], dtype=torch.float64)
    whole = float(start - math.atan(4.0) * 17)  # x - f / f'
    assert math.atan(whole) ** 2 > math.atan(4.0) ** 2
    descent = _minimise(torch.atan, start, halvings=8)
    assert float(descent.x) == pytest.approx(0, abs=1e-8)
    assert all(left > right for left, right in zip(descent.values, descent.values[1:], strict=False) if right)
    stuck = _minimise(torch.atan, start, halvings=0)
    assert (stuck.stopped, stuck.values, float(stuck.x)) == ("no descent", stuck.values[:1], 4.0)


@dataclass
class Bowl:
    """1/2 <x - target, N (x - target)> of rows x (v, p); N couples the rows."""

    x: Tensor
    target: Tensor
    normal: Tensor

    @property
    def value(self) -> float:
        away = self.x - self.target
        return 0.5 * float((away * (self.normal @ away)).sum())

    def linearise(self) -> Linearisation:
        return Linearisation(
            self.normal @ (self.x - self.target), lambda step: self.normal @ step, lambda rest: rest
        )


def test_a_row_is_shortened_as_a_whole_to_its_longest_step():
    target = torch.tensor([[1.0, 2.0], [0.05, -2.0], [0.4, 9.0]], dtype=torch.float64)
    longest = torch.tensor([0.1, 3.0], dtype=torch.float64)
    normal = torch.eye(3, dtype=torch.float64)
    descent = gauss_newton(
        lambda x: Bowl(x, target, normal), 0 * target, -FREE, FREE, longest, rounds=1, iterations=3
    )
    torch.testing.assert_close(descent.x, target * torch.tensor([[0.1], [1.0], [0.25]]).double())


def test_rows_are_shortened_alike_where_one_by_one_would_lead_uphill():
    """Along a narrow valley both rows must move together."""
    normal = torch.tensor([[1.0, 0.999], [0.999, 1.0]], dtype=torch.float64)
    target = torch.tensor([[10.0], [-9.9]], dtype=torch.float64)
    longest = torch.tensor([[1.0], [9.9]], dtype=torch.float64)
    start, one_by_one = 0 * target, torch.tensor([[1.0], [-9.9]], dtype=torch.float64)
    assert Bowl(one_by_one, target, normal).value > Bowl(start, target, normal).value
    descent = gauss_newton(
        lambda x: Bowl(x, target, normal), start, -FREE, FREE, longest, rounds=1, tolerance=1e-12
    )
    torch.testing.assert_close(descent.x, 0.1 * target)


def test_bounds_hold_and_leave_the_others_their_own_way():
    """The minimum within the bounds, by trying all sets of unknowns that may lie on theirs."""
    matrix, right = _matrix(), _matrix(9, 1, 1)[:, 0] * 3
    low, high = -0.2 * torch.ones(5, dtype=torch.float64), 0.3 * torch.ones(5, dtype=torch.float64)
    best = (math.inf, None)
    for code in range(3**5):
        choice = [(code // 3**i) % 3 for i in range(5)]  # free, at low, at high
        x = torch.where(torch.tensor(choice) == 1, low, high)
        free = [i for i in range(5) if choice[i] == 0]
        fixed = [i for i in range(5) if choice[i]]
        if free:
            rest = right - matrix[:, fixed] @ x[fixed]
            x[free] = torch.linalg.lstsq(matrix[:, free], rest[:, None]).solution[:, 0]
        if bool(((x >= low - 1e-12) & (x <= high + 1e-12)).all()):
            best = min(best, (float((matrix @ x - right).square().sum()), x), key=lambda pair: pair[0])
    start = torch.zeros(5, dtype=torch.float64)
    descent = _minimise(lambda x: matrix @ x - right, start, low, high)
    torch.testing.assert_close(descent.x, best[1], rtol=1e-6, atol=1e-6)
    assert bool(((descent.x == low) | (descent.x == high)).any())
    assert bool(((descent.x > low) & (descent.x < high)).any())
    outside = _minimise(lambda x: matrix @ x - right, start + 7, low, high, rounds=0)
    assert torch.equal(outside.x, high)


def test_small_falls_end_the_steps():
    start = torch.tensor([-1.9, 2.0], dtype=torch.float64)
    longest = torch.tensor(0.5, dtype=torch.float64)
    seen: list[tuple[int, float]] = []
    descent = _minimise(
        _valley, start, longest=longest, change=0.05, callback=lambda *args: seen.append(args), rounds=200
    )
    assert descent.stopped == "settled"
    falls = [left - right for left, right in zip(descent.values, descent.values[1:], strict=False)]
    assert falls[-1] <= 0.05 < min(falls[:-1])
    assert seen == list(enumerate(descent.values[1:]))


def test_a_minimum_stays_where_it_is():
    start = torch.ones(2, dtype=torch.float64)
    descent = _minimise(_valley, start)
    assert torch.equal(descent.x, start)
    assert descent.stopped == "settled"


@pytest.mark.parametrize(
    ("function", "stays"),
    [
        (lambda x: x * math.nan, True),  # not even at the start
        (lambda x: torch.where(x > 0.9, x, torch.nan), True),  # wherever a step leads
        (lambda x: torch.where(x > 0.5, x, torch.inf), False),  # beyond half of the way
    ],
)
def test_what_is_not_finite_is_left_out(function, stays):
    start = torch.ones(3, dtype=torch.float64)
    descent = _minimise(function, start, halvings=2)
    assert bool(descent.x.isfinite().all())
    assert torch.equal(descent.x, start) == stays
    assert descent.stopped == "not finite"
    assert all(math.isfinite(value) for value in descent.values[1:])


def test_a_gradient_that_is_not_finite_ends_the_steps():
    """The root has no slope at zero."""
    start = torch.zeros(2, dtype=torch.float64)
    descent = _minimise(lambda x: 1 + x.sqrt(), start, low=torch.zeros(2, dtype=torch.float64))
    assert descent.stopped == "not finite"
    assert torch.equal(descent.x, start)
