"""LoREIN as published: the networks of both blocks and of the coils take the gradients of all terms at once.

    DC1(U, C) + DC2(theta, C) + ||U - Phi^H I(theta)||^2 + sum_i lambda_i WNNM(theta_i)

Adam goes through batches of readout positions in random order; LRR is trained alone for some epochs first.
Data terms are in the reduced form, the maps' signals projected into the subspace, or frame by frame (the
reference). Each term is in units of the noise of all samples, so that DC1 = DC2 = 1/2 is a perfect fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quantitron.recon.data import KSpace, Problem
from quantitron.recon.gram import reduce_kspace
from quantitron.recon.networks.encoding import Samples
from quantitron.recon.networks.fields import ComplexField, CoordinateNetwork, RealField
from quantitron.recon.networks.hash_layout import HashGridLayout, grid_coordinates
from quantitron.recon.networks.low_rank_block import LowRankBlock, SharedFeatureNetwork
from quantitron.recon.operators.frame_data_term import FrameDataTerm
from quantitron.recon.operators.reduced_data_term import ReducedDataTerm
from quantitron.recon.operators.subspace import off_resonance_phase
from quantitron.recon.priors.block_matching import Matches, match_blocks
from quantitron.recon.priors.weighted_nuclear_norm import weighted_nuclear_norm
from quantitron.recon.signal.map_model import TIMES, MapModel
from quantitron.recon.solvers.cartesian import LinearEstimate
from quantitron.recon.solvers.held_out import split_lines
from quantitron.recon.solvers.map_estimate import MapEstimate
from quantitron.recon.solvers.solver import Progress
from quantitron.recon.solvers.training import (
    ParameterGroup,
    Schedule,
    TrainingRecord,
    adam,
    train,
    train_with_restart,
)

PUBLISHED_WNNM: Mapping[str, float] = {"amplitude": 0.05, "t1": 0.2, "phase": 0.2, "t2": 2.0, "t2star": 2.0}
"""lambda_i; multiplied by a setting. Maps are in units of their own spread."""
PUBLISHED_BLOCKS = (5, 7, 3)
"""Edge of a patch, edge of the window, patches in a stack."""
START_RATE, START_BETAS = 5e-3, (0.9, 0.99)
"""Adam's in the fit to the linear estimate, which is short."""
LEAST_TIME, LARGEST_TIME = 1e-3, 100.0
"""Bounds of the relaxation times [s] in training, far beyond the physical: in air nothing else holds them."""


@dataclass(frozen=True)
class JointSettings:
    """Settings of the joint training; the published ones are the defaults."""

    epochs: int = 200
    halve_every: int = 80
    learning_rate: float = 1e-3
    low_rank_epochs: int = 20
    """Epochs in which LRR is trained alone."""
    batch: int = 4
    """Readout positions in a step."""
    start_epochs: int = 0
    """Epochs in which the networks are fitted to the linear estimate and its maps first; 0: constants."""
    convolution: bool = True
    """Whether LRR's convolutional network is there."""
    channels: int = 32
    estimate_coils: bool = True
    """Whether a network changes the coil maps."""
    frames: bool = False
    """Data terms frame by frame, in place of their reduced form."""
    held_out: float = 0.03
    """Share of the lines that decide when to stop."""
    patience: int = 5
    wnnm: float = 1.0
    shared_encoder: bool = False
    levels: int = 16
    log2_rows: int = 19


@dataclass(frozen=True)
class _Block:
    """A run of readout positions, prepared."""

    part: slice
    shape: tuple[int, int, int]
    maps: Samples
    phase: Samples
    coarse: Samples


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
        longest = (max(shape),) * 3
        fine = HashGridLayout.for_matrix(longest, settings.levels, log2_rows=settings.log2_rows)
        coarse_phase = HashGridLayout.for_phase(longest)
        coils = estimate.operator.csm.shape[1]

        def network(
            layout: HashGridLayout, outputs: int, networks: int, shared_encoder: bool = False
        ) -> CoordinateNetwork:
            return CoordinateNetwork(
                layout, outputs, generator, device, networks, shared_encoder, coordinates=self.coordinates
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
        mean, spread = start.theta.mean(0), start.theta.std(0, correction=0).clamp_min(1e-3)
        count = len(self.positive)
        self.maps = RealField(
            network(fine, count, count, settings.shared_encoder),
            mean[self.positive].exp(),
            spread[self.positive],
        )
        # The phase as that of a complex number, which never wraps; the off-resonance that is left beside it.
        self.phase = ComplexField(network(coarse_phase, 2, 2), zeros.new_ones(1))
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
            self.coils = ComplexField(
                network(HashGridLayout.for_coils(), 2 * coils, 2, True), ones + 0j, 0.1 * ones
            )

    def block(self, part: slice) -> _Block:
        """Prepare a run of readout positions."""
        x, z, y = self.shape
        first, last, _ = part.indices(x)
        points = self.coordinates[first * z * y : last * z * y]
        maps, phase = self.maps.samples(points), self.phase.samples(points)
        coarse = phase if self.coils is None else self.coils.samples(points)
        return _Block(slice(first, last), (last - first, z, y), maps, phase, coarse)

    def theta(self, block: _Block) -> Tensor:
        """PMR's unknowns (v, p) of all voxels of a block, in the order of ``MapModel.names``."""
        logarithms = self.maps(block.maps).log()  # (maps, v)
        columns = dict(zip(self.positive, logarithms, strict=True))
        angular = [self.phase(block.phase)[0].angle()]
        if self.residual_field is not None:
            angular.append(self.residual_field(block.phase)[0])
        low, high = math.log(LEAST_TIME), math.log(LARGEST_TIME)
        columns |= {number: columns[number].clamp(low, high) for number in self.times}
        columns |= dict(zip(self.angular, angular, strict=True))
        return torch.stack([columns[number] for number in range(len(columns))], 1)

    def csm(self, block: _Block, given: Tensor) -> Tensor:
        """Coil maps (x, c, z, y) of a block, from those given there; root sum of squares as theirs."""
        if self.coils is None:
            return given
        x, z, y = block.shape
        found = given * self.coils(block.coarse).reshape(-1, x, z, y).transpose(0, 1)
        norm = torch.linalg.vector_norm(found, dim=1, keepdim=True)
        length = torch.linalg.vector_norm(given, dim=1, keepdim=True)
        normalised: Tensor = found * (length / norm.clamp_min(1e-12))
        return normalised


class JointTraining:
    """The objective of one slice, and the epochs that minimise it."""

    def __init__(
        self, problem: Problem, estimate: LinearEstimate, start: MapEstimate, settings: JointSettings
    ) -> None:
        """Set up the data terms; lines are held out where they are at hand.

        Args:
            problem: the slice.
            estimate: operator and basis.
            start: maps to begin with.
            settings: of the training.

        Raises:
            ValueError: if frames are asked for and there are no lines.
        """
        self.problem, self.estimate, self.start, self.settings = problem, estimate, start, settings
        self._csm = estimate.operator.csm
        self._operator = estimate.operator
        self._left_out: ReducedDataTerm | None = None
        kspace: KSpace | None = problem.kspace
        if kspace is not None:
            generator = torch.Generator().manual_seed(problem.seed)
            kept, aside = split_lines(kspace, settings.held_out, generator)
            if aside is not None:
                kspace = kept
                self._operator = estimate.operator.with_sums(reduce_kspace(kept, problem.reduced.basis))
                left_out = reduce_kspace(aside, problem.reduced.basis)
                self._left_out = ReducedDataTerm(estimate.operator.with_sums(left_out))
        self._frames: FrameDataTerm | None = None
        if settings.frames:
            if kspace is None:
                raise ValueError("the data term by frames needs the sampled lines")
            self._frames = FrameDataTerm(kspace, self._csm.device)
        self._reduced = None if settings.frames else ReducedDataTerm(self._operator)
        # Voxels outside the mask have no inversion efficiency of their own.
        model, x, z, y = start.model, *start.mask.shape
        if model.inversion is not None:
            whole = torch.full((x * z * y,), float(model.inversion.mean())).to(model.inversion)
            whole[start.mask.flatten()] = model.inversion
            model = replace(model, inversion=whole)
        self._model = model
        names = start.model.names
        self._wnnm = torch.tensor([PUBLISHED_WNNM.get(name, 0.0) for name in names]).to(start.theta)
        self._spread = start.theta.std(0, correction=0).clamp_min(1e-3)
        self._mean = start.theta.mean(0)
        self._matches: Matches | None = None
        if settings.wnnm > 0:
            # On the linear estimate's maps: the networks' are constants when they begin.
            guide = start.images(start.theta - self._mean)[:, names.index("t1") if "t1" in names else 0]
            self._matches = match_blocks(guide, *PUBLISHED_BLOCKS, mask=start.mask)

    def run(self, progress: Progress) -> tuple[JointNetworks, TrainingRecord]:
        """Train; once more at half the rate where that diverges.

        Raises:
            TrainingDiverged: if it diverges twice.
        """
        settings = self.settings
        schedule = Schedule(settings.epochs, settings.learning_rate, settings.halve_every)

        def run(networks: JointNetworks, schedule: Schedule) -> TrainingRecord:
            x = networks.shape[0]
            blocks = [
                networks.block(slice(first, first + settings.batch)) for first in range(0, x, settings.batch)
            ]
            if settings.start_epochs:
                self._fit_start(networks, blocks)
            generator = torch.Generator().manual_seed(self.problem.seed)
            return train(
                networks,
                lambda optimizer, number: self._epoch(networks, blocks, optimizer, number, generator),
                schedule,
                groups=[ParameterGroup(networks.parameters())],
                held_out=None if self._left_out is None else lambda: self._residual(networks, blocks),
                first_check=min(settings.low_rank_epochs + 1, settings.epochs - 1),
                patience=settings.patience,
                progress=progress,
            )

        return train_with_restart(
            lambda: JointNetworks(self.estimate, self.start, settings, self.problem.seed), run, schedule
        )

    def terms(self, networks: JointNetworks, block: _Block, both: bool = True) -> dict[str, Tensor]:
        """DC1, DC2 and the term between the blocks, of a run of readout positions.

        In units of the noise: 1/2 ||.||^2 over samples times noise variance.
        """
        csm = networks.csm(block, self._csm[block.part])
        u = networks.low_rank(block.maps, block.shape)  # (x, k, z, y)
        positions = self._csm.shape[0]
        unit = self._operator.samples * self.estimate.noise * (block.shape[0] / positions)
        terms = {"dc1": self._data(block, u, csm, None) / unit}
        if both:
            theta = networks.theta(block)
            x, z, y = block.shape
            modelled = self._block_model(block).coefficients(theta)  # (v, k)
            images = modelled.reshape(x, z, y, -1).permute(0, 3, 1, 2)
            terms["dc2"] = self._data(block, images, csm, theta) / unit
            curvature = float(self._operator.mean_diagonal().mean())
            difference = torch.view_as_real(u - images).square().sum()
            terms["prior"] = curvature * difference / unit
        return terms

    def residual_to_noise(self, networks: JointNetworks, maps: MapEstimate) -> float:
        """||s - A U||^2 / (samples noise) of maps, for the coil maps of the networks and all lines."""
        operator = self.estimate.operator
        term = ReducedDataTerm(operator)
        coefficients = maps.coefficients()  # (x, k, z, y)
        total = 0.5 * operator.energy
        with torch.no_grad():
            for first in range(0, networks.shape[0], self.settings.batch):
                block = networks.block(slice(first, first + self.settings.batch))
                csm = networks.csm(block, self._csm[block.part])
                total += float(term(block.part, coefficients[block.part], csm))
        return 2 * total / (operator.samples * self.estimate.noise)

    def unknowns(self, networks: JointNetworks) -> MapEstimate:
        """PMR's maps inside the mask."""
        with torch.no_grad():
            theta = networks.theta(networks.block(slice(None)))[self.start.mask.flatten()]
        low, high = self.start.model.limits(theta)
        return replace(self.start, theta=theta.clamp(low, high))

    def _block_model(self, block: _Block) -> MapModel:
        _, z, y = self.start.mask.shape
        return self._model.of(slice(block.part.start * z * y, block.part.stop * z * y))

    def _data(self, block: _Block, images: Tensor, csm: Tensor, theta: Tensor | None) -> Tensor:
        """1/2 ||s - A U||^2 - 1/2 ||s||^2; by frames, of the signals themselves."""
        if self._reduced is not None:
            return self._reduced(block.part, images, csm)
        assert self._frames is not None
        x, z, y = block.shape
        protocol = self.problem.protocol
        mixing = self.estimate.basis.mixing.to(images)
        if theta is None:
            echoes = torch.einsum("elk,xkzy->xelzy", mixing, images)
            psi = self.problem.reduced.basis.contrast.to(images)
            frames = torch.einsum("wl,xelzy->xwezy", psi, echoes)
        else:
            signal = self._block_model(block).frames(theta)  # (v, w, e)
            frames = signal.reshape(x, z, y, *signal.shape[1:]).permute(0, 3, 4, 1, 2)
        b0 = self.estimate.b0.permute(2, 0, 1)[block.part].to(csm.device)
        time = torch.tensor(protocol.echo_time)
        phase = off_resonance_phase(b0, time, protocol.phase_sign).to(frames)  # (x, e, z, y)
        frames = (frames * phase[:, None]).flatten(1, 2)  # (x, t, z, y)
        positions = torch.arange(block.part.start, block.part.stop)
        distance = 0.5 * self._frames.l2(frames, csm, positions)
        share = x / self._csm.shape[0]
        return distance - 0.5 * share * self._operator.energy

    def _epoch(
        self,
        networks: JointNetworks,
        blocks: list[_Block],
        optimizer: Optimizer,
        number: int,
        generator: torch.Generator,
    ) -> dict[str, float]:
        """Once through all readout positions in random order, then a step for WNNM on the whole maps."""
        both = number >= self.settings.low_rank_epochs
        sums: dict[str, float] = {}
        for index in torch.randperm(len(blocks), generator=generator).tolist():
            terms = self.terms(networks, blocks[index], both)
            loss = torch.stack(list(terms.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            share = blocks[index].shape[0] / self._csm.shape[0]  # the last block may be smaller
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * share
        offset = 0.5 * self._operator.energy / (self._operator.samples * self.estimate.noise)
        losses = {name: value + (offset if name != "prior" else 0.0) for name, value in sums.items()}
        if both and self._matches is not None:
            value = self.settings.wnnm * self._nuclear_norm(networks, blocks, self._matches)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses["wnnm"] = float(value.detach())
        return losses

    def _nuclear_norm(self, networks: JointNetworks, blocks: list[_Block], matches: Matches) -> Tensor:
        """WNNM of all maps, inside the mask."""
        theta = torch.cat([networks.theta(block) for block in blocks])  # (voxels, p)
        x, z, y = self.start.mask.shape
        inside = self.start.mask.flatten()[:, None]
        images = torch.where(inside, (theta - self._mean) / self._spread, 0).T.reshape(-1, x, z, y)
        return weighted_nuclear_norm(images, matches, self._wnnm)

    def _residual(self, networks: JointNetworks, blocks: list[_Block]) -> float:
        """||s - A U||^2 / (samples noise) of the lines held out, for PMR's maps."""
        assert self._left_out is not None
        operator = self._left_out.operator
        total = 0.5 * operator.energy
        for block in blocks:
            x, z, y = block.shape
            modelled = self._block_model(block).coefficients(networks.theta(block))
            images = modelled.reshape(x, z, y, -1).permute(0, 3, 1, 2)
            csm = networks.csm(block, self._csm[block.part])
            total += float(self._left_out(block.part, images, csm))
        return 2 * total / (operator.samples * self.estimate.noise)

    def _fit_start(self, networks: JointNetworks, blocks: list[_Block]) -> None:
        """Image-domain fit of both blocks to the linear estimate: no Fourier transforms, a few epochs.

        Amplitudes are fitted in air as well, and as they are, not by their logarithm: networks that say that
        there is tissue in air begin with a residual which is least where the amplitude is nothing everywhere,
        and there they stay.
        """
        settings = self.settings
        schedule = Schedule(settings.start_epochs, START_RATE)
        optimizer = adam([ParameterGroup(networks.parameters())], schedule, START_BETAS)
        generator = torch.Generator().manual_seed(self.problem.seed)
        target, theta = self.estimate.coefficients, self.start.images(self.start.theta)  # (x, k or p, z, y)
        inside, names = self.start.mask.to(theta), self.start.model.names
        phase = (torch.arange(len(names)) == names.index("phase"))[:, None, None].to(theta.device)
        spread = self._spread[:, None, None]
        # Outside the mask: from the signal, at the mask's middle ratio of amplitude to signal.
        signal = torch.linalg.vector_norm(target, dim=1)  # (x, z, y)
        amplitude = theta[:, 0].exp()
        ratio = (amplitude / signal)[self.start.mask].median()
        amplitude = torch.where(self.start.mask, amplitude, ratio * signal)
        unit = amplitude[self.start.mask].square().mean().sqrt() * self._spread[0]
        for _ in range(settings.start_epochs):
            for index in torch.randperm(len(blocks), generator=generator).tolist():
                block = blocks[index]
                u = networks.low_rank(block.maps, block.shape) - target[block.part]
                loss = (torch.view_as_real(u).square().sum(-1) / networks.low_rank.scale.square()).mean()
                found = networks.theta(block).reshape(*block.shape, -1).permute(0, 3, 1, 2)
                difference = found - theta[block.part]
                difference = torch.where(phase, 2 * torch.sin(difference / 2), difference) / spread
                weight = inside[block.part][:, None]
                loss = loss + (weight * difference[:, 1:].square()).mean()
                loss = loss + ((found[:, 0].exp() - amplitude[block.part]) / unit).square().mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
