"""Variable flip angle, multi-echo spoiled gradient echo (LoREIN data set 1; METHODS 2.2).

    S = A sin(a) (1 - E1) / (1 - E1 cos a) exp(-TE / T2*) exp(j phi_e),   E1 = exp(-TR / T1)

The factor over the flip angles and the factor over the echoes are separate; this file is the first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantitron.recon.data import Protocol
from quantitron.recon.signal.spoiled_gre import flash_steady_state, flash_steady_state_slope

PARAMETERS = ("t1",)
"""Tissue parameters that the contrast factor depends on."""


def contrast_signal(parameters: Mapping[str, Tensor], protocol: Protocol, b1: Tensor | None = None) -> Tensor:
    """Signal of each flip angle at TE = 0, per unit A.

    Args:
        parameters: ``t1`` [s], shape (...).
        protocol: flip angles [rad] and TR [s].
        b1: actual over nominal flip angle, shape (...); 1 where absent.

    Returns:
        real, shape (..., w).
    """
    t1 = parameters["t1"]
    flip_angle = torch.tensor(protocol.flip_angle, dtype=t1.dtype, device=t1.device)
    if b1 is not None:
        flip_angle = flip_angle * b1[..., None]
    return flash_steady_state(t1[..., None], flip_angle, protocol.repetition_time[0])


def projected_signal(
    parameters: Mapping[str, Tensor], protocol: Protocol, basis: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The contrast factor in a basis, and its derivative, in closed form.

    Args:
        parameters: ``t1`` [s], shape (v,).
        protocol: flip angles [rad] and TR [s].
        basis: Psi (w, l).

    Returns:
        Psi^H f (l, v), and by each parameter its derivative (l, v).
    """
    t1 = parameters["t1"]
    angle = torch.tensor(protocol.flip_angle, dtype=t1.dtype, device=t1.device)[:, None]
    projection = basis.mH
    signal = flash_steady_state(t1, angle, protocol.repetition_time[0])  # (w, v)
    slope = flash_steady_state_slope(t1, angle, protocol.repetition_time[0])
    return projection @ signal.to(basis.dtype), {"t1": projection @ slope.to(basis.dtype)}
