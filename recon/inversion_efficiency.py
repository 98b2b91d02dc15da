"""The inversion efficiency of a scan that does not tell it: one smooth map, from many voxels together.

    minimise over B (smooth) and theta (each voxel):   sum_v ||U_v - U(theta_v, B)||^2

The components of one voxel hardly tell the efficiency from T1, and a fit that leaves it free in each voxel is
off where noise or short T1 make that worst: the mean of many such fits is a biased mean. So the voxels are
asked jointly. With theta at its best for a given B, the cost of a voxel is a parabola in B whose other
unknowns are eliminated (Schur complement); the parabolas of a neighbourhood are summed, and their minimum is
the new B. From the mean of the free fits two to four rounds of that arrive.

Images that a prior has drawn towards others are off by a part of the signal that no averaging takes out. It
moves the minimum by that part over what of the signal a change of B is, once the other unknowns have imitated
what they can: little after many excitations, 0.06 after 12 (RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from quantitron.recon.match import Fit
from quantitron.recon.signal.map_model import MapModel, normal_blocks, pull_back

INVERSION_WIDTH = 4.0
"""Standard deviation [voxels] of the neighbourhood: the efficiency follows the transmit field."""
_RANGE = (0.5, 1.0)
"""Of the mean; what single voxels say may be beyond, or the mean would fall short."""
_MOST_ROUNDS = 4
_SETTLED = 1e-3
"""Change of the efficiency, root mean square over the voxels, after which no other round is taken."""
_AT_BOUND = 1e-5
"""Distance of an unknown from its bound that is rounding."""
_LEAST_SAY = 1e-6
"""Weight of the mean of all voxels beside that of a neighbourhood."""
_LOUDEST = 0.3
"""No voxel counts as if it knew the efficiency better than to this part of the median standard deviation."""


def mean_of_free_fits(result: Fit, mask: Tensor) -> Tensor:
    """The mean over a neighbourhood of a fit that left the efficiency free in each voxel.

    Args:
        result: of the voxels in the mask.
        mask: (z, y, x) bool.

    Returns:
        (v,) from 0.5 to 1.
    """
    deviation = result.standard_deviation["inversion"]
    precision = deviation.clamp_min(1e-6).square().reciprocal()
    return _neighbourhood_mean(result.parameters["inversion"], precision, mask)


def shared_efficiency(
    start: Fit,
    mask: Tensor,
    coefficients: Tensor,
    model: MapModel,
    refit: Callable[[Fit], Fit],
    noise_variance: float | None,
) -> Tensor:
    """The efficiency on which the voxels of each neighbourhood agree best.

    Args:
        start: a fit of the voxels in the mask that left the efficiency free.
        mask: (z, y, x) bool.
        coefficients: U (v, k) complex of the same voxels.
        model: of their components; its efficiency is not read.
        refit: the best fit of the voxels at the efficiency of the one it is given.
        noise_variance: E|n|^2 of each component; None: from what each voxel's fit leaves.

    Returns:
        (v,) from 0.5 to 1.
    """
    efficiency, result = mean_of_free_fits(start, mask), start
    for _ in range(_MOST_ROUNDS):
        result = refit(replace(result, parameters={**result.parameters, "inversion": efficiency}))
        parabola = _parabola(coefficients, result, model, noise_variance)
        vertex = efficiency + (parabola.slope / parabola.curvature.clamp_min(1e-30)).to(efficiency)
        before = efficiency
        efficiency = _neighbourhood_mean(vertex, parabola.curvature / parabola.variance, mask)
        if float((efficiency - before).square().mean().sqrt()) < _SETTLED:
            break
    return efficiency


@dataclass(frozen=True)
class _Parabola:
    """What is left of each voxel's cost / 2 once its own unknowns are eliminated, (v,) each."""

    slope: Tensor
    """Along which it falls, at the present efficiency."""
    curvature: Tensor
    """0 where the voxel says nothing."""
    variance: Tensor
    """Of the real and of the imaginary part of a component."""


def _parabola(coefficients: Tensor, result: Fit, model: MapModel, noise_variance: float | None) -> _Parabola:
    parts = [
        _parabola_part(
            coefficients[part],
            {name: t[part] for name, t in result.parameters.items()},
            result.pd[part],
            model,
        )
        for part in torch.split(torch.arange(len(coefficients)), model.chunk)
    ]
    slope, curvature, cost = (torch.cat(rows) for rows in zip(*parts, strict=True))
    degrees = 2 * coefficients.shape[1] - len(model.names)
    # Where the fit leaves more than noise, the model does not hold and its voxel is to be believed less.
    variance = cost / degrees if degrees > 0 else torch.zeros_like(cost)
    if noise_variance is not None:
        variance = variance.clamp_min(noise_variance / 2)
    told = slope.isfinite() & curvature.isfinite() & (curvature > 0)
    tiny = torch.finfo(cost.dtype).tiny
    return _Parabola(
        torch.where(told, slope, 0),
        torch.where(told, curvature, 0),
        torch.where(told, variance, 1).clamp_min(tiny),
    )


def _parabola_part(
    coefficients: Tensor, parameters: dict[str, Tensor], pd: Tensor, model: MapModel
) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, curvature and cost, (v,) each, in double precision: the efficiency and T1 are near to one."""
    efficiency = parameters["inversion"].double()
    at = replace(model, inversion=efficiency)
    theta = at.unknowns(parameters, pd).double()  # (v, p)
    u, jacobian = at.jacobian(theta)  # (v, k), (v, p, k)
    # Signals are linear in the efficiency: two of them tell the derivative.
    ends = [replace(at, inversion=torch.full_like(efficiency, end)).coefficients(theta) for end in (0, 1)]
    change = ends[1] - ends[0]  # (v, k)
    left = coefficients - u
    low, high = at.limits(theta)
    # (v, p): an unknown at its bound does not give way.
    free = (theta > low + _AT_BOUND) & (theta < high - _AT_BOUND)
    jacobian = jacobian * free[:, :, None]
    normal = normal_blocks(jacobian, theta.new_ones(u.shape[1])) + torch.diag_embed((~free).double())
    mixed = pull_back(jacobian, change)  # (v, p)
    answer, _ = torch.linalg.solve_ex(normal, mixed)
    slope = (change.conj() * left).real.sum(1) - (answer * pull_back(jacobian, left)).sum(1)
    curvature = change.abs().square().sum(1) - (answer * mixed).sum(1)
    return slope, curvature, left.abs().square().sum(1)


def _neighbourhood_mean(values: Tensor, precision: Tensor, mask: Tensor) -> Tensor:
    """(v,) mean of values (v,) in a neighbourhood, weighed by their precision, none too loud.

    Where no neighbour says anything it is the mean of all.
    """
    telling = values.isfinite() & (precision > 0) & precision.isfinite()
    if not telling.any():
        return torch.full_like(values, _RANGE[1])
    precision = precision.double()
    loudest = _LOUDEST**2 / precision[telling].median()
    weight = torch.where(telling, precision / (1 + loudest * precision), 0)
    product = torch.where(telling, values.double() * weight, 0)
    sigma = [min(INVERSION_WIDTH, n / 4) if n > 1 else 0 for n in mask.shape]

    def smooth(inside: Tensor) -> Tensor:
        grid = np.zeros(mask.shape)
        grid[mask.numpy()] = inside.numpy()
        return torch.from_numpy(ndimage.gaussian_filter(grid, sigma)[mask.numpy()])

    little = _LEAST_SAY * weight.sum() / len(weight)
    mean = (smooth(product) + little * product.sum() / weight.sum()) / (smooth(weight) + little)
    return mean.to(values).clamp(*_RANGE)
