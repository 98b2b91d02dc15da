"""Levenberg-Marquardt steps for many small problems at once, one a voxel, each with a damping of its own.

Voxels that have arrived are set aside and the work goes on with the others. All arrays have the voxels last:
each operation runs over them (Marquardt 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor


@dataclass
class VoxelState:
    """Where each voxel stands; all arrays end in (v,). Subclasses add what their steps need."""

    theta: Tensor
    """(p, v) fitted parameters."""
    cost: Tensor
    """(v,) what is minimised."""


State = TypeVar("State", bound=VoxelState)


def levenberg_marquardt(
    evaluate: Callable[[Tensor, Mapping[str, Tensor]], State],
    propose: Callable[[State, Tensor], Tensor],
    start: Tensor,
    data: Mapping[str, Tensor],
    arrived: Tensor,
    iterations: int,
) -> State:
    """Minimise until every voxel has arrived; no voxel's cost rises.

    Args:
        evaluate: theta (p, v) and data of the same voxels -> their state.
        propose: state, damping (v,) -> theta (p, v) that the damped step leads to, within all bounds.
        start: theta (p, v), within all bounds.
        data: name -> (..., v) what each voxel's cost depends on.
        arrived: (p, 1) change of each parameter below which a voxel has arrived.
        iterations: steps at most.

    Returns:
        The state of every voxel.
    """
    final = evaluate(start, data)
    # From here on ``state`` and all else holds the voxels in ``active`` only.
    active = torch.arange(start.shape[1], device=start.device)
    state, damping = _where(final, active), torch.full_like(final.cost, 1e-2)
    for _ in range(iterations):
        trial = evaluate(propose(state, damping), data)
        # Near the end a step changes the cost by less than its rounding, and is right all the same.
        better = trial.cost < state.cost * (1 + 4 * torch.finfo(state.cost.dtype).eps)
        size = ((trial.theta - state.theta).abs() / arrived).amax(0)
        for part in fields(state):
            old, new = getattr(state, part.name), getattr(trial, part.name)
            setattr(state, part.name, torch.where(better, new, old))
        damping = torch.where(better, damping / 5, damping * 5).clamp(1e-7, 1e7)
        # A small step at strong damping says nothing, unless even that brought nothing.
        going = (size >= 1) | (better & (damping > 1)) & (size > 0)
        going &= state.cost.isfinite()
        left = int(going.sum())
        if left < 0.8 * len(active):
            _put(final, active, state)
            keep = going.nonzero()[:, 0]
            active, state, damping = active[keep], _where(state, keep), damping[keep]
            data = {name: values[..., keep] for name, values in data.items()}
        if not left:
            break
    _put(final, active, state)
    return final


def _where(state: State, chosen: Tensor) -> State:
    """The voxels that ``chosen`` lists."""
    return type(state)(**{part.name: getattr(state, part.name)[..., chosen] for part in fields(state)})


def _put(state: State, places: Tensor, other: State) -> None:
    """Write the voxels of ``other`` at ``places``."""
    for part in fields(state):
        getattr(state, part.name)[..., places] = getattr(other, part.name)


def held_back(theta: Tensor, gradient: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(p, v) bool: parameters at a bound, (p, 1) each, beyond which ``gradient``, (p, v), would draw them."""
    return ((theta <= low) & (gradient < 0)) | ((theta >= high) & (gradient > 0))


def damped_step(normal: Tensor, gradient: Tensor, damping: Tensor, held: Tensor) -> Tensor:
    """(p, v): the solution of (N + damping diag(N)) x = gradient; none of what a bound holds back.

    Marquardt's scaling makes the damping independent of each parameter's unit. A parameter that is held
    leaves the others their own way.

    Args:
        normal: N (p, p, v).
        gradient: (p, v), along which the cost falls.
        damping: (v,).
        held: (p, v) bool, what ``held_back`` tells.
    """
    free = (~held).to(gradient.dtype)
    diagonal = normal.diagonal().T  # (p, v)
    tiny = torch.finfo(gradient.dtype).tiny
    extra = damping * diagonal + diagonal.amax(0) * 1e-12 + (1 - free) * diagonal + tiny
    return _solve(normal * free[:, None] * free[None], extra, gradient * free)


def inverse_diagonal(normal: Tensor) -> Tensor:
    """(p, v): the diagonal of the inverse of N (p, p, v); large where N says nothing, not infinite."""
    diagonal = normal.diagonal().T  # (p, v)
    floor = 1e-9 * diagonal.amax(0, keepdim=True) + torch.finfo(normal.dtype).tiny
    rows = []
    for number in range(len(normal)):
        unit = torch.zeros_like(diagonal)
        unit[number] = 1
        rows.append(_solve(normal, floor.expand_as(diagonal), unit)[number])
    return torch.stack(rows).clamp_min(0)


def _solve(normal: Tensor, extra: Tensor, right: Tensor) -> Tensor:
    """Solve (N + diag(extra)) x = right for every voxel by elimination; N is positive semidefinite.

    Args:
        normal: N (c, c, v).
        extra: (c, v), positive.
        right: (c, v).

    Returns:
        x (c, v).
    """
    count = len(right)
    rows = [[normal[i, j] for j in range(count)] for i in range(count)]
    values = list(right)
    for i in range(count):
        rows[i][i] = rows[i][i] + extra[i]
    for i in range(count):
        for j in range(i + 1, count):
            # A pivot that rounding has made zero or negative keeps at least its own damping.
            factor = rows[j][i] / torch.maximum(rows[i][i], extra[i])
            for k in range(i + 1, count):
                rows[j][k] = rows[j][k] - factor * rows[i][k]
            values[j] = values[j] - factor * values[i]
    for i in reversed(range(count)):
        for k in range(i + 1, count):
            values[i] = values[i] - rows[i][k] * values[k]
        values[i] = values[i] / torch.maximum(rows[i][i], extra[i])
    return torch.stack(values)
