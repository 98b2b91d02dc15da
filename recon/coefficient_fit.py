"""The last steps of a voxel's fit, taken in the components that its images were reconstructed in.

    minimise over theta:   ||U - U(theta)||^2,      U(theta) = Phi^H I(theta)   (``map_model.py``)

Images of few components hold of a signal what these span, and are zero in the rest. Against whole signals
(``match.py``) that zero counts as measured: signals that the components hold only in part, such as those of
short T2, come out as others that they hold better. Here both sides are what the components hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantitron.recon.algorithms.levenberg_marquardt import (
    VoxelState,
    damped_step,
    held_back,
    inverse_diagonal,
    levenberg_marquardt,
)
from quantitron.recon.data import Protocol
from quantitron.recon.match import Fit
from quantitron.recon.refine import ARRIVED
from quantitron.recon.signal.map_model import TIMES, MapModel, normal_blocks, pull_back
from quantitron.recon.signal.models import CONTRAST_PARAMETERS


@dataclass
class _State(VoxelState):
    gradient: Tensor
    """(p, v) Re(J^H r), along which the cost falls."""
    normal: Tensor
    """(p, p, v) Re(J^H J)."""


def fit_coefficients(
    coefficients: Tensor,
    start: Fit,
    psi: Tensor,
    mixing: Tensor,
    protocol: Protocol,
    iterations: int = 50,
    chunk: int = 16384,
    noise_variance: float | None = None,
) -> Fit:
    """Go on from a fit of whole signals, in the components.

    The inversion efficiency stays as it is: components of one voxel do not tell it from T1
    (``inversion_efficiency.py``).

    Args:
        coefficients: U (v, k) complex.
        start: of the same voxels.
        psi: (w, l) contrast basis.
        mixing: (e, l, k), orthonormal columns over (e, l).
        protocol: the sequence.
        iterations: steps at most; a voxel that has arrived takes no more.
        chunk: voxels worked on together; bounds memory, changes no result.
        noise_variance: E|n|^2 of each coefficient, for the standard deviations; None: from the residual of
            each voxel's fit.

    Returns:
        The fit; standard deviations are the roots of the Cramer-Rao bound, NaN where the noise is not given
        and there are no more numbers than unknowns. A voxel whose start is not finite stays as it is.
    """
    model = MapModel(protocol, psi, mixing)
    real = coefficients.real.dtype
    found = start.parameters
    theta = model.unknowns(found, start.pd).T.to(real)  # (p, v)
    low, high = (bound[:, None] for bound in model.limits(theta))
    arrived = ARRIVED * model.units(theta)[:, None]
    good = theta.isfinite().all(0).nonzero()[:, 0]

    def evaluate(theta: Tensor, data: Mapping[str, Tensor]) -> _State:
        at = replace(model, inversion=data.get("inversion"))
        u, jacobian = at.jacobian(theta.T)  # (v, k), (v, p, k)
        left = data["u"].T - u
        ones = theta.new_ones(left.shape[1])
        return _State(
            theta,
            torch.view_as_real(left).square().sum((1, 2)),
            pull_back(jacobian, left).T,
            normal_blocks(jacobian, ones).permute(1, 2, 0),
        )

    def propose(state: _State, damping: Tensor) -> Tensor:
        held = held_back(state.theta, state.gradient, low, high)
        return (state.theta + damped_step(state.normal, state.gradient, damping, held)).clamp(low, high)

    theta = theta.clamp(low, high)
    result, deviation = theta.clone(), torch.full_like(theta, math.nan)
    for part in torch.split(good, chunk):
        data = {"u": coefficients[part].T.contiguous()}
        if "inversion" in CONTRAST_PARAMETERS[protocol.sequence]:
            data["inversion"] = found["inversion"][part].to(real)
        final = levenberg_marquardt(evaluate, propose, theta[:, part], data, arrived, iterations)
        result[:, part] = final.theta
        # The variance of the real and of the imaginary part of a component.
        noise: Tensor | float = math.nan
        if noise_variance is not None:
            noise = noise_variance / 2
        elif 2 * coefficients.shape[1] > len(theta):
            noise = final.cost / (2 * coefficients.shape[1] - len(theta))
        deviation[:, part] = (noise * inverse_diagonal(final.normal)).sqrt()
    values = {
        name: row.exp() if name in TIMES else row for name, row in zip(model.names, result, strict=True)
    }
    parameters = {name: values.get(name, row) for name, row in found.items()}
    spread = dict(start.standard_deviation)
    for name, row in zip(model.names, deviation, strict=True):
        if name in spread:
            spread[name] = row * values[name] if name in TIMES else row
    return Fit(parameters, torch.polar(values["amplitude"].exp(), values["phase"]), spread)
