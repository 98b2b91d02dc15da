"""Coordinate networks that stand for the parameter maps: fitted in the image domain, read at any resolution.

Amplitude and relaxation times are fields with an exponential output (LoREIN's PMR block, SUMMIT's maps). The
fit weighs each voxel by what the data say of it there, and ends long before the networks have learnt the
noise: what they cannot learn quickly is what differs from voxel to voxel without a pattern.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantitron.recon.networks.fields import CoordinateNetwork, RealField
from quantitron.recon.networks.hash_layout import HashGridLayout, grid_coordinates
from quantitron.recon.signal.map_model import TIMES, normal_blocks
from quantitron.recon.solvers.map_estimate import MapEstimate

LARGEST_WEIGHT = 5.0
"""Most that one voxel counts in a fit, in units of the mean voxel."""


def marginal_precision(maps: MapEstimate, weight: Tensor) -> Tensor:
    """What the data say of each unknown by itself, all others free: 1 / diag((J^H diag(weight) J)^-1), (v, p).

    Args:
        maps: where the Jacobian is taken.
        weight: (k,) mean curvature of the data term (``ReducedSense.mean_diagonal``).
    """
    _, jacobian = maps.model.jacobian(maps.theta)
    blocks = normal_blocks(jacobian, weight)  # (v, p, p)
    size = blocks.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(blocks.dtype).tiny)
    scaled = blocks * size.rsqrt()[:, :, None] * size.rsqrt()[:, None]
    inverse = torch.linalg.inv(scaled + 1e-6 * torch.eye(scaled.shape[1]).to(scaled))
    precision: Tensor = size / inverse.diagonal(dim1=1, dim2=2).clamp_min(1)
    return precision


class MapNetworks:
    """Networks for the amplitude and the relaxation times of the voxels inside a mask."""

    def __init__(
        self,
        maps: MapEstimate,
        voxel_size: tuple[float, float, float],
        generator: torch.Generator,
        *,
        shared_encoder: bool,
        levels: int,
        log2_rows: int,
        learning_rate: float,
    ) -> None:
        """Draw networks that start at the mean of the maps.

        Args:
            maps: what they will be fitted to.
            voxel_size: edges [m] along (x, z, y).
            generator: the source of chance.
            shared_encoder: one network with a map an output, in place of a network for each map.
            levels: of the hash grid.
            log2_rows: a level's table has at most 2^log2_rows rows.
            learning_rate: of Adam; the tables' is five times as large.
        """
        names, theta = maps.model.names, maps.theta
        self.columns = [number for number, name in enumerate(names) if name in (*TIMES, "amplitude")]
        """Which unknowns the fields are, in their order."""
        device = theta.device
        shape = tuple(maps.mask.shape)
        coordinates = grid_coordinates((shape[0], shape[1], shape[2]), voxel_size)
        coordinates = coordinates[maps.mask.flatten().cpu()].to(device)
        # The grid is as fine along each axis as along the longest one: coordinates are isotropic.
        longest = max(shape)
        layout = HashGridLayout.for_matrix((longest, longest, longest), levels, log2_rows=log2_rows)
        chosen = theta[:, self.columns]
        count = len(self.columns)
        network = CoordinateNetwork(
            layout,
            count,
            generator,
            device,
            networks=1 if shared_encoder else count,
            coordinates=coordinates,
        )
        deviation = chosen.std(0, correction=0).clamp_min(1e-3)
        self.field = RealField(network, chosen.mean(0).exp(), deviation)
        """(maps, v): amplitude and times, not their logarithms."""
        self._deviation = deviation[:, None]
        self._samples = self.field.samples(coordinates)
        tables = list(network.encoding.parameters())
        others = list(network.perceptrons.parameters())
        self._optimizer = torch.optim.Adam(
            [{"params": tables, "lr": 5 * learning_rate}, {"params": others, "lr": learning_rate}],
            betas=(0.9, 0.99),
            eps=1e-15,
            fused=True,
        )

    def fit(
        self,
        theta: Tensor,
        precision: Tensor,
        steps: int,
        penalty: Callable[[Tensor], Tensor] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Steps towards the maps, from where the networks are.

        Args:
            theta: (v, p) unknowns.
            precision: (v, p) what each is worth.
            steps: of Adam, over all voxels each.
            penalty: of the logarithms (maps, v), in units of their mean square deviation; none by default.
            progress: called with the share that is done.

        Returns:
            (v, maps): the logarithms of the fields after the last step.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        target = theta[:, self.columns].T  # (maps, v)
        weight = precision[:, self.columns].T * self._deviation.square()
        weight = (weight / weight.mean(1, keepdim=True)).clamp_max(LARGEST_WEIGHT)
        for step in range(steps):
            values = self.field(self._samples).log()
            loss = (weight * ((values - target) / self._deviation).square()).mean()
            if penalty is not None:
                loss = loss + penalty(values)
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"the fit of the map networks was not finite in step {step + 1}")
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            if progress is not None:
                progress((step + 1) / steps)
        with torch.no_grad():
            fitted: Tensor = self.field(self._samples).log().T
        return fitted
