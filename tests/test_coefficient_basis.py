"""The product basis is the principal basis of the full dictionary that is never formed."""

import math

import pytest
import torch

from quantitron.recon.coefficient_basis import TISSUE_RANGE, coefficient_basis, echo_images
from quantitron.recon.data import Protocol
from quantitron.recon.signal.dictionary import contrast_dictionary, echo_dictionary
from quantitron.recon.temporal_basis import dictionary_basis

VFA = Protocol(
    "vfa_gre", (0.002, 0.006, 0.012, 0.02), (0.046,), tuple(math.radians(a) for a in (5, 15, 25, 40))
)


def _full_dictionary(b0_range):
    """(atom, w*e) unit-norm products of all contrast atoms with all echo atoms over the tissue range."""
    contrast = contrast_dictionary(VFA, TISSUE_RANGE).atoms
    echo = echo_dictionary(VFA, b0_range, TISSUE_RANGE["t2star"]).atoms
    atoms = torch.einsum("aw,be->abwe", contrast.to(echo.dtype), echo).flatten(2).flatten(0, 1)
    return atoms / torch.linalg.vector_norm(atoms, dim=1, keepdim=True)


@pytest.mark.parametrize("rank", [5, 0.999])
def test_it_keeps_the_energy_that_the_best_basis_of_its_size_keeps(rank):
    basis = dictionary_basis(VFA, 4)
    product = coefficient_basis(basis, VFA, 20.0, rank)
    phi = torch.einsum("wl,elk->wek", basis.contrast.to(torch.complex64), product.mixing).flatten(0, 1)
    phi = phi.to(torch.complex128)  # (t, k)
    torch.testing.assert_close(
        phi.mH @ phi, torch.eye(product.rank, dtype=torch.complex128), atol=1e-5, rtol=0
    )
    atoms = _full_dictionary(20.0)
    moment = atoms.T @ atoms.conj() / len(atoms)
    best = torch.linalg.eigvalsh(moment).flip(0)[: product.rank].sum()
    kept = torch.einsum("tk,ts,sk->", phi.conj(), moment, phi).real
    assert float(kept) == pytest.approx(float(best), abs=1e-5)
    assert product.retained_energy == pytest.approx(float(best), abs=1e-4)
    if isinstance(rank, float):
        assert product.retained_energy >= rank - 1e-4


def test_taking_the_field_out_needs_fewer_coefficients():
    basis = dictionary_basis(VFA, 4)
    assert coefficient_basis(basis, VFA, 3.0, 0.9999).rank < coefficient_basis(basis, VFA, 40.0, 0.9999).rank


def test_echo_images_are_the_mixed_coefficients():
    basis = coefficient_basis(dictionary_basis(VFA, 3), VFA, 3.0, 4)
    coefficients = torch.randn(5, 4, 2, 3, dtype=torch.complex64)  # (x, k, z, y)
    images = echo_images(coefficients, basis)
    assert images.shape == (4, 3, 2, 3, 5)
    torch.testing.assert_close(images[1, 2, 0, 1, 4], (basis.mixing[1, 2] * coefficients[4, :, 0, 1]).sum())


def test_rank_above_the_frames_is_refused():
    with pytest.raises(ValueError, match="rank 17 is above the 16 frames"):
        coefficient_basis(dictionary_basis(VFA, 3), VFA, 3.0, 17)
