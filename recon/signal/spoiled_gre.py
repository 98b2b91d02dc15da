"""Building blocks shared by the spoiled gradient-echo sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def flash_steady_state(t1: Tensor, flip_angle: Tensor, repetition_time: float) -> Tensor:
    """Steady state of an ideally spoiled gradient echo, per unit equilibrium magnetisation (Ernst 1966).

    ``sin(a) (1 - E1) / (1 - E1 cos(a))`` with ``E1 = exp(-TR / T1)``.

    Args:
        t1: T1 [s], any shape.
        flip_angle: flip angle a [rad], broadcast against ``t1``.
        repetition_time: TR [s].

    Returns:
        Signal, broadcast shape of the two.
    """
    # expm1 keeps (1 - E1) accurate where TR << T1.
    recovery = -torch.expm1(-repetition_time / t1)
    return torch.sin(flip_angle) * recovery / (1 - (1 - recovery) * torch.cos(flip_angle))


def flash_steady_state_slope(t1: Tensor, flip_angle: Tensor, repetition_time: float) -> Tensor:
    """Derivative of ``flash_steady_state`` by T1 [1/s]: ``-sin(a) (1 - cos(a)) E1' / (1 - E1 cos(a))^2``.

    Arguments as there; ``E1' = E1 TR / T1^2``.
    """
    e1 = torch.exp(-repetition_time / t1)
    cosine = torch.cos(flip_angle)
    slope = e1 * repetition_time / t1.square()
    return torch.sin(flip_angle) * (cosine - 1) * slope / (1 - e1 * cosine).square()


def echo_signal(t2star: Tensor, b0: Tensor, echo_time: Tensor, phase_sign: int = 1) -> Tensor:
    """Echo train ``exp(-TE / T2*) exp(j phase_sign 2 pi b0 TE)``.

    Args:
        t2star: T2* [s], shape (...).
        b0: off-resonance [Hz], shape (...).
        echo_time: TE [s], shape (e,).
        phase_sign: +1, or -1 where the phase evolves with time the other way round.

    Returns:
        complex, shape (..., e).
    """
    time = echo_time.to(t2star)
    decay = torch.exp(-time / t2star[..., None])
    return torch.polar(decay, phase_sign * 2 * math.pi * b0[..., None] * time + 0 * decay)
