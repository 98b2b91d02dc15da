"""Weighted nuclear norm of stacks of similar patches (WNNM: Gu 2014; SUMMIT eq. 7-9; METHODS 4).

    R(m) = mean over stacks of sum_i w_i s_i,    s_i the singular values of the (voxel, member) matrix Y
    w_i  = 1 / sqrt(max(s_i^2 - N sigma^2, 0) + epsilon)

N members in a stack, sigma^2 the variance of the reference patch less the mean patch; the weights are held
while differentiating. Large singular values are the image and are hardly touched, small ones are noise.

A stack has few members, so all comes from its Gram matrix Y^T Y (member, member), for all stacks at once:
s_i^2 and v_i by cyclic Jacobi rotations, the gradient as sum_i w_i u_i v_i^T = Y V diag(w / s) V^T. Nothing
is ever divided by a difference of eigenvalues, so equal ones do no harm; singular values below the rounding
of the largest count as zero. The members of a stack are alike: in an orthonormal basis of mean and
differences the Gram matrix is graded, and Jacobi finds its small eigenvalues well even in single precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantitron.recon.priors.block_matching import Matches

PUBLISHED_EPSILON = 1e-16
"""epsilon of SUMMIT [unit of the map, squared]."""
FLOOR = 1e-4
"""Share of a stack's energy that bounds its weights; see ``weighted_nuclear_norm``."""
_ENTRIES = 1 << 19
"""Entries of stacks worked on at a time: what the processor's cache holds. Changes no result."""


def weighted_nuclear_norm(
    maps: Tensor,
    matches: Matches,
    weights: Tensor,
    epsilon: float = PUBLISHED_EPSILON,
    floor: float = FLOOR,
) -> Tensor:
    """``sum_n weights_n R(maps_n)``: a scalar, differentiable once by the maps.

    R does not change with the scale of a map as long as epsilon is small against s_i^2.

    Args:
        maps: (n, x, z, y) real, each in a unit of its own.
        matches: stacks, from ``match_blocks`` on one image of the same anatomy.
        weights: (n,) weight of each map.
        epsilon: keeps weights finite [unit of the map, squared].
        floor: the same relative to the stack: ``floor`` times its energy sum_i s_i^2 is added to epsilon, so
            that no weight exceeds 1 / sqrt(floor) of that of the whole stack. 0 as published: singular values
            with s_i^2 < N sigma^2, 2 to 3 % of them at an SNR of 30, then weigh 1e8 and drown all else
            (gradient descent left a noisy piecewise constant map worse than it was; with 1e-4 a tenth of the
            error remained).

    Raises:
        ValueError: if the maps are complex or not of the shape that was matched, or the weights do not fit.
    """
    _check(maps, matches, weights)
    values: Tensor = _WeightedNuclearNorm.apply(maps, matches, epsilon, floor)  # type: ignore[no-untyped-call]
    return (values * weights.to(values)).sum()


def shrink_stacks(
    maps: Tensor,
    matches: Matches,
    strength: Tensor,
    epsilon: float = PUBLISHED_EPSILON,
    floor: float = FLOOR,
) -> Tensor:
    """Denoise maps: weighted singular-value thresholding of every stack, overlapping patches averaged.

    Each stack becomes the minimiser of ``1/2 ||X - Y||^2 + strength sum_i w_i s_i(X)``, w that of Y: its
    singular values become ``max(s_i - strength w_i, 0)`` (Gu 2014). Noise of variance v alone has s_i^2 of
    about v times the voxels of a patch: a strength of 1 to 2 times that removes it. No gradient.

    Args:
        maps: (n, x, z, y) real.
        matches: stacks, from ``match_blocks``.
        strength: (n,) [unit of each map, squared].
        epsilon: as in ``weighted_nuclear_norm``.
        floor: as there.

    Returns:
        (n, x, z, y); voxels that no patch covers keep their value.

    Raises:
        ValueError: as ``weighted_nuclear_norm``.
    """
    _check(maps, matches, strength)
    with torch.no_grad():
        columns = _columns(maps)
        spectrum = _Spectrum(columns, matches, epsilon, floor)
        threshold = strength.to(columns).repeat(matches.stacks) * spectrum.weight  # (side, stack * n)
        factor = torch.where(
            spectrum.kept, (1 - threshold * spectrum.inverse).clamp_min(0), torch.zeros_like(threshold)
        )
        total = spectrum.combine(columns, factor)
        count = matches.count[:, None]
        result = torch.where(count > 0, total / count.clamp_min(1), columns)
    return _images(result, maps)


def _check(maps: Tensor, matches: Matches, weights: Tensor) -> None:
    if maps.is_complex() or maps.shape[1:] != matches.shape:
        raise ValueError(
            f"the weighted nuclear norm is of real maps (n, {', '.join(map(str, matches.shape))}), "
            f"not of {maps.dtype} {tuple(maps.shape)}"
        )
    if weights.shape != maps.shape[:1]:
        raise ValueError(f"{maps.shape[0]} maps need as many weights, not {tuple(weights.shape)}")


def _columns(maps: Tensor) -> Tensor:
    """(n, x, z, y) -> (x * z * y, n), contiguous: a voxel of all maps is one look-up."""
    return maps.detach().flatten(1).T.contiguous()


def _images(columns: Tensor, like: Tensor) -> Tensor:
    return columns.T.reshape(like.shape).contiguous()


class _WeightedNuclearNorm(torch.autograd.Function):
    """Values (n,) of maps (n, x, z, y). The gradient is found with the value: it is as small as the maps."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, matches: Matches, epsilon: float, floor: float) -> Tensor:
        columns = _columns(maps)
        spectrum = _Spectrum(columns, matches, epsilon, floor)
        kept = (spectrum.weight * spectrum.singular).sum(0).reshape(matches.stacks, -1)
        if ctx.needs_input_grad[0]:
            total = spectrum.combine(columns, spectrum.weight * spectrum.inverse)
            ctx.save_for_backward(_images(total / matches.stacks, maps))
        return kept.mean(0)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0][:, None, None, None], None, None, None


class _Spectrum:
    """Singular values and singular vectors of every stack; columns are (stack * n), maps fastest.

    The vectors are those of the shorter side of a stack's matrix (members x voxels of a patch), whose Gram
    matrix is the smaller one.
    """

    def __init__(self, columns: Tensor, matches: Matches, epsilon: float, floor: float) -> None:
        self._matches = matches
        self._to_basis, self._from_differences = _mean_and_differences(matches.members, columns)
        stacks, members, voxels = matches.stacks, matches.members, matches.patch_voxels
        self._by_voxel = voxels < members
        side = min(members, voxels)
        gram = columns.new_empty(side, side, stacks * columns.shape[1])
        residual_sum, residual_square = (torch.empty_like(gram[0, 0]) for _ in range(2))
        for part, place in self._parts(columns.shape[1]):
            stack = self._stack(columns, part)  # (member, voxel, stack * n)
            rows = self._rows(stack)
            for a in range(side):
                for b in range(a, side):
                    torch.sum(rows[a] * rows[b], 0, out=gram[a, b, place])
            torch.sum(stack[1], 0, out=residual_sum[place])
            torch.sum(stack[1].square(), 0, out=residual_square[place])
        # Reference less mean patch is sqrt((N - 1) / N) times the first difference of the basis.
        share = (members - 1) / members
        variance = share * (residual_square / voxels - (residual_sum / voxels).square()).clamp_min(0)
        energy = sum((gram[a, a] for a in range(1, side)), start=gram[0, 0].clone())
        scale = torch.where(energy > 0, energy, torch.ones_like(energy))
        # Relative to the stack's energy, so that squares of small entries do not underflow.
        eigenvalues, self._vectors = _jacobi(gram.div_(scale))
        lost = torch.finfo(columns.dtype).eps ** 2
        self.kept = eigenvalues > lost  # (side, stack * n)
        square = torch.where(self.kept, eigenvalues, torch.zeros_like(eigenvalues)) * scale
        self.singular = square.sqrt()
        self.inverse = torch.where(self.kept, self.singular.reciprocal(), torch.zeros_like(square))
        self.weight = ((square - members * variance).clamp_min(0) + (epsilon + floor * energy)).rsqrt()

    def _parts(self, maps: int) -> Iterator[tuple[slice, slice]]:
        """Stacks, and their columns."""
        matches = self._matches
        step = max(1, _ENTRIES // (matches.members * matches.patch_voxels * maps))
        for first in range(0, matches.stacks, step):
            last = min(first + step, matches.stacks)
            yield slice(first, last), slice(first * maps, last * maps)

    def _stack(self, columns: Tensor, part: slice) -> Tensor:
        """Stacks in the basis of mean and differences: (member, voxel, stack * n)."""
        stack = self._matches.gather(columns, part)
        # Differences first: those of nearly equal numbers are exact, which their products would not be.
        stack[1:] -= stack[0]
        return (self._from_differences @ stack.flatten(1)).reshape(stack.shape)

    def _rows(self, stack: Tensor) -> Tensor:
        """A view of stacks (member, voxel, stack * n) with the shorter side first."""
        return stack.transpose(0, 1) if self._by_voxel else stack

    def combine(self, columns: Tensor, factor: Tensor) -> Tensor:
        """Sum over the stacks, at their voxels, of what singular values times ``factor`` make of them.

        That is V diag(factor) V^T Y, with V the vectors of the rows of Y: (x * z * y, n).

        Args:
            columns: (x * z * y, n) the maps.
            factor: (side, stack * n).
        """
        matches, vectors = self._matches, self._vectors
        members, voxels, stacks = matches.voxel.shape
        side, maps = len(factor), columns.shape[1]
        # (V diag(factor) V^T)[a, b] of every stack.
        mixing = torch.stack(
            [
                torch.stack([(vectors[a] * vectors[b] * factor).sum(0) for b in range(side)])
                for a in range(side)
            ]
        )
        entries = columns.new_empty(members, voxels, stacks, maps)
        for part, place in self._parts(maps):
            stack = self._stack(columns, part)
            mixed = torch.empty_like(stack)
            rows, mixed_rows = self._rows(stack), self._rows(mixed)
            for a in range(side):
                torch.mul(rows[0], mixing[0, a, place], out=mixed_rows[a])
                for b in range(1, side):
                    mixed_rows[a].addcmul_(rows[b], mixing[b, a, place])
            back = self._to_basis.T @ mixed.flatten(1)
            entries[:, :, part] = back.reshape(members, voxels, -1, maps)
        return matches.scatter(entries.reshape(-1, maps))


def _mean_and_differences(members: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (Helmert 1876): mean, reference against the others, differences of the others.

    Returns:
        Q^T (member, member), rows the basis vectors; and the matrix that makes them from the reference and
        the differences of the other members to it.
    """
    basis = torch.zeros(members, members, dtype=torch.float64)
    basis[0] = 1 / math.sqrt(members)
    for row in range(1, members):
        others = members - row
        basis[row, row - 1] = others
        basis[row, row:] = -1
        basis[row] /= math.sqrt(others * (others + 1))
    from_differences = basis.clone()
    from_differences[:, 0] = basis.sum(1)
    from_differences[1:, 0] = 0  # exactly: the differences do not hold the reference
    return basis.to(like), from_differences.to(like)


def _jacobi(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (m, v) and eigenvectors (m, i, v) of symmetric matrices (m, m, v), upper halves given.

    Cyclic Jacobi: rotations that each set one off-diagonal entry to zero (Golub and Van Loan 8.5). ``gram``
    is overwritten. Eigenvalues come in no order.
    """
    size = gram.shape[0]
    vectors = torch.zeros_like(gram)
    for a in range(size):
        vectors[a, a] = 1
    tiny = torch.finfo(gram.dtype).tiny
    for _ in range(4 if size <= 3 else 6):
        for p in range(size - 1):
            for q in range(p + 1, size):
                between = gram[p, q]
                difference = gram[q, q] - gram[p, p]
                root = torch.addcmul(difference.square(), between, between, value=4).sqrt_()
                # tan of the rotation: the smaller root, 0 where there is nothing to rotate.
                tangent = 2 * between / torch.copysign(difference.abs() + root + tiny, difference)
                cosine = tangent.square().add_(1).rsqrt_()
                sine = tangent * cosine
                gram[p, p].addcmul_(tangent, between, value=-1)
                gram[q, q].addcmul_(tangent, between)
                gram[p, q] = 0
                for r in range(size):
                    if r not in (p, q):
                        _rotate(gram[min(r, p), max(r, p)], gram[min(r, q), max(r, q)], cosine, sine)
                _rotate(vectors[:, p], vectors[:, q], cosine, sine)
    return torch.stack([gram[a, a] for a in range(size)]), vectors


def _rotate(left: Tensor, right: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Both in place: (c left - s right, s left + c right)."""
    turned = (cosine * left).addcmul_(sine, right, value=-1)
    right.mul_(cosine).addcmul_(sine, left)
    left.copy_(turned)
