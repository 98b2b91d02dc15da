"""The reduced data term as a function that networks are trained through.

    f(U, C) = 1/2 sum_t ||s_t - M_t F C D_t Phi_t U||^2 - 1/2 ||s||^2

of some readout positions, differentiable once by the coefficient images U and the coil maps C. Value and
gradients come from one sweep; nothing of it is recorded, so that memory is that of the sweep alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantitron.recon.operators.reduced_sense import ReducedSense


def reduced_data_term(operator: ReducedSense, part: slice, coefficients: Tensor, csm: Tensor) -> Tensor:
    """f of the readout positions in ``part``: a real scalar.

    Args:
        operator: sums G and b, basis and field map; its own coil maps are not used.
        part: which readout positions.
        coefficients: U (x, k, z, y) of these.
        csm: C (x, c, z, y) of these.
    """
    value: Tensor = _DataTerm.apply(coefficients, csm, operator, part)  # type: ignore[no-untyped-call]
    return value


class _DataTerm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, csm: Tensor, operator: ReducedSense, part: slice) -> Tensor:
        value, by_coefficients, by_csm = operator.value_and_gradients(part, coefficients, csm)
        ctx.save_for_backward(by_coefficients, by_csm)
        return coefficients.real.new_tensor(value)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_coefficients, by_csm = ctx.saved_tensors
        return gradient * by_coefficients, gradient * by_csm, None, None
