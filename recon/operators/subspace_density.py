"""Density compensation in the subspace: a matrix for every point of the trajectory.

A point of k-space is seen by the time points of its readout alone, and their share G_g of the temporal
basis is not that of all time points. A scalar weight leaves the components mixed, the more, the fewer time
points fell to the readouts that pass nearby. Around the centre, where many readouts pass, this mixing varies
slowly in space: no incoherent aliasing but a bias of the maps, and most of the error of a density-compensated
adjoint. With the scalar weights w and kappa as wide as a Cartesian sample,

    Gamma(k) = sum_n kappa(k - k_n) w_n G_g(n) / sum_n kappa(k - k_n) w_n
    W_n = w_n (Gamma(k_n) + share m)^-1,      m the mean eigenvalue of Gamma

undoes it as far as the time points nearby allow. All else is as with scalar weights: no iteration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantitron.recon.data import TrajectorySums
from quantitron.recon.operators.nonuniform_fourier import NonuniformFourier

_TOLERANCE = 1e-4
"""Of the transforms that average over neighbours."""
_POINTS = 16384
"""Points whose equations are solved together."""


def unmixed_data(sums: TrajectorySums, weights: Tensor, mixing: Tensor, share: float) -> Tensor:
    """Data whose adjoint with the same scalar weights has its components unmixed, in units of the images.

    Fewer components than the data have time points at every place can be told apart there: the weakest ones
    are better left out than solved for.

    Args:
        sums: of one slice.
        weights: (n,) density weights of the points.
        mixing: (l, k): components in the basis of the sums, orthonormal columns.
        share: what is added to the eigenvalues of Gamma, relative to their mean; above 0.

    Returns:
        (k, c, n) complex: (Gamma + share m)^-1 b, in the place of ``sums.projected`` for the adjoint.

    Raises:
        ValueError: if the share is not above 0, or the weights are not one a point.
    """
    if not share > 0:
        raise ValueError(f"the share that is added to the eigenvalues must be above 0, not {share:g}")
    if weights.shape != sums.readout.shape:
        raise ValueError(f"{tuple(weights.shape)} weights for {len(sums.readout)} points of the trajectory")
    real = not sums.gram.is_complex() and not (mixing.is_complex() and bool(mixing.imag.any()))
    mixing = (mixing.real if real else mixing).to(sums.trajectory.device)
    gram = mixing.mH @ sums.gram.to(mixing) @ mixing  # (g, k, k)
    gamma = _neighbourhood(sums, weights, gram)  # (n, k, k)
    rank = gamma.shape[1]
    mean = gamma.diagonal(dim1=1, dim2=2).real.mean()
    gamma.diagonal(dim1=1, dim2=2).add_(share * mean)
    _, coils, points = sums.projected.shape
    projected = sums.projected.new_empty(rank, coils, points)
    adjoint = mixing.mH.to(projected)
    for first in range(0, gamma.shape[0], _POINTS):
        part = slice(first, first + _POINTS)
        data = torch.einsum("kl,lcn->nkc", adjoint, sums.projected[:, :, part])
        if not real:
            solved = torch.linalg.solve(gamma[part], data)
        else:  # real and imaginary parts alike: half the arithmetic
            pairs = torch.view_as_real(data.contiguous()).reshape(len(data), rank, -1)
            solved = torch.linalg.solve(gamma[part], pairs).reshape(len(data), rank, -1, 2)
            solved = torch.view_as_complex(solved.contiguous())
        projected[:, :, part] = solved.permute(1, 2, 0)
    return projected


def _neighbourhood(sums: TrajectorySums, weights: Tensor, gram: Tensor) -> Tensor:
    """Gamma (n, k, k) at every point: the mean of G (g, k, k) over the neighbours."""
    trajectory = sums.trajectory
    dimensions = trajectory.shape[1]
    nz, ny, nx = sums.grid
    doubled = (2 * nz if dimensions == 3 else 1, 2 * ny, 2 * nx)
    fourier = NonuniformFourier(trajectory, doubled, _TOLERANCE)
    window = torch.ones((), device=trajectory.device)
    for axis, size in enumerate(doubled):
        if size > 1:
            # Transform of the Fejer kernel of the field of view: positive, as wide as a Cartesian sample.
            triangle = 1 - (torch.arange(size, device=trajectory.device) - size // 2).abs() / (size // 2)
            window = window * triangle.reshape(-1, *[1] * (2 - axis))

    def averaged(values: Tensor) -> Tensor:
        found: Tensor = fourier.forward(fourier.adjoint(values.to(torch.complex64)) * window)
        return found

    density = averaged(weights).real.clamp_min(1e-6)
    rank = gram.shape[1]
    real = not gram.is_complex()
    result = gram.new_empty(len(weights), rank, rank, dtype=torch.float32 if real else torch.complex64)
    pairs = [(i, j) for i in range(rank) for j in range(i, rank)]
    together = 2 if real else 1  # the kernel is real: two real columns are one complex one
    for first in range(0, len(pairs), together):
        chosen = pairs[first : first + together]
        columns = [gram[:, i, j][sums.readout] * weights for i, j in chosen]
        column = columns[0] if len(columns) == 1 else torch.complex(columns[0].float(), columns[1].float())
        found = averaged(column) / density
        for index, (i, j) in enumerate(chosen):
            value = (found.imag if index else found.real) if real else found
            result[:, i, j] = value
            result[:, j, i] = value if real else value.conj()
    return result
