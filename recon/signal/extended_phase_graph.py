"""Extended phase graph of a train of pulses with one unbalanced gradient after each (Weigel 2015).

Configuration states of order k are kept in the frame of the pulse that acts on them: with phi its phase,
``P_k = j exp(-j phi) F_k``, ``M_k = -j exp(j phi) conj(F_(-k))`` and ``Z_k``. A pulse of angle a then turns

    S = (P + M) / 2,  Z   into   S cos a + Z sin a,  Z cos a - S sin a

and leaves the component along its own axis, (P - M) / 2, alone: P and M change by the same amount. Nothing in
this is complex unless a phase step between pulses is neither 0 nor 180 degrees. The receiver follows the
phase of the pulses: the signal is P_0, and sin(a) for a single pulse on equilibrium.

How many orders matter. Order k at pulse n is fed by the k gradients before and read out by the k gradients
after it, so k <= n and k < pulses - n: a triangle that is exact. And whatever goes beyond order k and comes
back has been transverse for more than 2 k repetitions and has decayed by exp(-2 k TR / T2) at least. Pulses
conserve the norm of the states of an order and mostly spread it, so that much less than that bound arrives:
``states_needed`` keeps the orders whose bound is above ``TOLERANCE``, and the tests measure what it misses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Orders are left out where exp(-2 k TR / T2) is smaller. Their part of the signal, norm over norm, is below
a tenth of it: 1e-4, mostly 1e-5."""


@dataclass(frozen=True)
class PulseTrain:
    """What is played out. Times in seconds, angles in radians."""

    flip_angle: tuple[float, ...]
    """(w,)."""
    repetition_time: tuple[float, ...]
    """(w,): from each pulse to the next."""
    echo_time: float
    """From a pulse to the sample."""
    phase_step: tuple[float, ...] = ()
    """(w,): phase of each pulse less that of the one before; empty: all alike."""
    inversion_time: float | None = None
    """From the inversion to the first pulse; None where nothing is inverted."""

    @property
    def pulses(self) -> int:
        """Number of pulses."""
        return len(self.flip_angle)

    @property
    def is_real(self) -> bool:
        """Whether the signal is real: all phase steps are 0 or 180 degrees."""
        return all(abs(math.sin(step)) < 1e-9 for step in self.phase_step[1:])

    def opposite(self, pulse: int) -> bool:
        """Whether a pulse has rather the opposite phase of the one before than the same."""
        return bool(pulse and self.phase_step) and math.cos(self.phase_step[pulse]) < 0

    def orders(self, pulse: int, states: int) -> int:
        """Orders 0 .. orders - 1 that matter while ``pulse`` acts, if ``states`` are kept."""
        return min(states, pulse + 1, self.pulses - pulse)


def states_needed(train: PulseTrain, longest_t2: float, tolerance: float = TOLERANCE) -> int:
    """Orders to keep for atoms whose T2 [s] is at most ``longest_t2``."""
    periods = math.log(1 / tolerance) * longest_t2 / (2 * min(train.repetition_time))
    return max(2, min(math.ceil(periods) + 1, (train.pulses + 1) // 2 + 1))


def first_longitudinal(t1: Tensor, inversion: Tensor | float, train: PulseTrain) -> Tensor:
    """Longitudinal magnetisation as the first pulse finds it, of unit equilibrium, shape of ``t1``.

    The inversion takes 1 to ``-inversion``; what it leaves transverse is spoiled.
    """
    if train.inversion_time is None:
        return torch.ones_like(t1)
    return 1 - (1 + inversion) * torch.exp(-train.inversion_time / t1)


def differentiable_signal(
    t1: Tensor, t2: Tensor, b1: Tensor | None, inversion: Tensor | float, train: PulseTrain, states: int
) -> Tensor:
    """Signal of each pulse, open to differentiation by all of its tensors, forwards and backwards.

    Args:
        t1: T1 [s], (v,).
        t2: T2 [s], (v,).
        b1: actual over nominal flip angle, (v,), or None for 1.
        inversion: efficiency, (v,) or one for all.
        train: the pulses.
        states: orders to keep.

    Returns:
        (v, w), real where ``train.is_real``.
    """
    z = first_longitudinal(t1, inversion, train)[None]  # (k, v)
    if not train.is_real:
        z = torch.complex(z, torch.zeros_like(z))
    p = m = torch.zeros_like(z)
    echo_decay = torch.exp(-train.echo_time / t2)
    samples = []
    for pulse in range(train.pulses):
        if train.is_real:
            p, m = (-p, -m) if train.opposite(pulse) else (p, m)
        elif pulse:
            turn = complex(math.cos(train.phase_step[pulse]), math.sin(train.phase_step[pulse]))
            p, m = turn.conjugate() * p, turn * m
        half = train.flip_angle[pulse] / 2 * (torch.ones_like(t1) if b1 is None else b1)
        sine, less = torch.sin(2 * half), torch.sin(half).square()  # less = (1 - cos a) / 2
        total = p + m
        change = sine * z - less * total
        p, m, z = p + change, m + change, z - 2 * less * z - (sine / 2) * total
        samples.append(p[0] * echo_decay)
        if pulse + 1 == train.pulses:
            break
        repetition_time = train.repetition_time[pulse]
        p, m = (torch.exp(-repetition_time / t2) * side for side in (p, m))
        recovery = -torch.expm1(-repetition_time / t1)
        z = (1 - recovery) * z
        z = torch.cat([z[:1] + recovery, z[1:], torch.zeros_like(z[:1])])
        m = torch.cat([m[1:], torch.zeros_like(m[:1]), torch.zeros_like(m[:1])])
        p = torch.cat([m[:1].conj(), p])
        orders = train.orders(pulse + 1, states)
        p, m, z = p[:orders], m[:orders], z[:orders]
    return torch.stack(samples, dim=-1)
