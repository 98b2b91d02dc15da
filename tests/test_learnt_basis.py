"""The basis learnt from a scan: a turn of the components to the axes of the signals that are there."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from quantitron.recon.coefficient_basis import CoefficientBasis, coefficient_basis, echo_images, learnt_basis
from quantitron.recon.data import Protocol, ReducedKSpace
from quantitron.recon.operators.reduced_sense import ReducedSense
from quantitron.recon.temporal_basis import dictionary_basis

VFA = Protocol(
    "vfa_gre", (0.002, 0.006, 0.012, 0.02), (0.046,), tuple(math.radians(a) for a in (5, 15, 25, 40))
)
RANK = 6


@pytest.fixture(scope="module")
def basis() -> CoefficientBasis:
    return coefficient_basis(dictionary_basis(VFA, 4), VFA, 3.0, RANK)


def _random(seed, *shape):
    return torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def _scan(grid=(12, 6, 10), seed=0):
    """Correlated coefficients (x, k, z, y), energies (x, z, y), and a mask of half the voxels."""
    x, z, y = grid
    factor = _random(seed + 1, RANK, RANK) * torch.logspace(0, -2, RANK)[:, None]
    energy = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) * 50 + 1
    u = torch.einsum("jk,xkzy->xjzy", factor, _random(seed, x, RANK, z, y)) * energy.sqrt()[:, None]
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[: x // 2] = True
    return u, energy, mask


def _moments(u, energy, mask):
    """(k, k) sum of u u^H over the energy, voxel by voxel."""
    total = torch.zeros(u.shape[1], u.shape[1], dtype=torch.complex128)
    for x, z, y in mask.nonzero().tolist():
        vector = u[x, :, z, y].to(torch.complex128)
        total += torch.outer(vector, vector.conj())
    return total / float(energy[mask].sum())


def _turned(rotation, u):
    return torch.einsum("kj,xkzy->xjzy", rotation.conj().to(u.dtype), u)  # rotation^H u


def test_the_rotation_is_unitary_and_loses_no_signal(basis):
    u, energy, mask = _scan()
    learnt, rotation = learnt_basis(basis, u, energy, mask)
    torch.testing.assert_close(
        rotation.mH @ rotation, torch.eye(RANK, dtype=torch.complex128), rtol=0, atol=1e-12
    )
    # The same images from the turned coefficients in the turned basis, and the same space.
    torch.testing.assert_close(
        echo_images(_turned(rotation, u), learnt), echo_images(u, basis), rtol=0, atol=2e-5
    )
    old, new = (b.mixing.flatten(0, 1) for b in (basis, learnt))
    torch.testing.assert_close(new @ new.mH, old @ old.mH, rtol=0, atol=1e-5)
    torch.testing.assert_close(new.mH @ new, torch.eye(RANK, dtype=new.dtype), rtol=0, atol=1e-5)
    assert learnt.retained_energy == basis.retained_energy
    assert learnt.rank == basis.rank


def test_components_are_uncorrelated_afterwards_with_their_variances(basis):
    """After the dictionary's share: the mixture of both second moments is diagonal in the new components."""
    u, energy, mask = _scan()
    learnt, rotation = learnt_basis(basis, u, energy, mask)
    voxels = int(mask.sum())
    prior = torch.diag(basis.variance.double()).to(torch.complex128)
    mixed = (voxels * _moments(u, energy, mask) + 2 * RANK * prior) / (voxels + 2 * RANK)
    turned = rotation.mH @ mixed @ rotation
    torch.testing.assert_close(
        turned, torch.diag(learnt.variance.double()).to(turned), rtol=0, atol=1e-6 * float(turned.abs().max())
    )
    assert (learnt.variance.diff() <= 0).all()
    before, after = (
        float((m - torch.diag(m.diagonal())).norm() / m.norm())
        for m in (_moments(u, energy, mask), _moments(_turned(rotation, u), energy, mask))
    )
    assert after < 0.1 * before


def test_many_voxels_have_their_own_moments(basis):
    u, energy, mask = _scan((60, 20, 20))
    learnt, rotation = learnt_basis(basis, u, energy, mask)
    moments = _moments(_turned(rotation, u), energy, mask)
    torch.testing.assert_close(
        moments.diagonal().real.float(), learnt.variance, rtol=2e-3, atol=1e-3 * float(learnt.variance[0])
    )
    off = moments - torch.diag(moments.diagonal())
    assert float(off.abs().max()) < 2e-3 * float(moments.abs().max())


def test_few_voxels_leave_the_dictionary_in_charge(basis):
    u, energy, mask = _scan()
    learnt, rotation = learnt_basis(basis, u, energy, torch.zeros_like(mask))
    torch.testing.assert_close(learnt.variance, basis.variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(rotation.abs(), torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-9)
    one = torch.zeros_like(mask)
    one[0, 0, 0] = True
    energy[0, 0, 0] = u[0, :, 0, 0].abs().square().sum()
    learnt, _ = learnt_basis(basis, u, energy, one)
    # One voxel counts as one of 1 + 12: no variance falls below 12/13 of the dictionary's of that order.
    share = 2 * RANK / (2 * RANK + 1)
    assert (learnt.variance >= share * basis.variance * (1 - 1e-5)).all()
    assert float(learnt.variance.sum()) == pytest.approx(
        share * float(basis.variance.sum()) + (1 - share), rel=1e-5
    )


def test_voxels_outside_the_mask_do_not_count(basis):
    u, energy, mask = _scan()
    first, _ = learnt_basis(basis, u, energy, mask)
    other = torch.where(mask[:, None], u, 1e3 * _random(9, *u.shape))
    second, _ = learnt_basis(basis, other, torch.where(mask, energy, 7.0), mask)
    assert torch.equal(first.variance, second.variance)
    assert torch.equal(first.mixing, second.mixing)


def test_components_that_are_absent_keep_a_finite_weight(basis):
    u, energy, mask = _scan()
    u[:, 1:] = 0
    absent = replace(basis, variance=torch.tensor([1.0] + [0.0] * (RANK - 1)))
    learnt, _ = learnt_basis(absent, u, energy, mask)
    assert float(learnt.variance.min()) == pytest.approx(1e-9 * float(learnt.variance[0]), rel=1e-4)


def test_an_operator_in_another_basis_is_one_built_anew(basis):
    """And A^H A and A^H s turn with the components."""
    grid, coils = (3, 8), 2
    nx, (nz, ny) = 5, grid
    contrast = dictionary_basis(VFA, 4)
    lines = torch.rand(4, *grid, VFA.contrasts, generator=torch.Generator().manual_seed(2)) < 0.5
    psi = contrast.contrast.float()
    reduced = ReducedKSpace(
        torch.einsum("ezyw,wl,wm->ezylm", lines.float(), psi, psi)[None],
        _random(3, 1, 4, *grid, 4, coils, nx),
        lines.sum(-1)[None].float(),
        1.0,
        int(lines.sum()) * coils * nx,
        contrast,
    )
    csm, b0 = _random(4, nx, coils, nz, ny), 20 * _random(7, nx, nz, ny).real
    turn, _ = torch.linalg.qr(_random(5, RANK, RANK))
    mixing = basis.mixing @ turn
    operator, anew = (
        ReducedSense(reduced, csm, m, b0, torch.tensor(VFA.echo_time)) for m in (basis.mixing, mixing)
    )
    before = operator(u := _random(6, nx, RANK, nz, ny))
    other = operator.in_basis(mixing)
    for one, two in (
        (other(u), anew(u)),
        (other.adjoint_data(), anew.adjoint_data()),
        (other.mean_diagonal(), anew.mean_diagonal()),
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-6 * float(two.abs().max()))
    assert torch.equal(operator(u), before)  # the first one is left as it was
    old = torch.einsum("kj,xjzy->xkzy", turn, u)
    torch.testing.assert_close(
        other(u), _turned(turn, operator(old)), rtol=0, atol=2e-5 * float(before.abs().max())
    )
    data = operator.adjoint_data()
    torch.testing.assert_close(
        other.adjoint_data(), _turned(turn, data), rtol=0, atol=2e-5 * float(data.abs().max())
    )
    fewer = operator.in_basis(mixing[..., :3])
    assert fewer.shape == (nx, 3, nz, ny)
    torch.testing.assert_close(fewer.adjoint_data(), anew.adjoint_data()[:, :3], rtol=0, atol=1e-4)
    # One that is made for a single contrast component computes the same in it, and refuses the others.
    few = basis.mixing[..., :1]
    narrow, wide = ReducedSense(reduced, csm, few, b0, torch.tensor(VFA.echo_time)), operator.in_basis(few)
    for one, two in ((narrow(u[:, :1]), wide(u[:, :1])), (narrow.adjoint_data(), wide.adjoint_data())):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5 * float(two.abs().max()))
    with pytest.raises(ValueError, match="reach contrast components that the operator was not made for"):
        narrow.in_basis(mixing)
