"""An epoch as the publications compute it: features gathered and scattered, the data term frame by frame.

Plain torch throughout, one network after the other: what quick research code does, as the yardstick for the
sparse-matrix encoding and the reduced data term. It computes the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from quantitron.recon.data import KSpace
from quantitron.recon.networks import fields
from quantitron.recon.networks.encoding import GridEncoding, Samples
from quantitron.recon.networks.hash_layout import HashGridLayout, corner_rows_and_weights


@dataclass(frozen=True)
class Gathered(Samples):
    """Points as they are: rows and weights are worked out in every step."""

    coordinates: Tensor


class GatherGrid(GridEncoding):
    """The hash grid by gathering rows of the tables; autograd scatters their gradients."""

    def __init__(self, layout: HashGridLayout, networks: int, generator: torch.Generator) -> None:
        super().__init__(layout, networks)
        start = torch.rand(layout.total_rows, networks * layout.features, generator=generator)
        self.table = nn.Parameter((2 * start - 1) * 1e-4)

    def samples(self, coordinates: Tensor, gradient: bool = True) -> Gathered:
        """Keep the points."""
        del gradient
        return Gathered(self.layout, len(coordinates), coordinates)

    def forward(self, samples: Samples) -> Tensor:
        """(networks, v, levels x features)."""
        assert isinstance(samples, Gathered)
        layout = self.layout
        tables = self.table.reshape(len(self.table), self.networks, layout.features)
        features = []
        for network in range(self.networks):
            levels = []
            for level in range(layout.levels):
                rows, weights = corner_rows_and_weights(layout, samples.coordinates, level)
                corners = tables[rows + layout.first_row(level), network]  # (v, corners, features)
                levels.append((corners * weights[:, :, None].to(corners)).sum(1))
            features.append(torch.cat(levels, 1))
        return torch.stack(features)


@contextmanager
def gathering() -> Iterator[None]:
    """Networks made in here gather."""

    def encoder(
        layout: HashGridLayout,
        networks: int,
        device: torch.device,
        generator: torch.Generator,
        coordinates: Tensor | None = None,
    ) -> GatherGrid:
        del device, coordinates
        return GatherGrid(layout, networks, generator)

    with mock.patch.object(fields, "encoder", encoder):
        yield


class PlainFrames:
    """||s - M F C I||^2 with every coil image of every frame formed and recorded."""

    def __init__(self, kspace: KSpace) -> None:
        _, nz, ny, _ = kspace.grid
        echoes = kspace.contrast_shape[2]
        frames = int(torch.tensor(kspace.contrast_shape).prod())
        frame = kspace.contrast * echoes + kspace.echo
        self.frame, self.kz, self.ky = frame, kspace.kz, kspace.ky
        self.samples, self.shape = kspace.samples, (frames, nz, ny)

    def l2(self, frames: Tensor, csm: Tensor, position: Tensor) -> Tensor:
        """Sum of squares for images (x, t, z, y), maps (x, c, z, y) at readout positions (x,)."""
        axes = (-2, -1)
        coil_images = frames[:, :, None] * csm[:, None]  # (x, t, c, z, y)
        spectrum = torch.fft.fft2(torch.fft.ifftshift(coil_images, dim=axes), norm="ortho")
        spectrum = torch.fft.fftshift(spectrum, dim=axes)
        predicted = spectrum[:, self.frame, :, self.kz, self.ky]  # (line, x, c)
        acquired = self.samples[..., position].permute(0, 2, 1)  # (line, x, c)
        return torch.view_as_real(predicted - acquired).square().sum()
