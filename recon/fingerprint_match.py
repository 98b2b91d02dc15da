"""Matching of voxels with a fingerprint dictionary: the atom of largest normalised correlation, and PD.

    maximise |<d, u>| / ||d||,    PD = <d, u> / ||d||^2

over the atoms whose T2 is at most their T1 (METHODS 5). Where B1 is known in each voxel, voxels are taken
together by their B1, in steps small beside those of the dictionary in T2, and the atoms of each step are
interpolated between the B1 values of the dictionary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.atom_groups import AtomGroups, similar_atoms
from quantitron.recon.data import Basis, FingerprintDictionary
from quantitron.recon.match import best_atom

B1_STEP = 0.01
"""Width of the steps of B1 in which voxels are matched; the refinement takes B1 as it is."""


@dataclass(frozen=True)
class FingerprintMatch:
    """Outcome for each voxel."""

    atom: Tensor
    """(v,) index into the flattened (i, j) grid."""
    t1: Tensor
    """(v,) [s]."""
    t2: Tensor
    """(v,) [s]."""
    pd: Tensor
    """(v,) complex."""


def dictionary_table(dictionary: FingerprintDictionary, basis: Basis, mixing: Tensor | None = None) -> Tensor:
    """The dictionary's coefficients in another basis.

    Args:
        dictionary: its coefficients stand in its own axes.
        basis: (w, l) over the time points; ``source`` "dictionary" means the leading axes.
        mixing: (l, k) orthonormal columns that turn the basis into the one wanted; None: the basis itself.

    Returns:
        (b, i, j, l or k).

    Raises:
        ValueError: if the basis holds more columns than the dictionary has axes or not its time points.
    """
    columns = basis.rank
    if basis.source == "dictionary":
        if columns > dictionary.axes.shape[1]:
            raise ValueError(
                f"a basis of {columns} columns cannot lead {dictionary.axes.shape[1]} dictionary axes"
            )
        table = dictionary.coefficients[..., :columns]
    else:
        if len(basis.contrast) != len(dictionary.axes):
            raise ValueError(
                f"the basis holds {len(basis.contrast)} time points, the dictionary {len(dictionary.axes)}"
            )
        common = torch.promote_types(basis.contrast.dtype, dictionary.axes.dtype)
        turned = basis.contrast.to(common).mH @ dictionary.axes.to(common)  # (l, r)
        table = dictionary.coefficients.to(common) @ turned.T
    if mixing is not None:
        common = torch.promote_types(mixing.dtype, table.dtype)
        table = table.to(common) @ mixing.conj().to(common)
    return table.contiguous()


def match_fingerprints(
    coefficients: Tensor,
    dictionary: FingerprintDictionary,
    table: Tensor,
    b1: Tensor | None = None,
    groups: int = 0,
    working_set: int = 64_000_000,
) -> FingerprintMatch:
    """Match every voxel.

    Args:
        coefficients: V (v, l) complex.
        dictionary: for its grid.
        table: (b, i, j, l) its coefficients in the basis of V, from ``dictionary_table``.
        b1: (v,) actual over nominal flip angle; values off the grid are taken at its end. None: 1.
        groups: groups of similar atoms, of which those alone are searched that can hold the best (Cauley
            2015); 0 compares with every atom. The outcome is the same but for ties within rounding.
        working_set: bytes for the correlations held at once; bounds memory, changes no result.

    Raises:
        ValueError: if B1 is given and the dictionary holds one value of it only.
    """
    if b1 is not None and len(dictionary.b1) == 1:
        raise ValueError("a B1 map was given, but the dictionary holds a single B1: simulate it over several")
    t1, t2 = dictionary.t1.to(table.device), dictionary.t2.to(table.device)
    plausible = dictionary.plausible.to(table.device).flatten().nonzero()[:, 0]  # (a,)
    candidates = table.flatten(1, 2)[:, plausible]  # (b, a, l)
    atom = torch.zeros(len(coefficients), dtype=torch.int64, device=coefficients.device)
    pd = torch.zeros_like(coefficients[:, 0])
    members: list[Tensor] | None = None  # of all steps of B1, which move like signals alike
    for value, voxels in _b1_steps(b1, len(coefficients)):
        atoms = _at_b1(dictionary, candidates, value)  # (a, l)
        if groups:
            if members is None:
                members = similar_atoms(atoms, groups)
            found, factor, _ = AtomGroups(atoms, members).best_of_near_groups(
                coefficients[voxels], working_set
            )
        else:
            found, factor = best_atom(coefficients[voxels], atoms, working_set)
        atom[voxels], pd[voxels] = plausible[found], factor
    return FingerprintMatch(atom, t1[atom // len(t2)], t2[atom % len(t2)], pd)


def atoms_at(
    dictionary: FingerprintDictionary, table: Tensor, atom: Tensor, b1: Tensor | None = None
) -> Tensor:
    """Atoms that were matched, not normalised.

    Args:
        dictionary: for its grid.
        table: (b, i, j, l) as for matching.
        atom: (v,) index into the flattened (i, j) grid.
        b1: (v,) as for matching.

    Returns:
        (v, l), interpolated between the two B1 values of the dictionary about that of each voxel.
    """
    atoms = table.flatten(1, 2)  # (b, a, l)
    if len(dictionary.b1) == 1:
        return atoms[0, atom]
    values = torch.ones(len(atom), device=table.device) if b1 is None else b1.to(table.device)
    first, last = float(dictionary.b1[0]), float(dictionary.b1[-1])
    place = (values.clamp(first, last) - first) / (last - first) * (len(dictionary.b1) - 1)  # (v,)
    below = place.long().clamp_max(len(dictionary.b1) - 2)
    share = (place - below).to(table.real.dtype)[:, None]
    return torch.lerp(atoms[below, atom], atoms[below + 1, atom], share.to(table.dtype))


def _b1_steps(b1: Tensor | None, voxels: int) -> list[tuple[float, Tensor | slice]]:
    """Values of B1, each with the voxels that are matched there."""
    if b1 is None:
        return [(1.0, slice(0, voxels))]
    step = (b1 / B1_STEP).round().long()
    order = step.argsort(stable=True)
    values, counts = torch.unique(step, return_counts=True)
    places = torch.split(order, counts.tolist())
    return [(value * B1_STEP, place) for value, place in zip(values.tolist(), places, strict=True)]


def _at_b1(dictionary: FingerprintDictionary, atoms: Tensor, value: float) -> Tensor:
    """(a, l) the atoms (b, a, l) between their two B1 values about ``value``."""
    if len(dictionary.b1) == 1:
        return atoms[0]
    first, last = float(dictionary.b1[0]), float(dictionary.b1[-1])
    place = (min(max(value, first), last) - first) / (last - first) * (len(dictionary.b1) - 1)
    below = min(int(place), len(dictionary.b1) - 2)
    return torch.lerp(atoms[below], atoms[below + 1], place - below)
