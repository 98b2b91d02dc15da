"""LoREIN's joint training in the forms that it can be computed in: time of an epoch, and errors in the end.

- ``object``: features by sparse matrices, reduced data terms, networks at the object's voxels alone;
- ``everywhere``: the same with networks at all voxels, as published;
- ``published``: features gathered and scattered, data terms frame by frame (published_epoch.py), all voxels;
- ``given``: ``object`` with ESPIRiT's coil maps as they are, in place of a network that changes them;
- ``unscaled``: ``object`` with outputs for all coefficient images of the same size, in place of each image's;
- ``llr``: ``object`` that begins with the images and maps of ``llr`` in place of the linear estimate's;
- ``plain``: ``object`` with three convolutions of one resolution, without attention, in place of the
  convolutional network;
- ``preconditioned``: ``object`` with the gradient of each coefficient image divided by the mean curvature of
  its data term and of its Gaussian prior, as the conjugate gradients are.

Settings of ``JointSettings`` may follow a form: ``object:learning_rate=3e-3+wnnm=0``. So may two that were
tried and are no part of the package: ``low_rank``, the weight of a locally low-rank penalty on the output of
the LRR network, in the units of ``llr``; and ``noise_stop``, the multiple of the noise where training ends,
both data terms being there (Morozov's principle).

``everywhere`` and ``published`` minimise the same objective, up to what the maps' signals have outside the
basis; ``object`` knows the voxels in which there is nothing.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from published_epoch import PlainFrames, gathering
from scan_problem import load
from subspace import AVERAGE, VFA
from torch import Tensor, nn

from quantitron.gadgets.image_file import TRUTH_GROUP, read_images
from quantitron.gadgets.map_volume import map_volumes
from quantitron.phantoms.simulate import simulate
from quantitron.recon.algorithms.adam import Adam, ParameterGroup
from quantitron.recon.data import Maps, Problem
from quantitron.recon.metrics import CAPS, nrmse
from quantitron.recon.networks.fields import Field
from quantitron.recon.networks.low_rank_block import LowRankBlock
from quantitron.recon.priors.low_rank import BlockLowRank
from quantitron.recon.solvers import LocallyLowRank, LoREIN
from quantitron.recon.solvers.cartesian import CartesianSolver, LinearEstimate
from quantitron.recon.solvers.joint_networks import Block, JointNetworks, JointSettings
from quantitron.recon.solvers.lorein_joint import JointTraining
from quantitron.recon.solvers.map_estimate import MapEstimate, start_from
from quantitron.recon.solvers.training import Schedule, adam

TIMED_FORMS = ("object", "everywhere", "published")
FORMS = (*TIMED_FORMS, "given", "unscaled", "llr", "plain", "preconditioned")
SETTINGS = {"held_out": 0.0, "log2_rows": 15, "wnnm": 0.1}
"""Of all forms: no early stop, and the sizes that ``lorein`` ships with."""
COARSE = {"matrix": (56, 56, 8), "fov": (224.0, 224.0, 32.0)}
"""The whole head in an eighth of the voxels, on which trainings to the end are a matter of minutes."""


@dataclass(frozen=True)
class Scan:
    """A scan, and the linear estimate that the training starts from."""

    problem: Problem
    estimate: LinearEstimate
    linear: Maps
    start: MapEstimate

    @classmethod
    def simulated(cls, anatomy: Path, raw: Path, **settings: Any) -> Scan:
        """``vfa_gre`` at R 12 and SNR 30."""
        scan = {**VFA, **AVERAGE, **settings}
        simulate(**scan, phantom=anatomy, snr=30.0, seed=1, acceleration=12.0, output=raw)
        problem, solver = load(raw), LoREIN()
        estimate = solver.linear_estimate(problem, _quiet)
        linear = CartesianSolver.maps(solver, estimate, estimate.coefficients, problem, _quiet)
        return cls(problem, estimate, linear, start_from(estimate, linear, problem))

    @cached_property
    def locally_low_rank(self) -> tuple[LinearEstimate, MapEstimate]:
        """The start of form ``llr``."""
        images = LocallyLowRank().refine(self.estimate, 0, _quiet)
        maps = CartesianSolver.maps(LoREIN(), self.estimate, images, self.problem, _quiet)
        estimate = replace(self.estimate, coefficients=images)
        return estimate, start_from(estimate, maps, self.problem)

    def training(self, form: str, **settings: Any) -> Tried:
        """The objective, computed in one of the forms."""
        form, own = settings_of(form)
        frames = form == "published"
        chosen = TriedSettings(
            **{
                **SETTINGS,
                "frames": frames,
                "everywhere": form in ("everywhere", "published"),
                "estimate_coils": form != "given",
                **settings,
                **own,
            }
        )
        kind = Preconditioned if form == "preconditioned" else Tried
        estimate, start = self.locally_low_rank if form == "llr" else (self.estimate, self.start)
        training = kind(self.problem, estimate, start, chosen)
        if frames:
            assert self.problem.kspace is not None
            training._frames = PlainFrames(self.problem.kspace)  # type: ignore[assignment]
        return training


@dataclass(frozen=True)
class TriedSettings(JointSettings):
    """Those of the package, and two that were tried."""

    low_rank: float = 0.0
    """Weight of the locally low-rank penalty on U, as that of ``llr``; 0: none."""
    noise_stop: float = 0.0
    """Multiple of the noise at which training ends; 0: never."""


class Tried(JointTraining):
    """The training with what was tried and not kept."""

    settings: TriedSettings

    def __init__(
        self, problem: Problem, estimate: LinearEstimate, start: MapEstimate, settings: TriedSettings
    ) -> None:
        super().__init__(problem, estimate, start, settings)
        self._shifts = torch.Generator().manual_seed(problem.seed)
        self._explained: dict[str, float] | None = None
        self.epochs_done = 0

    def terms(self, networks: JointNetworks, block: Block, both: bool = True) -> dict[str, Tensor]:
        """Besides the terms of the package: R(U) of blocks of three voxels, shifted at random."""
        terms = super().terms(networks, block, both)
        if self.settings.low_rank > 0:
            u = networks.coefficients(block)  # (x, k, z, y)
            components, voxels = u.shape[1], math.prod(min(3, n) for n in block.shape)
            weight = self.settings.low_rank * self.estimate.noise_threshold(components, voxels)
            penalty = BlockLowRank(weight, (3, 3, 3))
            shift = penalty.random_shift(u.shape, self._shifts)
            # The quadratic that touches R at U has its gradient there.
            touching = penalty.reweighting(u.detach(), 0.3 * self.estimate.image_noise, shift)
            value = 0.5 * (u.conj() * touching(u.detach())).real.sum()
            terms["low_rank"] = value / self._unit(block)
        return terms

    def _epoch(
        self,
        networks: JointNetworks,
        blocks: list[Block],
        optimizer: Adam,
        number: int,
        generator: torch.Generator,
    ) -> dict[str, float]:
        """Nothing more once both data terms are at the noise, of which 1/2 is what it leaves."""
        if self._explained is None:
            losses = super()._epoch(networks, blocks, optimizer, number, generator)
            self.epochs_done = number + 1
            level = 0.5 * self.settings.noise_stop
            if all(losses.get(name, math.inf) <= level for name in ("dc1", "dc2")):
                self._explained = losses
            return losses
        return self._explained


class Preconditioned(Tried):
    """The gradient of DC1 and of the term between the blocks by U, divided by U's mean curvature."""

    def terms(self, networks: JointNetworks, block: Block, both: bool = True) -> dict[str, Tensor]:
        estimate = self.estimate
        prior = estimate.inside(estimate.prior.diagonal()).mean(0)  # (k,)
        curvature = estimate.operator.mean_diagonal() + prior
        factor = (curvature.mean() / curvature)[:, None, None]
        handle = networks.low_rank.register_forward_hook(
            lambda _module, _inputs, u: u.register_hook(lambda slope: factor * slope) and None
        )
        try:
            return super().terms(networks, block, both)
        finally:
            handle.remove()


Resize = Callable[[Tensor, nn.Module | None], tuple[Tensor, nn.Module | None]]
"""Sizes (k,) of the coefficient images, and the network that refines them -> others."""


@contextmanager
def low_rank_blocks(change: Resize) -> Iterator[None]:
    """Low-rank blocks made in here have other sizes of their outputs, or another network."""
    made = LowRankBlock.__init__

    def init(self: LowRankBlock, field: Field, convolution: nn.Module | None, scale: Tensor) -> None:
        scale, convolution = change(scale, convolution)
        made(self, field, convolution, scale)

    LowRankBlock.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        LowRankBlock.__init__ = made  # type: ignore[method-assign]


class PlainConvolutions(nn.Module):
    """Three convolutions of one resolution, added to their input; they start at nothing."""

    def __init__(self, rank: int, channels: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = (2 * rank, channels, channels, 2 * rank)
        self.layers = nn.ModuleList(
            nn.Conv2d(first, second, 3, padding=1) for first, second in pairwise(sizes)
        )
        for layer in self.layers:
            with torch.no_grad():
                bound = (3 / layer.weight[0].numel()) ** 0.5
                layer.weight.copy_((2 * torch.rand(layer.weight.shape, generator=generator) - 1) * bound)
                layer.bias.zero_()
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, images: Tensor) -> Tensor:
        """(x, k, z, y) complex -> the same."""
        values = torch.cat([images.real, images.imag], 1)  # (x, 2k, z, y)
        for layer in self.layers[:-1]:
            values = torch.relu(layer(values))
        real, imaginary = self.layers[-1](values).chunk(2, 1)
        return images + torch.complex(real, imaginary)


def _equal_sizes(scale: Tensor, network: nn.Module | None) -> tuple[Tensor, nn.Module | None]:
    return torch.full_like(scale, float(scale.square().mean().sqrt())), network


def _plain_network(scale: Tensor, _network: nn.Module | None) -> tuple[Tensor, nn.Module | None]:
    return scale, PlainConvolutions(len(scale)).to(scale.device)


def settings_of(form: str) -> tuple[str, dict[str, Any]]:
    """``object:epochs=3+convolution=false`` -> ("object", {"epochs": 3, "convolution": False}).

    Raises:
        SystemExit: if there is no such form or setting, or a value is not of its kind.
    """
    name, _, text = form.partition(":")
    if name not in FORMS:
        raise SystemExit(f"there is no form '{name}'; there are {', '.join(FORMS)}")
    kinds = {entry.name: type(entry.default) for entry in fields(TriedSettings)}
    found: dict[str, Any] = {}
    for setting in filter(None, text.split("+")):
        key, _, value = setting.partition("=")
        if key not in kinds:
            raise SystemExit(f"{form}: joint training has no setting '{key}'; it has {', '.join(kinds)}")
        try:
            found[key] = {"true": True, "false": False}[value] if kinds[key] is bool else kinds[key](value)
        except (ValueError, KeyError):
            raise SystemExit(f"{form}: '{value}' is no {kinds[key].__name__}") from None
    return name, found


def encoding(form: str) -> AbstractContextManager[None]:
    """Networks made in here encode coordinates as the form does."""
    name = form.partition(":")[0]
    if name == "published":
        return gathering()
    change = {"unscaled": _equal_sizes, "plain": _plain_network}.get(name)
    return nullcontext() if change is None else low_rank_blocks(change)


class Epoch:
    """Steps of an epoch in one form, timed."""

    def __init__(self, scan: Scan, form: str) -> None:
        self.training = scan.training(form)
        with encoding(form):
            self.networks = JointNetworks(scan.estimate, scan.start, self.training.settings, 0)
        positions, batch = self.networks.shape[0], self.training.settings.batch
        self.blocks = [self.networks.block(slice(x, x + batch)) for x in range(0, positions, batch)]
        self.optimizer = adam([ParameterGroup(self.networks.parameters())], Schedule(1))
        self.seconds = {"data": 0.0, "norm": 0.0}
        self.losses: dict[str, float] = {}

    def step(self, number: int) -> None:
        """One step of the data terms and the term between the blocks."""
        begun = time.perf_counter()
        terms = self.training.step(self.networks, self.blocks[number], self.optimizer)
        self.seconds["data"] += time.perf_counter() - begun
        for name, value in terms.items():
            self.losses[name] = self.losses.get(name, 0.0) + value / len(self.blocks)

    def norm_step(self) -> None:
        """The step of the weighted nuclear norm, which comes once an epoch."""
        begun = time.perf_counter()
        self.losses["wnnm"] = self.training.norm_step(self.networks, self.blocks, self.optimizer)
        self.seconds["norm"] += time.perf_counter() - begun


def epoch(anatomy: Path, raw: Path) -> list[dict[str, Any]]:
    """Time of a whole epoch in all forms.

    Their steps alternate: other work on the machine slows all of them alike. Losses are means over the steps.
    """
    scan = Scan.simulated(anatomy, raw)
    forms = {form: Epoch(scan, form) for form in TIMED_FORMS}
    positions = len(forms["published"].blocks)
    for number in torch.randperm(positions, generator=torch.Generator().manual_seed(0)).tolist():
        for form in forms.values():
            form.step(number)
    for form in forms.values():
        form.norm_step()
    slow, rows = forms["published"], []
    for name, form in forms.items():
        data, total = form.seconds["data"], sum(form.seconds.values())
        ratio, alone = sum(slow.seconds.values()) / total, slow.seconds["data"] / data
        losses = ", ".join(f"{key} {value:.4f}" for key, value in form.losses.items())
        _say(
            f"{name:10s} {total:6.1f} s an epoch ({ratio:4.1f} x), {data:5.1f} s without the nuclear "
            f"norm's step ({alone:4.1f} x); mean losses {losses}"
        )
        rows.append({"form": name, "seconds": total, "without_norm": data, "losses": form.losses})
    return rows


def equal(
    anatomy: Path, raw: Path, epochs: int, forms: Iterable[str] = FORMS, seeds: Iterable[int] = (1,)
) -> list[dict[str, Any]]:
    """Errors of the maps after a training in each form, on a scan of an eighth of the voxels."""
    forms = list(forms)
    for form in forms:
        settings_of(form)  # refuses what is wrong before any work
    scan = Scan.simulated(anatomy, raw, **COARSE)
    truth = map_volumes(read_images(raw, TRUTH_GROUP))
    mask = truth["MASK"].values > 0
    schedule = {"epochs": epochs, "halve_every": max(1, 2 * epochs // 5), "low_rank_epochs": epochs // 5}

    def error(maps: Maps, name: str) -> float:
        found = maps.values[name][0].numpy()  # (z, y, x) [s]
        return nrmse(found, 1e-3 * truth[name.upper()].values, mask, CAPS[name])

    rows: list[dict[str, Any]] = []

    def report(form: str, maps: Maps, seconds: float, losses: str = "") -> None:
        t1, t2star = error(maps, "t1"), error(maps, "t2star")
        _say(f"{form:16s} T1 {100 * t1:5.2f} %, T2* {100 * t2star:5.2f} %, {seconds:6.0f} s {losses}")
        rows.append({"form": form, "t1": t1, "t2star": t2star, "seconds": seconds})

    report("linear estimate", scan.linear, 0.0)
    for form, seed in product(forms, seeds):
        drawn = replace(scan, problem=replace(scan.problem, seed=seed))
        training = drawn.training(form, **{"start_epochs": 10, **schedule})
        with encoding(form):
            networks, record = training.run(_quiet)
        found = training.unknowns(networks)
        maps = LoREIN().delivered(scan.estimate, scan.linear, found, scan.problem)
        losses = ", ".join(f"{name} {value:.3f}" for name, value in record.losses[-1].items())
        losses += f" after {training.epochs_done} epochs"
        report(f"{form} {seed}", maps, record.seconds, losses)
    return rows


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _quiet(doing: str, share: float) -> None:
    del doing, share
