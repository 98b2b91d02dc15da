"""Temporal bases by SVD: of a dictionary, of navigator lines, or of the sampled k-space centre (METHODS 3).

The signal of every sequence here is a product of a factor over the contrasts (flip angles, or TI and tau) and
a factor over the echoes. The basis spans the first; each echo keeps coefficients of its own, so that complex
echo phases of any size are spanned exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantitron.recon.data import Basis, KSpace, Navigator, Protocol
from quantitron.recon.signal.dictionary import contrast_dictionary


def truncate(second_moment: Tensor, rank: int | float, source: str) -> Basis:
    """Principal axes of a second-moment matrix.

    Args:
        second_moment: (w, w) Hermitian, double precision.
        rank: number of columns (int >= 1), or the share of the energy to keep (0 < float <= 1).
        source: kept in the result.

    Raises:
        ValueError: if rank exceeds the number of contrasts, or is not positive, or nothing was measured.
    """
    contrasts = second_moment.shape[0]
    if isinstance(rank, int) and rank > contrasts:
        raise ValueError(f"rank {rank} is above the {contrasts} contrasts of the scan")
    if rank <= 0 or (isinstance(rank, float) and rank > 1):
        raise ValueError(f"rank {rank} is neither a number of columns nor a share of the energy in 0..1")
    values, vectors = torch.linalg.eigh(second_moment)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total = values.sum()
    if not total > 0:
        raise ValueError(f"the {source} holds no signal to take a temporal basis from")
    share = values.cumsum(0) / total
    columns = rank if isinstance(rank, int) else int((share < rank - 1e-12).sum()) + 1
    columns = min(columns, contrasts)
    # The sign of a singular vector is arbitrary: fix it, so that coefficients compare between runs.
    kept = vectors[:, :columns]
    largest = kept.gather(0, kept.abs().argmax(0, keepdim=True))
    kept = kept * (largest.conj() / largest.abs())
    single = torch.complex64 if kept.is_complex() else torch.float32
    return Basis(
        contrast=kept.to(single).contiguous(),
        variance=(values[:columns] / total).to(torch.float32),
        retained_energy=float(share[columns - 1]),
        source=source,
    )


def dictionary_basis(protocol: Protocol, rank: int | float) -> Basis:
    """Basis of the simulated signals, known before the scan starts.

    Args:
        protocol: the sequence.
        rank: number of columns, or share of the energy to keep (float).

    Raises:
        ValueError: if rank exceeds the number of contrasts.
    """
    atoms = contrast_dictionary(protocol).atoms  # (a, w)
    atoms = atoms / torch.linalg.vector_norm(atoms, dim=1, keepdim=True)
    return truncate(atoms.T @ atoms, rank, "dictionary")


def measured_basis(navigator: Navigator, contrasts: int, rank: int | float) -> Basis:
    """Basis of the Casorati matrix (w, coils x points x echoes) of navigator lines.

    Raises:
        ValueError: if some contrast has no navigator line, or rank exceeds the number of contrasts.
    """
    echoes = int(navigator.echo.max().item()) + 1
    _, coils, points = navigator.samples.shape
    slot = navigator.contrast * echoes + navigator.echo  # (n,)
    casorati = navigator.samples.new_zeros(contrasts * echoes, coils, points)
    casorati.index_add_(0, slot, navigator.samples)
    count = torch.zeros(contrasts * echoes).index_add_(0, slot, torch.ones(len(slot)))
    complete = (count.reshape(contrasts, echoes) > 0).all(0)  # (e,)
    if not complete.any():
        missing = int((count.reshape(contrasts, echoes).sum(1) == 0).sum())
        raise ValueError(
            f"the navigator lines leave {missing} of {contrasts} contrasts out: "
            "no temporal basis can be measured"
        )
    casorati = casorati / count.clamp_min(1)[:, None, None]
    casorati = casorati.reshape(contrasts, echoes, coils, points)[:, complete]  # (w, e, c, x)
    matrix = casorati.flatten(1).to(torch.complex128)  # (w, e*c*x)
    return truncate(matrix @ matrix.mH, rank, "navigator")


def centre_basis(kspace: KSpace, rank: int | float) -> Basis:
    """Basis of the k-space points that every contrast has sampled, as in a fully sampled centre.

    Raises:
        ValueError: if no point was sampled in all contrasts, or rank exceeds the number of contrasts.
    """
    contrasts = kspace.contrast_shape[0] * kspace.contrast_shape[1]
    _, nz, ny, _ = kspace.grid
    echoes = kspace.contrast_shape[2]
    place = ((kspace.slice * echoes + kspace.echo) * nz + kspace.kz) * ny + kspace.ky  # (n,)
    _, point, points_per = torch.unique(place, return_inverse=True, return_counts=True)
    complete = points_per == contrasts
    if not complete.any():
        raise ValueError(
            "no k-space point was sampled in every contrast: no temporal basis can be measured there"
        )
    chosen = complete[point]
    number = complete.cumsum(0)[point] - 1  # index among the complete points
    matrix = kspace.samples.new_zeros(
        contrasts, int(complete.sum()), *kspace.samples.shape[1:]
    )  # (w, p, c, x)
    matrix[kspace.contrast[chosen], number[chosen]] = kspace.samples[chosen]
    flat = matrix.flatten(1).to(torch.complex128)
    return truncate(flat @ flat.mH, rank, "centre")
