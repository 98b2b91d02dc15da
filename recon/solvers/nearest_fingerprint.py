"""The set of all fingerprints, and the one of it that is nearest to the signal of each voxel."""

from __future__ import annotations

from torch import Tensor

from quantitron.recon.fingerprint_match import atoms_at, dictionary_table, match_fingerprints
from quantitron.recon.solvers.fingerprint import FingerprintEstimate


class NearestFingerprint:
    """Coefficient images to those of the fingerprints that match them; where no signal is, they stay."""

    def __init__(self, estimate: FingerprintEstimate, groups: int) -> None:
        """Keep the dictionary in the scan's basis.

        Args:
            estimate: of the scan, for basis, mask and dictionary.
            groups: of atoms, for fast matching; 0 compares with every atom.
        """
        problem = estimate.problem
        self._groups = groups
        self._mixing = estimate.basis.mixing[0]  # (l, k)
        self._mask = estimate.mask.permute(2, 0, 1)  # (x, z, y)
        self._dictionary = problem.dictionary
        self._table = dictionary_table(problem.dictionary, problem.basis)  # (b, i, j, l)
        self._b1 = None if problem.b1 is None else problem.b1.permute(2, 0, 1)[self._mask]

    def __call__(self, images: Tensor) -> Tensor:
        """(x, k, z, y) -> (x, k, z, y)."""
        values = images.permute(0, 2, 3, 1)  # (x, z, y, k)
        mask, mixing, table = (part.to(images.device) for part in (self._mask, self._mixing, self._table))
        inside = values[mask] @ mixing.T  # (v, l)
        b1 = None if self._b1 is None else self._b1.to(images.device)
        found = match_fingerprints(inside, self._dictionary, table, b1, self._groups)
        atoms = atoms_at(self._dictionary, table, found.atom, b1)  # (v, l)
        result = values.clone()
        result[mask] = ((found.pd[:, None] * atoms) @ mixing.conj()).to(images.dtype)
        return result.permute(0, 3, 1, 2)
