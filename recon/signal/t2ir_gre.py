"""T2-prepared inversion recovery with a multi-echo FLASH readout (SUMMIT; LoREIN data set 2; METHODS 2.1).

    S = A sin(a) (1 - E1) / (1 - E1 cos a) [1 + (B E2 - 1) (E1 cos a)^n] exp(-TE / T2*) exp(j phi_e)

with E1 = exp(-TR / T1), E2 = exp(-tau / T2), n = 0 .. N-1 the excitation after the preparation and B the
inversion (-1 when perfect, B = -efficiency). The preparation acts on the steady state. The factor over
(n, tau) and the factor over the echoes are separate; this file is the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quantitron.recon.data import Protocol
from quantitron.recon.signal.spoiled_gre import flash_steady_state, flash_steady_state_slope

PARAMETERS = ("t1", "t2", "inversion")
"""Tissue parameters that the contrast factor depends on."""


def contrast_signal(parameters: Mapping[str, Tensor], protocol: Protocol, b1: Tensor | None = None) -> Tensor:
    """Signal of each (n, tau) at TE = 0, per unit A.

    Args:
        parameters: ``t1``, ``t2`` [s] and ``inversion`` (efficiency, 0..1), shape (...).
        protocol: flip angle [rad], TR and preparation times tau [s], excitations N.
        b1: actual over nominal flip angle, shape (...); 1 where absent.

    Returns:
        real, shape (..., w) with w = n * n_tau + tau.
    """
    t1, t2, inversion = parameters["t1"], parameters["t2"], parameters["inversion"]
    flip_angle = torch.full_like(t1, protocol.flip_angle[0])
    if b1 is not None:
        flip_angle = flip_angle * b1
    tau = torch.tensor(protocol.preparation_time, dtype=t1.dtype, device=t1.device)  # (tau,)
    excitation = torch.arange(protocol.excitations, dtype=t1.dtype, device=t1.device)  # (n,)
    steady = flash_steady_state(t1, flip_angle, protocol.repetition_time[0])
    prepared = -inversion[..., None] * torch.exp(-tau / t2[..., None]) - 1  # (..., tau)
    # (E1 cos a)^n through its factors, so that the power stays differentiable at a = 90 degrees.
    decay = torch.exp(-protocol.repetition_time[0] * excitation / t1[..., None])  # (..., n)
    decay = decay * torch.cos(flip_angle)[..., None] ** excitation
    signal = 1 + prepared[..., None, :] * decay[..., :, None]  # (..., n, tau)
    return (steady[..., None, None] * signal).flatten(-2)  # (..., w)


def projected_signal(
    parameters: Mapping[str, Tensor], protocol: Protocol, basis: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The contrast factor in a basis, and its derivatives, in closed form.

    The basis is contracted with the excitations first: what remains is over the few preparation times.

    Args:
        parameters: ``t1``, ``t2`` [s] and ``inversion``, shape (v,).
        protocol: as in ``contrast_signal``.
        basis: Psi (w, l).

    Returns:
        Psi^H f (l, v), and by each parameter its derivative (l, v).
    """
    t1, t2, inversion = parameters["t1"], parameters["t2"], parameters["inversion"]
    repetition_time, columns = protocol.repetition_time[0], basis.shape[1]
    angle = torch.tensor(protocol.flip_angle[0], dtype=t1.dtype, device=t1.device)
    tau = torch.tensor(protocol.preparation_time, dtype=t1.dtype, device=t1.device)[:, None]
    excitation = torch.arange(protocol.excitations, dtype=t1.dtype, device=t1.device)  # (n,)
    power = math.cos(protocol.flip_angle[0]) ** excitation
    decay = torch.exp(excitation[:, None] * (-repetition_time / t1)) * power[:, None]  # (n, v)
    # d/dT1 is decay * n * TR / T1^2: n joins the basis, so that both are products with one array.
    by_excitation = basis.conj().reshape(protocol.excitations, -1).T  # (tau l, n)
    both = torch.cat([by_excitation, by_excitation * excitation]) @ decay.to(basis.dtype)
    shape = (len(tau), columns, len(t1))
    sums, growth = (part.reshape(shape) for part in both.chunk(2))  # (tau, l, v)
    preparation = torch.exp(-tau / t2)  # (tau, v)
    prepared = -inversion * preparation - 1

    def over_tau(factor: Tensor, of: Tensor) -> Tensor:
        total = factor[0] * of[0]
        for number in range(1, len(factor)):
            total = torch.addcmul(total, factor[number].to(of.dtype), of[number])
        return total

    steady = flash_steady_state(t1, angle, repetition_time)
    bracket = basis.conj().sum(0)[:, None] + over_tau(prepared, sums)  # (l, v)
    by_inversion = over_tau(preparation, sums)
    by_rate = over_tau(preparation * tau, sums)
    return steady * bracket, {
        "t1": flash_steady_state_slope(t1, angle, repetition_time) * bracket
        + (steady * repetition_time / t1.square()) * over_tau(prepared, growth),
        "t2": (-steady * inversion / t2.square()) * by_rate,
        "inversion": -steady * by_inversion,
    }
