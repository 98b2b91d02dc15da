"""The fit of coordinate networks to the lines of one slice (SUMMIT): batches, losses, and maps in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from quantitron.recon.algorithms.adam import Adam, ParameterGroup
from quantitron.recon.data import KSpace, Maps, Problem
from quantitron.recon.networks.hash_layout import grid_coordinates
from quantitron.recon.operators.frame_data_term import FrameDataTerm
from quantitron.recon.priors.block_matching import Matches, match_blocks
from quantitron.recon.priors.weighted_nuclear_norm import FLOOR, weighted_nuclear_norm
from quantitron.recon.signal.map_model import MapModel
from quantitron.recon.solvers.cartesian import LinearEstimate
from quantitron.recon.solvers.held_out import split_lines
from quantitron.recon.solvers.map_estimate import MapEstimate
from quantitron.recon.solvers.scan_networks import NetworkSettings, Points, ScanNetworks, ScanValues
from quantitron.recon.solvers.solver import Progress
from quantitron.recon.solvers.start_maps import StartMaps
from quantitron.recon.solvers.training import Schedule, TrainingDiverged, TrainingRecord, train

PUBLISHED_WEIGHTS: Mapping[str, float] = {
    "amplitude": 0.05,
    "t1": 0.2,
    "t2": 2.0,
    "t2star": 2.0,
    "phase": 0.2,
}
"""lambda_m, relative weights of the weighted nuclear norms of the maps."""
_HELD_OUT_POSITIONS = 32
"""Readout positions at which the lines held out are looked at."""


@dataclass(frozen=True)
class FitSettings:
    """How the networks are fitted."""

    start: Literal["maps", "constant"] = "maps"
    """What the networks begin with: the linear estimate's maps, or the medians of these."""
    coils: Literal["estimated", "given"] = "estimated"
    """Whether a network changes the coil maps, or they stay as ESPIRiT found them."""
    coil_start: Literal["espirit", "network"] = "espirit"
    """Whether the coil network changes ESPIRiT's maps, or makes the coil maps from nothing."""
    epochs: int = field(default=100, metadata={"minimum": 1})
    """Times through the data."""
    learning_rate: float = field(default=1e-3, metadata={"above": 0})
    """Of Adam."""
    halve_every: int = field(default=20, metadata={"minimum": 0})
    """Epochs after which the rate is halved; 0: never."""
    table_rate: float = field(default=1.0, metadata={"above": 0})
    """Factor on the rate for the features of the hash grids."""
    batch: int = field(default=4, metadata={"minimum": 1})
    """Readout positions of a step."""
    start_epochs: int = field(default=10, metadata={"minimum": 1})
    """Epochs of the fit to the linear estimate's maps, without any Fourier transform."""
    start_rate: float = field(default=5e-3, metadata={"above": 0})
    """Learning rate of that fit."""
    wnnm: float = field(default=1e-3, metadata={"minimum": 0})
    """lambda, factor on the published weights; 0 leaves the weighted nuclear norm out."""
    wnnm_start: float = field(default=0.5, metadata={"minimum": 0, "maximum": 1})
    """Share of the epochs after which it sets in."""
    patch: int = field(default=5, metadata={"minimum": 2})
    """Edge of its patches [voxels]."""
    window: int = field(default=7, metadata={"minimum": 1})
    """Edge of the square in which similar patches are searched, odd."""
    similar: int = field(default=3, metadata={"minimum": 2})
    """Patches in a stack."""
    wnnm_floor: float = field(default=FLOOR, metadata={"minimum": 0})
    """Bounds the weights of the norm (``weighted_nuclear_norm``); 0 as published."""
    shared_encoder: bool = False
    """One hash grid for amplitude and relaxation times in place of one for each."""
    log2_rows: int = field(default=17, metadata={"minimum": 3, "maximum": 24})
    """A resolution of their hash grid has at most 2^log2_rows rows: about as many as there are voxels."""
    phase_log2_rows: int = field(default=17, metadata={"minimum": 3, "maximum": 24})
    """The same for the echo phases; with LoREIN's 12 the networks miss more of the field than noise hides."""
    held_out: float = field(default=0.03, metadata={"minimum": 0, "maximum": 0.5})
    """Share of the lines kept aside; 0: none, and the last epoch's networks count.

    With ``start: maps`` they are not quite unseen: the linear estimate was made of all lines."""
    check_every: int = field(default=2, metadata={"minimum": 1})
    """Epochs between looks at the lines kept aside."""
    patience: int = field(default=5, metadata={"minimum": 0})
    """Looks without a better prediction of them after which training ends; 0: it runs to the end."""


@dataclass(frozen=True)
class _Batch:
    """Readout positions of a step, all their voxels."""

    position: Tensor
    """(x,) int64."""
    voxel: Tensor
    """(v,) int64: their voxels in the flat (x, z, y) grid."""
    points: Points


@dataclass(frozen=True)
class _Plane:
    """A plane (x, y) whose patches are matched."""

    points: Points
    matches: Matches


class ScanFit:
    """The networks of one slice, and what they are fitted to."""

    def __init__(
        self, settings: FitSettings, problem: Problem, estimate: LinearEstimate, linear: Maps
    ) -> None:
        """Draw the networks.

        Args:
            settings: of the method.
            problem: the slice.
            estimate: coil maps, noise and mask.
            linear: maps of the linear estimate, which hold signal somewhere.
        """
        assert problem.kspace is not None
        self.settings, self.problem, self.estimate, self.linear = settings, problem, estimate, linear
        self.device = estimate.coefficients.device
        self._generator = torch.Generator().manual_seed(problem.seed)
        _, nz, ny, nx = problem.kspace.grid
        self._grid = (nx, nz, ny)
        self.csm = estimate.operator.csm
        """(x, c, z, y) ESPIRiT's coil maps."""
        self.target = StartMaps.of(linear, estimate, problem)
        kept, aside = split_lines(problem.kspace, settings.held_out, self._generator)
        self._data, self._aside = self._term(kept), None if aside is None else self._term(aside)
        coordinates = grid_coordinates(self._grid, estimate.voxel_size)
        self._coordinates = coordinates
        self.networks = ScanNetworks(
            problem.protocol,
            NetworkSettings(
                self._grid,
                self.csm.shape[1],
                settings.shared_encoder,
                settings.log2_rows,
                settings.phase_log2_rows,
                estimate_coils=settings.coils == "estimated",
                multiply_coils=settings.coil_start == "espirit",
            ),
            self.target.constants(),
            self.target.spread,
            coordinates,
            self._generator,
            self.device,
        )
        positions = torch.randperm(nx, generator=self._generator)
        self._batches = [self._batch(part.sort().values) for part in torch.split(positions, settings.batch)]
        # The same positions whatever the size of a batch: whole batches of them, and what then is missing.
        whole = _HELD_OUT_POSITIONS // settings.batch
        rest = positions[whole * settings.batch : _HELD_OUT_POSITIONS].sort().values
        self._watched = self._batches[:whole] + ([self._batch(rest)] if len(rest) else [])
        self._planes: list[_Plane] = []

    def run(self, schedule: Schedule, progress: Progress) -> TrainingRecord:
        """Fit: first to the maps of the linear estimate where these are the start, then to the data.

        Args:
            schedule: of the fit to the data.
            progress: takes the share of the whole reconstruction.

        Raises:
            TrainingDiverged: if a loss or a parameter is not finite.
        """
        settings = self.settings
        tables = [value for name, value in self.networks.named_parameters() if ".encoding." in name]
        others = [value for name, value in self.networks.named_parameters() if ".encoding." not in name]
        groups = [ParameterGroup(tables, settings.table_rate), ParameterGroup(others)]
        if settings.start == "maps":
            # A restart at half the rate halves this one too: either fit may have diverged.
            rate = settings.start_rate * schedule.learning_rate / settings.learning_rate
            try:
                train(
                    self.networks,
                    self._start_epoch,
                    Schedule(settings.start_epochs, rate, max(1, settings.start_epochs // 3)),
                    groups=groups,
                    progress=lambda doing, share: progress(f"start: {doing}", 0.15 + 0.1 * share),
                )
            except TrainingDiverged as error:
                raise TrainingDiverged(
                    f"{error} of the fit to the linear estimate's maps, at start_rate {rate:g}"
                ) from error
        return train(
            self.networks,
            self._epoch,
            schedule,
            groups=groups,
            held_out=None if self._aside is None else self._held_out,
            check_every=settings.check_every,
            patience=settings.patience,
            progress=lambda doing, share: progress(doing, 0.25 + 0.75 * share),
        )

    def maps(self, standard_deviations: bool = False) -> Maps:
        """The maps of the networks as they are.

        Args:
            standard_deviations: whether those of the maps are wanted too.
        """
        values, phase_and_length, residual = self._everywhere()
        names = ["amplitude", "phase", *(name for name in self.networks.names if name != "amplitude")]
        mask = self.linear.mask[0].permute(2, 0, 1).to(self.device)  # (x, z, y)
        chosen = mask.flatten()
        length, angle = phase_and_length.abs()[chosen], phase_and_length / phase_and_length.abs()
        phase, b0 = self._phase_and_field(values, angle)
        columns = {
            "amplitude": (values.positive["amplitude"][chosen] * length).log(),
            "phase": phase[chosen],
            **{name: values.positive[name][chosen].log() for name in names[2:]},
        }
        if self.problem.protocol.echoes > 1:
            columns["b0"] = b0[chosen]
        model = MapModel(
            self.problem.protocol,
            self.problem.reduced.basis.contrast.to(self.device),
            self.estimate.basis.mixing.to(self.device),
            None if values.inversion is None else values.inversion[chosen].clamp(max=1.0),
        )
        theta = torch.stack([columns[name] for name in model.names], dim=1)
        theta = theta.clamp(*model.limits(theta))
        background = torch.zeros_like(self.estimate.coefficients)
        delivered = MapEstimate(theta, mask, model, background).delivered(
            self.estimate,
            self.linear,
            residual_to_noise=residual if self.problem.noise_known else float("nan"),
            standard_deviations=standard_deviations,
        )
        found = dict(delivered.values)
        if values.inversion is not None:
            grid = values.inversion.clamp(max=1.0).reshape(self._grid).permute(1, 2, 0).cpu()
            found["inversion"] = torch.where(self.linear.mask, grid[None], torch.nan)
        failed = ~torch.stack([image.isfinite() for image in found.values()]).all(0) & self.linear.mask
        return replace(delivered, values=found, failed_voxels=int(failed.sum()))

    def _term(self, lines: KSpace) -> FrameDataTerm:
        return FrameDataTerm(lines, self.device)

    def _batch(self, position: Tensor) -> _Batch:
        _, nz, ny = self._grid
        voxel = (position[:, None] * (nz * ny) + torch.arange(nz * ny)).flatten()
        points = self.networks.points(self._coordinates[voxel], (len(position), nz, ny))
        return _Batch(position.to(self.device), voxel.to(self.device), points)

    def _share(self, batch: _Batch) -> float:
        """Its size, in units of that of the others: the last one may be smaller."""
        return len(batch.position) / min(self.settings.batch, self._grid[0])

    def _mean(self, losses: list[Tensor], batches: list[_Batch]) -> float:
        """Over the readout positions of batches."""
        weight = torch.tensor([self._share(batch) for batch in batches], device=self.device)
        return float((weight * torch.stack(losses)).sum() / weight.sum())

    def _mean_absolute_error(self, term: FrameDataTerm, batch: _Batch) -> Tensor:
        """In units of what noise alone gives."""
        frames = self.networks.values(batch.points).frames(self.problem.protocol, batch.points.shape)
        csm = self.networks.csm(batch.points, self.csm[batch.position])
        # Each part of the noise is normal with half the variance.
        noise = 2 * math.sqrt(self.estimate.noise / math.pi)
        samples = len(batch.position) * term.samples_per_position
        return term.l1(frames, csm, batch.position) / (noise * samples)

    def _order(self) -> list[_Batch]:
        order = torch.randperm(len(self._batches), generator=self._generator)
        return [self._batches[index] for index in order.tolist()]

    def _start_epoch(self, optimizer: Adam, _number: int) -> dict[str, float]:
        """Towards the linear estimate's maps, in the image domain."""
        batches, losses = self._order(), []
        for batch in batches:
            loss = self.target.distance(self.networks, batch.points, batch.voxel)
            _step(optimizer, self._share(batch) * loss)
            losses.append(loss.detach())
        return {"maps": self._mean(losses, batches)}

    def _epoch(self, optimizer: Adam, number: int) -> dict[str, float]:
        """Once through the readout positions, and through the planes where the norm has set in."""
        settings, batches = self.settings, self._order()
        with_norm = settings.wnnm > 0 and number >= settings.wnnm_start * settings.epochs
        if with_norm and not self._planes:
            self._planes = self._matched_planes()
        visits = self._visits(len(batches)) if with_norm else {}
        # As much as all data losses of the epoch, of which the last batch may hold fewer positions.
        weight = sum(self._share(batch) for batch in batches)
        data: list[Tensor] = []
        norm = torch.zeros((), device=self.device)
        for step, batch in enumerate(batches):
            loss = self._mean_absolute_error(self._data, batch)
            data.append(loss.detach())
            loss = self._share(batch) * loss
            if step in visits:
                value = self._norm(self._planes[visits[step]], number + step)
                norm += value.detach()
                loss = loss + settings.wnnm * weight / len(visits) * value
            _step(optimizer, loss)
        losses = {"data": self._mean(data, batches)}
        if visits:
            losses["wnnm"] = float(norm) / len(visits)
        return losses

    def _visits(self, steps: int) -> dict[int, int]:
        """Step -> plane whose norm is added there: all planes equally often, over about half the steps.

        Where there are more planes than steps, some planes wait for another epoch.
        """
        planes = len(self._planes)
        order = torch.randperm(planes, generator=self._generator).tolist()
        order = (order * max(1, round(steps / 2 / planes)))[:steps]
        return {(2 * index + 1) * steps // (2 * len(order)): plane for index, plane in enumerate(order)}

    def _matched_planes(self) -> list[_Plane]:
        """Planes that hold signal, their patches matched on the maps as they are now; done once."""
        nx, nz, ny = self._grid
        mask = self.linear.mask[0].permute(2, 0, 1).to(self.device)
        guide = torch.zeros(self._grid, device=self.device).flatten()
        with torch.no_grad():
            for batch in self._batches:
                maps = self.networks.positive(batch.points)
                guide[batch.voxel] = sum(maps[name] / self.target.size[name] for name in maps)  # type: ignore[assignment]
        guide = guide.clamp(max=float(10 * guide[mask.flatten()].median())).reshape(self._grid)
        voxels = torch.arange(nx * nz * ny).reshape(self._grid)
        planes = []
        for z in range(nz):
            if mask[:, z].any():
                chosen = slice(z, z + 1)
                points = self.networks.points(self._coordinates[voxels[:, chosen].flatten()], (nx, 1, ny))
                settings = self.settings
                matches = match_blocks(
                    guide[:, chosen],
                    settings.patch,
                    settings.window,
                    settings.similar,
                    mask=mask[:, chosen],
                )
                planes.append(_Plane(points, matches))
        return planes

    def _norm(self, plane: _Plane, number: int) -> Tensor:
        """Weighted nuclear norms of the maps, and of one echo's phase: each echo's turn comes."""
        maps = self.networks.positive(plane.points)
        echo = self.networks.phasors(plane.points)[number % self.problem.protocol.echoes]
        images = torch.stack([*maps.values(), echo.real, echo.imag])
        weights = [PUBLISHED_WEIGHTS[name] for name in maps] + 2 * [PUBLISHED_WEIGHTS["phase"]]
        return weighted_nuclear_norm(
            images.reshape(-1, *plane.points.shape),
            plane.matches,
            images.new_tensor(weights),
            floor=self.settings.wnnm_floor,
        )

    def _held_out(self) -> float:
        """Mean absolute error of the lines kept aside."""
        assert self._aside is not None
        errors = [self._mean_absolute_error(self._aside, batch).detach() for batch in self._watched]
        return self._mean(errors, self._watched)

    @torch.no_grad()
    def _everywhere(self) -> tuple[ScanValues, Tensor, float]:
        """Values of all voxels in the order of the grid; what of the coil maps is the object's; the residual.

        The coil maps of unit root-sum-of-squares, their phase that of the given ones, leave a complex factor
        (v,) to amplitude and phase.
        """
        assert self.problem.kspace is not None
        whole = self._term(self.problem.kspace)
        values, factors, voxels, residual = [], [], [], 0.0
        for batch in self._batches:
            found = self.networks.values(batch.points)
            given = self.csm[batch.position]
            csm = self.networks.csm(batch.points, given)
            frames = found.frames(self.problem.protocol, batch.points.shape)
            residual += float(whole.l2(frames, csm, batch.position))
            alike = (given.conj() * csm).sum(1)
            length = torch.linalg.vector_norm(csm, dim=1)
            factors.append((length * alike / alike.abs().clamp_min(1e-12)).flatten())
            values.append(found)
            voxels.append(batch.voxel)
        order = torch.cat(voxels).argsort()
        joined = ScanValues(
            {
                name: torch.cat([part.positive[name] for part in values])[order]
                for name in self.networks.names
            },
            torch.cat([part.phasor for part in values], dim=1)[:, order],
            None
            if self.networks.inversion is None
            else torch.cat([part.inversion for part in values if part.inversion is not None])[order],
        )
        samples = self.problem.kspace.acquired_samples * self.estimate.noise
        return joined, torch.cat(factors)[order], residual / samples

    def _phase_and_field(self, values: ScanValues, angle: Tensor) -> tuple[Tensor, Tensor]:
        """Phase at TE = 0 [rad] and off-resonance beside the linear estimate's field map [Hz], (v,) each.

        A line through the phases of the echoes, each weighed by its signal.
        """
        protocol, field = self.problem.protocol, self.estimate.b0.permute(2, 0, 1).flatten()
        time = torch.tensor(protocol.echo_time, device=self.device)[:, None]
        turn = 2 * math.pi * protocol.phase_sign
        phasor = values.phasor * angle
        if protocol.echoes == 1:
            return phasor[0].angle(), torch.zeros_like(time)
        phasor = phasor * torch.exp(-1j * turn * time * field.to(self.device))
        weight = torch.exp(-2 * time / values.positive["t2star"])
        mean = (weight * phasor).sum(0)
        residual = (phasor * mean.conj()).angle()  # (e, v), small: no turns are left
        weight = weight / weight.sum(0)
        mean_time, mean_angle = (weight * time).sum(0), (weight * residual).sum(0)
        spread = (weight * (time - mean_time).square()).sum(0)
        slope = (weight * (time - mean_time) * residual).sum(0) / spread.clamp_min(1e-12)
        return mean.angle() + mean_angle - slope * mean_time, slope / turn


def _step(optimizer: Adam, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
