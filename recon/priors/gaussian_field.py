"""Gaussian prior for coefficient images: amplitudes that vary over space, correlated between neighbours.

    -log p(U) = 1/2 <U, W U> + const,    W = a^-1 F^H S^-1 F a^-1
    S(q) = (1 + |q|^2 ell^2)^(-power), scaled to mean 1,    q the angular spatial frequency

a_k(r)^2 is the expected mean square of U_k at r, S the spectrum of U / a, a Matern one (Whittle 1954).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantitron.recon.priors.neighbourhood import neighbourhood_mean, neighbourhood_voxels

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
        self._expected = expected
        self._voxel_size = voxel_size
        self._correlation_length = correlation_length
        self._power = power
        nx, _, nz, ny = expected.shape
        x, z, y = (
            (2 * math.pi / edge) * torch.fft.fftfreq(n, device=expected.device)
            for n, edge in zip((nx, nz, ny), voxel_size, strict=True)
        )
        square = x[:, None, None] ** 2 + z[:, None] ** 2 + y**2  # (x, z, y)
        spectrum = (1 + square * correlation_length**2) ** -power
        self._inverse_spectrum = (spectrum.mean() / spectrum)[:, None]  # (x, 1, z, y)
        self._inverse_amplitude = expected.rsqrt()

    def learnt_around(self, u: Tensor, width: float, voxels: float) -> GaussianField:
        """The field whose mean squares are those of ``u`` in the neighbourhood of each voxel.

        Mean squares over a whole object suit none of its parts: what is rare there, such as fluid among
        tissue, is drawn to what is common. Those around a voxel are uncertain in their turn, so they are
        mixed with the ones that this field expects, as the posterior of a variance does under its conjugate
        prior, the inverse gamma distribution (Gelman, Bayesian Data Analysis, 2.6).

        Args:
            u: an estimate (x, k, z, y) complex.
            width: standard deviation of the neighbourhood, in voxels of the shortest edge.
            voxels: how many voxels of evidence the present expectation counts for.
        """
        shortest = min(self._voxel_size)
        x, z, y = (
            width * shortest / edge if n > 1 else 0.0
            for edge, n in zip(self._voxel_size, (u.shape[0], *u.shape[2:]), strict=True)
        )
        around = neighbourhood_mean(u.abs().square(), (x, z, y))
        evidence = neighbourhood_voxels((x, z, y))
        expected = (voxels * self._expected + evidence * around) / (voxels + evidence)
        return GaussianField(expected, self._voxel_size, self._correlation_length, self._power)

    def precision(self, u: Tensor) -> Tensor:
        """W U: (x, k, z, y) -> (x, k, z, y)."""
        scaled = self._inverse_amplitude * u
        if self._correlation_length > 0:
            spectrum = torch.fft.fftn(scaled, dim=_AXES)
            scaled = torch.fft.ifftn(self._inverse_spectrum * spectrum, dim=_AXES)
        return self._inverse_amplitude * scaled

    def diagonal(self) -> Tensor:
        """Diagonal of W: (x, k, z, y) real."""
        diagonal: Tensor = self._inverse_spectrum.mean() * self._inverse_amplitude.square()
        return diagonal
