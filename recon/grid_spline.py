"""Interpolation of a table over a regular grid, with its derivatives, at one place for each voxel.

Cubic B-splines (de Boor 1978): twice differentiable, of fourth order in the spacing up to the edges, where
the third derivative is continuous across the first and last inner knot ("not a knot"). Axes of fewer than
four points take the polynomial through all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GridSpline:
    """A table over (b, i, j), interpolated along all three and differentiated along the last two."""

    def __init__(self, table: Tensor) -> None:
        """Find the control points.

        Args:
            table: (b, i, j, l) float or complex.
        """
        self._points = tuple(table.shape[:3])
        control = torch.view_as_real(table).flatten(-2) if table.is_complex() else table
        for axis, count in enumerate(self._points):
            if count >= 4:
                system = _control_system(count).to(table.device)
                rows = control.double().movedim(axis, 0)
                given = torch.zeros(count + 2, *rows.shape[1:], dtype=torch.float64, device=table.device)
                given[1:-1] = rows
                solved = torch.linalg.solve(system, given.flatten(1)).reshape(given.shape)
                control = solved.movedim(0, axis)
        self._complex = table.is_complex()
        self._control = control.to(table.real.dtype).contiguous()  # (b', i', j', l or 2 l)
        self._taps = tuple(min(4, count) for count in self._points)
        nb, ni, nj, width = self._control.shape
        taps = self._taps[2]
        # Neighbours along j lie side by side: they are read as one row.
        self._rows = self._control.view(-1).as_strided(
            (nb * ni, nj - taps + 1, taps * width), (nj * width, width, 1)
        )

    def __call__(self, b: Tensor | None, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values and derivatives.

        Args:
            b: (v,) place along the first axis in steps of the grid; None where it has one point.
            i: (v,) along the second.
            j: (v,) along the third.

        Returns:
            (l, v) the value, its derivative along i and along j.
        """
        first_i, weight_i, slope_i = _taps(i, self._points[1])
        first_j, weight_j, slope_j = _taps(j, self._points[2])
        block = (len(i), self._taps[1], self._taps[2], self._control.shape[-1])
        row = first_i[:, None] + torch.arange(block[1], device=i.device)  # (v, taps)
        if b is None:
            parts = self._rows[row, first_j[:, None]].view(block)
        else:
            first_b, weight_b, _ = _taps(b, self._points[0])
            parts = self._rows.new_zeros(block)
            for tap in range(self._taps[0]):
                rows = row + (first_b[:, None] + tap) * self._control.shape[1]
                found = self._rows[rows, first_j[:, None]].view(block)
                parts.addcmul_(found, weight_b[:, tap, None, None, None])
        along_j = torch.stack([weight_j, slope_j], 1)[:, None]  # (v, 1, 2, taps)
        lines = along_j @ parts  # (v, taps, 2, width)
        value, by_j = (weight_i[:, None] @ lines.flatten(2)).view(-1, 2, block[3]).unbind(1)
        by_i = (slope_i[:, None] @ lines[:, :, 0])[:, 0]
        return self._columns(value), self._columns(by_i), self._columns(by_j)

    def _columns(self, rows: Tensor) -> Tensor:
        """(v, width) to (l, v)."""
        if self._complex:
            rows = torch.view_as_complex(rows.reshape(len(rows), -1, 2).contiguous())
        return rows.T.contiguous()


def _control_system(count: int) -> Tensor:
    """(n + 2, n + 2): control points to the values at n grid points and to the two conditions at the ends."""
    system = torch.zeros(count + 2, count + 2, dtype=torch.float64)
    for row in range(count):
        system[row + 1, row : row + 3] = torch.tensor([1, 4, 1]) / 6
    fourth_difference = torch.tensor([1.0, -4.0, 6.0, -4.0, 1.0], dtype=torch.float64)
    system[0, :5] = fourth_difference
    system[-1, -5:] = fourth_difference
    return system


def _taps(place: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """First control point (v,), and weights and their slopes (v, taps), at ``place`` (v,) among n points."""
    if count < 4:
        first = torch.zeros_like(place, dtype=torch.int64)
        return first, *_polynomial(place, count)
    first = place.detach().floor().clamp(0, count - 2)
    f = place - first
    g = 1 - f
    weight = [g**3, 3 * f**3 - 6 * f**2 + 4, 3 * g**3 - 6 * g**2 + 4, f**3]
    slope = [-(g**2), 3 * f**2 - 4 * f, 4 * g - 3 * g**2, f**2]
    return first.long(), torch.stack(weight, 1) / 6, torch.stack(slope, 1) / 2


def _polynomial(place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Lagrange weights and their slopes (v, n) over the points 0..n-1, n at most 3."""
    one, none = torch.ones_like(place), torch.zeros_like(place)
    if count == 1:
        return one[:, None], none[:, None]
    if count == 2:
        return torch.stack([1 - place, place], 1), torch.stack([-one, one], 1)
    weight = [(place - 1) * (place - 2) / 2, place * (2 - place), place * (place - 1) / 2]
    return torch.stack(weight, 1), torch.stack([place - 1.5, 2 - 2 * place, place - 0.5], 1)
