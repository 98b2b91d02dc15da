"""The hash grid of tiny-cuda-nn, where it is installed. Same rules and start values as ``hash_grid``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from quantitron.recon.networks.encoding import GridEncoding, Samples
from quantitron.recon.networks.hash_grid import HashGrid
from quantitron.recon.networks.hash_layout import HashGridLayout, check_coordinates

MODULE = "tinycudann"
"""Name of its Python binding."""
_ROW_WIDTHS = (8, 4, 2, 1)
"""Features that a row may hold there."""
_DIMENSIONS = (2, 3)
"""Coordinates that a point may have there."""


@dataclass(frozen=True)
class CoordinateSamples(Samples):
    """Points as they are: the library works out rows and weights in every call."""

    coordinates: Tensor
    """(v, d) float32."""


class TinyCudaGrid(GridEncoding):
    """N hash grids of one layout, computed by tiny-cuda-nn in single precision."""

    def __init__(
        self,
        library: ModuleType,
        layout: HashGridLayout,
        networks: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        """Make the encodings. The features of several networks share a row where one holds them.

        Args:
            library: the imported binding.
            layout: shape of the grid, of 2 or 3 dimensions.
            networks: encodings that share it.
            generator: the source of chance, on the CPU.
            device: the GPU.

        Raises:
            ValueError: if there is no network, or the library has no such grid.
        """
        super().__init__(layout, networks)
        if not supported(layout):
            raise ValueError(
                f"{MODULE} has no hash grid of {layout.dimensions} dimensions and {layout.features} features"
            )
        # Our own table, so that both backends start from the same numbers.
        table = HashGrid(layout, networks, generator).table.detach()
        self.encodings = nn.ModuleList()
        self.groups: list[int] = []
        first = 0
        while first < networks:
            group = next(
                width // layout.features
                for width in _ROW_WIDTHS
                if width % layout.features == 0 and width // layout.features <= networks - first
            )
            encoding = library.Encoding(
                n_input_dims=layout.dimensions,
                encoding_config={
                    "otype": "HashGrid",
                    "n_levels": layout.levels,
                    "n_features_per_level": group * layout.features,
                    "log2_hashmap_size": layout.log2_rows,
                    "base_resolution": layout.base_resolution,
                    "per_level_scale": layout.growth,
                },
                dtype=torch.float32,
            )
            part = table[:, first * layout.features : (first + group) * layout.features]
            with torch.no_grad():
                encoding.params.copy_(part.reshape(-1))
            self.encodings.append(encoding.to(device))
            self.groups.append(group)
            first += group

    def samples(self, coordinates: Tensor, gradient: bool = True) -> CoordinateSamples:
        """Check points and bring them to the GPU.

        Args:
            coordinates: (v, d) in [0, 1].
            gradient: without meaning here.

        Raises:
            ValueError: if the coordinates are not (v, d) in [0, 1].
        """
        del gradient
        check_coordinates(self.layout, coordinates)
        device = next(self.parameters()).device
        return CoordinateSamples(
            self.layout, len(coordinates), coordinates.to(device, torch.float32).contiguous()
        )

    def forward(self, samples: Samples) -> Tensor:
        """Features of the points.

        Returns:
            (networks, v, levels x features).

        Raises:
            ValueError: if the samples were prepared for another grid.
        """
        if not isinstance(samples, CoordinateSamples) or samples.layout != self.layout:
            raise ValueError("the samples were prepared for another hash grid")
        layout, parts = self.layout, []
        for encoding, group in zip(self.encodings, self.groups, strict=True):
            rows = encoding(samples.coordinates).view(-1, layout.levels, group, layout.features)
            parts.append(rows.permute(2, 0, 1, 3).reshape(group, samples.voxels, layout.width))
        return torch.cat(parts)


def supported(layout: HashGridLayout) -> bool:
    """Whether the library has such a grid."""
    return layout.dimensions in _DIMENSIONS and layout.features in _ROW_WIDTHS


def find_library() -> ModuleType | None:
    """The binding, None where it is missing or does not run here.

    It raises on import without a GPU, and where it was built for another one: OSError, besides ImportError.
    """
    try:
        return importlib.import_module(MODULE)
    except (ImportError, OSError, RuntimeError):
        return None
