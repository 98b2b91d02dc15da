"""Plain multi-echo spoiled gradient echo: A exp(-TE / T2*) exp(j phi_e), two echoes or more.

There is one contrast, and the flip angle and T1 are part of A: the contrast factor is 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from quantitron.recon.data import Protocol

PARAMETERS: tuple[str, ...] = ()
"""The contrast factor depends on nothing."""


def contrast_signal(parameters: Mapping[str, Tensor], protocol: Protocol, b1: Tensor | None = None) -> Tensor:
    """The contrast factor of a scan with one contrast: ones of shape (..., 1), shaped like ``t2star``.

    Args:
        parameters: any map that gives the shape (...), such as ``t2star`` [s].
        protocol: not used; present so that all sequences are called alike.
        b1: not used.
    """
    return next(iter(parameters.values())).new_ones(()).expand(next(iter(parameters.values())).shape)[..., None]
