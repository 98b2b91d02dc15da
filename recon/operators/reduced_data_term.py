"""The reduced data term as a function that networks are trained through.

    f(U, C) = 1/2 sum_t ||s_t - M_t F C D_t Phi_t U||^2 - 1/2 ||s||^2

of some readout positions, differentiable once by the coefficient images U and the coil maps C. Value and
gradients come from one sweep over coils; nothing of it is recorded, so that memory is that of a few coils.

What a step of a training pays for is less the transforms than reading and writing arrays. So the sums G and b
are kept at the sampled points of each echo alone (``sampled_gram.py``), and as few coils are worked on
together as stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantitron.recon.operators.reduced_sense import ReducedSense, usual_working_set

_AXES = (-2, -1)  # (z, y)


class ReducedDataTerm:
    """f of one slice, prepared for many steps."""

    def __init__(self, operator: ReducedSense, working_set: int | None = None) -> None:
        """Collect the sums at the sampled points.

        Args:
            operator: sums G and b, basis and field map; its own coil maps are not used.
            working_set: bytes that the coil images worked on together may take, by default what suits the
                device. Changes no result beyond rounding.
        """
        self.operator = operator
        self._gram = operator.gram_at_samples
        self._data = operator.sampled_data()  # (x, c, r, p)
        self._working_set = usual_working_set(operator.device) if working_set is None else working_set

    def __call__(self, part: slice, coefficients: Tensor, csm: Tensor) -> Tensor:
        """f of the readout positions in ``part``: a real scalar, differentiable once by both arrays.

        Args:
            part: which readout positions.
            coefficients: U (x, k, z, y) of these.
            csm: C (x, c, z, y) of these.
        """
        value: Tensor = _Value.apply(coefficients, csm, self, part)  # type: ignore[no-untyped-call]
        return value

    def value_and_gradients(
        self, part: slice, coefficients: Tensor, csm: Tensor, wanted: tuple[bool, bool] = (True, True)
    ) -> tuple[float, Tensor | None, Tensor | None]:
        """f and its gradients, without any record.

        Args:
            part: the readout positions.
            coefficients: U (x, k, z, y) of these.
            csm: (x, c, z, y) coil maps of these.
            wanted: whether the gradients by U and by the coil maps are; without either, half of the
                transforms are left out.

        Returns:
            The value; its gradients by U and by the coil maps, of their shapes, or None: along a change d the
            value rises by Re <gradient, d>.
        """
        # Norms of the transforms go into the few coil maps, not into the many coil images.
        scale = (csm.shape[-2] * csm.shape[-1]) ** -0.5
        csm = torch.fft.ifftshift(csm, dim=_AXES) * scale
        images = self.operator.echo_images(part, torch.fft.ifftshift(coefficients, dim=_AXES))
        by_images = torch.zeros_like(images) if wanted[0] else None  # (x, r, e, z, y)
        by_csm = torch.empty_like(csm) if wanted[1] else None
        conjugate_csm = csm.conj().resolve_conj()
        value = torch.zeros((), dtype=torch.float64, device=csm.device)
        data = self._data[part]
        coils = max(1, self._working_set // (images[0].numel() * images.element_size()))
        for x, image in enumerate(images):
            conjugate = image.conj().resolve_conj() if by_csm is not None else None
            for first in range(0, csm.shape[1], coils):
                chunk = slice(first, first + coils)
                spectrum = torch.fft.fft2(image * csm[x, chunk, None, None])  # (c, r, e, z, y)
                sampled = self._gram.sampled(spectrum)  # (c, r, p)
                slope = self._gram(sampled).sub_(data[x, chunk])
                value += 0.5 * (_real_inner(sampled, slope) - _real_inner(sampled, data[x, chunk]))
                if by_images is None and conjugate is None:
                    continue
                coil_images = torch.fft.ifft2(self._gram.spread(slope, spectrum), norm="forward")
                if by_csm is not None and conjugate is not None:
                    torch.sum((coil_images * conjugate).flatten(1, 2), 1, out=by_csm[x, chunk])
                if by_images is not None:
                    for coil_image, sensitivity in zip(coil_images, conjugate_csm[x, chunk], strict=True):
                        by_images[x].addcmul_(coil_image, sensitivity)
        by_coefficients = None
        if by_images is not None:
            by_coefficients = torch.fft.fftshift(self.operator.from_echo_images(part, by_images), dim=_AXES)
        if by_csm is not None:
            by_csm = torch.fft.fftshift(by_csm.mul_(scale), dim=_AXES)
        return float(value), by_coefficients, by_csm


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, csm: Tensor, term: ReducedDataTerm, part: slice) -> Tensor:
        wanted = (bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[1]))
        value, *gradients = term.value_and_gradients(part, coefficients, csm, wanted)
        ctx.save_for_backward(*gradients)
        return coefficients.real.new_tensor(value)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        by_coefficients, by_csm = (None if part is None else part * outer[0] for part in ctx.saved_tensors)
        return by_coefficients, by_csm, None, None


def _real_inner(left: Tensor, right: Tensor) -> Tensor:
    """Re <left, right>."""
    return torch.dot(torch.view_as_real(left).flatten(), torch.view_as_real(right).flatten())
