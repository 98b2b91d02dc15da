"""What the networks ask of an encoding of coordinates, whichever library computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from quantitron.recon.networks.hash_layout import HashGridLayout


@dataclass(frozen=True)
class Samples:
    """Points prepared for one encoding: made once, used in every step."""

    layout: HashGridLayout
    """The grid that they were prepared for."""
    voxels: int
    """Number of points."""


class GridEncoding(nn.Module, ABC):
    """Learnt features of points: N stacked encodings that share one grid."""

    def __init__(self, layout: HashGridLayout, networks: int) -> None:
        """Set the shape.

        Args:
            layout: shape of the grid.
            networks: encodings that share it, each with features of its own.

        Raises:
            ValueError: if there is no network.
        """
        if networks < 1:
            raise ValueError(f"an encoding serves at least one network, not {networks}")
        super().__init__()
        self.layout = layout
        self.networks = networks

    @abstractmethod
    def samples(self, coordinates: Tensor, gradient: bool = True) -> Samples:
        """Prepare points.

        Args:
            coordinates: (v, d) in [0, 1].
            gradient: whether the features will be differentiated; without it this takes half the memory.

        Raises:
            ValueError: if the coordinates are not (v, d), or lie outside [0, 1].
        """

    @abstractmethod
    def forward(self, samples: Samples) -> Tensor:
        """Features of the points.

        Returns:
            (networks, v, levels x features).
        """
