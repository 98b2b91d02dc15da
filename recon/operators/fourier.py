"""Centred unitary Fourier transforms: k = 0 and r = 0 lie at index n // 2 of each axis."""

from __future__ import annotations

import torch
from torch import Tensor

from quantitron.recon.operators.linear_operator import LinearOperator


def centred_fft(image: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``s(k) = sum_r I(r) exp(-2 pi i k r) / sqrt(n)`` along ``axes``; shape unchanged."""
    shifted = torch.fft.ifftshift(image, dim=axes)
    spectrum: Tensor = torch.fft.fftshift(torch.fft.fftn(shifted, dim=axes, norm="ortho"), dim=axes)
    return spectrum


def centred_ifft(kspace: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Inverse and adjoint of ``centred_fft``; shape unchanged."""
    shifted = torch.fft.ifftshift(kspace, dim=axes)
    image: Tensor = torch.fft.fftshift(torch.fft.ifftn(shifted, dim=axes, norm="ortho"), dim=axes)
    return image


class FourierOperator(LinearOperator):
    """F along some axes of a tensor: image (...) -> k-space (...)."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        self._axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Image to k-space."""
        return centred_fft(x, self._axes)

    def adjoint(self, y: Tensor) -> Tensor:
        """k-space to image."""
        return centred_ifft(y, self._axes)

    def normal(self, x: Tensor) -> Tensor:
        """The identity: F is unitary."""
        return x
