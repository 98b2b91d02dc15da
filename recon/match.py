"""From coefficients to tissue parameters: matching over the dictionaries, then bounded Gauss-Newton steps.

    minimise over theta and complex PD:   sum_{e,l} |V_{e,l} - PD p_l(theta) g_e(theta)|^2

with p = Psi^H f(T1, T2, inversion) and g = exp(-TE / T2*) exp(j 2 pi b0 TE) (METHODS 5). Because the signal
factorises, V of one voxel is a matrix of rank one: its echo side is matched first, its contrast side next,
each over a small dictionary of its own, instead of over all combinations at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.data import Basis, Protocol
from quantitron.recon.signal.dictionary import PARAMETER_RANGE, contrast_dictionary, echo_dictionary
from quantitron.recon.signal.models import CONTRAST_PARAMETERS, CONTRAST_SIGNALS, ContrastSignal
from quantitron.recon.signal.spoiled_gre import echo_signal


@dataclass(frozen=True)
class Fit:
    """Parameters of each voxel."""

    parameters: Mapping[str, Tensor]
    """Name -> (voxel,): t1, t2, t2star [s], inversion [1], b0 [Hz], as far as the sequence has them."""
    pd: Tensor
    """(voxel,) complex: proton density times receive phase."""
    standard_deviation: Mapping[str, Tensor]
    """Name -> (voxel,): root of the Cramer-Rao bound at the residual of the fit, in the map's unit."""


def best_atom(signals: Tensor, atoms: Tensor, working_set: int = 64_000_000) -> tuple[Tensor, Tensor]:
    """Atom of largest normalised correlation, and the complex factor that fits it.

    Args:
        signals: (voxel, n) complex.
        atoms: (a, n).
        working_set: bytes for the correlations held at once; bounds memory, changes no result.

    Returns:
        index (voxel,) of the atom with the largest ``|<d, u>| / ||d||``; PD = ``<d, u> / ||d||^2`` (voxel,).
    """
    norm = torch.linalg.vector_norm(atoms, dim=1)
    normalised = (atoms / norm[:, None]).to(signals.dtype).conj()  # (a, n)
    chunk = max(1, working_set // (16 * len(atoms)))
    index = torch.empty(len(signals), dtype=torch.int64, device=signals.device)
    factor = torch.empty(len(signals), dtype=signals.dtype, device=signals.device)
    for start in range(0, len(signals), chunk):
        part = slice(start, start + chunk)
        correlation = signals[part] @ normalised.T  # (chunk, a)
        index[part] = correlation.abs().argmax(1)
        factor[part] = correlation.gather(1, index[part, None])[:, 0] / norm[index[part]].to(signals.dtype)
    return index, factor


def fit(
    coefficients: Tensor,
    basis: Basis,
    protocol: Protocol,
    b0_range: float = 25.0,
    iterations: int = 12,
    chunk: int = 16384,
    known: Mapping[str, Tensor] | None = None,
) -> Fit:
    """Match, then refine off the grid.

    Args:
        coefficients: V (voxel, e, l) complex, in the contrast basis.
        basis: the contrast basis.
        protocol: the sequence.
        b0_range: half-width [Hz] of the off-resonances searched by matching; the refinement may leave it.
        iterations: Gauss-Newton steps.
        chunk: voxels worked on together; bounds memory, changes no result.
        known: name -> (voxel,) parameters that are given and not fitted.
    """
    device = coefficients.device
    psi = basis.contrast.to(device)
    contrasts = contrast_dictionary(protocol)
    contrast_atoms = contrasts.atoms.to(device, psi.real.dtype).to(psi.dtype) @ psi.conj()  # (a, l)
    echoes = echo_dictionary(protocol, b0_range if protocol.echoes > 1 else 0.0)
    echo_atoms = echoes.atoms.to(device, coefficients.dtype)  # (a, e)
    parts = []
    for start in range(0, len(coefficients), chunk):
        measured = coefficients[start : start + chunk]  # (v, e, l)
        # Echo side: principal left vector of V, from the small Gram matrix over the echoes.
        _, vectors = torch.linalg.eigh(measured @ measured.mH)
        echo_index, _ = best_atom(vectors[:, :, -1], echo_atoms)
        g = echo_atoms[echo_index]  # (v, e)
        side = torch.einsum("ve,vel->vl", g.conj(), measured) / g.abs().square().sum(1, keepdim=True)
        contrast_index, pd = best_atom(side, contrast_atoms)
        start_values = {
            **{
                name: values.to(device).float()[contrast_index]
                for name, values in contrasts.parameters.items()
            },
            **{name: values.to(device).float()[echo_index] for name, values in echoes.parameters.items()},
        }
        given = {name: values[start : start + chunk] for name, values in (known or {}).items()}
        parts.append(_refine(measured, {**start_values, **given}, set(given), pd, psi, protocol, iterations))
    if not parts:
        names = (*CONTRAST_PARAMETERS[protocol.sequence], "t2star", "b0")
        empty = torch.zeros(0, device=device)
        return Fit(dict.fromkeys(names, empty), empty.to(coefficients.dtype), dict.fromkeys(names, empty))
    return Fit(
        {name: torch.cat([part.parameters[name] for part in parts]) for name in parts[0].parameters},
        torch.cat([part.pd for part in parts]),
        {name: torch.cat([part.standard_deviation[name] for part in parts]) for name in parts[0].parameters},
    )


def _model(
    theta: Tensor, free: tuple[str, ...], fixed: Mapping[str, Tensor], psi: Tensor, protocol: Protocol
) -> tuple[Tensor, Tensor]:
    """Signal in the contrast basis and its derivatives.

    Args:
        theta: (p, v), times as logarithms.
        free: name of each row of theta.
        fixed: parameters that are not fitted, (v,).
        psi: (w, l).
        protocol: the sequence.

    Returns:
        model (v, e, l) and derivatives (p, v, e, l), complex.
    """
    values = {name: row.exp() if name in _LOGARITHMIC else row for name, row in zip(free, theta, strict=True)}
    values = {**fixed, **values}
    names = CONTRAST_PARAMETERS[protocol.sequence]
    signal = CONTRAST_SIGNALS[protocol.sequence]
    dtype = torch.promote_types(psi.dtype, torch.complex64)
    psi_conj = psi.conj().to(dtype)
    contrast_values = {name: values[name] for name in (names or ("t2star",))}
    p = signal(contrast_values, protocol, None).to(dtype) @ psi_conj  # (v, l)
    time = torch.tensor(protocol.echo_time, dtype=theta.dtype, device=theta.device)
    g = echo_signal(values["t2star"], values["b0"], time, protocol.phase_sign)  # (v, e)
    derivatives = []
    for name in free:
        if name in names:
            tangent = {
                key: (value if name in _LOGARITHMIC else torch.ones_like(value))
                if key == name
                else torch.zeros_like(value)
                for key, value in contrast_values.items()
            }
            slope = _directional_derivative(signal, contrast_values, tangent, protocol)
            derivatives.append(g[:, :, None] * (slope.to(dtype) @ psi_conj)[:, None, :])
        elif name == "t2star":
            slope = g * time / values["t2star"][:, None]  # derivative after log T2*
            derivatives.append(slope[:, :, None] * p[:, None, :])
        else:
            slope = g * (2j * math.pi * protocol.phase_sign) * time
            derivatives.append(slope[:, :, None] * p[:, None, :])
    return g[:, :, None] * p[:, None, :], torch.stack(derivatives)


def _directional_derivative(
    signal: ContrastSignal, values: dict[str, Tensor], tangent: dict[str, Tensor], protocol: Protocol
) -> Tensor:
    """Forward-mode derivative (v, w) of the contrast signal along ``tangent``."""
    with warnings.catch_warnings():
        # torch's own forward mode still compiles some formulas with torch.jit when it is first used.
        warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated")
        slope: Tensor = torch.func.jvp(lambda inputs: signal(inputs, protocol, None), (values,), (tangent,))[
            1
        ]
    return slope


_LOGARITHMIC = ("t1", "t2", "t2star")
"""Parameters whose logarithm is fitted: they stay positive and their steps are relative."""


def _refine(
    measured: Tensor,
    start: Mapping[str, Tensor],
    given: set[str],
    pd: Tensor,
    psi: Tensor,
    protocol: Protocol,
    iterations: int,
) -> Fit:
    """Levenberg-Marquardt steps on all voxels together, each voxel keeping only steps that lower its cost."""
    if protocol.inversion_efficiency is not None:
        given = given | {"inversion"}
    if protocol.echoes == 1:
        given = given | {"t2star", "b0"}
    fixed = {name: values for name, values in start.items() if name in given}
    free = tuple(name for name in start if name not in fixed)
    theta = torch.stack([start[name].log() if name in _LOGARITHMIC else start[name] for name in free])
    bounds = torch.tensor(
        [
            [math.log(b) if name in _LOGARITHMIC else b for b in PARAMETER_RANGE.get(name, (-1e4, 1e4))]
            for name in free
        ],
        dtype=theta.dtype,
        device=theta.device,
    )
    low, high = bounds[:, :1], bounds[:, 1:]
    model, slopes = _model(theta, free, fixed, psi, protocol)
    pd = _best_pd(model, measured)
    cost = _cost(model, pd, measured)
    damping = torch.full_like(cost, 1e-2)
    for _ in range(iterations):
        normal, gradient = _normal_equations(model, slopes, pd, measured)
        # Marquardt's scaling makes the damping independent of each parameter's unit.
        diagonal = normal.diagonal(dim1=1, dim2=2)
        floor = diagonal.amax(1, keepdim=True) * 1e-12 + torch.finfo(diagonal.dtype).tiny
        damped = normal + torch.diag_embed(damping[:, None] * diagonal + floor)
        step = torch.linalg.solve(damped, gradient)  # (v, p)
        trial = torch.minimum(torch.maximum(theta + step.T, low), high)
        trial_model, trial_slopes = _model(trial, free, fixed, psi, protocol)
        trial_pd = _best_pd(trial_model, measured)
        trial_cost = _cost(trial_model, trial_pd, measured)
        better = trial_cost < cost
        theta = torch.where(better, trial, theta)
        model = torch.where(better[:, None, None], trial_model, model)
        slopes = torch.where(better[:, None, None], trial_slopes, slopes)
        pd = torch.where(better, trial_pd, pd)
        cost = torch.where(better, trial_cost, cost)
        damping = torch.where(better, damping / 5, damping * 5).clamp(1e-7, 1e7)
    values = {name: row.exp() if name in _LOGARITHMIC else row for name, row in zip(free, theta, strict=True)}
    deviation = _standard_deviation(model, slopes, pd, cost)
    scaled = {
        name: row * values[name] if name in _LOGARITHMIC else row
        for name, row in zip(free, deviation, strict=True)
    }
    return Fit(
        {name: fixed.get(name, values.get(name, start[name])) for name in start},
        pd,
        {name: scaled.get(name, torch.zeros_like(start[name])) for name in start},
    )


def _best_pd(model: Tensor, measured: Tensor) -> Tensor:
    """Closed-form complex PD (v,): <m, V> / ||m||^2."""
    return (model.conj() * measured).sum((1, 2)) / model.abs().square().sum((1, 2)).clamp_min(1e-30)


def _cost(model: Tensor, pd: Tensor, measured: Tensor) -> Tensor:
    """(v,) squared residual."""
    residual: Tensor = (measured - pd[:, None, None] * model).abs().square()
    total: Tensor = residual.sum((1, 2))
    return total


def _projected_slopes(model: Tensor, slopes: Tensor, pd: Tensor) -> Tensor:
    """Derivatives (v, p, e*l) of the model with PD refitted (variable projection, Golub and Pereyra 1973)."""
    unit = (model / torch.linalg.vector_norm(model, dim=(1, 2), keepdim=True).clamp_min(1e-30)).flatten(1)
    jacobian = (pd[:, None, None] * slopes).permute(1, 0, 2, 3).flatten(2)  # (v, p, e*l)
    projected: Tensor = jacobian - (jacobian @ unit.conj()[:, :, None]) * unit[:, None, :]
    return projected


def _normal_equations(model: Tensor, slopes: Tensor, pd: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    """J^T J (v, p, p) and J^T r (v, p) of the real least-squares problem."""
    jacobian = _projected_slopes(model, slopes, pd)
    residual = (measured - pd[:, None, None] * model).flatten(1)  # (v, e*l)
    return (jacobian.conj() @ jacobian.mT).real, (jacobian.conj() @ residual[:, :, None])[:, :, 0].real


def _standard_deviation(model: Tensor, slopes: Tensor, pd: Tensor, cost: Tensor) -> Tensor:
    """(p, v) root of the diagonal of the Cramer-Rao bound, noise variance from the residual of the fit."""
    jacobian = _projected_slopes(model, slopes, pd)
    normal = (jacobian.conj() @ jacobian.mT).real
    measurements = 2 * model[0].numel() - 2 - len(slopes)
    per_part = cost / max(measurements, 1)  # variance of the real and of the imaginary part
    scale = normal.diagonal(dim1=1, dim2=2).amax(1)[:, None].clamp_min(1e-30)
    eye = torch.eye(len(slopes), dtype=normal.dtype, device=normal.device)
    inverse = torch.linalg.inv(normal + 1e-9 * scale[:, :, None] * eye)
    variance: Tensor = inverse.diagonal(dim1=1, dim2=2).clamp_min(0) * per_part[:, None]
    return variance.sqrt().T
