"""The basis that a solver works in: contrast basis times echo basis, its components ordered by energy.

Signals factorise into contrast times echo, and so does the second-moment matrix of a dictionary over a
product grid: its eigenvectors are the products of the two factors' eigenvectors and its eigenvalues the
products of theirs. The SVD of the huge full dictionary is therefore never formed.

    Phi[(w,e), k] = sum_l Psi[w,l] mixing[e,l,k],     mixing[e, l, (n,m)] = P[l,n] chi[e,m]

P holds the principal axes of tissue signals within the contrast basis, chi those of their echo trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.data import Basis, Protocol
from quantitron.recon.signal.dictionary import contrast_dictionary, echo_dictionary

TISSUE_RANGE: Mapping[str, tuple[float, float]] = {
    "t1": (0.4, 4.5),
    "t2": (0.03, 2.0),
    "t2star": (0.02, 0.12),
    "inversion": (0.8, 1.0),
}
"""Where tissue lies [s], [1]: the variance of the coefficients is taken over it, logarithmically uniform."""


@dataclass(frozen=True)
class CoefficientBasis:
    """Which coefficient images are solved for, and how strong each is expected to be."""

    mixing: Tensor
    """(e, l, k) complex: coefficients of echo e in the contrast basis are ``mixing[e] @ U``."""
    variance: Tensor
    """(k,) float: expected mean square of U_k for unit signal energy ``sum_t |I_t|^2``."""
    retained_energy: float
    """Share of the dictionary's energy that the components keep."""

    @property
    def rank(self) -> int:
        """Number of coefficient images."""
        return int(self.mixing.shape[2])


def coefficient_basis(
    basis: Basis,
    protocol: Protocol,
    b0_range: float,
    rank: int | float,
    tissue_range: Mapping[str, tuple[float, float]] = TISSUE_RANGE,
) -> CoefficientBasis:
    """Strongest components of contrast basis times echo basis.

    Args:
        basis: over the contrasts. One that was measured brings its own variances.
        protocol: for the echo times.
        b0_range: half-width [Hz] of the off-resonances that the echo basis must span.
        rank: number of components, or the share of the energy to keep (float).
        tissue_range: name -> (low, high) over which the dictionary's variance is taken.

    Raises:
        ValueError: if rank is above the number of frames.
    """
    if isinstance(rank, int) and rank > protocol.frames:
        raise ValueError(f"rank {rank} is above the {protocol.frames} frames of the scan")
    echoes = echo_dictionary(protocol, b0_range, tissue_range["t2star"])
    echo_variance, echo_axes = principal_axes(echoes.atoms)  # (m,), (e, m)
    if basis.source == "dictionary":
        atoms = contrast_dictionary(protocol, tissue_range).atoms @ basis.contrast.double()  # (a, l)
        contrast_variance, contrast_axes = principal_axes(atoms)  # (n,), (l, n)
    else:
        contrast_variance = basis.variance.double() / basis.variance.double().sum()
        contrast_axes = torch.eye(basis.rank, dtype=torch.float64)
    product = (contrast_variance[:, None] * echo_variance).flatten()  # (n*m,)
    order = product.argsort(descending=True, stable=True)
    share = product[order].cumsum(0)
    columns = min(rank, len(order)) if isinstance(rank, int) else int((share < rank - 1e-12).sum()) + 1
    kept = order[: min(columns, len(order))]
    component, echo_component = kept // len(echo_variance), kept % len(echo_variance)
    mixing = torch.einsum(
        "lk,ek->elk",
        contrast_axes[:, component].to(torch.complex128),
        echo_axes[:, echo_component].to(torch.complex128),
    )
    # A component that the dictionary says is absent still gets a finite weight.
    variance = product[kept].clamp_min(float(product[kept[0]]) * 1e-9)
    return CoefficientBasis(
        mixing.to(torch.complex64), variance.float(), float(share[len(kept) - 1]) * basis.retained_energy
    )


def learnt_basis(
    basis: CoefficientBasis, coefficients: Tensor, energy: Tensor, mask: Tensor
) -> tuple[CoefficientBasis, Tensor]:
    """Turn the components to the principal axes of the signals that a scan turned out to hold.

    The second moments of coefficients found with the dictionary's variances replace those variances. They are
    mixed with the dictionary's, which count as ``_DICTIONARY_VOXELS`` voxels a component do, so that a few
    voxels alone do not decide.

    Args:
        basis: that the coefficients were found in.
        coefficients: U (x, k, z, y).
        energy: (x, z, y) expected signal energy of each voxel.
        mask: (x, z, y) bool, the voxels that count.

    Returns:
        The basis with its components turned, and the rotation (k, k): new U = rotation^H @ old U.
    """
    inside = coefficients.permute(0, 2, 3, 1)[mask].to(torch.complex128)  # (voxel, k)
    moments = inside.T @ inside.conj() / energy[mask].double().sum().clamp_min(1e-300)  # E[u u^H]
    if not basis.mixing.imag.any():
        # Real signals times a complex density: what is imaginary here is noise.
        moments = moments.real
    voxels, prior_voxels = len(inside), _DICTIONARY_VOXELS * basis.rank
    prior = torch.diag(basis.variance.double()).to(moments)
    moments = (voxels * moments + prior_voxels * prior) / (voxels + prior_voxels)
    values, vectors = torch.linalg.eigh(moments)
    values, rotation = values.flip(0), vectors.flip(1).to(inside)
    variance = values.clamp_min(float(values[0]) * 1e-9)
    mixing = (basis.mixing.to(rotation) @ rotation).to(basis.mixing.dtype)
    return CoefficientBasis(mixing, variance.float(), basis.retained_energy), rotation


_DICTIONARY_VOXELS = 2
"""Voxels a component that the dictionary's variances count as, when they are learnt from a scan."""


def principal_axes(atoms: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares (n,), descending and of sum 1, and axes (n, n) of normalised atoms (a, n)."""
    atoms = atoms / torch.linalg.vector_norm(atoms, dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(atoms.T @ atoms.conj() / len(atoms))
    return values.flip(0).clamp_min(0), vectors.flip(1)


def echo_images(coefficients: Tensor, basis: CoefficientBasis) -> Tensor:
    """Coefficient images to the images of each echo in the contrast basis.

    Args:
        coefficients: U (x, k, z, y) complex.
        basis: the basis of U.

    Returns:
        V (e, l, z, y, x).
    """
    return torch.einsum("elk,xkzy->elzyx", basis.mixing.to(coefficients), coefficients)
