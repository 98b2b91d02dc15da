"""The basis that a solver works in: contrast basis times echo basis, its components ordered by energy.

Signals factorise into contrast times echo, and so does the second-moment matrix of a dictionary over a
product grid: its eigenvectors are the products of the two factors' eigenvectors and its eigenvalues the
products of theirs. The SVD of the huge full dictionary is therefore never formed.

    Phi[(w,e), k] = sum_l Psi[w,l] mixing[e,l,k],     mixing[e, l, (l', m)] = delta(l, l') chi[e, m]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.data import Basis, Protocol
from quantitron.recon.signal.dictionary import echo_dictionary

T2STAR_PRIOR = (0.008, 0.4)
"""T2* [s] between which the dictionary's variance is taken, logarithmically uniform."""


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
    t2star_prior: tuple[float, float] = T2STAR_PRIOR,
) -> CoefficientBasis:
    """Strongest components of contrast basis times echo basis.

    Args:
        basis: over the contrasts.
        protocol: for the echo times.
        b0_range: half-width [Hz] of the off-resonances that the echo basis must span.
        rank: number of components, or the share of the energy to keep (float).
        t2star_prior: T2* [s] range of the echo dictionary.

    Raises:
        ValueError: if rank is above the number of frames.
    """
    if isinstance(rank, int) and rank > protocol.frames:
        raise ValueError(f"rank {rank} is above the {protocol.frames} frames of the scan")
    atoms = echo_dictionary(protocol, b0_range, t2star_prior).atoms  # (a, e)
    atoms = atoms / torch.linalg.vector_norm(atoms, dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(atoms.T @ atoms.conj() / len(atoms))
    echo_variance, echo_vectors = values.flip(0).clamp_min(0), vectors.flip(1)  # (m,), (e, m)
    contrast_variance = basis.variance.double()  # (l,)
    product = (contrast_variance[:, None] * echo_variance).flatten()  # (l*m,)
    order = product.argsort(descending=True, stable=True)
    share = product[order].cumsum(0)
    if isinstance(rank, int):
        columns = min(rank, len(order))
    else:
        # A contrast basis that was cut already cannot reach more than its own share.
        columns = int((share < min(rank, float(share[-1])) - 1e-12).sum()) + 1
    kept = order[:columns]
    component, echo_component = kept // len(echo_variance), kept % len(echo_variance)
    mixing = torch.zeros(protocol.echoes, basis.rank, columns, dtype=torch.complex128)
    mixing[:, component, torch.arange(columns)] = echo_vectors[:, echo_component].to(mixing)
    # A component that the dictionary says is absent still gets a finite weight.
    variance = product[kept].clamp_min(float(product[kept[0]]) * 1e-9)
    return CoefficientBasis(mixing.to(torch.complex64), variance.to(torch.float32), float(share[columns - 1]))


def echo_images(coefficients: Tensor, basis: CoefficientBasis) -> Tensor:
    """Coefficient images to the images of each echo in the contrast basis.

    Args:
        coefficients: U (x, k, z, y) complex.
        basis: the basis of U.

    Returns:
        V (e, l, z, y, x).
    """
    return torch.einsum("elk,xkzy->elzyx", basis.mixing.to(coefficients), coefficients)
