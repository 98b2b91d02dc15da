"""Noise level of data that came without a noise scan."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from quantitron.recon.data import Basis, ReducedKSpace, TrajectoryKSpace
from quantitron.recon.trajectory_gram import readout_groups
from quantitron.recon.trajectory_sums import TrajectorySums

_QUANTILE = 0.1
_LEAST_FREEDOMS = 1000
"""Numbers outside the basis that tell the noise to 3 %."""
_MOST_POINTS = 200_000
"""Points of a trajectory that are looked at; more tell the quantile no better."""


def noise_variance(reduced: ReducedKSpace, outermost: float = 0.15) -> float:
    """Noise variance E|n|^2 of one sample, from the outermost acquired k-space points.

    The squared modulus of complex Gaussian noise is exponentially distributed: a tenth of the values lie
    below -ln(0.9) times the mean, and that quantile hardly sees the points that still hold signal.

    Args:
        reduced: sums of the scan.
        outermost: share of the acquired points that is used, those furthest from the centre.

    Returns:
        variance in the units of the data, 1 for whitened data; above 0.
    """
    _, _, nz, ny = reduced.count.shape
    z = (torch.arange(nz) - nz // 2) / max(nz, 1)
    y = (torch.arange(ny) - ny // 2) / max(ny, 1)
    radius = (z[:, None] ** 2 + y**2).sqrt().expand_as(reduced.count)
    acquired = reduced.count > 0
    if not acquired.any():
        raise ValueError("no line was acquired: there is no noise level to estimate")
    edge = torch.quantile(radius[acquired].double(), 1 - outermost, interpolation="lower")
    chosen = acquired & (radius.double() >= edge)
    weight = reduced.gram[chosen].diagonal(dim1=-2, dim2=-1).real  # (point, l)
    return _from_sums(weight, reduced.projected[chosen])


def trajectory_noise_variance(
    sums: TrajectorySums, kspace: TrajectoryKSpace | None = None, outermost: float = 0.15
) -> float:
    """Noise variance E|n|^2 of one sample of a scan on any trajectory.

    Readouts of equal trajectory that are more than the components of the basis leave a part outside of it in
    which there is no signal, but for what the basis lacks. Where there are none, as ``noise_variance``.

    Args:
        sums: of one slice.
        kspace: its readouts, where they are at hand.
        outermost: share of the points that is used, those furthest from the centre.

    Returns:
        variance in the units of the data; above 0.
    """
    radius = sums.trajectory.double().square().sum(1)
    edge = torch.quantile(radius[:: max(1, len(radius) // 1_000_000)], 1 - outermost)
    if kspace is not None:
        energy, freedoms = _outside_the_basis(kspace, sums.basis, float(edge))
        if freedoms >= _LEAST_FREEDOMS:
            return energy / freedoms
    chosen = (radius >= edge).nonzero()[:, 0]
    chosen = chosen[:: max(1, len(chosen) // _MOST_POINTS)]
    weight = sums.gram.diagonal(dim1=1, dim2=2).real[sums.readout[chosen]]  # (point, l)
    components = torch.eye(weight.shape[1], dtype=sums.projected.alone.dtype)
    return _from_sums(weight, sums.projected.mixed(components, points=chosen).permute(2, 0, 1)[..., None])


def _outside_the_basis(kspace: TrajectoryKSpace, basis: Basis, edge: float) -> tuple[float, int]:
    """Energy of the samples outside the basis, and of how many independent numbers it is the sum.

    Args:
        kspace: readouts of one slice.
        basis: temporal basis.
        edge: square of the distance from the k-space centre beyond which samples are taken.
    """
    starts = kspace.readout_length.cumsum(0) - kspace.readout_length
    energy, freedoms = 0.0, 0
    for members in readout_groups(kspace):
        if len(members) <= basis.rank:
            continue
        length, first = int(kspace.readout_length[members[0]]), int(starts[members[0]])
        outer = kspace.trajectory[first : first + length].double().square().sum(1) >= edge
        places = outer.nonzero()[:, 0]
        readouts = torch.stack([kspace.samples[:, start + places] for start in starts[members].tolist()])
        inside = torch.linalg.qr(basis.contrast[kspace.time_point[members]].to(readouts))[0]  # (t, l)
        readouts = readouts.flatten(1)
        rest = (readouts - inside @ (inside.mH @ readouts)).abs().square().sum(0)  # (c p,)
        energy += float(rest.sum(dtype=torch.float64))
        freedoms += (len(members) - basis.rank) * int((rest > 0).sum())  # a dead channel tells nothing
    return energy, freedoms


def _from_sums(weight: Tensor, projected: Tensor) -> float:
    """Variance from points that hold noise for the most part.

    Args:
        weight: (point, l) diagonal of G.
        projected: (point, l, c, x) b.
    """
    strongest = weight.argmax(1)  # the component that these lines measure best
    point = torch.arange(len(strongest))
    samples = projected[point, strongest]  # (point, c, x)
    # b_l is a sum of noise weighted with psi_l; its variance is G_ll times that of a sample.
    power = samples.abs().square() / weight[point, strongest][:, None, None]
    values = np.asarray(power.flatten())
    values = values[values > 0]  # a dead channel and zeros that stand for samples tell nothing
    if not values.size:
        return 1.0  # nothing was measured: any level will do
    return float(np.quantile(values, _QUANTILE)) / -math.log1p(-_QUANTILE)
