"""Gaussian prior for coefficient images: amplitudes that vary over space, correlated between neighbours.

    -log p(U) = 1/2 <U, W U> + const,    W = a^-1 F^H S^-1 F a^-1
    S(q) = (1 + |q|^2 ell^2)^(-power), scaled to mean 1,    q the angular spatial frequency

a_k(r)^2 is the expected mean square of U_k at r, S the spectrum of U / a, a Matern one (Whittle 1954).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_AXES = (0, 2, 3)  # (x, z, y) of (x, k, z, y)


class GaussianField:
    """Precision W, the inverse covariance, of coefficient images (x, k, z, y)."""

    def __init__(
        self,
        expected: Tensor,
        voxel_size: tuple[float, float, float],
        correlation_length: float,
        power: float = 1.5,
    ) -> None:
        """Set up W.

        Args:
            expected: (x, k, z, y) expected mean square of the coefficients, above zero.
            voxel_size: edges [m] along (x, z, y).
            correlation_length: ell [m]; 0 makes voxels independent of each other.
            power: decay of the spectrum.
        """
        nx, _, nz, ny = expected.shape
        x, z, y = (
            (2 * math.pi / edge) * torch.fft.fftfreq(n, device=expected.device)
            for n, edge in zip((nx, nz, ny), voxel_size, strict=True)
        )
        square = x[:, None, None] ** 2 + z[:, None] ** 2 + y**2  # (x, z, y)
        spectrum = (1 + square * correlation_length**2) ** -power
        self._inverse_spectrum = (spectrum.mean() / spectrum)[:, None]  # (x, 1, z, y)
        self._inverse_amplitude = expected.rsqrt()
        self._correlated = correlation_length > 0

    def precision(self, u: Tensor) -> Tensor:
        """W U: (x, k, z, y) -> (x, k, z, y)."""
        scaled = self._inverse_amplitude * u
        if self._correlated:
            spectrum = torch.fft.fftn(scaled, dim=_AXES)
            scaled = torch.fft.ifftn(self._inverse_spectrum * spectrum, dim=_AXES)
        return self._inverse_amplitude * scaled

    def diagonal(self) -> Tensor:
        """Diagonal of W: (x, k, z, y) real."""
        diagonal: Tensor = self._inverse_spectrum.mean() * self._inverse_amplitude.square()
        return diagonal
