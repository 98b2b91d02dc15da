"""Seconds and peak memory of parts of a program: the functions that they are, wrapped while a block runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PROCESS = Path("/proc/self")


@dataclass
class PartCost:
    """What the calls of one part cost together."""

    calls: int = 0
    seconds: float = 0.0
    memory: float = 0.0
    """Most [GB] at any time within a call: of the GPU where there is one, else of the process."""


def peak_memory() -> float:
    """Most memory [GB] since ``forget_peak``; NaN where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM:"))


def forget_peak() -> None:
    """Let the peak begin at what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            (PROCESS / "clear_refs").write_text("5")
        except OSError:  # no such file but on Linux: the peak is then that of the whole run
            return


def measured(function: Callable[..., Any], cost: PartCost) -> Callable[..., Any]:
    """The function, its calls added to ``cost``."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        forget_peak()
        begun = time.perf_counter()
        result = function(*arguments, **named)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        cost.calls += 1
        cost.seconds += time.perf_counter() - begun
        cost.memory = max(cost.memory, peak_memory())
        return result

    return wrapper


@contextmanager
def part_costs(parts: dict[str, tuple[object, str]]) -> Iterator[dict[str, PartCost]]:
    """Measure parts while the block runs. Parts within parts count in both, but for the peak of the outer.

    Args:
        parts: name -> the module or class, and the name of its function or method.
    """
    costs = {name: PartCost() for name in parts}
    kept = {name: getattr(owner, attribute) for name, (owner, attribute) in parts.items()}
    try:
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, measured(kept[name], costs[name]))
        yield costs
    finally:
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, kept[name])
