"""Sums the Gram form of the data term, line by line while the scan runs or all at once (METHODS 1).

    G_e(k) = sum over lines at (e, k) of conj(Psi_w) Psi_w^T        b_{e,c}(k) = sum of conj(Psi_w) s_c(k)

Both arrays are laid out so that one k-space point of one echo is one contiguous piece: a point that is never
sampled is never written, and the pages that hold it are never taken from the system.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantitron.recon.data import Basis, KSpace, ReducedKSpace


class GramSum:
    """Running sums G and b of one scan."""

    def __init__(self, basis: Basis, grid: tuple[int, int, int, int], echoes: int, coils: int) -> None:
        """Preallocate the sums.

        Args:
            basis: temporal basis over the contrasts, (w, l).
            grid: (s, z, y, x) of the scan.
            echoes: number of echoes e.
            coils: receive channels c.
        """
        slices, nz, ny, nx = grid
        rank = basis.rank
        self.basis = basis
        self._grid = grid
        self._echoes = echoes
        double = basis.contrast.dtype in (torch.float64, torch.complex128)
        dtype = np.complex128 if double else np.complex64
        slots = slices * echoes * nz * ny
        # numpy asks the system for zeroed pages and touches none of them; torch.zeros would write them all.
        self._projected = torch.from_numpy(np.zeros((slots, rank, coils, nx), dtype=dtype))
        self._gram = torch.from_numpy(np.zeros((slots, rank, rank), dtype=dtype))
        self._gram = self._gram if basis.contrast.is_complex() else self._gram.real.clone()
        self._count = torch.zeros(slots, dtype=torch.float64 if double else torch.float32)
        self._energy = 0.0
        self._samples = 0

    def add(
        self,
        samples: Tensor,
        contrast: Tensor,
        echo: Tensor,
        slice_index: Tensor,
        kz: Tensor,
        ky: Tensor,
        count: Tensor | None = None,
        energy: float | None = None,
    ) -> None:
        """Add whitened lines in hybrid space.

        Args:
            samples: (n, c, x) complex.
            contrast: (n,) w of each line; ``echo``, ``slice_index``, ``kz``, ``ky`` likewise.
            count: (n,) how many acquisitions each line is the mean of; 1 where absent.
            energy: sum of |s|^2 over the acquisitions behind the lines, where lines are means.
        """
        _, nz, ny, _ = self._grid
        slot = ((slice_index * self._echoes + echo) * nz + kz) * ny + ky  # (n,)
        psi = self.basis.contrast[contrast]  # (n, l)
        weighted = psi.conj() if count is None else psi.conj() * count[:, None].to(psi.real.dtype)
        self._gram.index_add_(0, slot, weighted[:, :, None] * psi[:, None, :])
        ones = torch.ones(len(slot)) if count is None else count
        self._count.index_add_(0, slot, ones.to(self._count.dtype))
        # One outer product a line, added in place: nothing of size l x c x x is written between, which made
        # this 3 times as fast as one index_add_ of all lines. addcmul_ takes two thirds of the time of addr_.
        sums, values = self._projected, samples
        if not weighted.is_complex():
            # A real basis multiplies real and imaginary parts alike: half the arithmetic of complex products.
            sums, values = torch.view_as_real(sums), torch.view_as_real(samples)
        sums, values = sums.flatten(2), values.flatten(1)  # (slot, l, c*x[*2]), (n, c*x[*2])
        columns = weighted[:, :, None].unbind(0)  # (l, 1) each
        for place, column, line in zip(slot.tolist(), columns, values.unbind(0), strict=True):
            sums[place].addcmul_(column, line)
        if energy is None:
            energy = float(torch.view_as_real(samples).square().sum(dtype=torch.float64))
        self._energy += energy
        lines = len(slot) if count is None else int(count.sum().item())
        self._samples += lines * samples.shape[1] * samples.shape[2]

    def add_energy(self, energy: float) -> None:
        """Add the energy [sum of |s|^2] of acquisitions whose lines were given to ``add`` as means."""
        self._energy += energy

    @property
    def nbytes(self) -> int:
        """Size of the reduced problem [bytes] if every point of every echo is sampled."""
        return sum(part.numel() * part.element_size() for part in (self._projected, self._gram, self._count))

    def result(self) -> ReducedKSpace:
        """The sums so far, as views of the running arrays."""
        slices, nz, ny, nx = self._grid
        rank = self.basis.rank
        lead = (slices, self._echoes, nz, ny)
        return ReducedKSpace(
            gram=self._gram.reshape(*lead, rank, rank),
            projected=self._projected.reshape(*lead, rank, -1, nx),
            count=self._count.reshape(lead),
            energy=self._energy,
            samples=self._samples,
            basis=self.basis,
        )


def reduce_kspace(kspace: KSpace, basis: Basis, lines_at_once: int = 256) -> ReducedKSpace:
    """Gram form of sampled lines.

    Args:
        kspace: the lines; an average of n acquisitions counts n times.
        basis: (w, l).
        lines_at_once: lines worked on together; bounds memory, changes no result beyond rounding.
    """
    echoes = kspace.contrast_shape[2]
    total = GramSum(basis, kspace.grid, echoes, kspace.samples.shape[1])
    for start in range(0, len(kspace.echo), lines_at_once):
        part = slice(start, start + lines_at_once)
        total.add(
            kspace.samples[part],
            kspace.contrast[part],
            kspace.echo[part],
            kspace.slice[part],
            kspace.kz[part],
            kspace.ky[part],
            kspace.count[part],
            energy=0.0,
        )
    total.add_energy(kspace.energy)
    return total.result()
