"""Parameter grids and the dictionaries simulated over them, one for each factor of the signal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.data import Protocol
from quantitron.recon.signal.models import CONTRAST_PARAMETERS, CONTRAST_SIGNALS
from quantitron.recon.signal.spoiled_gre import echo_signal

PARAMETER_RANGE: Mapping[str, tuple[float, float]] = {
    "t1": (0.02, 6.0),
    "t2": (0.004, 3.0),
    "t2star": (0.002, 1.5),
    "inversion": (0.5, 1.2),
}
"""Bounds of the fitted parameters: times [s], inversion efficiency [1]. No efficiency is above 1, but noise
around 1 must be let through, or the mean of the estimates falls short."""

_CONTRAST_GRID_POINTS = {"t1": 64, "t2": 48, "inversion": 6}


@dataclass(frozen=True)
class Dictionary:
    """Atoms of one factor of the signal with their parameters."""

    atoms: Tensor
    """(a, n) real or complex, one row an atom, not normalised."""
    parameters: Mapping[str, Tensor]
    """Name -> (a,) [s], [Hz] or [1]."""


def _grid(low: float, high: float, points: int, logarithmic: bool) -> Tensor:
    if logarithmic:
        return torch.logspace(
            float(torch.log10(torch.tensor(low))),
            float(torch.log10(torch.tensor(high))),
            points,
            dtype=torch.float64,
        )
    return torch.linspace(low, high, points, dtype=torch.float64)


def contrast_dictionary(
    protocol: Protocol,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    points: Mapping[str, int] | None = None,
) -> Dictionary:
    """Dictionary over the contrasts (T1, T2, inversion as far as the sequence depends on them).

    Args:
        protocol: the sequence. A known inversion efficiency is used and not varied.
        ranges: name -> (low, high) in place of ``PARAMETER_RANGE``.
        points: name -> grid points in place of the usual ones.

    Returns:
        real atoms (a, w) in double precision.
    """
    bounds = {**PARAMETER_RANGE, **(ranges or {})}
    counts = {**_CONTRAST_GRID_POINTS, **(points or {})}
    names = CONTRAST_PARAMETERS[protocol.sequence]
    axes = []
    for name in names:
        if name == "inversion" and protocol.inversion_efficiency is not None:
            axes.append(torch.tensor([protocol.inversion_efficiency], dtype=torch.float64))
        else:
            low, high = bounds[name]
            axes.append(_grid(low, high, counts[name], name != "inversion"))
    if not names:
        return Dictionary(torch.ones(1, 1, dtype=torch.float64), {})
    mesh = torch.meshgrid(*axes, indexing="ij")
    parameters = {name: values.flatten() for name, values in zip(names, mesh, strict=True)}  # (a,)
    return Dictionary(CONTRAST_SIGNALS[protocol.sequence](parameters, protocol, None), parameters)


def echo_dictionary(
    protocol: Protocol,
    b0_range: float,
    t2star_range: tuple[float, float] = PARAMETER_RANGE["t2star"],
    t2star_points: int = 48,
    b0_points: int = 41,
) -> Dictionary:
    """Dictionary over the echoes (T2*, off-resonance).

    Args:
        protocol: the sequence, for its echo times.
        b0_range: half-width [Hz] of the off-resonances, 0 for none.
        t2star_range: T2* [s], logarithmic.
        t2star_points: grid points of T2*.
        b0_points: grid points of the off-resonance.

    Returns:
        complex atoms (a, e) in double precision.
    """
    t2star = _grid(*t2star_range, t2star_points, True)
    b0 = _grid(-b0_range, b0_range, b0_points, False) if b0_range > 0 else torch.zeros(1, dtype=torch.float64)
    t2star, b0 = (values.flatten() for values in torch.meshgrid(t2star, b0, indexing="ij"))
    time = torch.tensor(protocol.echo_time, dtype=torch.float64)
    return Dictionary(echo_signal(t2star, b0, time, protocol.phase_sign), {"t2star": t2star, "b0": b0})
