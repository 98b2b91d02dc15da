"""Which hash grid is used: the one place that chooses (DESIGN decision 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from quantitron.recon.networks.encoding import GridEncoding
from quantitron.recon.networks.hash_grid import HashGrid
from quantitron.recon.networks.hash_layout import HashGridLayout
from quantitron.recon.networks.tiny_cuda_grid import TinyCudaGrid, find_library, supported


def encoder(
    layout: HashGridLayout,
    networks: int,
    device: torch.device,
    generator: torch.Generator,
    coordinates: Tensor | None = None,
) -> GridEncoding:
    """N hash grids of one layout: tiny-cuda-nn's on a GPU where it can be imported, else the sparse matrix.

    Args:
        layout: shape of the grid.
        networks: encodings that share it.
        device: where it runs.
        generator: the source of chance, on the CPU. Both start from the same features.
        coordinates: (v, d). Where given, the sparse matrix stores only the rows that these points touch.

    Raises:
        ValueError: if there is no network, or the coordinates are not (v, d) in [0, 1].
    """
    if device.type == "cuda" and supported(layout):
        library = find_library()
        if library is not None:
            return TinyCudaGrid(library, layout, networks, generator, device)
    return HashGrid(layout, networks, generator, coordinates, device)
