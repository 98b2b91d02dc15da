"""The data term of a scan on any trajectory: a convolution for each pair of components (METHODS 1).

    f(U) = 1/2 sum_t ||s_t - F_t C Psi_t U||^2 = 1/2 <U, A^H A U> - Re <U, A^H s> + 1/2 ||s||^2
    (A^H A U)_i = sum_c conj(C_c) sum_j T_ij * (C_c U_j)
    T_ij(r) = 1/(z y x) sum_n G_ij(n) exp(2 pi i k_n.r)

T is needed at differences of voxels, -(n-1)..n-1 along each axis, so a cyclic convolution on twice the grid
is exact. Instead of padding images with zeros, the 2n frequencies of each axis are taken as the n even and
the n odd ones: the odd frequencies of an image are the even ones of the image times exp(-pi i r / n), a phase
that the coil maps take along. So each of the four (2D) or eight (3D) cosets of frequencies is one transform
of the images' own size, with nothing to pad or crop and little memory. Along an axis whose samples lie on the
grid (partitions of a stack of spirals) the convolution is cyclic on the grid itself: no odd ones there.

T_ji(-r) = conj(T_ij(r)) makes the spectra Hermitian matrices, real ones for a real basis.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from quantitron.recon.operators.linear_operator import LinearOperator
from quantitron.recon.operators.nonuniform_fourier import SINGLE_PRECISION, NonuniformFourier
from quantitron.recon.trajectory_sums import TrajectorySums


class ToeplitzSense(LinearOperator):
    """A^H A of a SENSE scan on any trajectory, in a subspace: (x, k, z, y) -> (x, k, z, y), self-adjoint.

    It also knows A^H s (``adjoint_data``) and the value of the data term (``residual_energy``).
    """

    def __init__(
        self,
        sums: TrajectorySums,
        csm: Tensor,
        mixing: Tensor,
        working_set: int | None = None,
    ) -> None:
        """Build the kernels, one type-1 transform for two pairs of components (one a pair in complex bases).

        Args:
            sums: of one slice.
            csm: (x, c, z, y) coil sensitivity maps.
            mixing: (l, k): ``Phi[w, k] = sum_l Psi[w, l] mixing[l, k]``.
            working_set: bytes that one batch of coils may take; None: what suits the device's cache or cores.

        Raises:
            ValueError: if the coil maps are not on the grid of the sums, or the trajectory of two columns for
                images of several partitions.
        """
        nz, ny, nx = sums.grid
        if (csm.shape[0], *csm.shape[2:]) != (nx, nz, ny):
            raise ValueError(
                f"coil maps {tuple(csm.shape)} (x, c, z, y) are not on the grid {sums.grid} (z, y, x)"
            )
        if sums.trajectory.shape[1] == 2 and nz > 1:
            raise ValueError(f"trajectories of two columns tell {nz} partitions not apart")
        self._csm, self._sums = csm, sums
        self._dtype = csm.dtype
        self._fourier = _fourier(sums, csm)
        self._dimensions = sums.trajectory.shape[1]
        self._axes = (-3, -1) if self._dimensions == 2 else (-3, -2, -1)  # of (x, z, y): those transformed
        self._doubled = self._doubled_axes()
        self._cosets = list(product(*[(0, 1) if doubled else (0,) for doubled in self._doubled]))
        maps = csm.permute(1, 0, 2, 3)  # (c, x, z, y)
        self._maps = [(maps * self._phase(coset)).contiguous() for coset in self._cosets]
        # Only as many components as the coefficients can reach are convolved.
        self._span = reachable(mixing).to(csm.device)  # (l, r)
        self._mixing = self._span.to(csm).mH @ mixing.to(csm)  # (r, k)
        self._kernels, self._centre = self._build()
        if working_set is None:
            working_set = 1_000_000_000 if csm.is_cuda else 3_300_000 * torch.get_num_threads()
        coil = 2 * self._mixing.shape[0] * csm[:, 0].numel() * csm.element_size()
        self._batch = max(1, working_set // coil)

    def _doubled_axes(self) -> tuple[bool, ...]:
        """Whether the grid must be doubled along x, z, y: not where samples lie on the grid, or alike."""
        trajectory = self._sums.trajectory.double()
        # Off the grid by this much, samples turn the phase at the far end by no more than rounding does.
        rounding = 1e-12 if self._dtype == torch.complex128 else 1e-6
        nz, ny, nx = self._sums.grid
        columns = {0: (0, nx), 2: (1, ny)} if self._dimensions == 2 else {0: (0, nx), 1: (2, nz), 2: (1, ny)}
        doubled = [False, False, False]
        for axis, (column, size) in columns.items():
            index = trajectory[:, column] * size
            doubled[axis] = bool((index - index.round()).abs().max() > rounding * size)
        return tuple(doubled)

    def _phase(self, coset: tuple[int, ...]) -> Tensor:
        """exp(-pi i r / n) along the axes of odd frequencies, (x, z, y)."""
        shape = (self._csm.shape[0], *self._csm.shape[2:])
        phase = torch.ones((), dtype=torch.complex128, device=self._csm.device)
        for axis, (odd, size) in enumerate(zip(coset, shape, strict=True)):
            steps = torch.arange(size, dtype=torch.float64, device=self._csm.device) * (-math.pi * odd / size)
            phase = phase * torch.polar(torch.ones_like(steps), steps).reshape(-1, *[1] * (2 - axis))
        return phase.to(self._dtype)

    def _build(self) -> tuple[list[list[Tensor]], Tensor]:
        """Spectra [coset][j] of pairs (i, j), (i, x, z, y), or (i, x, z, y, 2) if real; and T(0), (r, r)."""
        nz, ny, nx = self._sums.grid
        double_x, double_z, double_y = self._doubled
        grid = (nz * (1 + double_z), ny * (1 + double_y), nx * (1 + double_x))
        # In double precision: the rounding of positions would be twice that of the images' transform.
        tolerance = 1e-12 if self._dtype == torch.complex128 else 1e-6
        device = self._csm.device
        fourier = NonuniformFourier(self._sums.trajectory.to(device), grid, tolerance)
        gram = self._sums.gram.to(device)
        gram = self._span.mT.to(gram) @ gram @ self._span.to(gram)  # (g, r, r)
        real = not gram.is_complex()
        points = self._sums.readout.to(device)
        # Unitary factor of the doubled grid taken off, that of the images put on twice.
        scale = math.sqrt(math.prod(grid)) / math.prod(self._sums.grid)

        rank = gram.shape[1]
        # A real spectrum stands there twice, for real and imaginary part of what it multiplies: four times as
        # fast as repeating it on the way.
        dtype = self._csm.real.dtype if real else self._dtype
        full = (rank, nx, nz, ny, 2) if real else (rank, nx, nz, ny)
        spectra = [[torch.empty(full, dtype=dtype, device=device) for _ in range(rank)] for _ in self._cosets]
        centre = gram.new_empty(rank, rank)
        pairs = [(i, j) for i in range(rank) for j in range(i, rank)]
        together = 2 if real else 1  # two real spectra are real and imaginary part of one transform
        # Each thread makes whole transforms: as many at once as there are threads.
        transforms = [pairs[first : first + together] for first in range(0, len(pairs), together)]
        at_once = 1 if device.type == "cuda" else torch.get_num_threads()
        for start in range(0, len(transforms), at_once):
            batch = transforms[start : start + at_once]
            columns = torch.stack([_as_one([gram[:, i, j] for i, j in chosen]) for chosen in batch])  # (b, g)
            kernels = fourier.adjoint(columns[:, points]) * scale
            for chosen, kernel in zip(batch, kernels.permute(0, 3, 1, 2), strict=True):  # (x, z, y)
                self._keep(chosen, kernel, spectra, centre)
        return spectra, centre

    def _keep(
        self, pairs: list[tuple[int, int]], kernel: Tensor, spectra: list[list[Tensor]], centre: Tensor
    ) -> None:
        """Put the spectra of one kernel (x, z, y), of one pair or of two real ones, in their places."""
        real = not centre.is_complex()
        for axis in (axis for axis, doubled in enumerate(self._doubled) if doubled):
            kernel.select(axis, 0).zero_()  # the difference -n, which has no opposite and never occurs
        kernel = torch.fft.ifftshift(kernel, dim=self._axes)
        # The inverse transform's factor is taken along.
        spectrum = torch.fft.fftn(kernel, dim=self._axes, norm="forward")
        for index, (i, j) in enumerate(pairs):
            value = kernel[0, 0, 0]
            value = (value.imag if index else value.real) if real else value
            centre[i, j], centre[j, i] = value, value.conj()
            for coset, table in zip(self._cosets, spectra, strict=True):
                every = [slice(odd, None, 1 + two) for odd, two in zip(coset, self._doubled, strict=True)]
                part = spectrum[every[0], every[1], every[2]]
                if real:
                    part = (part.imag if index else part.real)[..., None]
                elif i == j:
                    part = part.real
                table[j][i], table[i][j] = part, part.conj()

    @property
    def csm(self) -> Tensor:
        """(x, c, z, y) coil sensitivity maps."""
        return self._csm

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (x, k, z, y) of the coefficient images."""
        nx, _, nz, ny = self._csm.shape
        return nx, self._mixing.shape[1], nz, ny

    @property
    def samples(self) -> int:
        """Complex samples acquired, over coils."""
        return self._sums.samples

    @property
    def energy(self) -> float:
        """||s||^2."""
        return self._sums.energy

    @property
    def device(self) -> torch.device:
        """Where the operator works."""
        return self._csm.device

    def mean_diagonal(self) -> Tensor:
        """Diagonal of A^H A where the coil maps have unit root-sum-of-squares: (k,) real."""
        centre = self._centre.to(self._dtype)
        diagonal: Tensor = torch.einsum("rk,rs,sk->k", self._mixing.conj(), centre, self._mixing).real
        return diagonal

    def spectrum(self) -> Tensor:
        """What A^H A does to a wave of each frequency, coil maps taken as of one coil: (x, k, z, y) real.

        The kernel is tapered with the cosine along each axis, so that what it does far away, which depends on
        the place in the image, counts little. The mean over the frequencies is ``mean_diagonal``.
        """
        total = torch.zeros(self.shape, dtype=self._csm.real.dtype, device=self._csm.device)
        for coset, columns in zip(self._cosets, self._kernels, strict=True):
            for number, column in enumerate(columns):  # (i, x, z, y), or (i, x, z, y, 2) if real
                kernel = column if column.is_complex() else column[..., 0].to(self._dtype)
                part = torch.einsum("ik,ixzy->xkzy", self._mixing.conj(), kernel)
                part = (part * self._mixing[number][:, None, None]).real
                for axis, (odd, doubled) in enumerate(zip(coset, self._doubled, strict=True)):
                    if doubled and odd:  # those half a step before and after
                        place = (0, 2, 3)[axis]
                        part = (part + part.roll(1, place)) / 4
                    elif doubled:
                        part = part / 2
                total += part
        # The factor of the inverse transform, which ``_keep`` takes along, is taken off.
        return total * float(math.prod(self._csm[:, 0].shape) << sum(self._doubled))

    def forward(self, x: Tensor) -> Tensor:
        """A^H A U: (x, k, z, y) -> (x, k, z, y)."""
        images = torch.einsum("rk,xkzy->rxzy", self._mixing, x.to(self._dtype)).contiguous()
        total = torch.zeros_like(images)
        # All arrays of a step are written over in the next: they stay in the cache.
        buffers = images.new_empty(2, min(self._batch, self._csm.shape[1]), *images.shape)
        for maps, kernels in zip(self._maps, self._kernels, strict=True):
            for part in torch.split(maps, self._batch):  # (c, x, z, y)
                here, there = buffers[:, : len(part)]  # (c, r, x, z, y)
                torch.mul(part[:, None], images, out=here)
                torch.fft.fftn(here, dim=self._axes, out=there)
                _mix(kernels, there, here)
                torch.fft.ifftn(here, dim=self._axes, norm="forward", out=there)
                for coil, convolved in zip(part, there, strict=True):
                    total.addcmul_(convolved, coil.conj())
        result: Tensor = torch.einsum("rk,rxzy->xkzy", self._mixing.conj(), total)
        return result.contiguous()

    def adjoint(self, y: Tensor) -> Tensor:
        """The operator itself: it is self-adjoint."""
        return self.forward(y)

    def adjoint_data(self) -> Tensor:
        """A^H s: (x, k, z, y)."""
        mixing = self._span.to(self._mixing) @ self._mixing  # (l, k)
        return adjoint_images(self._sums, self._csm, mixing, fourier=self._fourier)

    def residual_energy(self, coefficients: Tensor, adjoint_data: Tensor | None = None) -> float:
        """||s - A U||^2 with its constant, from two inner products.

        Args:
            coefficients: U (x, k, z, y).
            adjoint_data: A^H s where it is at hand already.
        """
        if adjoint_data is None:
            adjoint_data = self.adjoint_data()
        # In double precision: the three terms nearly cancel.
        image = coefficients.to(torch.complex128)
        quadratic = torch.vdot(image.flatten(), self.forward(coefficients).to(image).flatten()).real
        linear = torch.vdot(image.flatten(), adjoint_data.to(image).flatten()).real
        return float(quadratic - 2 * linear) + self.energy


def adjoint_images(
    sums: TrajectorySums,
    csm: Tensor,
    mixing: Tensor,
    weights: Tensor | None = None,
    fourier: NonuniformFourier | None = None,
) -> Tensor:
    """A^H W s, for which no kernels are needed: with density weights the images of ``svdmrf``.

    Args:
        sums: of one slice.
        csm: (x, c, z, y) coil sensitivity maps.
        mixing: (l, k): ``Phi[w, k] = sum_l Psi[w, l] mixing[l, k]``.
        weights: (n,); 1 where absent.
        fourier: transform onto the points of the sums, where one is at hand.

    Returns:
        (x, k, z, y).
    """
    if fourier is None:
        fourier = _fourier(sums, csm)
    mixing = mixing.to(csm)
    conjugates = csm.permute(1, 2, 3, 0).conj().resolve_conj().contiguous()  # (c, z, y, x)
    result = csm.new_zeros(mixing.shape[1], *conjugates.shape[1:])
    for coil, conjugate in enumerate(conjugates):
        data = sums.projected.mixed(mixing, slice(coil, coil + 1))[:, 0]  # (k, n)
        if weights is not None:
            data = data * weights.to(csm.real)
        result.addcmul_(fourier.adjoint(data), conjugate)
    return result.permute(3, 0, 1, 2).contiguous()


def _fourier(sums: TrajectorySums, csm: Tensor) -> NonuniformFourier:
    """Transform onto the points of the sums."""
    # Far below the noise; the residual is no more than a difference of sums over all samples.
    tolerance = 1e-12 if csm.dtype == torch.complex128 else SINGLE_PRECISION
    return NonuniformFourier(sums.trajectory.to(csm.device), sums.grid, tolerance)


def _as_one(columns: list[Tensor]) -> Tensor:
    """One complex column (g,), or two real ones as its real and imaginary part."""
    parts = [column.to(torch.complex128) for column in columns]
    return parts[0] + 1j * parts[1] if len(parts) == 2 else parts[0]


def _mix(kernels: list[Tensor], spectrum: Tensor, out: Tensor) -> None:
    """Hermitian matrix of spectra at every frequency: (c, r, x, z, y) -> the same."""
    if not kernels[0].is_complex():
        spectrum, out = torch.view_as_real(spectrum), torch.view_as_real(out)
    torch.mul(kernels[0], spectrum[:, :1], out=out)
    for column in range(1, len(kernels)):
        out.addcmul_(kernels[column], spectrum[:, column : column + 1])


def reachable(mixing: Tensor) -> Tensor:
    """Orthonormal real basis (l, r) of what the columns of ``mixing`` (l, k) reach; the identity for all."""
    parts = torch.cat([mixing.real, mixing.imag], 1) if mixing.is_complex() else mixing
    vectors, values, _ = torch.linalg.svd(parts, full_matrices=False)
    reached: Tensor = vectors[:, : int((values > 1e-5 * values[0]).sum())]
    return torch.eye(len(mixing)).to(reached) if reached.shape[1] == len(mixing) else reached.contiguous()
