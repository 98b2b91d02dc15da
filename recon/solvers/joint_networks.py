"""The networks of LoREIN's joint training: coefficient images, maps and coil maps of readout positions.

They are evaluated at the voxels of the object alone, or, as published, at all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantitron.recon.networks.encoding import Samples
from quantitron.recon.networks.fields import ComplexField, CoordinateNetwork, RealField
from quantitron.recon.networks.hash_layout import HashGridLayout, grid_coordinates
from quantitron.recon.networks.low_rank_block import LowRankBlock, SharedFeatureNetwork
from quantitron.recon.networks.voxel_images import images_of, values_of
from quantitron.recon.priors.weighted_nuclear_norm import FLOOR
from quantitron.recon.signal.map_model import TIMES
from quantitron.recon.solvers.cartesian import LinearEstimate
from quantitron.recon.solvers.map_estimate import MapEstimate

LEAST_TIME, LARGEST_TIME = 1e-3, 100.0
"""Bounds of the relaxation times [s] in training, far beyond the physical: in air nothing else holds them."""


@dataclass(frozen=True)
class JointSettings:
    """Settings of the joint training."""

    epochs: int = 200
    halve_every: int = 80
    learning_rate: float = 1e-3
    low_rank_epochs: int = 20
    """Epochs in which LRR is trained alone."""
    batch: int = 4
    """Readout positions in a step."""
    everywhere: bool = True
    """Whether networks are evaluated at all voxels; else at those of the object, the others being known."""
    start_epochs: int = 0
    """Epochs in which the networks are fitted to the linear estimate and its maps first; 0: constants."""
    convolution: bool = True
    """Whether LRR's convolutional network is there."""
    channels: int = 32
    estimate_coils: bool = True
    """Whether a network gives the coil maps."""
    multiply_coils: bool = True
    """Whether that network changes given coil maps, in place of making them, as published."""
    frames: bool = False
    """Data terms frame by frame, in place of their reduced form."""
    held_out: float = 0.03
    """Share of the lines that decide when to stop."""
    patience: int = 5
    scaled_coupling: bool = True
    """Whether the term between the blocks has the mean curvature of the data term, about 1 / R; else 1."""
    wnnm: float = 1.0
    wnnm_start: float = 0.0
    """Share of the epochs after which it sets in."""
    wnnm_floor: float = FLOOR
    """``floor`` of ``weighted_nuclear_norm``."""
    shared_encoder: bool = False
    levels: int = 16
    log2_rows: int = 19


@dataclass(frozen=True)
class Block:
    """A run of readout positions, prepared."""

    part: slice
    """Which."""
    shape: tuple[int, int, int]
    """(x, z, y)."""
    places: Tensor | None
    """(v,) the voxels' numbers in the flat block; None where they are all of it."""
    voxels: slice
    """The voxels' numbers among all that the networks are evaluated at."""
    maps: Samples
    phase: Samples
    coarse: Samples

    def images(self, values: Tensor) -> Tensor:
        """Values (v, n) of the voxels as images (x, n, z, y), zero elsewhere."""
        return images_of(values.T, self.shape, self.places)


def centre_and_spread(start: MapEstimate) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the unknowns, (p,) each; of the phase those of its direction.

    A phase has no zero: what is measured does not depend on where the receiver put it.
    """
    mean, spread = start.theta.mean(0), start.theta.std(0, correction=0)
    column = start.model.names.index("phase")
    phasor = torch.polar(torch.ones_like(start.theta[:, column]), start.theta[:, column])
    mean[column] = phasor.mean().angle()
    spread[column] = (phasor * phasor.mean().conj()).angle().square().mean().sqrt()
    return mean, spread.clamp_min(1e-3)


class JointNetworks(nn.Module):
    """All networks of one scan."""

    def __init__(
        self, estimate: LinearEstimate, start: MapEstimate, settings: JointSettings, seed: int
    ) -> None:
        """Draw them: constants of the linear estimate and its maps.

        Args:
            estimate: scale of the coefficients.
            start: maps whose means and spreads are the start and the scale of PMR's.
            settings: sizes.
            seed: of all weights.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        device, shape = start.theta.device, tuple(start.mask.shape)
        self.shape = (shape[0], shape[1], shape[2])
        self.coordinates = grid_coordinates(self.shape, estimate.voxel_size, device)
        self.known: Tensor | None = None
        """(x * z * y,) bool, the voxels that networks are evaluated at; None: all."""
        points = self.coordinates
        if not settings.everywhere:
            self.known = start.mask.flatten()
            points = points[self.known]
        longest = (max(shape),) * 3
        fine = HashGridLayout.for_matrix(longest, settings.levels, log2_rows=settings.log2_rows)
        coarse_phase = HashGridLayout.for_phase(longest)
        coils = estimate.operator.csm.shape[1]

        def network(
            layout: HashGridLayout, outputs: int, networks: int, shared_encoder: bool = False
        ) -> CoordinateNetwork:
            return CoordinateNetwork(
                layout, outputs, generator, device, networks, shared_encoder, coordinates=points
            )

        rank = estimate.basis.rank
        scale = estimate.inside(estimate.coefficients).abs().square().mean(0).sqrt()  # (k,)
        zeros = torch.zeros(rank, dtype=estimate.coefficients.dtype, device=device)
        self.low_rank = LowRankBlock(
            ComplexField(network(fine, 2 * rank, 2), zeros),
            SharedFeatureNetwork(rank, settings.channels, generator).to(device)
            if settings.convolution
            else None,
            scale.clamp_min(float(scale.max()) * 1e-4),
        )
        names = start.model.names
        self.times = [n for n, name in enumerate(names) if name in TIMES]
        self.positive = [n for n, name in enumerate(names) if name in (*TIMES, "amplitude")]
        self.angular = [n for n, name in enumerate(names) if name not in (*TIMES, "amplitude")]
        mean, spread = centre_and_spread(start)
        count = len(self.positive)
        self.maps = RealField(
            network(fine, count, count, settings.shared_encoder),
            mean[self.positive].exp(),
            spread[self.positive],
        )
        # The phase as that of a complex number, which never wraps; the off-resonance that is left beside it.
        phase = mean[[names.index("phase")]]
        self.phase = ComplexField(
            network(coarse_phase, 2, 2), torch.polar(torch.ones_like(phase), phase).to(zeros)
        )
        self.residual_field: RealField | None = None
        if "b0" in names:
            column = names.index("b0")
            self.residual_field = RealField(
                network(coarse_phase, 1, 1),
                mean.new_zeros(1),
                spread[[column]],
                torch.zeros(1, dtype=torch.bool, device=device),
            )
        self.coils: ComplexField | None = None
        if settings.estimate_coils and coils > 1:
            ones = torch.ones(coils, device=device)
            begin, scale = (1.0, 0.1 * ones) if settings.multiply_coils else (coils**-0.5, ones)
            self.coils = ComplexField(
                network(HashGridLayout.for_coils(), 2 * coils, 2, True), begin * ones + 0j, scale
            )
        self.multiply_coils = settings.multiply_coils

    def block(self, part: slice) -> Block:
        """Prepare a run of readout positions."""
        x, z, y = self.shape
        first, last, _ = part.indices(x)
        run = slice(first * z * y, last * z * y)
        points, voxels, places = self.coordinates[run], run, None
        if self.known is not None:
            places = self.known[run].nonzero()[:, 0]
            before = int(self.known[: run.start].sum())
            points, voxels = points[places], slice(before, before + len(places))
        maps, phase = self.maps.samples(points), self.phase.samples(points)
        coarse = phase if self.coils is None else self.coils.samples(points)
        return Block(slice(first, last), (last - first, z, y), places, voxels, maps, phase, coarse)

    def coefficients(self, block: Block) -> Tensor:
        """U (x, k, z, y) of a block by LRR, zero where it is not evaluated."""
        u: Tensor = self.low_rank(block.maps, block.shape, block.places)
        return u

    def theta(self, block: Block, field: bool = True) -> Tensor:
        """PMR's unknowns (v, p) of the voxels of a block, in the order of ``MapModel.names``.

        Args:
            block: the voxels.
            field: whether the off-resonance is wanted; else it is zero, and its network is not asked.
        """
        logarithms = self.maps(block.maps).log()  # (maps, v)
        columns = dict(zip(self.positive, logarithms, strict=True))
        angular = [self.phase(block.phase)[0].angle()]
        if self.residual_field is not None:
            angular.append(self.residual_field(block.phase)[0] if field else torch.zeros_like(angular[0]))
        low, high = math.log(LEAST_TIME), math.log(LARGEST_TIME)
        columns |= {number: columns[number].clamp(low, high) for number in self.times}
        columns |= dict(zip(self.angular, angular, strict=True))
        return torch.stack([columns[number] for number in range(len(columns))], 1)

    def csm(self, block: Block, given: Tensor) -> Tensor:
        """Coil maps (x, c, z, y) of a block: given ones, changed but for their root sum of squares, or new.

        Where the networks are not evaluated, those given.
        """
        if self.coils is None:
            return given
        found: Tensor = self.coils(block.coarse)  # (c, v)
        start = values_of(given, block.places) if self.multiply_coils else torch.ones_like(found)
        found = start * found
        # Root of the sum of squares of real and imaginary parts: that of moduli takes four times as long.
        square, wanted = (torch.view_as_real(maps).square().sum((0, 2)) for maps in (found, start))
        if not self.multiply_coils:
            wanted = torch.ones_like(square)
        found = found * (wanted / square.clamp_min(1e-24)).sqrt()
        if block.places is not None:
            found = values_of(given).index_copy(1, block.places, found)
        return images_of(found, block.shape)
