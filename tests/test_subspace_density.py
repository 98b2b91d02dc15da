"""Density weights that are matrices: components unmixed, no bias where all readouts pass."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from spirals import scan, spirals
from torch import Tensor

from quantitron.recon.data import Basis
from quantitron.recon.operators.density_compensation import density_weights
from quantitron.recon.operators.nonuniform_fourier import NonuniformFourier
from quantitron.recon.operators.subspace_density import unmixed_data
from quantitron.recon.operators.toeplitz import adjoint_images
from quantitron.recon.trajectory_gram import sum_readouts
from quantitron.recon.trajectory_sums import ProjectedSamples, TrajectorySums

N, SPOKES, POINTS, RANK = 32, 64, 64, 2


def _groups(values: Tensor) -> ProjectedSamples:
    """Data (l, c, n) of readouts that were summed."""
    none = torch.zeros(0, dtype=torch.int64)
    return ProjectedSamples(values, values.new_zeros(values.shape[1], 0), torch.zeros(0, len(values)), none)


def _sums(images: Tensor) -> TrajectorySums:
    """Noise-free data of images (k, z, y, x) on spokes, each seen by two time points of a skew basis."""
    angle = torch.arange(SPOKES) * math.pi / SPOKES
    radius = (torch.arange(POINTS) - POINTS // 2) / POINTS
    trajectory = torch.stack((angle.cos()[:, None] * radius, angle.sin()[:, None] * radius), dim=-1).reshape(
        -1, 2
    )
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2 * SPOKES, RANK, generator=generator))[0]
    pairs = basis.reshape(2, SPOKES, RANK)  # time points g and g + SPOKES fall to spoke g
    gram = torch.einsum("tgi,tgj->gij", pairs, pairs)
    readout = torch.arange(SPOKES).repeat_interleave(POINTS)
    samples = NonuniformFourier(trajectory, (1, N, N)).forward(images)  # (k, n)
    projected = torch.einsum("nij,jn->in", gram[readout].to(samples), samples)[:, None]
    return TrajectorySums(
        trajectory=trajectory,
        readout=readout,
        gram=gram,
        projected=_groups(projected),
        count=torch.full((SPOKES,), 2),
        density=None,
        energy=0.0,
        samples=0,
        basis=Basis(basis, torch.tensor([0.7, 0.3]), 1.0, "dictionary"),
        grid=(1, N, N),
    )


def _images() -> Tensor:
    axis = (torch.arange(N) - N // 2) / (N / 2)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    disc = torch.sigmoid(12 * (0.6 - (x.square() + y.square()).sqrt()))
    other = torch.sigmoid(12 * (0.3 - ((x - 0.2).square() + y.square()).sqrt()))
    return torch.stack((disc, 0.3 * other)).to(torch.complex64)[:, None]


def _adjoint(sums: TrajectorySums, weights: Tensor, scale: float = 1.0) -> Tensor:
    csm = torch.ones(N, 1, 1, N, dtype=torch.complex64)
    images = adjoint_images(sums, csm, torch.eye(RANK), weights)  # (x, k, z, y)
    return scale * images.permute(1, 2, 3, 0)


def _error(images: Tensor) -> float:
    weak = _images()[1]
    return float((images[1] - weak).norm() / weak.norm())


def test_unmixed_components_are_nearer_to_the_truth() -> None:
    sums = _sums(_images())
    weights = density_weights(sums.trajectory, sums.grid)
    plain = _adjoint(sums, weights, SPOKES)  # the mean of all G is the identity / SPOKES
    unmixed = replace(sums, projected=unmixed_data(sums, weights, torch.eye(RANK), 1e-3))
    assert _error(plain) > 0.3
    assert _error(_adjoint(unmixed, weights)) < 0.4 * _error(plain)


def test_alike_readouts_need_no_unmixing() -> None:
    sums = _sums(_images())
    same = torch.eye(RANK).expand(SPOKES, RANK, RANK).contiguous() / SPOKES
    samples = NonuniformFourier(sums.trajectory, sums.grid).forward(_images())[:, None]
    sums = replace(sums, gram=same, projected=_groups(samples / SPOKES))
    weights = density_weights(sums.trajectory, sums.grid)
    unmixed = unmixed_data(sums, weights, torch.eye(RANK), 1e-6).groups
    assert torch.allclose(unmixed, samples, rtol=1e-3, atol=1e-3 * float(samples.abs().max()))


def test_complex_components_are_the_turned_real_ones() -> None:
    sums = _sums(_images())
    weights = density_weights(sums.trajectory, sums.grid)
    turn = torch.linalg.qr(
        torch.randn(RANK, RANK, dtype=torch.complex64, generator=torch.Generator().manual_seed(2))
    )[0]
    real = unmixed_data(sums, weights, torch.eye(RANK), 1e-2).groups
    turned = unmixed_data(sums, weights, turn, 1e-2).groups
    expected = torch.einsum("lk,lcn->kcn", turn.conj(), real)
    assert torch.allclose(turned, expected, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("complex_basis", [False, True])
@pytest.mark.parametrize("distinct", [2 * SPOKES, SPOKES + 10])
def test_readouts_that_stand_alone_are_unmixed_as_summed_ones(complex_basis: bool, distinct: int) -> None:
    """One vector at a point says the same as a vector for each channel."""
    kspace, basis = scan(spirals(distinct, POINTS), (1, N, N), 2 * SPOKES, 3, RANK, complex_basis)
    sums = sum_readouts(kspace, basis)
    assert len(sums.projected.row) == (2 * distinct - 2 * SPOKES) * POINTS
    identity = torch.eye(RANK, dtype=torch.complex64)
    summed = replace(sums, projected=_groups(sums.projected.mixed(identity)))
    weights = density_weights(sums.trajectory, sums.grid)
    found = unmixed_data(sums, weights, identity, 1e-2)
    assert found.alone.data_ptr() == sums.projected.alone.data_ptr()
    expected = unmixed_data(summed, weights, identity, 1e-2).groups
    assert torch.allclose(found.mixed(identity), expected, atol=1e-5 * float(expected.abs().max()))


def test_share_and_weights_are_checked() -> None:
    sums = _sums(_images())
    weights = torch.ones(len(sums.readout))
    with pytest.raises(ValueError, match="above 0"):
        unmixed_data(sums, weights, torch.eye(RANK), 0.0)
    with pytest.raises(ValueError, match="points of the trajectory"):
        unmixed_data(sums, weights[1:], torch.eye(RANK), 1e-2)
