"""T2-prepared inversion recovery with a multi-echo FLASH readout (SUMMIT; LoREIN data set 2; METHODS 2.1).

    S = A sin(a) (1 - E1) / (1 - E1 cos a) [1 + (B E2 - 1) (E1 cos a)^n] exp(-TE / T2*) exp(j phi_e)

with E1 = exp(-TR / T1), E2 = exp(-tau / T2), n = 0 .. N-1 the excitation after the preparation and B the
inversion (-1 when perfect, B = -efficiency). The preparation acts on the steady state. The factor over
(n, tau) and the factor over the echoes are separate; this file is the first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantitron.recon.data import Protocol
from quantitron.recon.signal.spoiled_gre import flash_steady_state

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
