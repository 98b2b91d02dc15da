"""The rules of a comparison: each method at its best weight, and time at equal error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

Result = TypeVar("Result")


def best_weight(
    run: Callable[[float], tuple[Result, float]],
    weights: Sequence[float],
    score: Callable[[Result], float],
) -> tuple[float, float, float]:
    """Grid search: all weights, then once finer around the best, halfway to its neighbours.

    The grid grows while its best is at an end, at most as far again as it is long, so that no method is
    judged at the edge of a grid that was laid for another.

    Args:
        run: weight -> result and seconds.
        weights: ascending, at least two, equally spaced in their logarithm.
        score: result -> error, lower is better.

    Returns:
        Best weight, its score, and the seconds that the run with it took.

    Raises:
        ValueError: if the weights are not positive, ascending and at least two, or no score is a number.
    """
    if len(weights) < 2 or weights[0] <= 0 or any(b <= a for a, b in pairwise(weights)):
        raise ValueError("the grid needs two or more positive weights in ascending order")
    tried: dict[float, tuple[float, float]] = {}

    def measure(weight: float) -> None:
        result, seconds = run(weight)
        error = score(result)
        tried[weight] = (error if math.isfinite(error) else math.inf, seconds)

    def best() -> float:
        return min(tried, key=lambda weight: tried[weight][0])

    for weight in weights:
        measure(weight)
    ratio = (weights[-1] / weights[0]) ** (1 / (len(weights) - 1))
    for _ in weights:
        if best() == min(tried):
            measure(min(tried) / ratio)
        elif best() == max(tried):
            measure(max(tried) * ratio)
        else:
            break
    centre = best()
    for weight in (centre / math.sqrt(ratio), centre * math.sqrt(ratio)):
        measure(weight)
    weight = best()
    error, seconds = tried[weight]
    if math.isinf(error):
        raise ValueError("no weight gave a score that is a number")
    return weight, error, seconds


def seconds_to_reach(
    run: Callable[[int], tuple[Result, float]],
    score: Callable[[Result], float],
    target: float,
    iterations: Sequence[int],
) -> tuple[int, float, float] | None:
    """Time at equal error: run with more and more iterations until the score is as good as the target.

    Args:
        run: iterations -> result and seconds; each run starts afresh.
        score: result -> error, lower is better.
        target: error to reach.
        iterations: numbers to try, ascending.

    Returns:
        Iterations, seconds and score of the first run that reached the target; None if none did.
    """
    for count in iterations:
        result, seconds = run(count)
        error = score(result)
        if error <= target:
            return count, seconds, error
    return None
