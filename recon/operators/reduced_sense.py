"""The data term of a Cartesian scan in reduced (Gram) form, over batches of readout positions (METHODS 1).

    f(U) = 1/2 sum_t ||s_t - M_t F C D_t Phi_t U||^2
         = 1/2 <U, A^H A U> - Re <U, A^H s> + 1/2 ||s||^2

A^H A and A^H s come from the sums G and b: no step depends on the number of frames. The readout positions
are independent and are worked on in batches; the batch size bounds memory and changes nothing else.

Fourier transforms here are uncentred: maps and sums are rolled once instead of in every step.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from quantitron.recon.data import ReducedKSpace
from quantitron.recon.operators.linear_operator import LinearOperator
from quantitron.recon.operators.sampled_gram import SampledGram
from quantitron.recon.operators.shared_work import share_out
from quantitron.recon.operators.subspace import off_resonance_phase

_AXES = (-2, -1)  # (z, y)
_POSITIONS_OF_DATA = 4
"""Readout positions whose sums b, which lie scattered, are put in order together."""


def usual_working_set(device: torch.device) -> int:
    """Bytes that the coil images worked on together should take: what the cache of a core holds, or much."""
    return 1_100_000 if device.type == "cpu" else 500_000_000


class ReducedSense(LinearOperator):
    """A^H A of a Cartesian multi-echo SENSE scan in a subspace: (x, k, z, y) -> (x, k, z, y), self-adjoint.

    It also knows A^H s (``adjoint_data``) and the value of the data term (``residual_energy``).
    """

    def __init__(
        self,
        reduced: ReducedKSpace,
        csm: Tensor,
        mixing: Tensor,
        b0: Tensor | None = None,
        echo_time: Tensor | None = None,
        phase_sign: int = 1,
        working_set: int | None = None,
    ) -> None:
        """Set up for one slice.

        Args:
            reduced: sums of one slice (s = 1).
            csm: (x, c, z, y) coil sensitivity maps.
            mixing: (e, l, k): coefficients of echo e in the contrast basis are ``mixing[e] @ U``, so that
                ``Phi[(w,e),k] = sum_l Psi[w,l] mixing[e,l,k]``.
            b0: (x, z, y) [Hz], taken out of the basis; None for none.
            echo_time: (e,) [s], needed with ``b0``.
            phase_sign: +1 or -1.
            working_set: bytes that the coil images worked on together may take, by default what suits the
                device. Changes no result beyond rounding.

        Raises:
            ValueError: if the sums hold more than one slice, or b0 comes without echo times.
        """
        if reduced.gram.shape[0] != 1:
            raise ValueError(f"the reduced data term is of one slice, not of {reduced.gram.shape[0]}")
        if b0 is not None and echo_time is None:
            raise ValueError("an off-resonance map needs the echo times")
        self._csm = torch.fft.ifftshift(csm, dim=_AXES)
        self._dtype = csm.dtype
        # Only as many contrast components as the coefficients can reach are transformed and summed over.
        self._span = _reachable(mixing).to(csm.device)  # (l, r)
        self._mixing = self._within_span(mixing)  # (e, r, k)
        self._take_sums(reduced)
        self._phase = None
        if b0 is not None and echo_time is not None:
            phase = off_resonance_phase(b0, echo_time, phase_sign).to(self._dtype)  # (x, e, z, y)
            self._phase = torch.fft.ifftshift(phase, dim=_AXES)
        nx, coils, nz, ny = csm.shape
        echoes, rank, _ = self._mixing.shape
        if working_set is None:
            working_set = usual_working_set(csm.device)
        image = echoes * rank * nz * ny * csm.element_size()
        self._coils = max(1, min(coils, working_set // image))
        self._positions = max(1, min(nx, working_set // (coils * image)))

    def in_basis(self, mixing: Tensor) -> ReducedSense:
        """The same scan, coil maps and field in another basis (e, l, k) of coefficients.

        Raises:
            ValueError: if it reaches contrast components that this one does not.
        """
        other = copy(self)
        other._mixing = self._within_span(mixing)
        return other

    def with_sums(self, reduced: ReducedKSpace) -> ReducedSense:
        """The same slice, maps, field and basis with the sums of other lines, such as some of them.

        Raises:
            ValueError: if the sums are of another shape.
        """
        if reduced.projected.shape != self._reduced.projected.shape:
            raise ValueError(
                f"sums of shape {tuple(reduced.projected.shape)} cannot take the place of "
                f"{tuple(self._reduced.projected.shape)}"
            )
        other = copy(self)
        other._take_sums(reduced)
        return other

    def _take_sums(self, reduced: ReducedKSpace) -> None:
        """G within the span, uncentred, and its mean over k-space."""
        self._reduced = reduced
        gram = torch.fft.ifftshift(reduced.gram[0], dim=(1, 2)).to(self._csm.device)  # (e, z, y, l, l)
        span = self._span.to(gram.dtype)
        spanned: Tensor = span.mH @ gram @ span  # (e, z, y, r, r)
        self._mean_gram = spanned.mean((1, 2))  # (e, r, r)
        self.gram_at_samples = SampledGram(spanned.permute(0, 3, 4, 1, 2))

    def _within_span(self, mixing: Tensor) -> Tensor:
        """(e, l, k) -> (e, r, k)."""
        span = self._span.to(self._dtype)
        mixing = mixing.to(span)
        inside = span.mH @ mixing
        if (span @ inside - mixing).abs().max() > 1e-4 * mixing.abs().max():
            raise ValueError("the coefficients reach contrast components that the operator was not made for")
        return inside

    @property
    def csm(self) -> Tensor:
        """(x, c, z, y) coil sensitivity maps."""
        csm: Tensor = torch.fft.fftshift(self._csm, dim=_AXES)
        return csm

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (x, k, z, y) of the coefficient images."""
        nx, _, nz, ny = self._csm.shape
        return nx, self._mixing.shape[2], nz, ny

    @property
    def _components(self) -> Tensor:
        """(r*e, k): the mixing as a matrix."""
        return self._mixing.transpose(0, 1).flatten(0, 1)

    @property
    def samples(self) -> int:
        """Complex samples acquired, over coils and readout."""
        return self._reduced.samples

    @property
    def energy(self) -> float:
        """||s||^2."""
        return self._reduced.energy

    @property
    def device(self) -> torch.device:
        """Where the operator works."""
        device: torch.device = self._csm.device
        return device

    def mean_diagonal(self) -> Tensor:
        """Mean over k-space of the diagonal of A^H A: (k,) real, for diagonal preconditioning."""
        mean = self._mean_gram.to(self._dtype)
        diagonal: Tensor = torch.einsum("elk,elm,emk->k", self._mixing.conj(), mean, self._mixing).real
        return diagonal

    def forward(self, x: Tensor) -> Tensor:
        """A^H A U: (x, k, z, y) -> (x, k, z, y)."""
        rolled = torch.fft.ifftshift(x, dim=_AXES)
        result = torch.empty_like(rolled)
        gram = self.gram_at_samples

        def apply(start: int) -> None:
            part = slice(start, start + self._positions)
            images = self.echo_images(part, rolled[part])  # (x, r, e, z, y)
            total = torch.zeros_like(images)
            for first in range(0, self._csm.shape[1], self._coils):
                csm = self._csm[part, first : first + self._coils, None, None]  # (x, c, 1, 1, z, y)
                spectrum = torch.fft.fft2(images[:, None] * csm)  # (x, c, r, e, z, y)
                sums = gram(gram.sampled(spectrum.flatten(0, 1)))  # (x*c, r, p)
                gram.spread(sums, spectrum.flatten(0, 1))
                # Both transforms are unitary together.
                coil_images = torch.fft.ifft2(spectrum)
                for coil_image, sensitivity in zip(coil_images.unbind(1), csm.unbind(1), strict=True):
                    total.addcmul_(coil_image, sensitivity.conj())
            result[part] = self.from_echo_images(part, total)

        share_out(apply, range(0, rolled.shape[0], self._positions), self.device)
        image: Tensor = torch.fft.fftshift(result, dim=_AXES)
        return image

    def echo_images(self, part: slice, coefficients: Tensor) -> Tensor:
        """Images of every echo in the contrast components, off-resonance included, of some readout positions.

        Args:
            part: the readout positions.
            coefficients: U (x, k, z, y) of these, uncentred.

        Returns:
            (x, r, e, z, y), uncentred: components within the span of the basis.
        """
        echoes, rank, _ = self._mixing.shape
        nx, _, nz, ny = coefficients.shape
        images = self._components @ coefficients.flatten(2)  # (x, r*e, z*y)
        images = images.reshape(nx, rank, echoes, nz, ny)
        return images if self._phase is None else images * self._phase[part, None]

    def from_echo_images(self, part: slice, images: Tensor) -> Tensor:
        """Adjoint of ``echo_images``: (x, r, e, z, y) -> (x, k, z, y), both uncentred."""
        if self._phase is not None:
            images = images * self._phase[part, None].conj()
        nx, _, _, nz, ny = images.shape
        mixed = self._components.mH @ images.reshape(nx, -1, nz * ny)  # (x, k, z*y)
        return mixed.reshape(nx, -1, nz, ny)

    def sampled_data(self) -> Tensor:
        """b where there are samples, within the span of the basis: (x, c, r, p) at ``gram_at_samples``."""
        nx = self._csm.shape[0]
        return torch.cat(
            [
                self.gram_at_samples.sampled(self._data_spectrum(slice(start, start + _POSITIONS_OF_DATA)))
                for start in range(0, nx, _POSITIONS_OF_DATA)
            ]
        )

    def _data_spectrum(self, part: slice) -> Tensor:
        """b of some readout positions within the span, uncentred: (x, c, r, e, z, y)."""
        lines = self._reduced.projected[0][..., part].to(self._csm)  # (e, z, y, l, c, x)
        spectrum = torch.einsum("lr,ezylcx->xcrezy", self._span.to(self._dtype).conj(), lines)
        data: Tensor = torch.fft.ifftshift(spectrum, dim=_AXES)
        return data

    def adjoint(self, y: Tensor) -> Tensor:
        """The operator is its own adjoint."""
        return self.forward(y)

    def adjoint_data(self) -> Tensor:
        """A^H s from the sums b: (x, k, z, y)."""
        result = self._csm.new_zeros(self.shape)
        for start in range(0, self._csm.shape[0], _POSITIONS_OF_DATA):
            part = slice(start, start + _POSITIONS_OF_DATA)
            coil_images = torch.fft.ifft2(self._data_spectrum(part), norm="ortho")
            csm = self._csm[part, :, None, None]
            result[part] = self.from_echo_images(part, (coil_images * csm.conj()).sum(1))
        image: Tensor = torch.fft.fftshift(result, dim=_AXES)
        return image

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
        return float(quadratic - 2 * linear) + self._reduced.energy


def _reachable(mixing: Tensor) -> Tensor:
    """Orthonormal basis (l, r), real, of the contrast components that coefficients reach at any echo.

    Real, so that a real G stays real: the components of a real contrast basis are combinations of real ones.
    """
    parts = torch.cat([mixing.real, mixing.imag], -1) if mixing.is_complex() else mixing
    vectors, values, _ = torch.linalg.svd(parts.permute(1, 0, 2).flatten(1), full_matrices=False)
    reached: Tensor = vectors[:, : int((values > 1e-5 * values[0]).sum())]
    return reached.contiguous()
