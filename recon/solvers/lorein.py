"""LoREIN: low-rank coefficient images and coordinate networks for the maps, one objective (METHODS 4).

    DC1(U) + DC2(theta) + ||Phi U - I(theta)||^2 + lambda WNNM(theta),     U by the LRR block, theta by PMR's

``training: joint`` is the published form: the networks of both blocks take the gradients of all terms
(``lorein_joint.py``). ``training: alternating``, the default, minimises the terms of the same kind where each
is easy, because a network that is trained through the undersampled Fourier transform learns the weak
components, which carry the relaxation times, last and least:

1. LRR: coefficient images by conjugate gradients in the learnt low-rank basis (``cartesian.py``);
2. DC2: Gauss-Newton steps of the maps themselves, with their total variation (``model_based.py``);
3. PMR: networks are fitted to these maps in the image domain, for a few steps, each voxel weighed by what the
   data say of it; Gauss-Newton steps then draw the maps towards the networks' as well as towards the data;
4. WNNM: the maps' stacks of similar patches are shrunk by weighted singular values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.data import Maps, Problem
from quantitron.recon.priors.block_matching import match_blocks
from quantitron.recon.priors.weighted_nuclear_norm import shrink_stacks
from quantitron.recon.signal.map_model import TIMES
from quantitron.recon.solvers.cartesian import CartesianSolver, LinearEstimate
from quantitron.recon.solvers.lorein_joint import JointSettings, JointTraining
from quantitron.recon.solvers.map_estimate import MapEstimate, start_from
from quantitron.recon.solvers.map_networks import MapNetworks, marginal_precision
from quantitron.recon.solvers.map_objective import Attraction
from quantitron.recon.solvers.model_based import ModelBased
from quantitron.recon.solvers.solver import Progress
from quantitron.recon.solvers.training import TrainingDiverged


@dataclass(frozen=True)
class LoREIN(ModelBased):
    """Settings of LoREIN."""

    name: ClassVar[str] = "lorein"

    training: str = field(default="alternating", metadata={"choices": ("alternating", "joint")})
    """How the objective is minimised; ``joint`` is the published form, and takes the settings below ``epochs``."""
    preview: bool = True
    """Whether the maps of the linear estimate are sent as soon as they are there."""
    weight: float = field(default=0.1, metadata={"above": 0})
    """Factor on the total variation of the relaxation times: a little less than without networks."""
    rounds: int = field(default=3, metadata={"minimum": 1})
    """Gauss-Newton steps before the networks are fitted."""
    network_rounds: int = field(default=1, metadata={"minimum": 0})
    """Times that the networks are fitted and the maps drawn towards them."""
    network_steps: int = field(default=60, metadata={"minimum": 1})
    """Steps of each fit; many of them teach the networks the noise."""
    network_weight: float = field(default=0.6, metadata={"minimum": 0})
    """How much the networks' maps are worth, in units of what the data say of each voxel."""
    network_learning_rate: float = field(default=3e-3, metadata={"above": 0})
    """Of the networks in the fit to the maps."""
    shared_encoder: bool = True
    """One network for all maps in place of one each."""
    levels: int = field(default=16, metadata={"minimum": 1, "maximum": 32})
    """Resolutions of the hash grid."""
    log2_rows: int = field(default=15, metadata={"minimum": 3, "maximum": 24})
    """A resolution's table has at most 2^log2_rows rows."""
    wnnm: float = field(default=0.1, metadata={"minimum": 0})
    """Strength of the weighted nuclear norm, in units of the maps' noise; 0 leaves it out."""
    patch: int = field(default=3, metadata={"minimum": 2})
    """Edge of its patches [voxels]."""
    window: int = field(default=9, metadata={"minimum": 1})
    """Edge of the square of patches that are searched."""
    similar: int = field(default=16, metadata={"minimum": 2})
    """Patches in a stack."""

    epochs: int = field(default=200, metadata={"minimum": 1})
    """Times through the data, of ``joint``."""
    halve_every: int = field(default=80, metadata={"minimum": 0})
    """Epochs after which the learning rate is halved; 0 never."""
    learning_rate: float = field(default=1e-3, metadata={"above": 0})
    """Of Adam."""
    low_rank_epochs: int = field(default=20, metadata={"minimum": 0})
    """Epochs in which the LRR block is trained alone."""
    batch: int = field(default=4, metadata={"minimum": 1})
    """Readout positions in a step."""
    start_steps: int = field(default=0, metadata={"minimum": 0})
    """Steps of fitting the networks to the linear estimate and its maps beforehand; 0: from constants."""
    convolution: bool = True
    """Whether the LRR block has its convolutional network."""
    coils: str = field(default="estimated", metadata={"choices": ("estimated", "given")})
    """Whether a network changes the coil maps, or they stay as ESPIRiT found them."""
    data_term: str = field(default="reduced", metadata={"choices": ("reduced", "frames")})
    """The data term's form; ``frames`` is the reference, and slow."""
    held_out: float = field(default=0.03, metadata={"minimum": 0, "maximum": 0.5})
    """Share of the lines that are not trained on and end the training once they are predicted no better."""
    patience: int = field(default=5, metadata={"minimum": 0})
    """Epochs without a better prediction after which it ends; 0: it runs to the end."""

    @property
    def needs_lines(self) -> bool:
        """Joint training holds lines out, or goes through the frames."""
        return self.training == "joint" and (self.held_out > 0 or self.data_term == "frames")

    def solve(self, problem: Problem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slice: the linear estimate's maps first, as a preview, then LoREIN's."""
        self._check_size(problem)
        estimate = self.linear_estimate(problem, lambda doing, share: progress(doing, 0.5 * share))
        linear = CartesianSolver.maps(
            self, estimate, estimate.coefficients, problem, lambda doing, _share: progress(doing, 0.45)
        )
        if self.preview:
            yield replace(linear, preview=True)
        start = start_from(estimate, linear, problem)
        if not len(start.theta):
            yield linear
            return
        if self.training == "joint":
            training = JointTraining(problem, estimate, start, self._joint_settings())
            try:
                networks, _ = training.run(lambda doing, share: progress(doing, 0.5 + 0.5 * share))
            except TrainingDiverged as error:
                yield replace(linear, failure=f"{error}; the maps are those of the linear estimate")
                return
            found = training.unknowns(networks)
        else:
            found = self._alternating(estimate, start, problem, progress)
        residual = estimate.residual_to_noise(found.coefficients())
        yield found.delivered(
            estimate,
            linear,
            residual_to_noise=residual if problem.noise_known else float("nan"),
            standard_deviations=self.standard_deviations,
        )
        progress("done", 1.0)

    def _check_size(self, problem: Problem) -> None:
        """Refuse scans on which patches cannot be matched, before any work.

        Raises:
            ValueError: if a plane is smaller than a patch, or holds too few patches.
        """
        ny, nx = problem.reduced.count.shape[3], problem.reduced.projected.shape[-1]
        places = max(ny - self.patch + 1, 0) * max(nx - self.patch + 1, 0)
        if self.wnnm > 0 and places < self.similar:
            raise ValueError(
                f"planes of {nx} x {ny} voxels are too small for stacks of {self.similar} patches of "
                f"{self.patch} x {self.patch}; set wnnm to 0 for them"
            )

    def _joint_settings(self) -> JointSettings:
        return JointSettings(
            epochs=self.epochs,
            halve_every=self.halve_every,
            learning_rate=self.learning_rate,
            low_rank_epochs=self.low_rank_epochs,
            batch=self.batch,
            start_steps=self.start_steps,
            convolution=self.convolution,
            estimate_coils=self.coils == "estimated",
            frames=self.data_term == "frames",
            held_out=self.held_out,
            patience=self.patience,
            wnnm=self.wnnm,
            shared_encoder=self.shared_encoder,
            levels=self.levels,
            log2_rows=self.log2_rows,
        )

    def _alternating(
        self, estimate: LinearEstimate, start: MapEstimate, problem: Problem, progress: Progress
    ) -> MapEstimate:
        """Gauss-Newton steps, networks, and WNNM in turns."""
        variation = self.variation(estimate, start)
        found = self.descend(
            estimate,
            start,
            lambda share: progress("Gauss-Newton steps of the maps", 0.5 + 0.2 * share),
            variation=variation,
        )
        weight = estimate.operator.mean_diagonal()
        networks = None
        for number in range(self.network_rounds):
            precision = marginal_precision(found, weight)
            if networks is None:
                networks = MapNetworks(
                    found,
                    estimate.voxel_size,
                    torch.Generator().manual_seed(problem.seed),
                    shared_encoder=self.shared_encoder,
                    levels=self.levels,
                    log2_rows=self.log2_rows,
                    learning_rate=self.network_learning_rate,
                )
            done = (0.7 + 0.2 * number / self.network_rounds, 0.2 / self.network_rounds)
            fitted = networks.fit(
                found.theta,
                precision,
                self.network_steps,
                progress=lambda share, done=done: progress("map networks", done[0] + done[1] * share),  # type: ignore[misc]
            )
            found = self.descend(
                estimate,
                found,
                lambda share: None,
                rounds=1,
                variation=variation,
                attraction=self._towards(found, fitted, networks.columns, precision),
            )
        if self.wnnm > 0:
            progress("weighted nuclear norm", 0.95)
            found = self._shrunk(estimate, found)
        return found

    def _towards(
        self, found: MapEstimate, fitted: Tensor, columns: list[int], precision: Tensor
    ) -> Attraction:
        """The networks' times as an expectation of the maps'; amplitudes are left to the data."""
        centre, strength = found.theta.clone(), torch.zeros_like(found.theta)
        for position, column in enumerate(columns):
            if found.model.names[column] in TIMES:
                centre[:, column] = fitted[:, position]
                strength[:, column] = self.network_weight * precision[:, column]
        return Attraction(centre, strength)

    def _shrunk(self, estimate: LinearEstimate, found: MapEstimate) -> MapEstimate:
        """Stacks of similar patches of the relaxation times, shrunk by weighted singular values."""
        columns = [number for number, name in enumerate(found.model.names) if name in TIMES]
        theta = found.theta[:, columns]
        median = theta.median(0).values
        images = found.images(theta - median).permute(1, 0, 2, 3).contiguous()  # (maps, x, z, y)
        spread = theta.std(0, correction=0).clamp_min(1e-6)
        guide = (images / spread[:, None, None, None]).sum(0)
        matches = match_blocks(guide, self.patch, self.window, self.similar, mask=found.mask)
        # The noise of a map is that of its middle voxel, prior aside.
        precision = marginal_precision(found, estimate.operator.mean_diagonal())[:, columns]
        variance = 0.5 * estimate.noise / precision.median(0).values
        shrunk = found.values(
            shrink_stacks(images, matches, self.wnnm * self.patch**2 * variance).permute(1, 0, 2, 3)
        )
        theta = found.theta.clone()
        theta[:, columns] = shrunk + median
        return replace(found, theta=theta.clamp(*found.model.limits(theta)))
