"""The atom of largest normalised correlation with each voxel's signal, among many: atoms in groups.

Two searches, both exact up to rounding. One compares every signal with every atom, block by block. The other
is fast group matching (Cauley 2015), made safe: with phi the angle between two signals up to a phase, which
obeys the triangle inequality, no atom of a group of angular radius rho about a centre c is closer to u than
phi(u, c) - rho. The group of the nearest centre is searched first, then every group that could hold a better
atom than the best one there.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_BLOCK = 512
"""Signals and atoms compared at a time on a CPU: their correlations stay in its cache."""
_ROUNDING = 2e-6
"""What bounds in single precision may be wrong by; searched groups are more by as much, never fewer."""


class AtomGroups:
    """Atoms, normalised, in groups that lie side by side."""

    def __init__(self, atoms: Tensor, members: list[Tensor]) -> None:
        """Lay them out.

        Args:
            atoms: (a, n) real or complex; one that is zero correlates with nothing.
            members: of each group the indices of its atoms; every atom once.
        """
        self._norm = torch.linalg.vector_norm(atoms, dim=1)
        normalised = atoms / self._norm.clamp_min(torch.finfo(self._norm.dtype).tiny)[:, None]
        if normalised.is_complex() and not bool(normalised.imag.any()):
            normalised = normalised.real.contiguous()
        self._atoms, self._members = normalised, members
        self._columns = [normalised[group].conj().resolve_conj().T.contiguous() for group in members]

    @staticmethod
    def consecutive(atoms: Tensor) -> AtomGroups:
        """Groups in the order of the atoms."""
        return AtomGroups(atoms, list(torch.split(torch.arange(len(atoms), device=atoms.device), _BLOCK)))

    @staticmethod
    def similar(atoms: Tensor, groups: int) -> AtomGroups:
        """Groups of one size, halved again and again across their principal axis."""
        return AtomGroups(atoms, similar_atoms(atoms, groups))

    def best(self, signals: Tensor, working_set: int) -> tuple[Tensor, Tensor]:
        """Compare every signal with every atom.

        Args:
            signals: (v, n) complex or real.
            working_set: bytes for the correlations held at once; bounds memory, changes no result.

        Returns:
            index (v,) of the atom with the largest ``|<d, u>| / ||d||``; PD = ``<d, u> / ||d||^2`` (v,).
        """
        # The largest value of a block costs far less than its place, which is needed of one block only.
        rows = max(1, working_set // (16 * max(_BLOCK, len(self._columns))))
        rows = min(rows, _BLOCK) if signals.device.type == "cpu" else rows
        group = torch.empty(len(signals), dtype=torch.int64, device=signals.device)

        def work(start: int) -> None:
            parts = _parts(signals[start : start + rows], self._atoms)
            peaks = [_squared_correlation(parts, columns).amax(1) for columns in self._columns]
            group[start : start + rows] = torch.stack(peaks, 1).argmax(1)

        # Blocks that suit the cache are too small to be shared out: each thread takes blocks of its own.
        threads = torch.get_num_threads() if signals.device.type == "cpu" else 1
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(0, len(signals), rows)))
        voxel = torch.arange(len(signals), device=signals.device)
        return self._with_factor(signals, self._search(signals, voxel, group, working_set)[1])

    def best_of_near_groups(self, signals: Tensor, working_set: int) -> tuple[Tensor, Tensor, int]:
        """The same, comparing with the atoms of those groups only that can hold the best one.

        Returns:
            index and PD as ``best``; and how many correlations were computed.
        """
        centres, cosine, sine = self._cones()
        rows = max(1, working_set // (16 * len(centres)))
        atom = torch.empty(len(signals), dtype=torch.int64, device=signals.device)
        work = len(signals) * len(centres)
        sizes = torch.tensor([len(group) for group in self._members], device=signals.device)
        for start in range(0, len(signals), rows):
            part = signals[start : start + rows]
            # The signals stay as they are: divided by their norm, ties would fall otherwise than in ``best``.
            norm = torch.linalg.vector_norm(part, dim=1)
            near = _squared_correlation(_parts(part, centres), centres.conj().resolve_conj().T)  # (v, g)
            first = near.argmax(1)
            every = torch.arange(len(part), device=part.device)
            best, found = self._search(part, every, first, working_set)
            # cos(beta + rho): a group whose centre is farther than this holds nothing better.
            squared = best / norm.square().clamp_min(torch.finfo(norm.dtype).tiny)
            cos_beta = squared.clamp(0, 1).sqrt()
            sin_beta = (1 - squared + _ROUNDING).clamp_min(0).sqrt()
            least = torch.stack([cos_beta, -sin_beta], 1) @ torch.stack([cosine, sine])  # (v, g)
            could = near >= ((least - _ROUNDING).clamp_min_(0) * norm[:, None]).square_()
            could[every, first] = False
            voxel, group = could.nonzero().unbind(1)
            work += int(sizes[first].sum() + sizes[group].sum())
            value, other = self._search(part, voxel, group, working_set)
            atom[start : start + rows] = _largest(best, found, voxel, value, other)
        return (*self._with_factor(signals, atom), work)

    def _cones(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centres (g, n) of length 1, and cosine and sine (g,) of the radius of each group."""
        sizes = torch.tensor([len(group) for group in self._members], device=self._atoms.device)
        group = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)  # (a,)
        atoms = self._atoms[torch.cat(self._members)]
        centres = atoms.new_zeros(len(sizes), atoms.shape[1]).index_add_(0, group, atoms)
        length = torch.linalg.vector_norm(centres, dim=1, keepdim=True)
        centres = centres / length.clamp_min(torch.finfo(length.dtype).tiny)
        # The chord is accurate where the cosine of a small angle is not.
        about = centres[group]
        inner = (atoms * about.conj()).sum(1, keepdim=True)
        phase = inner.sgn()
        chord = (atoms - about * phase).abs().square().sum(1).sqrt()
        largest = chord.new_zeros(len(sizes)).scatter_reduce(0, group, chord, "amax")
        # No two signals are farther apart than a right angle.
        radius = 2 * (largest / 2 + _ROUNDING).clamp_max(2**-0.5).asin()
        return centres, radius.cos(), radius.sin()

    def _search(
        self, signals: Tensor, voxel: Tensor, group: Tensor, working_set: int
    ) -> tuple[Tensor, Tensor]:
        """Largest squared correlation (p,) and its atom (p,) for pairs of a voxel (p,) and a group (p,)."""
        order = group.argsort(stable=True)
        counts = torch.bincount(group, minlength=len(self._members)).tolist()
        parts = _parts(signals[voxel[order]], self._atoms)
        value = torch.zeros(len(voxel), dtype=signals.real.dtype, device=signals.device)
        atom = torch.zeros(len(voxel), dtype=torch.int64, device=signals.device)
        for piece, number in _pieces(counts, working_set // 16, [len(group) for group in self._members]):
            found = _squared_correlation([part[piece] for part in parts], self._columns[number])
            place = found.argmax(1, keepdim=True)
            value[order[piece]] = found.gather(1, place)[:, 0]
            atom[order[piece]] = self._members[number][place[:, 0]]
        return value, atom

    def _with_factor(self, signals: Tensor, atom: Tensor) -> tuple[Tensor, Tensor]:
        chosen, norm = self._atoms[atom].conj().to(signals.dtype), self._norm[atom]
        tiny = torch.finfo(norm.dtype).tiny
        return atom, (signals * chosen).sum(1) / norm.clamp_min(tiny).to(signals.dtype)


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


def _parts(signals: Tensor, atoms: Tensor) -> list[Tensor]:
    """Real and imaginary part where the atoms are real, which halves the arithmetic."""
    if atoms.is_complex():
        return [signals.to(torch.promote_types(signals.dtype, atoms.dtype))]
    if signals.is_complex():
        return [signals.real.to(atoms.dtype).contiguous(), signals.imag.to(atoms.dtype).contiguous()]
    return [signals.to(atoms.dtype)]


def _squared_correlation(parts: list[Tensor], columns: Tensor) -> Tensor:
    """(v, a) |<d, u>|^2; squares, for the modulus of complex numbers is slow."""
    if columns.is_complex():
        pairs = torch.view_as_real(parts[0] @ columns)
        return pairs[..., 0].square() + pairs[..., 1].square()
    size = (parts[0] @ columns).square_()
    for part in parts[1:]:
        more = part @ columns
        size.addcmul_(more, more)
    return size


def _largest(best: Tensor, found: Tensor, voxel: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """Atom (v,) of the largest value among the first found (v,) and those of further pairs (p,)."""
    top = best.scatter_reduce(0, voxel, value, "amax")
    winning = value > best[voxel]
    winning &= value >= top[voxel]
    voxel, other = voxel[winning], other[winning]
    # Of atoms that tie, the first, whatever order the pairs are worked on.
    first = torch.full_like(found, torch.iinfo(torch.int64).max).scatter_reduce(0, voxel, other, "amin")
    return torch.where(top > best, first, found)
