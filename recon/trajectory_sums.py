"""The least-squares data term of a slice on any trajectory, readouts of equal trajectory summed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.data import Basis


@dataclass(frozen=True)
class ProjectedSamples:
    """Sums b = sum_t conj(Psi_w) s of a scan on any trajectory, (l, c, n), one for each distinct point.

    Readouts of equal trajectory are summed. A readout that stands alone has b of rank one at each point: its
    samples and one row of the basis say all, in the place of l numbers for each sample.
    """

    groups: Tensor
    """(l, c, m) complex: b at the first m points, those of readouts that were summed."""
    alone: Tensor
    """(c, n - m) complex: samples at the other points, whose readouts stand alone."""
    rows: Tensor
    """(r, l): rows conj(Psi_w) of these."""
    row: Tensor
    """(n - m,) int64: the row that belongs to each sample of ``alone``."""

    @property
    def channels(self) -> int:
        """Number of channels c."""
        return int(self.alone.shape[0])

    @property
    def points(self) -> int:
        """Number of points n."""
        return int(self.groups.shape[2] + self.alone.shape[1])

    def mixed(self, mixing: Tensor, channels: slice = slice(None), points: Tensor | None = None) -> Tensor:
        """b in another basis: mixing^H b.

        Args:
            mixing: (l, k) complex; its dtype and device are those of the result.
            channels: which of them.
            points: (p,) int64 numbers of points, all if None.

        Returns:
            (k, c, p) complex.
        """
        summed = self.groups.shape[2]
        groups, alone, row = self.groups[:, channels], self.alone[channels], self.row
        if points is not None:
            among = points < summed
            groups = groups[:, :, points[among]]
            alone, row = alone[:, points[~among] - summed], row[points[~among] - summed]
        parts = []
        if groups.shape[2]:
            values = mixing.mH @ groups.flatten(1).to(mixing)
            parts.append(values.reshape(-1, *groups.shape[1:]))
        if alone.shape[1] or not parts:
            factors = (self.rows.to(mixing) @ mixing.conj()).T[:, row.to(mixing.device)]  # (k, p)
            parts.append(factors[:, None] * alone.to(mixing))
        result = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        if points is None or len(parts) == 1:
            return result
        order = torch.cat([among.nonzero()[:, 0], (~among).nonzero()[:, 0]]).argsort()
        return result[:, :, order.to(result.device)]


@dataclass(frozen=True)
class TrajectorySums:
    """The least-squares data term of one slice on any trajectory in Gram form (METHODS 1).

    Readouts t of bitwise equal trajectory, a group g, see the same Fourier transform: summed over each
    group, they cost as much as the distinct ones alone. Groups of several readouts come first. With Psi the
    temporal basis and v = F_g C_c u the coefficient images of coil c transformed onto the points of g,

        1/2 sum |s - Psi F C u|^2 = 1/2 sum_{g,c} [v^H G_g v - 2 Re(v^H b_{g,c})] + 1/2 energy
    """

    trajectory: Tensor
    """(n, d) float: points of the distinct readouts [cycles per voxel], one readout after the other."""
    readout: Tensor
    """(n,) int64: the distinct readout g that each point belongs to."""
    gram: Tensor
    """(g, l, l): G = sum over the readouts of g of conj(Psi_w) Psi_w^T; real for a real basis."""
    projected: ProjectedSamples
    """(l, c, n) complex: b = sum over the readouts of g of conj(Psi_w) s."""
    count: Tensor
    """(g,) int64: readouts in each group."""
    density: Tensor | None
    """(n,) float: density compensation weights of the scan, where it brought some."""
    energy: float
    """Sum of |s|^2 over all acquired samples."""
    samples: int
    """Complex samples acquired, over coils."""
    basis: Basis
    """The basis that both sums are expressed in."""
    grid: tuple[int, int, int]
    """(z, y, x) of the images."""
