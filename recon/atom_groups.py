"""The atom of largest normalised correlation with each voxel's signal, among many: atoms in groups.

Two searches, both exact up to rounding. One compares every signal with every atom, block by block. The other
is fast group matching (Cauley 2015), made safe: with phi the angle between two signals up to a phase, which
obeys the triangle inequality, no atom of a group of angular radius rho about a centre c is closer to u than
phi(u, c) - rho. The group of the nearest centre is searched first, then every group that could hold a better
atom than the best one there.

Atoms (d, e) may hold real contrasts e beside the signal d, for which the phase is none. For a voxel (u, q)

    |<d, u>| + <e, q> = max over t of Re <(d, e), (exp(-it) u, q)>

is a largest inner product as |<d, u>| is. Changing the phase of u alone changes no length, nor the angle
between two voxels changed alike: the least angle over t obeys the triangle inequality again,

    phi(a, b) + phi(b, c) = angle(a, b') + angle(b', c') >= angle(a, c') >= phi(a, c),

b' and c' with the phases that bring b nearest to a and c nearest to b'. So the same bound holds, with angles
up to 180 degrees, where contrasts of opposite sign lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 512
"""Signals and atoms compared at a time on a CPU: their correlations stay in its cache."""
_ROUNDING = 2e-6
"""What bounds in single precision may be wrong by; searched groups are more by as much, never fewer."""


@dataclass(frozen=True)
class _Voxels:
    """Signals, as they are multiplied with atoms."""

    parts: list[Tensor]
    """(v, n) each: real and imaginary part where the atoms are real, which halves the arithmetic."""
    contrasts: Tensor | None
    """(v, m) real."""

    @staticmethod
    def of(signals: Tensor, contrasts: Tensor | None, atoms: Tensor) -> _Voxels:
        """Signals (v, n) and contrasts (v, m) for atoms (..., n)."""
        if atoms.is_complex():
            parts = [signals.to(torch.promote_types(signals.dtype, atoms.dtype))]
        elif signals.is_complex():
            parts = [signals.real.to(atoms.dtype).contiguous(), signals.imag.to(atoms.dtype).contiguous()]
        else:
            parts = [signals.to(atoms.dtype)]
        return _Voxels(parts, None if contrasts is None else contrasts.to(parts[0].real.dtype))

    def __getitem__(self, piece: slice) -> _Voxels:
        contrasts = None if self.contrasts is None else self.contrasts[piece]
        return _Voxels([part[piece] for part in self.parts], contrasts)


@dataclass(frozen=True)
class _Columns:
    """Atoms of length 1, one a column."""

    atoms: Tensor
    """(n, a) conjugated."""
    contrasts: Tensor | None
    """(m, a) real."""

    @staticmethod
    def of(atoms: Tensor, contrasts: Tensor | None) -> _Columns:
        """Atoms (a, n) and their contrasts (a, m)."""
        columns = atoms.conj().resolve_conj().T.contiguous()
        return _Columns(columns, None if contrasts is None else contrasts.T.contiguous())

    def score(self, voxels: _Voxels) -> Tensor:
        """(v, a) what grows with the cosine: ``|<d, u>|^2``, or with contrasts ``|<d, u>| + <e, q>``.

        Squares as far as possible, for the modulus of complex numbers is slow.
        """
        if self.atoms.is_complex():
            pairs = torch.view_as_real(voxels.parts[0] @ self.atoms)
            size = pairs[..., 0].square() + pairs[..., 1].square()
        else:
            size = (voxels.parts[0] @ self.atoms).square_()
            for part in voxels.parts[1:]:
                more = part @ self.atoms
                size.addcmul_(more, more)
        if self.contrasts is None or voxels.contrasts is None:
            return size
        return size.sqrt_().addmm_(voxels.contrasts, self.contrasts)


class AtomGroups:
    """Atoms, normalised, in groups that lie side by side."""

    def __init__(self, atoms: Tensor, members: list[Tensor], contrasts: Tensor | None = None) -> None:
        """Lay them out.

        Args:
            atoms: (a, n) real or complex; one that is zero correlates with nothing.
            members: of each group the indices of its atoms; every atom once.
            contrasts: (a, m) real, of each atom, times the root of the weight that they have beside the
                signal; None: none.
        """
        self._norm = torch.linalg.vector_norm(atoms, dim=1)
        if contrasts is not None:
            contrasts = contrasts.to(self._norm)
            self._norm = torch.hypot(self._norm, torch.linalg.vector_norm(contrasts, dim=1))
        length = self._norm.clamp_min(torch.finfo(self._norm.dtype).tiny)[:, None]
        normalised = atoms / length
        if normalised.is_complex() and not bool(normalised.imag.any()):
            normalised = normalised.real.contiguous()
        self._atoms, self.members = normalised, members
        self._contrasts = None if contrasts is None else contrasts / length
        self._columns = [
            _Columns.of(normalised[group], None if self._contrasts is None else self._contrasts[group])
            for group in members
        ]
        self._kept_cones: tuple[_Columns, Tensor, Tensor] | None = None

    @staticmethod
    def consecutive(atoms: Tensor, contrasts: Tensor | None = None) -> AtomGroups:
        """Groups in the order of the atoms."""
        members = list(torch.split(torch.arange(len(atoms), device=atoms.device), _BLOCK))
        return AtomGroups(atoms, members, contrasts)

    @staticmethod
    def similar(atoms: Tensor, groups: int, contrasts: Tensor | None = None) -> AtomGroups:
        """Groups of one size, halved again and again across their principal axis."""
        whole = atoms if contrasts is None else torch.cat([atoms, contrasts.to(atoms)], 1)
        return AtomGroups(atoms, similar_atoms(whole, groups), contrasts)

    def best(
        self, signals: Tensor, working_set: int, contrasts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compare every signal with every atom.

        Args:
            signals: (v, n) complex or real.
            working_set: bytes for the correlations held at once; bounds memory, changes no result.
            contrasts: (v, m) real, times the root of their weight, where the atoms have contrasts.

        Returns:
            index (v,) of the atom with the largest ``|<d, u>| / ||d||``; PD = ``<d, u> / ||d||^2`` (v,).
            With contrasts the atom with the largest ``(|<d, u>| + <e, q>) / ||(d, e)||``; the PD of the phase
            of <d, u> and the size ``max(0, |<d, u>| + <e, q>) / ||(d, e)||^2``.

        Raises:
            ValueError: if the atoms have contrasts and the voxels none, or the reverse.
        """
        self._check(contrasts)
        # The largest value of a block costs far less than its place, which is needed of one block only.
        rows = max(1, working_set // (16 * max(_BLOCK, len(self._columns))))
        rows = min(rows, _BLOCK) if signals.device.type == "cpu" else rows
        group = torch.empty(len(signals), dtype=torch.int64, device=signals.device)

        def work(start: int) -> None:
            piece = slice(start, start + rows)
            voxels = _Voxels.of(signals[piece], None if contrasts is None else contrasts[piece], self._atoms)
            peaks = [columns.score(voxels).amax(1) for columns in self._columns]
            group[piece] = torch.stack(peaks, 1).argmax(1)

        # Blocks that suit the cache are too small to be shared out: each thread takes blocks of its own.
        threads = torch.get_num_threads() if signals.device.type == "cpu" else 1
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(0, len(signals), rows)))
        voxel = torch.arange(len(signals), device=signals.device)
        atom = self._search(signals, contrasts, voxel, group, working_set)[1]
        return atom, self._factor(signals, contrasts, atom)

    def best_of_near_groups(
        self, signals: Tensor, working_set: int, contrasts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, int]:
        """The same, comparing with the atoms of those groups only that can hold the best one.

        Returns:
            index and PD as ``best``; and how many correlations were computed.

        Raises:
            ValueError: as ``best``.
        """
        self._check(contrasts)
        centres, cosine, sine = self._cones()
        rows = max(1, working_set // (16 * len(cosine)))
        atom = torch.empty(len(signals), dtype=torch.int64, device=signals.device)
        work = len(signals) * len(cosine)
        sizes = torch.tensor([len(group) for group in self.members], device=signals.device)
        for start in range(0, len(signals), rows):
            part = signals[start : start + rows]
            also = None if contrasts is None else contrasts[start : start + rows]
            # The signals stay as they are: divided by their norm, ties would fall otherwise than in ``best``.
            norm = torch.linalg.vector_norm(part, dim=1)
            if also is not None:
                norm = torch.hypot(norm, torch.linalg.vector_norm(also, dim=1).to(norm))
            near = centres.score(_Voxels.of(part, also, self._atoms))  # (v, g)
            first = near.argmax(1)
            every = torch.arange(len(part), device=part.device)
            best, found = self._search(part, also, every, first, working_set)
            could = _could_hold_better(near, best, norm, cosine, sine, signed=also is not None)
            could[every, first] = False
            voxel, group = could.nonzero().unbind(1)
            work += int(sizes[first].sum() + sizes[group].sum())
            value, other = self._search(part, also, voxel, group, working_set)
            atom[start : start + rows] = _largest(best, found, voxel, value, other)
        return atom, self._factor(signals, contrasts, atom), work

    def _check(self, contrasts: Tensor | None) -> None:
        if (contrasts is None) != (self._contrasts is None):
            raise ValueError("contrasts are compared where both atoms and voxels have them")

    def _cones(self) -> tuple[_Columns, Tensor, Tensor]:
        """Centres, of length 1, and cosine and sine (g,) of the radius of each group."""
        if self._kept_cones is not None:
            return self._kept_cones
        sizes = torch.tensor([len(group) for group in self.members], device=self._atoms.device)
        group = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)  # (a,)
        order = torch.cat(self.members)
        atoms = self._atoms[order]
        contrasts = self._norm.new_zeros(len(atoms), 0) if self._contrasts is None else self._contrasts[order]
        centres = atoms.new_zeros(len(sizes), atoms.shape[1]).index_add_(0, group, atoms)
        means = contrasts.new_zeros(len(sizes), contrasts.shape[1]).index_add_(0, group, contrasts)
        length = torch.hypot(
            torch.linalg.vector_norm(centres, dim=1, keepdim=True),
            torch.linalg.vector_norm(means, dim=1, keepdim=True),
        ).clamp_min(torch.finfo(means.dtype).tiny)
        centres, means = centres / length, means / length
        # The chord is accurate where the cosine of a small angle is not.
        about = centres[group]
        inner = (atoms * about.conj()).sum(1, keepdim=True)
        phase = torch.where(inner == 0, 1, inner.sgn())
        square = (atoms - about * phase).abs().square().sum(1) + (contrasts - means[group]).square().sum(1)
        largest = square.new_zeros(len(sizes)).scatter_reduce(0, group, square.sqrt(), "amax")
        # No two signals are farther apart than a right angle, and with contrasts none farther than two.
        farthest = 2**-0.5 if self._contrasts is None else 1.0
        radius = 2 * (largest / 2 + _ROUNDING).clamp_max(farthest).asin()
        # A mean of nothing is no centre, and its group holds anything.
        radius = torch.where(length[:, 0] > 1e-3, radius, 2 * torch.tensor(farthest).asin().to(radius))
        columns = _Columns.of(centres, None if self._contrasts is None else means)
        self._kept_cones = columns, radius.cos(), radius.sin()
        return self._kept_cones

    def _search(
        self, signals: Tensor, contrasts: Tensor | None, voxel: Tensor, group: Tensor, working_set: int
    ) -> tuple[Tensor, Tensor]:
        """Largest score (p,) and its atom (p,) for pairs of a voxel (p,) and a group (p,)."""
        order = group.argsort(stable=True)
        counts = torch.bincount(group, minlength=len(self.members)).tolist()
        chosen = voxel[order]
        voxels = _Voxels.of(signals[chosen], None if contrasts is None else contrasts[chosen], self._atoms)
        value = torch.zeros(len(voxel), dtype=signals.real.dtype, device=signals.device)
        atom = torch.zeros(len(voxel), dtype=torch.int64, device=signals.device)
        for piece, number in _pieces(counts, working_set // 16, [len(group) for group in self.members]):
            found = self._columns[number].score(voxels[piece])
            place = found.argmax(1, keepdim=True)
            value[order[piece]] = found.gather(1, place)[:, 0].to(value.dtype)
            atom[order[piece]] = self.members[number][place[:, 0]]
        return value, atom

    def _factor(self, signals: Tensor, contrasts: Tensor | None, atom: Tensor) -> Tensor:
        """PD (v,) of the atoms (v,) that were found."""
        chosen, norm = self._atoms[atom].conj().to(signals.dtype), self._norm[atom]
        norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
        inner = (signals * chosen).sum(1)
        if contrasts is None or self._contrasts is None:
            pd: Tensor = inner / norm.to(signals.dtype)
            return pd
        size = inner.abs() + (contrasts * self._contrasts[atom]).sum(1).to(inner.abs())
        # Where the signal is orthogonal to the atom, contrasts alone tell PD, and any phase is as good.
        phase = torch.where(inner == 0, 1, inner.sgn())
        pd = phase * (size.clamp_min(0) / norm.to(size))
        return pd


def _could_hold_better(
    near: Tensor, best: Tensor, norm: Tensor, cosine: Tensor, sine: Tensor, signed: bool
) -> Tensor:
    """Which groups are not ruled out: (v, g) bool.

    With beta the angle to the best atom so far, a group whose centre is farther than beta + rho holds nothing
    better.

    Args:
        near: (v, g) scores of the centres.
        best: (v,) the best score so far.
        norm: (v,) lengths of the signals.
        cosine, sine: (g,) of rho.
        signed: whether scores are correlations of either sign; else they are squares of correlations.
    """
    tiny = torch.finfo(norm.dtype).tiny
    if signed:
        cos_beta = (best / norm.clamp_min(tiny)).clamp(-1, 1)
        squared = cos_beta.square()
    else:
        squared = best / norm.square().clamp_min(tiny)
        cos_beta = squared.clamp(0, 1).sqrt()
    sin_beta = (1 - squared + _ROUNDING).clamp_min(0).sqrt()
    least = torch.stack([cos_beta, -sin_beta], 1) @ torch.stack([cosine, sine])  # (v, g) cos(beta + rho)
    least -= _ROUNDING
    if not signed:
        return near >= (least.clamp_min_(0) * norm[:, None]).square_()
    # Beyond two right angles the cosine rises again, and there is nothing to rule out.
    return (near >= least * norm[:, None]) | (cos_beta[:, None] + cosine <= 0)


def similar_atoms(atoms: Tensor, groups: int) -> list[Tensor]:
    """Sort atoms into groups of like signals, all of one size (but for one atom).

    A set is cut across its principal axis until there are as many as asked for: principal direction divisive
    partitioning (Boley 1998), which is deterministic.

    Args:
        atoms: (a, n).
        groups: how many; at most a.

    Returns:
        of each group the indices of its atoms.
    """
    real = torch.view_as_real(atoms).flatten(1) if atoms.is_complex() else atoms
    real = real / torch.linalg.vector_norm(real, dim=1, keepdim=True).clamp_min(torch.finfo(real.dtype).tiny)
    waiting = [(torch.arange(len(real), device=real.device), min(groups, len(real)))]
    done = []
    while waiting:
        members, pieces = waiting.pop()
        if pieces == 1:
            done.append(members)
            continue
        about = real[members].double()
        about = about - about.mean(0)
        axis = torch.linalg.eigh(about.T @ about).eigenvectors[:, -1]
        axis = axis * axis[axis.abs().argmax()].sgn()  # its sign is the library's whim
        order = (about @ axis).argsort(stable=True)
        left = pieces // 2
        cut = len(members) * left // pieces
        waiting += [(members[order[cut:]], pieces - left), (members[order[:cut]], left)]
    return done


def _pieces(counts: list[int], elements: int, sizes: list[int]) -> Iterator[tuple[slice, int]]:
    """Stretches of pairs of one group each, short enough that the correlations are at most ``elements``."""
    start = 0
    for number, count in enumerate(counts):
        rows = max(1, elements // sizes[number])
        for first in range(start, start + count, rows):
            yield slice(first, min(first + rows, start + count)), number
        start += count


def _largest(best: Tensor, found: Tensor, voxel: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """Atom (v,) of the largest value among the first found (v,) and those of further pairs (p,)."""
    top = best.scatter_reduce(0, voxel, value, "amax")
    winning = value > best[voxel]
    winning &= value >= top[voxel]
    voxel, other = voxel[winning], other[winning]
    # Of atoms that tie, the first, whatever order the pairs are worked on.
    first = torch.full_like(found, torch.iinfo(torch.int64).max).scatter_reduce(0, voxel, other, "amin")
    return torch.where(top > best, first, found)
