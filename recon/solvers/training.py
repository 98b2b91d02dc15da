"""The training loop of the solvers that are coordinate networks: rates, progress, early stop, divergence.

What is minimised is the solver's affair: it hands in a function that goes once through the data. Adam has the
epsilon that hash grids want (METHODS 1), its rate is halved in steps. Where some of the data are held out,
training ends once they are predicted no better, and the networks return to where they predicted them best:
they fit noise in the end.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from quantitron.recon.algorithms.adam import Adam, ParameterGroup
from quantitron.recon.solvers.solver import Progress

logger = logging.getLogger("quantitron")

ADAM_EPSILON = 1e-15
"""Features of a hash grid have gradients far below Adam's usual 1e-8."""
BETAS = (0.9, 0.999)
"""Adam's usual decay of the means of the gradient and of its square."""
POOR_FIT = 2.0
"""Residual of trained networks, in units of that of the linear estimate, above which it is said."""
_RECENT = 5
"""Epochs from whose time the remaining time is reckoned."""

Epoch: TypeAlias = Callable[[Adam, int], Mapping[str, float]]
"""Goes once through the data with the optimiser; the epoch's number, from 0 -> mean of each loss, by name."""
State = TypeVar("State")


class TrainingDiverged(ValueError):
    """A loss or a parameter is not finite any more."""


@dataclass(frozen=True)
class Schedule:
    """How long, and how fast."""

    epochs: int
    """Times through the data."""
    learning_rate: float = 1e-3
    """Adam's rate at the start."""
    halve_every: int = 0
    """Epochs after which the rate is halved, again and again; 0: never."""

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        return self.learning_rate * 0.5 ** (epoch // self.halve_every if self.halve_every else 0)

    def at_half_rate(self) -> Schedule:
        """The same with half the rate."""
        return replace(self, learning_rate=0.5 * self.learning_rate)


@dataclass(frozen=True)
class TrainingRecord:
    """What happened."""

    losses: tuple[Mapping[str, float], ...] = ()
    """Mean of each loss, epoch by epoch."""
    held_out: tuple[tuple[int, float], ...] = ()
    """Each check of the data held out: epochs done, residual."""
    epochs_kept: int = 0
    """Epochs behind the networks as they were left."""
    stopped_early: bool = False
    """Whether the residual of the data held out ended the training."""
    seconds: float = 0.0
    """Time that it took."""


@dataclass
class _Best:
    """The networks where they predicted the data held out best."""

    residual: float = math.inf
    epochs: int = 0
    checks_since: int = 0
    values: list[Tensor] = field(default_factory=list)


def adam(groups: Sequence[ParameterGroup], schedule: Schedule, betas: tuple[float, float] = BETAS) -> Adam:
    """Adam as the networks want it.

    Args:
        groups: all parameters.
        schedule: gives the rate of the first epoch.
        betas: decay of the means of the gradient and of its square.
    """
    return Adam(groups, schedule.rate(0), betas, ADAM_EPSILON)


def train(
    networks: nn.Module,
    epoch: Epoch,
    schedule: Schedule,
    *,
    groups: Sequence[ParameterGroup] | None = None,
    held_out: Callable[[], float] | None = None,
    check_every: int = 1,
    first_check: int = 0,
    patience: int = 0,
    progress: Progress | None = None,
    betas: tuple[float, float] = BETAS,
) -> TrainingRecord:
    """Train networks in place.

    Args:
        networks: whose parameters are kept where they are best; all of them, whatever the groups.
        epoch: does the steps of one epoch. Its rates are set already; it returns the mean losses.
        schedule: number of epochs and their rates.
        groups: parameters with factors on the rate; all of ``networks`` at the schedule's rate by default.
        held_out: residual of data that no step sees; where given, the networks return to its least value.
        check_every: epochs from one check of it to the next; there is always one at the end.
        first_check: epochs before the first one.
        patience: checks without a new least value after which training ends; 0: it runs to the end.
        progress: told after every epoch, with the share of the epochs that is done.
        betas: Adam's decay of the means of the gradient and of its square.

    Raises:
        TrainingDiverged: if a loss, the held-out residual or a parameter is not finite.
    """
    begin = time.monotonic()
    groups = [ParameterGroup(networks.parameters())] if groups is None else groups
    optimizer = adam(groups, schedule, betas)
    recent: deque[float] = deque(maxlen=_RECENT)
    losses: list[Mapping[str, float]] = []
    checks: list[tuple[int, float]] = []
    best = _Best()
    stopped = False
    for number in range(schedule.epochs):
        started = time.monotonic()
        optimizer.learning_rate = schedule.rate(number)
        found = dict(epoch(optimizer, number))
        done = number + 1
        _check_finite(networks, found, done)
        losses.append(found)
        last = done == schedule.epochs
        if held_out is not None and done > first_check and ((done - first_check) % check_every == 0 or last):
            with torch.no_grad():
                residual = held_out()
            _check_finite(networks, {"held out": residual}, done)
            checks.append((done, residual))
            found = {**found, "held out": residual}
            _compare(best, networks, residual, done)
            stopped = not last and 0 < patience <= best.checks_since
        recent.append(time.monotonic() - started)
        if progress is not None:
            left = (schedule.epochs - done) * sum(recent) / len(recent)
            progress(_report(done, schedule.epochs, found, left), done / schedule.epochs)
        if stopped:
            break
    kept = len(losses)
    if best.values:
        with torch.no_grad():
            for parameter, value in zip(networks.parameters(), best.values, strict=True):
                parameter.copy_(value)
        kept = best.epochs
    return TrainingRecord(tuple(losses), tuple(checks), kept, stopped, time.monotonic() - begin)


def train_with_restart(
    make: Callable[[], State], run: Callable[[State, Schedule], TrainingRecord], schedule: Schedule
) -> tuple[State, TrainingRecord]:
    """Train; where that diverges, once more from the start at half the rate.

    Args:
        make: creates networks and all that goes with them, the same each time.
        run: trains them, usually by ``train``.
        schedule: of the first attempt.

    Returns:
        What was trained, and how.

    Raises:
        TrainingDiverged: if both attempts diverge.
    """
    state = make()
    try:
        return state, run(state, schedule)
    except TrainingDiverged as first:
        logger.warning(
            "%s; training starts again at half the learning rate, %g", first, schedule.learning_rate / 2
        )
    del state  # its memory is needed
    state = make()
    try:
        return state, run(state, schedule.at_half_rate())
    except TrainingDiverged as second:
        raise TrainingDiverged(
            f"training diverged at learning rate {schedule.learning_rate:g} and again at half of it: {second}"
        ) from second


def warn_of_poor_fit(residual: float, usual: float) -> None:
    """Say where networks explain the data much less than the linear estimate does.

    Args:
        residual: of the networks, in units of the noise.
        usual: of the linear estimate; nan where it is not known, and nothing is said.
    """
    if residual >= POOR_FIT * usual or math.isnan(residual):
        logger.warning(
            "the networks' maps leave a residual of %.3g times the noise, the linear estimate's %.3g; "
            "they are not trained to the end: give them more epochs or start_epochs",
            residual,
            usual,
        )


def _check_finite(networks: nn.Module, losses: Mapping[str, float], epoch: int) -> None:
    for name, value in losses.items():
        if not math.isfinite(value):
            raise TrainingDiverged(f"loss '{name}' is not finite in epoch {epoch}")
    if not all(bool(parameter.isfinite().all()) for parameter in networks.parameters()):
        raise TrainingDiverged(f"a network parameter is not finite after epoch {epoch}")


def _compare(best: _Best, networks: nn.Module, residual: float, epochs: int) -> None:
    if residual < best.residual:
        best.residual, best.epochs, best.checks_since = residual, epochs, 0
        best.values = [parameter.detach().clone() for parameter in networks.parameters()]
    else:
        best.checks_since += 1


def _report(done: int, epochs: int, losses: Mapping[str, float], left: float) -> str:
    """``epoch 12/100, data 0.93, wnnm 0.02, 1 min 20 s for the others``."""
    parts = [f"epoch {done}/{epochs}", *(f"{name} {value:.3g}" for name, value in losses.items())]
    minutes, seconds = divmod(round(left), 60)
    parts.append(f"{minutes} min {seconds} s for the others" if minutes else f"{seconds} s for the others")
    return ", ".join(parts)
