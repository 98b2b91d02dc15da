"""LoREIN as published: the networks of both blocks and of the coils take the gradients of all terms at once.

    DC1(U, C) + DC2(theta, C) + c ||U - Phi^H I(theta)||^2 + sum_i lambda_i WNNM(theta_i)

Adam goes through batches of readout positions in random order; LRR is trained alone for some epochs first.
Data terms are in the reduced form, the maps' signals projected into the subspace, or frame by frame (the
reference). Each term is in units of the noise of all samples, so that DC1 = DC2 = 1/2 is a perfect fit. c is
1 as published (eq. 17), or the mean curvature of DC1, about 1 / R: blocks then hold together as much as the
data hold each. WNNM is that of logarithms of amplitude and times, and of both parts of the phase's direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quantitron.recon.algorithms.adam import Adam, ParameterGroup
from quantitron.recon.data import KSpace, Problem
from quantitron.recon.gram import reduce_kspace
from quantitron.recon.networks.voxel_images import images_of, values_of
from quantitron.recon.operators.frame_data_term import FrameDataTerm
from quantitron.recon.operators.reduced_data_term import ReducedDataTerm
from quantitron.recon.operators.subspace import off_resonance_phase
from quantitron.recon.priors.block_matching import Matches, match_blocks
from quantitron.recon.priors.weighted_nuclear_norm import weighted_nuclear_norm
from quantitron.recon.solvers.cartesian import LinearEstimate
from quantitron.recon.solvers.held_out import split_lines
from quantitron.recon.solvers.joint_networks import Block, JointNetworks, JointSettings, centre_and_spread
from quantitron.recon.solvers.map_estimate import MapEstimate
from quantitron.recon.solvers.solver import Progress
from quantitron.recon.solvers.training import (
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
        self._background: Tensor | None = None if settings.everywhere else start.background
        self._still: dict[int, float] = {}
        # Voxels outside the mask have no inversion efficiency of their own.
        model, x, z, y = start.model, *start.mask.shape
        if model.inversion is not None and settings.everywhere:
            whole = torch.full((x * z * y,), float(model.inversion.mean())).to(model.inversion)
            whole[start.mask.flatten()] = model.inversion
            model = replace(model, inversion=whole)
        self._model = model
        names = start.model.names
        self._mean, self._spread = centre_and_spread(start)
        self._phase = names.index("phase")
        self._mean_cosine = (start.theta[:, self._phase] - self._mean[self._phase]).cos().mean()
        self._logarithms = [n for n, name in enumerate(names) if name in PUBLISHED_WNNM and name != "phase"]
        weights = [PUBLISHED_WNNM[names[n]] for n in self._logarithms] + 2 * [PUBLISHED_WNNM["phase"]]
        self._wnnm = torch.tensor(weights).to(start.theta)
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

    def terms(self, networks: JointNetworks, block: Block, both: bool = True) -> dict[str, Tensor]:
        """DC1, DC2 and the term between the blocks, of a run of readout positions.

        In units of the noise: 1/2 ||.||^2 over samples times noise variance.
        """
        csm = networks.csm(block, self._csm[block.part])
        u = networks.coefficients(block)  # (x, k, z, y)
        unit = self._unit(block)
        terms = {"dc1": self._data(block, u, csm, None) / unit}
        if both:
            theta = networks.theta(block)
            images = block.images(self._model.of(block.voxels).coefficients(theta))
            terms["dc2"] = self._data(block, images, csm, theta) / unit
            scaled = self.settings.scaled_coupling
            coupling = float(self._operator.mean_diagonal().mean()) if scaled else 1.0
            difference = torch.view_as_real(u - images).square().sum()
            terms["prior"] = coupling * difference / unit
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
                turned = self._phase_taken(block, csm)[:, None]
                total += float(term(block.part, coefficients[block.part], csm * turned.conj()))
        return 2 * total / (operator.samples * self.estimate.noise)

    def unknowns(self, networks: JointNetworks) -> MapEstimate:
        """PMR's maps inside the mask, their phase that beside the given coil maps.

        The data tell the product of coil maps and phase alone.
        """
        with torch.no_grad():
            block = networks.block(slice(None))
            theta = networks.theta(block)
            taken = self._phase_taken(block, networks.csm(block, self._csm)).angle()[self.start.mask]
        if networks.known is None:
            theta = theta[self.start.mask.flatten()]
        phase = [name == "phase" for name in self.start.model.names]
        theta = theta + taken[:, None] * theta.new_tensor(phase)
        low, high = self.start.model.limits(theta)
        return replace(self.start, theta=theta.clamp(low, high))

    def _phase_taken(self, block: Block, csm: Tensor) -> Tensor:
        """(x, z, y) of length 1: the phase that the networks' coil maps took from the maps, inside the mask.

        Args:
            block: of readout positions.
            csm: (x, c, z, y) the networks' coil maps.
        """
        alike = (self._csm[block.part].conj() * csm).sum(1)  # (x, z, y)
        inside = self.start.mask[block.part] & (alike != 0)
        return torch.where(inside, alike.sgn(), torch.ones_like(alike))

    def _data(self, block: Block, images: Tensor, csm: Tensor, theta: Tensor | None) -> Tensor:
        """1/2 ||s - A U||^2 - 1/2 ||s||^2 for U (x, k, z, y) and what is known outside the object.

        By frames, and given the unknowns that U stems from: of their signals themselves.
        """
        whole = images if self._background is None else images + self._background[block.part]
        if self._reduced is not None:
            return self._reduced(block.part, whole, csm)
        assert self._frames is not None
        if theta is None:
            frames = self._frame_images(whole)
        else:
            signal = self._model.of(block.voxels).frames(theta)  # (v, w, e)
            frames = block.images(signal.flatten(1))  # (x, t, z, y)
            if self._background is not None:
                frames = frames + self._frame_images(self._background[block.part])
        protocol = self.problem.protocol
        b0 = self.estimate.b0.permute(2, 0, 1)[block.part].to(csm.device)
        time = torch.tensor(protocol.echo_time)
        phase = off_resonance_phase(b0, time, protocol.phase_sign).to(frames)  # (x, e, z, y)
        frames = frames * phase.repeat(1, frames.shape[1] // protocol.echoes, 1, 1)
        positions = torch.arange(block.part.start, block.part.stop)
        distance = 0.5 * self._frames.l2(frames, csm, positions)
        share = block.shape[0] / self._csm.shape[0]
        return distance - 0.5 * share * self._operator.energy

    def _frame_images(self, coefficients: Tensor) -> Tensor:
        """(x, k, z, y) -> all frames (x, t, z, y), the field map's part left out."""
        echoes = torch.einsum("elk,xkzy->xelzy", self.estimate.basis.mixing.to(coefficients), coefficients)
        psi = self.problem.reduced.basis.contrast.to(coefficients)
        return torch.einsum("wl,xelzy->xwezy", psi, echoes).flatten(1, 2)

    def _epoch(
        self,
        networks: JointNetworks,
        blocks: list[Block],
        optimizer: Adam,
        number: int,
        generator: torch.Generator,
    ) -> dict[str, float]:
        """Once through all readout positions in random order, then a step for WNNM on the whole maps."""
        both = number >= self.settings.low_rank_epochs
        sums: dict[str, float] = {}
        for index in torch.randperm(len(blocks), generator=generator).tolist():
            terms = self.step(networks, blocks[index], optimizer, both)
            share = blocks[index].shape[0] / self._csm.shape[0]  # the last block may be smaller
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value * share
        offset = 0.5 * self._operator.energy / (self._operator.samples * self.estimate.noise)
        losses = {name: value + (offset if name in ("dc1", "dc2") else 0.0) for name, value in sums.items()}
        started = number >= self.settings.wnnm_start * self.settings.epochs
        if both and started and self._matches is not None:
            losses["wnnm"] = self.norm_step(networks, blocks, optimizer)
        return losses

    def step(
        self, networks: JointNetworks, block: Block, optimizer: Adam, both: bool = True
    ) -> dict[str, float]:
        """A step for the terms of a run of readout positions; their values before it."""
        if not block.maps.voxels:  # nothing to learn: what is known gives the same in every epoch
            first = block.part.start
            if first not in self._still:
                csm, nothing = self._csm[block.part], self.start.background[block.part] * 0
                unit = self._unit(block)
                self._still[first] = float(self._data(block, nothing, csm, None)) / unit
            known = self._still[first]
            return {"dc1": known, "dc2": known, "prior": 0.0} if both else {"dc1": known}
        terms = self.terms(networks, block, both)
        # A last block of fewer positions than the others counts for as many as it has.
        share = block.shape[0] / min(self.settings.batch, self._csm.shape[0])
        loss = share * torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return {name: float(value.detach()) for name, value in terms.items()}

    def norm_step(self, networks: JointNetworks, blocks: list[Block], optimizer: Adam) -> float:
        """A step for WNNM of the whole maps; its value before it."""
        assert self._matches is not None
        value = self.settings.wnnm * self._nuclear_norm(networks, blocks, self._matches)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(value.detach())

    def _unit(self, block: Block) -> float:
        """What noise alone gives in the samples of a block: ||.||^2."""
        share = block.shape[0] / self._csm.shape[0]
        return self._operator.samples * self.estimate.noise * share

    def _nuclear_norm(self, networks: JointNetworks, blocks: list[Block], matches: Matches) -> Tensor:
        """WNNM of all maps but the off-resonance, which has no weight, inside the mask.

        Of the phase, both parts of its direction: the phase itself jumps by a turn here and there.
        """
        theta = torch.cat([networks.theta(block, field=False) for block in blocks])  # (voxels, p)
        x, z, y = self.start.mask.shape
        inside = self.start.mask.flatten()
        deviation = theta - self._mean
        phase = deviation[:, self._phase]
        direction = torch.stack([phase.cos() - self._mean_cosine, phase.sin()], 1) / self._spread[self._phase]
        values = (deviation / self._spread)[:, self._logarithms]
        values = torch.cat([values, direction], 1)
        if networks.known is None:
            values = torch.where(inside[:, None], values, 0)
        places = None if networks.known is None else inside.nonzero()[:, 0]
        images = images_of(values.T, (x, z, y), places).transpose(0, 1)  # (p, x, z, y)
        return weighted_nuclear_norm(images, matches, self._wnnm, floor=self.settings.wnnm_floor)

    def _residual(self, networks: JointNetworks, blocks: list[Block]) -> float:
        """||s - A U||^2 / (samples noise) of the lines held out, for PMR's maps."""
        assert self._left_out is not None
        operator = self._left_out.operator
        total = 0.5 * operator.energy
        for block in blocks:
            images = block.images(self._model.of(block.voxels).coefficients(networks.theta(block)))
            if self._background is not None:
                images = images + self._background[block.part]
            csm = networks.csm(block, self._csm[block.part])
            total += float(self._left_out(block.part, images, csm))
        return 2 * total / (operator.samples * self.estimate.noise)

    def _fit_start(self, networks: JointNetworks, blocks: list[Block]) -> None:
        """Image-domain fit of both blocks to the linear estimate: no Fourier transforms, a few epochs.

        Amplitudes are fitted in air as well, and as they are, not by their logarithm: networks that say that
        there is tissue in air begin with a residual which is least where the amplitude is nothing everywhere,
        and there they stay.
        """
        settings = self.settings
        schedule = Schedule(settings.start_epochs, START_RATE)
        optimizer = adam([ParameterGroup(networks.parameters())], schedule, START_BETAS)
        generator = torch.Generator().manual_seed(self.problem.seed)
        target, names = self.estimate.coefficients, self.start.model.names
        theta = values_of(self.start.images(self.start.theta)).T  # (x * z * y, p)
        inside = self.start.mask.flatten()
        # Outside the mask: from the signal, at the mask's middle ratio of amplitude to signal.
        signal = torch.linalg.vector_norm(target, dim=1).flatten()
        amplitude = theta[:, 0].exp()
        ratio = (amplitude / signal)[inside].median()
        amplitude = torch.where(inside, amplitude, ratio * signal)
        unit = amplitude[inside].square().mean().sqrt() * self._spread[0]
        if self._background is not None:
            target = target * self.start.mask[:, None]
            theta, amplitude, inside = theta[inside], amplitude[inside], inside[inside]
        phase = torch.arange(len(names), device=theta.device) == names.index("phase")
        for _ in range(settings.start_epochs):
            for index in torch.randperm(len(blocks), generator=generator).tolist():
                block = blocks[index]
                if not block.maps.voxels:
                    continue
                u = networks.coefficients(block) - target[block.part]
                loss = (torch.view_as_real(u).square().sum(-1) / networks.low_rank.scale.square()).mean()
                found = networks.theta(block)  # (v, p)
                difference = found - theta[block.voxels]
                difference = torch.where(phase, 2 * torch.sin(difference / 2), difference) / self._spread
                loss = loss + (inside[block.voxels, None] * difference[:, 1:].square()).mean()
                loss = loss + ((found[:, 0].exp() - amplitude[block.voxels]) / unit).square().mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
