"""The training loop that all networks share: what is learned from and the loss are handed in.

Adam with a warm-up and a rate that falls as a cosine, gradients of bounded length, and an average of the
weights over the last steps, which is what is validated and delivered. Every step draws from a generator of
its own, so that a training that was stopped goes on as if it had not been, to the last bit on one CPU.
"""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from quantitron.gadgets.errors import ScanError
from quantitron.recon.networks.conditional_unet import ConditionalUNet, UNetShape
from quantitron.recon.networks.precision import autocast
from quantitron.training.batch import Batch, Sampler, step_generator
from quantitron.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint

Loss: TypeAlias = Callable[[ConditionalUNet, Batch], Tensor]
"""The number to make small."""
Validate: TypeAlias = Callable[[ConditionalUNet, bool], Mapping[str, Any]]
"""What held out data say of a network, told whether the training has ended -> JSON, with a number under
``score`` (larger is better)."""

_FLOOR = 0.01
"""Rate at the end, relative to the highest."""
_POINTS = 25
"""Steps whose mean loss is a point of the curve."""
_AHEAD = 8
"""Threads that draw batches for a GPU."""


class TrainingStopped(ScanError):
    """Somebody asked for it; the checkpoint is complete."""


class TrainingDiverged(ScanError):
    """A loss, a gradient or what is made of held out images is not finite any more."""


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, and with which chance."""

    steps: int = 0
    """To do in all; 0: as many as fit the time."""
    minutes: float = 0.0
    """To spend in all; 0: as many as the steps need. With a limit of time, results depend on the machine."""
    rate: float = 1e-3
    """Adam's highest."""
    warm_up: int = 100
    """Steps until the rate is reached."""
    average: float = 0.999
    """Share of the old in the average of the weights; less during the first steps."""
    clip: float = 1.0
    """Longest gradient."""
    validate_every: int = 500
    """Steps between validations; the last one is always at the end."""
    checkpoint_minutes: float = 3.0
    """Between checkpoints."""
    seed: int = 0
    """Of everything random."""
    precision: str = "auto"
    """Of the layers, see ``recon.networks.precision``."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done.

        Raises:
            ScanError: in one sentence.
        """
        if self.steps < 0 or self.minutes < 0 or not (self.steps or self.minutes):
            raise ScanError("a training needs a number of steps or of minutes")
        if not (self.rate > 0 and self.clip > 0 and 0 <= self.average < 1):
            raise ScanError("rate and clip must be above zero, average within 0..1")

    def share(self, step: int, seconds: float) -> float:
        """How much of the training is done, 0..1."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def rate_at(self, step: int, share: float) -> float:
        """Learning rate of a step."""
        falling = _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * share))
        return self.rate * falling * min(1.0, (step + 1) / max(1, self.warm_up))


@dataclass(frozen=True)
class Standing:
    """What a progress line shows."""

    share: float
    """Done, 0..1."""
    step: int
    loss: float
    """Mean of the last steps."""
    images_per_second: float
    seconds_left: float
    validation: Mapping[str, Any] | None = None
    """Where there has just been one."""


@dataclass
class Trained:
    """What came of it."""

    network: ConditionalUNet
    """With averaged weights."""
    state: TrainingState = field(default_factory=TrainingState)


def train_network(
    network: ConditionalUNet,
    sampler: Sampler,
    loss: Loss,
    settings: LoopSettings,
    device: torch.device,
    validate: Validate | None = None,
    checkpoint: Path | None = None,
    identity: Mapping[str, object] | None = None,
    resume: bool = False,
    progress: Callable[[Standing], None] | None = None,
) -> Trained:
    """Train a network; Ctrl-C and SIGTERM save a checkpoint first.

    Args:
        network: with its first weights; moved to the device.
        sampler: draws the batches, on the CPU.
        loss: of a network on a batch.
        settings: of the loop.
        device: to train on.
        validate: told the network with averaged weights.
        checkpoint: folder of checkpoints; None writes none.
        identity: what decides about the result beside the settings that may change between sessions.
        resume: go on from the checkpoint.
        progress: told after every step.

    Raises:
        TrainingStopped: if it was interrupted.
        TrainingDiverged: if a loss, a gradient or the score of held out data is not finite.
        ScanError: if the checkpoint cannot be read, written or does not fit.
    """
    network = network.to(device).train()
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.rate, betas=(0.9, 0.99))
    known = dict(identity or {})
    state = TrainingState()
    if resume:
        if checkpoint is None:
            raise ScanError("nothing to go on from: no checkpoint is named")
        state, tensors = load_checkpoint(checkpoint, known)
        _restore(tensors, network, average, optimiser, state.step, checkpoint)

    def save() -> None:
        if checkpoint is not None:
            save_checkpoint(checkpoint, state, _tensors(network, average, optimiser), known)

    before = state.seconds
    started = saved = time.monotonic()
    recent: deque[tuple[float, int]] = deque(maxlen=30)
    batches = draw_batches(sampler, settings.seed, state.step, _AHEAD if device.type == "cuda" else 0)
    with closing(batches), _Interruption() as interruption:
        while (share := settings.share(state.step, state.seconds)) < 1:
            batch = next(batches).to(device)
            rate = settings.rate_at(state.step, share)
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
            with autocast(
                device, safe_precision(network.shape, batch.input.shape[2], device, settings.precision)
            ):
                value = loss(network, batch)
            value.backward()  # type: ignore[no-untyped-call]
            length = torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
            found = float(value.detach())
            if not (math.isfinite(found) and math.isfinite(float(length))):
                good = checkpoint is not None and checkpoint.exists()
                kept = f"; the last good state is in {checkpoint}" if good else ""
                raise TrainingDiverged(
                    f"the loss is not finite after {state.step} steps: try a lower rate than "
                    f"{settings.rate:g}{kept}"
                )
            optimiser.step()
            state.step += 1
            _follow(average, network, min(settings.average, (1 + state.step) / (10 + state.step)))
            now = time.monotonic()
            state.seconds = before + now - started
            state.window = [state.window[0] + found, state.window[1] + 1]
            if state.window[1] >= _POINTS:
                mean = state.window[0] / state.window[1]
                state.losses.append([state.step, mean, rate, round(state.seconds, 1)])
                state.window = [0.0, 0.0]
            recent.append((now, len(batch.input)))
            said = None
            done = settings.share(state.step, state.seconds)
            if validate is not None and done < 1 and state.step % settings.validate_every == 0:
                said = _validated(validate, average, state, settings, device)
            if progress is not None:
                progress(_standing(settings, state, recent, found, said))
            if interruption.asked:
                save()
                where = f"; --resume {checkpoint} goes on" if checkpoint is not None else ""
                raise TrainingStopped(f"stopped after {state.step} steps{where}")
            if now - saved > 60 * settings.checkpoint_minutes:
                save()
                saved = now
    save()
    if validate is not None:
        _validated(validate, average, state, settings, device, last=True)
        save()
    return Trained(average, state)


def safe_precision(shape: UNetShape, depth: int, device: torch.device, wanted: str) -> str:
    """The precision to compute gradients in: float32 on a CPU where a level of the network has two slices.

    The gradient of the weights of a 3 x 3 x 3 convolution of two bfloat16 slices is computed from memory that
    nobody wrote to (oneDNN in torch 2.13: any number, or none); one slice, three and more are right.

    Args:
        shape: of the network.
        depth: slices of the volumes that go in.
        device: computed on.
        wanted: one of ``recon.networks.precision.PRECISIONS``.
    """
    depths = {-(-depth // (1 << level)) for level in range(len(shape.channels))}
    return "float32" if device.type == "cpu" and 2 in depths else wanted


def _validated(
    validate: Validate,
    average: ConditionalUNet,
    state: TrainingState,
    settings: LoopSettings,
    device: torch.device,
    last: bool = False,
) -> dict[str, Any]:
    with torch.no_grad(), autocast(device, settings.precision):
        said: dict[str, Any] = {"step": state.step, **validate(average, last)}
    if not math.isfinite(said["score"]):
        raise TrainingDiverged(
            f"what the network makes of held out images is not finite after {state.step} steps: try a lower "
            f"rate than {settings.rate:g}"
        )
    state.validations = [old for old in state.validations if old["step"] != state.step]
    state.validations.append(said)
    return said


def _follow(average: ConditionalUNet, network: ConditionalUNet, keep: float) -> None:
    """Move the average of the weights towards the newest ones."""
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
            slow.lerp_(fast, 1 - keep)


def _standing(
    settings: LoopSettings,
    state: TrainingState,
    recent: deque[tuple[float, int]],
    found: float,
    said: Mapping[str, Any] | None,
) -> Standing:
    span = recent[-1][0] - recent[0][0]
    images = sum(count for _, count in list(recent)[1:])
    share = settings.share(state.step, state.seconds)
    per_step = span / (len(recent) - 1) if len(recent) > 1 else 0.0
    left = math.inf
    if settings.steps and per_step:
        left = (settings.steps - state.step) * per_step
    if settings.minutes:
        left = min(left, 60 * settings.minutes - state.seconds)
    mean = state.window[0] / state.window[1] if state.window[1] else found
    if state.losses and state.window[1] < _POINTS // 2:
        mean = state.losses[-1][1]
    return Standing(share, state.step, mean, images / span if span else 0.0, max(0.0, left), said)


def draw_batches(sampler: Sampler, seed: int, step: int, ahead: int) -> Generator[Batch, None, None]:
    """Batches of the steps from one on.

    Args:
        sampler: draws them.
        seed: of the training.
        step: the first.
        ahead: threads that draw ahead, where a GPU would have to wait for its batches; 0: none. The batches
            are the same.
    """
    if not ahead:
        while True:
            yield sampler(step, step_generator(seed, step))
            step += 1
    pool = ThreadPoolExecutor(max_workers=ahead)
    try:
        queue: deque[Future[Batch]] = deque()
        while True:
            while len(queue) < 2 * ahead:
                queue.append(pool.submit(sampler, step, step_generator(seed, step)))
                step += 1
            yield queue.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _tensors(
    network: ConditionalUNet, average: ConditionalUNet, optimiser: torch.optim.Adam
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for (name, weight), slow in zip(network.named_parameters(), average.parameters(), strict=True):
        tensors[f"network.{name}"] = weight
        tensors[f"average.{name}"] = slow
        for moment in ("exp_avg", "exp_avg_sq"):
            held = optimiser.state[weight].get(moment)
            tensors[f"{moment}.{name}"] = torch.zeros_like(weight) if held is None else held
    return tensors


def _restore(
    tensors: Mapping[str, Tensor],
    network: ConditionalUNet,
    average: ConditionalUNet,
    optimiser: torch.optim.Adam,
    step: int,
    folder: Path,
) -> None:
    """Put tensors of a checkpoint back, each in the memory layout that it had."""
    wanted = set(_tensors(network, average, optimiser))
    if set(tensors) != wanted:
        raise ScanError(f"the checkpoint {folder} is one of another network")
    with torch.no_grad():
        for (name, weight), slow in zip(network.named_parameters(), average.parameters(), strict=True):
            if any(tensors[f"{kind}.{name}"].shape != weight.shape for kind in ("network", "average")):
                raise ScanError(f"the checkpoint {folder} is one of another network")
            weight.copy_(tensors[f"network.{name}"])
            slow.copy_(tensors[f"average.{name}"])
            if step:
                optimiser.state[weight] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": torch.zeros_like(weight).copy_(tensors[f"exp_avg.{name}"]),
                    "exp_avg_sq": torch.zeros_like(weight).copy_(tensors[f"exp_avg_sq.{name}"]),
                }


class _Interruption:
    """Ctrl-C and SIGTERM set a flag, once; the second one does what it always does."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked = True
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
