"""Coordinate networks that stand for the parameter maps: fitted to them in the image domain.

Amplitude and relaxation times are fields with an exponential output (LoREIN's PMR block, SUMMIT's maps). The
fit weighs each voxel by what the data say of it there, and ends long before the networks have learnt the
noise: what they cannot learn quickly is what differs from voxel to voxel without a pattern.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantitron.recon.algorithms.adam import Adam, ParameterGroup
from quantitron.recon.networks.fields import CoordinateNetwork, RealField
from quantitron.recon.networks.hash_layout import HashGridLayout, grid_coordinates
from quantitron.recon.signal.map_model import TIMES, normal_blocks
from quantitron.recon.solvers.map_estimate import MapEstimate
from quantitron.recon.solvers.solver import Progress
from quantitron.recon.solvers.training import (
    Schedule,
    TrainingDiverged,
    TrainingRecord,
    train,
)

TABLE_RATE = 5.0
"""Factor on the learning rate for the hash tables: each of their rows is seen by few voxels."""
BETAS = (0.9, 0.99)
"""Of Adam: a fit of some tens of steps has no time for the usual 0.999."""

LARGEST_WEIGHT = 5.0
"""Most that one voxel counts in a fit, in units of the mean voxel."""


def marginal_precision(maps: MapEstimate, weight: Tensor) -> Tensor:
    """What the data say of each unknown by itself, all others free: 1 / diag((J^H diag(weight) J)^-1).

    Args:
        maps: where the Jacobian is taken.
        weight: (k,) mean curvature of the data term (``ReducedSense.mean_diagonal``).

    Returns:
        (v, p), in units of the data term's curvature: noise / 2 over it is the variance of the unknown.
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
    ) -> None:
        """Draw networks that start at the mean of the maps.

        Args:
            maps: what they will be fitted to.
            voxel_size: edges [m] along (x, z, y).
            generator: the source of chance.
            shared_encoder: one network with a map an output, in place of a network for each map.
            levels: of the hash grid.
            log2_rows: a level's table has at most 2^log2_rows rows.
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
        self._groups = [
            ParameterGroup(list(network.encoding.parameters()), TABLE_RATE),
            ParameterGroup(list(network.perceptrons.parameters())),
        ]

    def fit(
        self,
        theta: Tensor,
        precision: Tensor,
        schedule: Schedule,
        progress: Progress | None = None,
    ) -> TrainingRecord:
        """Steps towards the maps, from where the networks are.

        Args:
            theta: (v, p) unknowns.
            precision: (v, p) what each is worth.
            schedule: of Adam; an epoch is one step, over all voxels.
            progress: told after every step, with the share that is done.

        Raises:
            TrainingDiverged: if the loss, or what the networks say in the end, is not finite.
        """
        target = theta[:, self.columns].T  # (maps, v)
        weight = precision[:, self.columns].T * self._deviation.square()
        mean = weight.mean(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        weight = (weight / mean).clamp_max(LARGEST_WEIGHT)

        def step(optimizer: Adam, _number: int) -> Mapping[str, float]:
            values = self.field(self._samples).log()
            loss = (weight * ((values - target) / self._deviation).square()).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return {"map networks": float(loss.detach())}

        record = train(self.field, step, schedule, groups=self._groups, progress=progress, betas=BETAS)
        if not bool(self.logarithms().isfinite().all()):
            raise TrainingDiverged("the map networks were not finite after their fit")
        return record

    def logarithms(self) -> Tensor:
        """(v, maps): logarithms of the fields, voxel by voxel; no gradient."""
        with torch.no_grad():
            values: Tensor = self.field(self._samples).log().T
        return values
