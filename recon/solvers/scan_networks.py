"""Coordinate networks for all that a scan is made of: maps, echo phases, inversion, coil maps (SUMMIT).

    I_(w,e) = A f_w(T1, T2, B) exp(-TE_e / T2*) exp(j phi_e),      s = M F C I

A and the relaxation times are exponentials of their networks' outputs. The phase of each echo is that of a
complex number whose parts two networks give, so that it never wraps. The inversion efficiency and the coil
maps are smooth and have coarse grids. All are functions of the coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantitron.recon.data import Protocol
from quantitron.recon.networks.encoding import Samples
from quantitron.recon.networks.fields import ComplexField, CoordinateNetwork, RealField
from quantitron.recon.networks.hash_layout import HashGridLayout
from quantitron.recon.operators.frame_data_term import frame_images
from quantitron.recon.signal.models import CONTRAST_PARAMETERS, CONTRAST_SIGNALS

_LEAST_TIME, _LARGEST_TIME = 1e-3, 100.0
"""Bounds of the relaxation times [s], far outside the physical ones: in air nothing else holds them."""
_LEAST_PHASOR = 1e-6
_INVERSION_SCALE = 0.1
"""Relative change of the inversion efficiency for a network's output of 1."""


@dataclass(frozen=True)
class ScanValues:
    """All maps at v voxels."""

    positive: Mapping[str, Tensor]
    """``amplitude`` and the relaxation times [s], (v,) each."""
    phasor: Tensor
    """(e, v) complex of modulus 1: phase of each echo."""
    inversion: Tensor | None
    """(v,) efficiency; None where the sequence has none or the protocol gives it."""

    def frames(self, protocol: Protocol, shape: tuple[int, int, int]) -> Tensor:
        """Images of all frames.

        Args:
            protocol: the sequence.
            shape: (x, z, y) of the v voxels.

        Returns:
            (x, t, z, y) complex, receive sensitivity left out.
        """
        amplitude = self.positive["amplitude"]
        parameters = {name: self.positive[name] for name in ("t1", "t2") if name in self.positive}
        if "inversion" in CONTRAST_PARAMETERS[protocol.sequence]:
            known = 1.0 if protocol.inversion_efficiency is None else protocol.inversion_efficiency
            parameters["inversion"] = (
                amplitude.new_tensor(known).expand_as(amplitude) if self.inversion is None else self.inversion
            )
        signal = CONTRAST_SIGNALS[protocol.sequence]
        contrast = signal(parameters or {"amplitude": amplitude}, protocol, None)  # (v, w)
        magnitude = amplitude[None]  # (e, v)
        if "t2star" in self.positive:
            time = amplitude.new_tensor(protocol.echo_time)[:, None]
            magnitude = amplitude * torch.exp(-time / self.positive["t2star"])
        echo = magnitude * self.phasor
        x, z, y = shape
        return frame_images(
            contrast.reshape(x, z, y, -1).permute(0, 3, 1, 2), echo.reshape(-1, x, z, y).transpose(0, 1)
        )


@dataclass(frozen=True)
class Points:
    """Voxels prepared for the networks: a block of the scan, (x, z, y)."""

    shape: tuple[int, int, int]
    maps: Samples
    phase: Samples
    coarse: Samples
    """For inversion and coil maps."""


@dataclass(frozen=True)
class NetworkSettings:
    """What the networks look like."""

    matrix: tuple[int, int, int]
    """(x, z, y) voxels."""
    coils: int
    shared_encoder: bool = False
    """One set of features for amplitude and relaxation times, in place of one for each."""
    log2_rows: int = 19
    """Of the maps' hash grid."""
    phase_log2_rows: int = 12
    """Of the phase's hash grid."""
    estimate_coils: bool = True
    """Whether there is a network for the coil maps; given ones stay as they are where not."""
    multiply_coils: bool = True
    """Whether the coil network changes given coil maps, in place of making them."""


class ScanNetworks(nn.Module):
    """The networks of one scan."""

    def __init__(
        self,
        protocol: Protocol,
        settings: NetworkSettings,
        start: ScanValues,
        scale: Mapping[str, float],
        coordinates: Tensor,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        """Draw the networks.

        Args:
            protocol: the sequence.
            settings: their shape.
            start: what they begin with everywhere, one voxel (v = 1).
            scale: change of each logarithm in ``start.positive`` for an output of 1.
            coordinates: (v, 3) of all voxels.
            generator: the source of chance.
            device: where they run.
        """
        super().__init__()
        self.protocol, self.settings = protocol, settings
        self.names = tuple(start.positive)
        """Amplitude and relaxation times, in the order of the network's outputs."""
        layout = HashGridLayout.for_matrix(settings.matrix, log2_rows=settings.log2_rows)
        phase = replace(HashGridLayout.for_phase(settings.matrix), log2_rows=settings.phase_log2_rows)
        coarse = HashGridLayout.for_coils()

        def network(
            layout: HashGridLayout, outputs: int, networks: int, shared_encoder: bool = False
        ) -> CoordinateNetwork:
            return CoordinateNetwork(
                layout, outputs, generator, device, networks, shared_encoder, coordinates=coordinates
            )

        count = len(self.names)
        self.maps = RealField(
            network(layout, count, count, settings.shared_encoder),
            torch.cat([start.positive[name] for name in self.names]).to(device),
            torch.tensor([scale[name] for name in self.names], device=device),
        )
        self.phase = ComplexField(
            network(phase, 2 * len(start.phasor), 2, shared_encoder=True), start.phasor[:, 0].to(device)
        )
        self.inversion: RealField | None = None
        if start.inversion is not None:
            small = torch.full((1,), _INVERSION_SCALE, device=device)
            self.inversion = RealField(network(coarse, 1, 1), start.inversion.to(device), small)
        self.coils: ComplexField | None = None
        if settings.estimate_coils and settings.coils > 1:  # one coil's map and the amplitude are one
            begin = 1.0 if settings.multiply_coils else settings.coils**-0.5
            ones = torch.ones(settings.coils, device=device)
            self.coils = ComplexField(
                network(coarse, 2 * settings.coils, 2, shared_encoder=True), begin * ones + 0j
            )

    def points(self, coordinates: Tensor, shape: tuple[int, int, int], gradient: bool = True) -> Points:
        """Prepare a block of voxels.

        Args:
            coordinates: (v, 3).
            shape: (x, z, y) of the v voxels.
            gradient: whether they serve a fit.
        """
        coarse = self.coils if self.inversion is None else self.inversion
        maps = self.maps.samples(coordinates, gradient)
        return Points(
            shape,
            maps,
            self.phase.samples(coordinates, gradient),
            maps if coarse is None else coarse.samples(coordinates, gradient),
        )

    def values(self, points: Points) -> ScanValues:
        """All maps but those of the coils."""
        return ScanValues(
            self.positive(points),
            self.phasors(points),
            None if self.inversion is None else self.inversion(points.coarse)[0],
        )

    def positive(self, points: Points) -> dict[str, Tensor]:
        """Amplitude and relaxation times, (v,) each."""
        columns = zip(self.names, self.maps(points.maps), strict=True)
        return {
            name: column if name == "amplitude" else column.clamp(_LEAST_TIME, _LARGEST_TIME)
            for name, column in columns
        }

    def phasors(self, points: Points) -> Tensor:
        """(e, v) complex of modulus 1."""
        parts: Tensor = self.phase(points.phase)
        return parts / parts.abs().clamp_min(_LEAST_PHASOR)

    def csm(self, points: Points, given: Tensor) -> Tensor:
        """Coil maps, of no particular length: what they and the amplitude share is settled in the end.

        Args:
            points: block of voxels.
            given: (x, c, z, y) coil maps there, to start from.
        """
        if self.coils is None:
            return given
        x, z, y = points.shape
        found: Tensor = self.coils(points.coarse).reshape(-1, x, z, y).transpose(0, 1)
        return given * found if self.settings.multiply_coils else found
