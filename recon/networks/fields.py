"""Maps as functions of the coordinates: an encoding, a perceptron, and what its outputs mean.

A field is asked for a batch of points that was prepared beforehand, in every step of a fit, or, after it, for
points of any grid (``at``). Its outputs start as constants, for features start near zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from quantitron.recon.networks.encoder import encoder
from quantitron.recon.networks.encoding import GridEncoding, Samples
from quantitron.recon.networks.hash_layout import HashGridLayout
from quantitron.recon.networks.mlp import StackedMLP

_POINTS_AT_ONCE = 65536


class CoordinateNetwork(nn.Module):
    """Hash-grid features into perceptrons: so many real numbers at every point."""

    def __init__(
        self,
        layout: HashGridLayout,
        outputs: int,
        generator: torch.Generator,
        device: torch.device,
        networks: int = 1,
        shared_encoder: bool = False,
        width: int = 64,
        hidden: int = 3,
        biases: bool = False,
        coordinates: Tensor | None = None,
    ) -> None:
        """Draw features and weights.

        Args:
            layout: of the hash grid.
            outputs: numbers at every point, over all networks.
            generator: the source of chance, on the CPU.
            device: where it runs.
            networks: perceptrons that share the outputs, in order and equally: 1 for shared hidden layers, as
                many as outputs for a network each.
            shared_encoder: one set of features for all networks instead of one each.
            width: neurons of a hidden layer.
            hidden: number of hidden layers.
            biases: whether the layers add constants.
            coordinates: (v, d), points of the fit; where given, rows that they do not touch are not stored.

        Raises:
            ValueError: if the networks cannot share the outputs equally, or a number is out of range.
        """
        if networks < 1 or outputs < 1 or outputs % networks:
            raise ValueError(f"{networks} networks cannot share {outputs} outputs")
        super().__init__()
        self.outputs = outputs
        self.encoding: GridEncoding = encoder(
            layout, 1 if shared_encoder else networks, device, generator, coordinates
        )
        self.perceptrons = StackedMLP(
            networks, layout.width, outputs // networks, generator, width, hidden, biases, device
        )

    def forward(self, samples: Samples) -> Tensor:
        """Outputs at prepared points.

        Returns:
            (outputs, v).
        """
        values: Tensor = self.perceptrons(self.encoding(samples))
        return values.transpose(1, 2).reshape(self.outputs, samples.voxels)


class Field(nn.Module, ABC):
    """Several maps as functions of the coordinates."""

    def __init__(self, network: CoordinateNetwork) -> None:
        """Keep the network.

        Args:
            network: gives the outputs.
        """
        super().__init__()
        self.network = network

    def samples(self, coordinates: Tensor, gradient: bool = True) -> Samples:
        """Prepare points; fields of one layout may share them where both store all rows, or the same ones.

        Args:
            coordinates: (v, d) in [0, 1].
            gradient: whether they serve a fit.

        Raises:
            ValueError: if the coordinates are not (v, d) in [0, 1].
        """
        return self.network.encoding.samples(coordinates, gradient)

    @abstractmethod
    def forward(self, samples: Samples) -> Tensor:
        """Maps at prepared points, (maps, v)."""

    def at(self, coordinates: Tensor) -> Tensor:
        """Maps at any points, so at any resolution; without gradient and in bounded memory.

        Where the finest level has more than one cell between the points that a field was fitted at, some of
        its vertices were never trained, and what is read between those points comes from the other levels.

        Args:
            coordinates: (v, d) in [0, 1].

        Returns:
            (maps, v).

        Raises:
            ValueError: if the coordinates are not (v, d) in [0, 1].
        """
        with torch.no_grad():
            parts = [
                self(self.samples(part, gradient=False)) for part in torch.split(coordinates, _POINTS_AT_ONCE)
            ]
        return torch.cat(parts, dim=1)


class RealField(Field):
    """Real maps: start x exp(scale x output) where positive, else start + scale x output."""

    start: Tensor
    scale: Tensor
    positive: Tensor

    def __init__(
        self,
        network: CoordinateNetwork,
        start: Tensor,
        scale: Tensor | None = None,
        positive: Tensor | None = None,
    ) -> None:
        """Say what the outputs mean.

        Args:
            network: one output a map.
            start: (maps,) value of each map before the fit, above 0 where positive.
            scale: (maps,) change for an output of 1: in the logarithm where positive, else in the map's unit.
                1 by default.
            positive: (maps,) bool, whether the map is positive everywhere; by default all are.

        Raises:
            ValueError: if the numbers of maps differ, or a positive map does not start above 0.
        """
        super().__init__(network)
        scale = torch.ones_like(start) if scale is None else scale
        positive = torch.ones_like(start, dtype=torch.bool) if positive is None else positive
        if not start.shape == scale.shape == positive.shape == (network.outputs,):
            raise ValueError(
                f"{network.outputs} outputs do not make {start.numel()} maps with {scale.numel()} scales and"
                f" {positive.numel()} signs"
            )
        if bool((start[positive] <= 0).any()):
            raise ValueError("a positive map must start above 0")
        self.register_buffer("start", start[:, None])
        self.register_buffer("scale", scale[:, None])
        self.register_buffer("positive", positive[:, None])

    def forward(self, samples: Samples) -> Tensor:
        """Maps at prepared points, (maps, v)."""
        change = self.scale * self.network(samples)
        # Both branches are differentiated: the exponential must not overflow where it is not taken.
        factor = torch.exp(torch.where(self.positive, change, 0))
        return torch.where(self.positive, self.start * factor, self.start + change)


class ComplexField(Field):
    """Complex maps: start + scale x (real output + i imaginary output).

    The network's first outputs are the real parts of all maps, the others the imaginary parts: with two
    networks, as published, one makes the former and one the latter.
    """

    start: Tensor
    scale: Tensor

    def __init__(self, network: CoordinateNetwork, start: Tensor, scale: Tensor | None = None) -> None:
        """Say what the outputs mean.

        Args:
            network: two outputs a map.
            start: (maps,) complex, value of each map before the fit.
            scale: (maps,) real, change for an output of 1. 1 by default.

        Raises:
            ValueError: if the numbers of maps differ.
        """
        super().__init__(network)
        scale = torch.ones_like(start.real) if scale is None else scale
        if start.ndim != 1 or scale.shape != start.shape or network.outputs != 2 * len(start):
            raise ValueError(
                f"{network.outputs} outputs do not make {start.numel()} complex maps with {scale.numel()}"
                " scales"
            )
        self.register_buffer("start", start[:, None])
        self.register_buffer("scale", scale[:, None])

    def forward(self, samples: Samples) -> Tensor:
        """Maps at prepared points, (maps, v) complex."""
        real, imaginary = self.network(samples).chunk(2)
        return self.start + self.scale * torch.complex(real, imaginary)
