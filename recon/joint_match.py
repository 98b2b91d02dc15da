"""Matching of voxels with atoms that hold a signal and the weighted images of the same tissue.

    minimise over j and complex PD:   ||x - PD d_j||^2 + sum_m w_m (q_m - |PD| e_jm)^2

x are the coefficients of a voxel, q its real contrasts, d and e the dictionary's (MRI2Qmap, eq. 9). With PD =
r exp(it) only Re <d, x> exp(-it) depends on t, and is largest at the phase of <d, x>. What is left is a
parabola in r >= 0,

    ||x||^2 + ||q||_w^2 - 2 r (|<d, x>| + <e, q>_w) + r^2 (||d||^2 + ||e||_w^2),

lowest at r = max(0, |<d, x>| + <e, q>_w) / (||d||^2 + ||e||_w^2), where it has fallen by the square of

    max(0, |<d_j, x>| + <e_j, q>_w) / sqrt(||d_j||^2 + ||e_j||_w^2)

which the best atom makes largest (eqs. 10, 11). Without weights it is the plain matching of fingerprints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.atom_groups import AtomGroups, similar_atoms
from quantitron.recon.field_table import FieldTable

WORKING_SET = {"cpu": 64_000_000, "cuda": 1_000_000_000}
"""Bytes for the correlations held at once where nothing else is said. A GPU wants few steps, large ones."""


@dataclass(frozen=True)
class JointMatch:
    """Outcome for each voxel."""

    atom: Tensor
    """(v,) index of the atom."""
    pd: Tensor
    """(v,) complex; 0 where the contrasts contradict every atom."""


class JointMatcher:
    """Atoms and what searching them takes, kept from one call to the next.

    Beside the table that is some 8 (l + m) bytes an atom, for every step of the field that voxels have.
    """

    def __init__(self, table: Tensor | FieldTable, contrasts: Tensor | None = None, groups: int = 0) -> None:
        """Keep the atoms.

        Args:
            table: (a, l) real or complex, not normalised, or such atoms at several values of a field.
            contrasts: (a, m) real, those of the same tissue; None: matching without.
            groups: groups of similar atoms, of which those alone are searched that can hold the best (Cauley
                2015); 0 compares with every atom. The outcome is the same but for ties within rounding.

        Raises:
            ValueError: if there are not as many contrasts as atoms.
        """
        if isinstance(table, Tensor):
            table = FieldTable(table[None], torch.ones(1))
        self._table, self._groups = table, groups
        atoms = table.atoms.shape[1]
        real = table.atoms.real
        self._contrasts = real.new_zeros(atoms, 0) if contrasts is None else contrasts.to(real)
        if len(self._contrasts) != atoms:
            raise ValueError(f"{atoms} atoms have contrasts of {len(self._contrasts)} tissues")
        self._weights: tuple[float, ...] = ()
        self._members: list[Tensor] | None = None
        self._laid_out: dict[float, AtomGroups] = {}

    def __call__(
        self,
        signals: Tensor,
        contrasts: Tensor | None = None,
        weights: Tensor | None = None,
        field: Tensor | None = None,
        working_set: int | None = None,
    ) -> JointMatch:
        """Match every voxel.

        Args:
            signals: x (v, l) complex.
            contrasts: q (v, m) real, of either sign; None: the signals alone count.
            weights: w (m,), not negative; zeros: the signals alone count.
            field: (v,) of each voxel, where the atoms depend on one.
            working_set: bytes for the correlations held at once; bounds memory, changes no result. None: what
                suits the device.

        Raises:
            ValueError: if contrasts are given without weights or the reverse, their number is not the
                dictionary's, a weight is negative or not finite, or there is no such field.
        """
        self._table.check(field)
        root = self._root_weights(contrasts, weights)
        if working_set is None:
            working_set = WORKING_SET.get(signals.device.type, WORKING_SET["cpu"])
        weighted = None if root is None or contrasts is None else contrasts * root.to(contrasts)
        atom = torch.zeros(len(signals), dtype=torch.int64, device=signals.device)
        pd = torch.zeros_like(signals[:, 0])
        for value, voxels in self._table.steps(field, len(signals)):
            laid_out = self._at(value, root)
            part, also = signals[voxels], None if weighted is None else weighted[voxels]
            if self._groups:
                found, factor, _ = laid_out.best_of_near_groups(part, working_set, also)
            else:
                found, factor = laid_out.best(part, working_set, also)
            atom[voxels], pd[voxels] = found, factor
        return JointMatch(atom, pd)

    def signals(self, match: JointMatch, field: Tensor | None = None) -> Tensor:
        """(v, l) of the tissue that was found: ``PD d``."""
        return match.pd[:, None] * self._table.of(match.atom, field)

    def contrasts(self, match: JointMatch) -> Tensor:
        """(v, m) of the tissue that was found: ``|PD| e``; m is 0 where the atoms have none."""
        return match.pd.abs()[:, None] * self._contrasts[match.atom]

    def _root_weights(self, contrasts: Tensor | None, weights: Tensor | None) -> Tensor | None:
        """(m,) roots of the weights; None where the signals alone count."""
        if contrasts is None and weights is None:
            return None
        if contrasts is None or weights is None:
            raise ValueError("contrasts are matched by their weights: give both or neither")
        expected = self._contrasts.shape[1]
        if contrasts.shape[1] != expected or weights.shape != (expected,):
            raise ValueError(
                f"{contrasts.shape[1]} contrasts and weights of shape {tuple(weights.shape)} were given for "
                f"atoms with {expected}"
            )
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise ValueError(f"weights must be finite and not negative, not {weights.tolist()}")
        return weights.sqrt() if bool(weights.any()) else None

    def _at(self, value: float, root: Tensor | None) -> AtomGroups:
        """The atoms at one value of the field, laid out for these weights, made when first asked for."""
        key = () if root is None else tuple(root.tolist())
        if key != self._weights:
            self._weights, self._members = key, None
            self._laid_out.clear()
        if value not in self._laid_out:
            atoms = self._table.at(value)
            contrasts = None if root is None else self._contrasts * root.to(self._contrasts)
            if not self._groups:
                self._laid_out[value] = AtomGroups.consecutive(atoms, contrasts)
            else:
                if self._members is None:  # of all values of the field, which move like signals alike
                    whole = atoms if contrasts is None else torch.cat([atoms, contrasts.to(atoms)], 1)
                    self._members = similar_atoms(whole, self._groups)
                self._laid_out[value] = AtomGroups(atoms, self._members, contrasts)
        return self._laid_out[value]
