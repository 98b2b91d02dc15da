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

from quantitron.recon.operators.nonuniform_fourier import NonuniformFourier
from quantitron.recon.trajectory_sums import ProjectedSamples, TrajectorySums

_TOLERANCE = 1e-4
"""Of the transforms that average over neighbours."""
_POINTS = 16384
"""Points whose equations are solved together."""


def unmixed_data(sums: TrajectorySums, weights: Tensor, mixing: Tensor, share: float) -> ProjectedSamples:
    """Data whose adjoint with the same scalar weights has its components unmixed, in units of the images.

    Fewer components than the data have time points at every place can be told apart there: the weakest ones
    are better left out than solved for.

    Args:
        sums: of one slice.
        weights: (n,) density weights of the points.
        mixing: (l, k): components in the basis of the sums, orthonormal columns.
        share: what is added to the eigenvalues of Gamma, relative to their mean; above 0.

    Returns:
        (k, c, n): (Gamma + share m)^-1 b, in the place of ``sums.projected`` for the adjoint.

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
    data, adjoint = sums.projected, mixing.mH
    summed = data.groups.shape[2]
    groups = data.groups.new_empty(rank, *data.groups.shape[1:])
    for first in range(0, summed, _POINTS):
        part = slice(first, min(first + _POINTS, summed))
        inside = torch.einsum("kl,lcn->nkc", adjoint.to(groups), data.groups[:, :, part])
        groups[:, :, part] = _solved(gamma[part], inside).permute(1, 2, 0)
    # Readouts that stand alone have one vector at each point, whatever the channels.
    vectors = data.rows.to(adjoint) @ adjoint.mT
    rows = vectors.new_empty(len(data.row), rank)
    for first in range(0, len(rows), _POINTS):
        part = slice(first, first + _POINTS)
        rows[part] = _solved(gamma[summed:][part], vectors[data.row[part], :, None])[:, :, 0]
    return ProjectedSamples(groups, data.alone, rows, torch.arange(len(rows), device=rows.device))


def _solved(matrices: Tensor, right_hand_sides: Tensor) -> Tensor:
    """matrices^-1 right_hand_sides: (n, k, k), (n, k, c) -> (n, k, c)."""
    if matrices.is_complex() or not right_hand_sides.is_complex():
        solved: Tensor = torch.linalg.solve(matrices, right_hand_sides.to(matrices))
        return solved
    # Real and imaginary parts alike: half the arithmetic.
    points, rank, _ = right_hand_sides.shape
    pairs = torch.view_as_real(right_hand_sides.contiguous()).reshape(points, rank, -1)
    solved = torch.linalg.solve(matrices, pairs).reshape(points, rank, -1, 2)
    return torch.view_as_complex(solved.contiguous())


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
