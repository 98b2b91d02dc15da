"""The form in which a trained network sees the coefficient images of a fingerprint.

Solvers work in a basis that is turned to the tissue of one scan; a network must find the same component in
the same place in every scan of a protocol. Three things are therefore settled before it sees anything:

axes    the leading principal axes of the signals of tissue, T1 0.4 to 4.5 s and T2 0.03 to 2 s uniform in the
        logarithm, each with the sign (or phase) that makes its largest time point positive. They depend on
        the protocol, and on the grid of its dictionary hardly at all;
phase   the phase of the strongest component, smoothed over some millimetres, is taken off all of them: what
        is left is nearly real where the signals are;
order   channels are the real parts of all components, then the imaginary ones.

White noise stays white. What lies outside of these axes is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from quantitron.recon.data import Basis, FingerprintDictionary, Protocol
from quantitron.recon.fingerprint_basis import fingerprint_basis
from quantitron.recon.networks.trained_network import NetworkDescription

TISSUE = {"t1": (0.4, 4.5), "t2": (0.03, 2.0)}
"""T1 and T2 [s] that the axes are those of. Networks depend on it: not a setting."""
PHASE_WIDTH = 4e-3
"""Standard deviation [m] of the Gaussian that smooths the phase."""


@dataclass(frozen=True)
class CanonicalSeries:
    """Coefficient images (x, k, z, y) of one slice to real images (2K, z, y, x) and back."""

    axes: Tensor
    """(k, K): the canonical components in the basis of the coefficient images."""
    phase: Tensor
    """(x, z, y) complex of modulus 1: what is taken off."""

    def images(self, coefficients: Tensor) -> Tensor:
        """(x, k, z, y) complex -> (2K, z, y, x) real."""
        turned = torch.einsum("kj,xkzy->jzyx", self.axes.conj().to(coefficients), coefficients)
        turned = turned * self.phase.permute(1, 2, 0).conj().to(turned)
        return torch.cat([turned.real, turned.imag])

    def replaced(self, coefficients: Tensor, images: Tensor) -> Tensor:
        """Coefficient images whose canonical part is ``images``; what lies outside of it stays.

        Args:
            coefficients: (x, k, z, y).
            images: (2K, z, y, x).

        Returns:
            (x, k, z, y).
        """
        change = images.to(coefficients.real) - self.images(coefficients)
        real, imaginary = change.chunk(2)
        turned = torch.complex(real, imaginary) * self.phase.permute(1, 2, 0).to(coefficients)
        added: Tensor = torch.einsum("kj,jzyx->xkzy", self.axes.to(coefficients), turned)
        return coefficients + added


@dataclass(frozen=True)
class TissueAxes:
    """The canonical components of a protocol."""

    axes: Tensor
    """(l, K) orthonormal columns in the temporal basis, real where the dictionary is."""
    size: Tensor
    """(K,) rms of each component over tissue, relative to the first one's."""
    moments: Tensor
    """(l, l) E[u u^H] of tissue in the temporal basis."""

    def retained(self, columns: Tensor) -> float:
        """Share of the energy of tissue that components (l, k) hold, of all that the temporal basis does."""
        columns = columns.to(self.moments)
        held = (columns.mH @ self.moments @ columns).diagonal().real.sum()
        return float(held / self.moments.diagonal().real.sum())

    def channels(self) -> Tensor:
        """(2K, 1, 1, 1) the sizes, for real and imaginary parts."""
        return torch.cat([self.size, self.size])[:, None, None, None]


def tissue_axes(basis: Basis, dictionary: FingerprintDictionary, components: int) -> TissueAxes:
    """The canonical components in a temporal basis.

    Args:
        basis: leading columns of the dictionary's axes.
        dictionary: fingerprints over T1 x T2.
        components: K.

    Raises:
        ValueError: if the basis has fewer columns than K.
    """
    if basis.rank < components:
        raise ValueError(
            f"the network wants {components} coefficient images, and basis.rank leaves {basis.rank}; "
            f"set basis.rank to {components} or more"
        )
    found = fingerprint_basis(basis, dictionary, TISSUE)
    axes = found.mixing[0, :, :components]  # (l, K)
    signals = basis.contrast.to(axes) @ axes  # (w, K)
    largest = signals.gather(0, signals.abs().argmax(0, keepdim=True))[0]  # (K,)
    axes = axes * (largest.conj() / largest.abs())
    size = (found.variance[:components] / found.variance[0]).sqrt()
    every = found.mixing[0]  # (l, l)
    moments = (every * found.variance.to(every)) @ every.mH
    return TissueAxes(axes if bool(axes.imag.any()) else axes.real, size, moments)


def canonical_series(
    coefficients: Tensor, axes: Tensor, voxel_size: tuple[float, float, float]
) -> CanonicalSeries:
    """The canonical form of a slice.

    Args:
        coefficients: U (x, k, z, y), for its phase.
        axes: (k, K), the canonical components in the basis of U.
        voxel_size: edges [m] along x, z, y.
    """
    strongest = torch.einsum("k,xkzy->xzy", axes[:, 0].conj().to(coefficients), coefficients).cpu().numpy()
    width = [
        PHASE_WIDTH / edge if n > 1 else 0.0 for n, edge in zip(strongest.shape, voxel_size, strict=True)
    ]
    smooth = ndimage.gaussian_filter(strongest.real, width) + 1j * ndimage.gaussian_filter(
        strongest.imag, width
    )
    phase = np.exp(1j * np.angle(smooth)).astype(np.complex64)
    return CanonicalSeries(axes, torch.from_numpy(phase).to(coefficients.device))


def protocol_checksum(protocol: Protocol) -> str:
    """Of everything that the canonical axes depend on, in steps well above what a file's header rounds off.

    Flip angles and phases count in thousandths of a degree, times in microseconds.
    """
    degrees = [
        [round(1e3 * math.degrees(angle)) for angle in angles]
        for angles in (protocol.flip_angle, protocol.rf_phase)
    ]
    times = [
        [round(1e6 * time) for time in times]
        for times in (protocol.repetition_time, protocol.echo_time, protocol.inversion_time)
    ]
    efficiency = 1.0 if protocol.inversion_efficiency is None else protocol.inversion_efficiency
    text = json.dumps([protocol.sequence, degrees, times, round(1e3 * efficiency)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_protocol(network: NetworkDescription, protocol: Protocol) -> None:
    """Refuse a network that was trained for another protocol than the scan's.

    Args:
        network: whose card says which, under ``protocol_checksum`` and, for people, ``protocol``.
        protocol: of the scan.

    Raises:
        ValueError: in one sentence.
    """
    trained = network.card.get("protocol_checksum")
    if trained is None:
        raise ValueError(f"the network for {network.kind} does not say which protocol it was trained for")
    if trained != protocol_checksum(protocol):
        meant, points = network.card.get("protocol", trained), len(protocol.flip_angle)
        raise ValueError(
            f"the network for {network.kind} was trained for {meant}, another protocol than this scan's "
            f"{points} time points; train one for that"
        )
