"""The extended phase graph of many atoms at speed, in place: the same numbers as ``differentiable_signal``.

What makes it fast on a CPU:

- Orders run along the first axis and atoms along the second, in batches that stay in a core's cache.
- A gradient moves no data: the windows onto P and M move along their buffers.
- Relaxation is not applied to the states at all. It scales all transverse and all longitudinal states of an
  atom alike, so it goes into the few coefficients of the rotation, and into the states only every so often
  (``_Clock``).
- Atoms are sorted by T2, and short T2 needs few orders (``states_needed``).
- Batches run on all cores. No operation is large enough for torch to share it out itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.signal.extended_phase_graph import PulseTrain, first_longitudinal, states_needed

_SHARED_BEYOND = 32768
"""Elements from which torch shares an operation out among threads; 128 kB, of which a cache holds several."""
_LARGEST_EXPONENT = 30.0
"""Decay that states may be ahead of, as an exponent: far from the ends of float32 at 88."""


@dataclass(frozen=True)
class _Atoms:
    t1: Tensor
    t2: Tensor
    b1: Tensor | None
    inversion: Tensor

    def of(self, index: Tensor) -> _Atoms:
        return _Atoms(
            self.t1[index],
            self.t2[index],
            None if self.b1 is None else self.b1[index],
            self.inversion[index],
        )


def signal_in_place(
    t1: Tensor, t2: Tensor, b1: Tensor | None, inversion: Tensor, train: PulseTrain, states: int | None = None
) -> Tensor:
    """Signal of each pulse. Arguments and result as in ``differentiable_signal``, but for:

    Args:
        t1: T1 [s], (v,).
        t2: T2 [s], (v,).
        b1: actual over nominal flip angle, (v,), or None for 1.
        inversion: efficiency, (v,).
        train: the pulses.
        states: orders to keep; as many as each T2 needs if None.

    Returns:
        (v, w), real where ``train.is_real``.
    """
    kind = t1.dtype if train.is_real else t1.dtype.to_complex()
    result = torch.empty(len(t1), train.pulses, dtype=kind, device=t1.device)
    atoms = _Atoms(t1, t2, b1, inversion)
    falling = torch.argsort(t2, descending=True)
    longest = t2[falling].tolist()
    batches: list[tuple[Tensor, int]] = []
    start = 0
    while start < len(falling):
        kept = states_needed(train, longest[start]) if states is None else states
        elements = _SHARED_BEYOND if t1.device.type == "cpu" else 2**22
        size = max(32, elements // min(kept, (train.pulses + 1) // 2 + 1))
        batches.append((falling[start : start + size], kept))
        start += size

    def run(batch: tuple[Tensor, int]) -> None:
        with torch.no_grad():
            _simulate(atoms.of(batch[0]), batch[0], train, batch[1], result)

    workers = min(_cores(), len(batches)) if t1.device.type == "cpu" else 1
    if workers < 2:
        for batch in batches:
            run(batch)
    else:
        with ThreadPoolExecutor(workers, "phase-graph") as pool:
            for _ in pool.map(run, batches):
                pass
    return result


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Clock:
    """Time since relaxation was last applied to the states, as each pulse finds it [s]."""

    def __init__(self, train: PulseTrain, fastest_rate: float) -> None:
        limit = _LARGEST_EXPONENT / fastest_rate
        self.ahead = [0.0]
        self.applied = [0.0]
        """What is applied just before the pulse, 0 for nothing."""
        for time in train.repetition_time[:-1]:
            ahead = self.ahead[-1] + time
            self.applied.append(ahead if ahead > limit else 0.0)
            self.ahead.append(0.0 if ahead > limit else ahead)


def _simulate(atoms: _Atoms, place: Tensor, train: PulseTrain, states: int, result: Tensor) -> None:
    """Write the signals (a, w) of a batch into the rows ``place`` of ``result``.

    With g1 and g2 the relaxation that the states are behind by, they are P / g2, M / g2 and Z / g1.
    """
    voxels, pulses, kind, device = len(place), train.pulses, result.dtype, result.device
    largest = max(train.orders(pulse, states) for pulse in range(pulses))
    # At twice the largest exponent nothing is left after any repetition: faster makes no difference.
    fastest = 2 * _LARGEST_EXPONENT / min(train.repetition_time)
    rate1, rate2 = ((1 / time).clamp(max=fastest) for time in (atoms.t1, atoms.t2))
    clock = _Clock(train, float(torch.maximum(rate1.max(), rate2.max())))
    # P moves down its buffer by a row each pulse and M up: order 0 is row pulses - 1 - pulse, row pulse.
    buffer_p, buffer_m = torch.zeros(2, pulses + largest, voxels, dtype=kind, device=device)
    buffer_z, buffer_t, buffer_d = torch.zeros(3, largest, voxels, dtype=kind, device=device)
    rows_p, rows_m, row_z = buffer_p.unbind(0), buffer_m.unbind(0), buffer_z[0]
    row_z.copy_(first_longitudinal(atoms.t1, atoms.inversion, train))
    echo_decay = torch.exp(-train.echo_time / atoms.t2)
    together = max(1, _SHARED_BEYOND // voxels) if device.type == "cpu" else pulses
    samples = torch.empty(min(together, pulses), voxels, dtype=kind, device=device)
    sign = 1.0
    for first in range(0, pulses, together):
        some = range(first, min(first + together, pulses))
        signs = []
        for pulse in some:
            # In the frame of a pulse of opposite phase P and M are negative: that goes into g2.
            sign = -sign if train.is_real and train.opposite(pulse) else sign
            signs.append(sign)
        rotations, scale = _rotations(atoms, rate1, rate2, train, clock, some, signs)
        for pulse, feed, less, keep, drain, recovery in zip(
            some, *(rows.to(kind).unbind(0) for rows in rotations), strict=True
        ):
            orders, base = train.orders(pulse, states), pulses - 1 - pulse
            p, m = buffer_p[base : base + orders], buffer_m[pulse : pulse + orders]
            z, t, d = buffer_z[:orders], buffer_t[:orders], buffer_d[:orders]
            if pulse:
                torch.conj_physical(rows_m[pulse], out=rows_p[base])
                if clock.applied[pulse]:
                    decay = torch.exp(-clock.applied[pulse] * rate2).to(kind)
                    p.mul_(decay)
                    m.mul_(decay)
                    z.mul_(torch.exp(-clock.applied[pulse] * rate1).to(kind))
                row_z.add_(recovery)
                if not train.is_real:
                    step = train.phase_step[pulse]
                    turn = complex(math.cos(step), math.sin(step))
                    p.mul_(turn.conjugate())
                    m.mul_(turn)
            torch.add(p, m, out=t)
            torch.mul(z, feed, out=d)
            d.addcmul_(t, less)
            z.mul_(keep)
            z.addcmul_(t, drain)
            p.add_(d)
            m.add_(d)
            samples[pulse - first].copy_(rows_p[base])
        found = samples[: len(some)].mul_(scale.mul_(echo_decay)).T
        few = max(1, _SHARED_BEYOND // len(some))
        for atom in range(0, voxels, few):
            result[place[atom : atom + few], first : first + len(some)] = found[atom : atom + few]


def _rotations(
    atoms: _Atoms,
    rate1: Tensor,
    rate2: Tensor,
    train: PulseTrain,
    clock: _Clock,
    pulses: range,
    signs: list[float],
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Coefficients (pulse, a) of the rotations of some pulses, and what scales P to the signal.

    In order: of Z and of P + M in the change of P and M; of Z and of P + M in the new Z; the recovery that is
    added to Z before the pulse.
    """
    like = rate1

    def column(values: Iterable[float]) -> Tensor:
        return like.new_tensor(list(values))[:, None]

    half = column(train.flip_angle[pulse] / 2 for pulse in pulses)
    half = half.expand(-1, len(like)) if atoms.b1 is None else half * atoms.b1
    sine, less = torch.sin(2 * half), torch.sin(half).square_()
    ahead, sign = column(clock.ahead[pulse] for pulse in pulses), column(signs)
    ratio = sign * torch.exp(ahead * (rate2 - rate1))  # g1 / g2
    before = column(train.repetition_time[pulse - 1] if pulse else 0.0 for pulse in pulses)
    recovery = -torch.expm1(-before * rate1) * torch.exp(ahead * rate1)
    rotations = (sine * ratio, -less, 1 - 2 * less, -sine / (2 * ratio), recovery)
    return rotations, sign * torch.exp(-ahead * rate2)
