"""The sequences that have a signal model, by name, and the full signal built from its two factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from quantitron.recon.data import Protocol
from quantitron.recon.signal import fisp_mrf, megre, t2ir_gre, vfa_gre
from quantitron.recon.signal.spoiled_gre import echo_signal

ContrastSignal: TypeAlias = Callable[[Mapping[str, Tensor], Protocol, "Tensor | None"], Tensor]
"""Signal over the contrasts at TE = 0 (``fisp_mrf``: at TE): (parameters of shape (...), protocol, b1) ->
(..., w)."""

CONTRAST_SIGNALS: Mapping[str, ContrastSignal] = {
    "t2ir_gre": t2ir_gre.contrast_signal,
    "vfa_gre": vfa_gre.contrast_signal,
    "megre": megre.contrast_signal,
    "fisp_mrf": fisp_mrf.contrast_signal,
}
CONTRAST_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "t2ir_gre": t2ir_gre.PARAMETERS,
    "vfa_gre": vfa_gre.PARAMETERS,
    "megre": megre.PARAMETERS,
    "fisp_mrf": fisp_mrf.PARAMETERS,
}
SEQUENCES = tuple(CONTRAST_SIGNALS)


def signal(parameters: Mapping[str, Tensor], protocol: Protocol, b1: Tensor | None = None) -> Tensor:
    """Complex signal of every frame for unit A and zero receive phase.

    Args:
        parameters: ``t2star`` [s] (not ``fisp_mrf``, whose fingerprints hold their decay), ``b0`` [Hz] and
            the sequence's own parameters, shape (...).
        protocol: the sequence.
        b1: actual over nominal flip angle, shape (...); 1 where absent.

    Returns:
        complex, shape (..., t) with ``t = w * n_echoes + e``.

    Raises:
        ValueError: if the protocol's sequence has no signal model.
    """
    if protocol.sequence not in CONTRAST_SIGNALS:
        raise ValueError(
            f"no signal model for sequence '{protocol.sequence}'; there are {', '.join(SEQUENCES)}"
        )
    contrast = CONTRAST_SIGNALS[protocol.sequence](parameters, protocol, b1)  # (..., w)
    b0 = parameters["b0"]
    time = torch.tensor(protocol.echo_time, dtype=b0.dtype, device=b0.device)
    t2star = torch.full_like(b0, math.inf) if protocol.sequence == "fisp_mrf" else parameters["t2star"]
    echo = echo_signal(t2star, b0, time, protocol.phase_sign)  # (..., e)
    return (contrast[..., :, None] * echo[..., None, :]).flatten(-2)  # (..., t)
