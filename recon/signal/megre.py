"""Plain multi-echo spoiled gradient echo: A exp(-TE / T2*) exp(j phi_e), two echoes or more.

There is one contrast, and the flip angle and T1 are part of A: the contrast factor is 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from quantitron.recon.data import Protocol

PARAMETERS: tuple[str, ...] = ()
"""The contrast factor depends on nothing."""


def contrast_signal(
    parameters: Mapping[str, Tensor],
    protocol: Protocol,  # noqa: ARG001  (all sequences are called alike)
    b1: Tensor | None = None,  # noqa: ARG001
) -> Tensor:
    """The contrast factor of a scan with one contrast: ones.

    Args:
        parameters: any map that gives the shape (...), such as ``t2star`` [s].
        protocol: not used.
        b1: not used.

    Returns:
        real ones, shape (..., 1).
    """
    like = next(iter(parameters.values()))
    return like.new_ones(()).expand(like.shape)[..., None]
