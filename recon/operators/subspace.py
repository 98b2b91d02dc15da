"""From coefficient images to the images of all frames, off-resonance taken out of the basis (METHODS 3).

I_(w,e)(r) = D_e(r) sum_k Phi[(w,e), k] U_k(r),      D_e = exp(j phase_sign 2 pi b0(r) TE_e)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantitron.recon.operators.linear_operator import LinearOperator


class SubspaceOperator(LinearOperator):
    """Phi: coefficient images (x, k, z, y) -> frames (x, t, z, y)."""

    def __init__(self, basis: Tensor) -> None:
        """Keep the basis.

        Args:
            basis: (t, k), real or complex.
        """
        self._basis = basis

    def forward(self, x: Tensor) -> Tensor:
        """(x, k, z, y) -> (x, t, z, y)."""
        frames = self._basis.to(x.dtype) @ x.flatten(2)  # (x, t, z*y)
        return frames.reshape(*frames.shape[:2], *x.shape[2:])

    def adjoint(self, y: Tensor) -> Tensor:
        """(x, t, z, y) -> (x, k, z, y)."""
        coefficients = self._basis.to(y.dtype).mH @ y.flatten(2)  # (x, k, z*y)
        return coefficients.reshape(*coefficients.shape[:2], *y.shape[2:])


class OffResonanceOperator(LinearOperator):
    """D: frames (x, t, z, y) times the phase that a known field gives at each frame's echo time."""

    def __init__(self, b0: Tensor, echo_time: Tensor, contrasts: int, phase_sign: int = 1) -> None:
        """Precompute the phases.

        Args:
            b0: (x, z, y) [Hz].
            echo_time: (e,) [s].
            contrasts: number of contrasts w; frame t = w * n_echoes + e.
            phase_sign: +1 or -1, ``Protocol.phase_sign``.
        """
        phase = off_resonance_phase(b0, echo_time, phase_sign)  # (x, e, z, y)
        self._phase = phase.repeat(1, contrasts, 1, 1)  # (x, t, z, y)

    def forward(self, x: Tensor) -> Tensor:
        """(x, t, z, y), shape unchanged."""
        return x * self._phase

    def adjoint(self, y: Tensor) -> Tensor:
        """(x, t, z, y), shape unchanged."""
        return y * self._phase.conj()


def off_resonance_phase(b0: Tensor, echo_time: Tensor, phase_sign: int = 1) -> Tensor:
    """exp(j phase_sign 2 pi b0 TE).

    Args:
        b0: (x, z, y) [Hz].
        echo_time: (e,) [s].
        phase_sign: +1 or -1.

    Returns:
        (x, e, z, y) complex of b0's precision.
    """
    angle = phase_sign * 2 * math.pi * b0[:, None] * echo_time.to(b0)[:, None, None]  # (x, e, z, y)
    return torch.polar(torch.ones_like(angle), angle)
