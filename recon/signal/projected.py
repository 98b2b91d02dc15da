"""The contrast factor in a temporal basis, with its derivatives: what a fit in the basis asks for.

A sequence may bring its own closed form; for any other the derivatives are taken by forward-mode automatic
differentiation of its contrast signal, which takes several times as long.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from quantitron.recon.data import Protocol
from quantitron.recon.signal import t2ir_gre, vfa_gre
from quantitron.recon.signal.models import CONTRAST_PARAMETERS, CONTRAST_SIGNALS

ProjectedSignal: TypeAlias = Callable[
    [Mapping[str, Tensor], Protocol, Tensor], tuple[Tensor, dict[str, Tensor]]
]
"""(parameters (v,), protocol, Psi (w, l)) -> Psi^H f (l, v), and by each parameter its derivative."""

CLOSED_FORMS: Mapping[str, ProjectedSignal] = {
    "t2ir_gre": t2ir_gre.projected_signal,
    "vfa_gre": vfa_gre.projected_signal,
}
"""Sequences that bring theirs."""


def projected_signal(
    parameters: Mapping[str, Tensor], protocol: Protocol, basis: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrast factor f of each voxel in the basis.

    Args:
        parameters: the parameters of the sequence (times [s]), and at least one of any name, each (v,).
        protocol: the sequence.
        basis: Psi (w, l).

    Returns:
        Psi^H f (l, v), and by each parameter of the sequence its derivative (l, v).
    """
    return CLOSED_FORMS.get(protocol.sequence, differentiated)(parameters, protocol, basis)


def differentiated(
    parameters: Mapping[str, Tensor], protocol: Protocol, basis: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """``projected_signal`` by automatic differentiation, for every sequence."""
    names = CONTRAST_PARAMETERS[protocol.sequence]
    signal = CONTRAST_SIGNALS[protocol.sequence]

    def project(frames: Tensor) -> Tensor:
        return basis.mH @ frames.mT.to(basis.dtype)

    if not names:
        return project(signal(parameters, protocol, None)), {}
    values = {name: parameters[name] for name in names}
    slopes = {}
    with warnings.catch_warnings():
        # torch's own forward mode still compiles some formulas with torch.jit when it is first used.
        warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated")
        for name in names:
            tangent = {key: torch.full_like(value, float(key == name)) for key, value in values.items()}
            slopes[name] = project(
                torch.func.jvp(lambda inputs: signal(inputs, protocol, None), (values,), (tangent,))[1]
            )
    return project(signal(values, protocol, None)), slopes
