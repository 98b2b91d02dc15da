"""Matching of voxels with a fingerprint dictionary: the atom of largest normalised correlation, and PD.

    maximise |<d, u>| / ||d||,    PD = <d, u> / ||d||^2

over the atoms whose T2 is at most their T1 (METHODS 5). Atoms stand in the components of the images, and in
no others: images that were made in k components are the projection of a signal, and the atom that they are
nearest to is found among projections. Beside whole atoms, one with energy outside of these components would
count for less than it is, and tissue far from that which the components were chosen for would be taken for
tissue near it. Where B1 is known in each voxel, voxels are taken
together by their B1, in steps small beside those of the dictionary in T2, and the atoms of each step are
interpolated between the B1 values of the dictionary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.data import Basis, FingerprintDictionary
from quantitron.recon.field_table import FieldTable
from quantitron.recon.joint_match import JointMatcher


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
        mixing: (l, k) orthonormal columns that turn the basis into the one wanted, or into components of it,
            on which the atoms are then projected; None: the basis itself.

    Returns:
        (b, i, j, l or k), real where dictionary, basis and mixing are.

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
        if mixing.is_complex() and not bool(mixing.imag.any()):
            mixing = mixing.real  # real atoms halve the arithmetic of matching
        common = torch.promote_types(mixing.dtype, table.dtype)
        table = table.to(common) @ mixing.conj().to(common)
    return table.contiguous()


class FingerprintAtoms:
    """The atoms of a dictionary whose T2 is at most their T1: those that are matched."""

    def __init__(self, dictionary: FingerprintDictionary, table: Tensor) -> None:
        """Choose them.

        Args:
            dictionary: for its grid.
            table: (b, i, j, l) its coefficients in the basis of the signals, from ``dictionary_table``, on
                the device where they are matched.
        """
        device = table.device
        t1, t2 = dictionary.t1.to(device), dictionary.t2.to(device)
        self.place = dictionary.plausible.to(device).flatten().nonzero()[:, 0]
        """(a,) index into the flattened (i, j) grid."""
        self.t1 = t1[self.place // len(t2)]
        """(a,) [s]."""
        self.t2 = t2[self.place % len(t2)]
        """(a,) [s]."""
        self.table = FieldTable(table.flatten(1, 2)[:, self.place], dictionary.b1.to(device))
        """Atoms (b, a, l) over B1."""


def match_fingerprints(
    coefficients: Tensor,
    dictionary: FingerprintDictionary,
    table: Tensor,
    b1: Tensor | None = None,
    groups: int = 0,
    working_set: int | None = None,
) -> FingerprintMatch:
    """Match every voxel, once; ``JointMatcher`` keeps what the next call needs again.

    Args:
        coefficients: V (v, l) complex.
        dictionary: for its grid.
        table: (b, i, j, l) its coefficients in the basis of V, from ``dictionary_table``.
        b1: (v,) actual over nominal flip angle; values off the grid are taken at its end. None: 1.
        groups: groups of similar atoms, of which those alone are searched that can hold the best (Cauley
            2015); 0 compares with every atom. The outcome is the same but for ties within rounding.
        working_set: bytes for the correlations held at once; bounds memory, changes no result. None: what
            suits the device.

    Raises:
        ValueError: if B1 is given and the dictionary holds one value of it only.
    """
    atoms = FingerprintAtoms(dictionary, table)
    found = JointMatcher(atoms.table, groups=groups)(coefficients, field=b1, working_set=working_set)
    return FingerprintMatch(atoms.place[found.atom], atoms.t1[found.atom], atoms.t2[found.atom], found.pd)
