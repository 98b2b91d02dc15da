"""LoREIN: low-rank coefficient images and coordinate networks for the maps, one objective (METHODS 4).

    DC1(U) + DC2(theta) + ||Phi U - I(theta)||^2 + lambda WNNM(theta),     U by the LRR block, theta by PMR's

``training: joint`` is the published way: the networks of both blocks take the gradients of all terms
(``lorein_joint.py``). Its defaults are what did better or runs faster; the published form besides has
``voxels: all``, ``start_epochs: 0``, ``batch: 4``, ``convolution: true``, ``coil_start: network``,
``coupling: published``, ``held_out: 0``, ``shared_encoder: false``, ``log2_rows: 19``, ``wnnm: 1``,
``wnnm_floor: 0`` and ``rank: 15``. ``training: alternating``, the default, minimises the terms of the same
kind where each is easy, because a network that is trained through the undersampled Fourier transform learns
the weak components, which carry the relaxation times, last and least:

1. LRR: coefficient images by conjugate gradients in the learnt low-rank basis (``cartesian.py``);
2. DC2: Gauss-Newton steps of the maps themselves, with their total variation (``model_based.py``);
3. PMR: networks are fitted to these maps in the image domain, for a few steps, each voxel weighed by what the
   data say of it; Gauss-Newton steps then draw the maps towards the networks' as well as towards the data,
   the less, the further the two lie apart in units of the noise;
4. WNNM: the maps' stacks of similar patches are shrunk by weighted singular values;
5. ||Phi U - I(theta)||^2: what theta and U say is brought together where theta errs more than U
   (``map_agreement.py``): T2* where the two lie far apart, T2 where tissue and fluid meet.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.data import Encoding, Maps, Problem, Protocol
from quantitron.recon.priors.block_matching import check_planes, match_blocks
from quantitron.recon.priors.weighted_nuclear_norm import FLOOR, shrink_stacks
from quantitron.recon.signal.map_model import TIMES
from quantitron.recon.solvers.cartesian import CartesianSolver, LinearEstimate
from quantitron.recon.solvers.joint_networks import JointSettings
from quantitron.recon.solvers.lorein_joint import PUBLISHED_BLOCKS, JointTraining
from quantitron.recon.solvers.map_agreement import MEDIAN_SQUARE, agreed
from quantitron.recon.solvers.map_estimate import MapEstimate, start_from
from quantitron.recon.solvers.map_networks import MapNetworks, marginal_precision
from quantitron.recon.solvers.map_objective import Attraction
from quantitron.recon.solvers.model_based import ModelBased
from quantitron.recon.solvers.solver import Progress
from quantitron.recon.solvers.training import (
    Schedule,
    TrainingDiverged,
    train_with_restart,
    warn_of_poor_fit,
)

logger = logging.getLogger("quantitron")

OF_JOINT_TRAINING = (
    *("learning_rate", "low_rank_epochs", "batch", "voxels", "start_epochs", "convolution", "coils"),
    *("coil_start", "coupling", "wnnm_start", "wnnm_floor", "data_term", "held_out", "patience"),
)
"""Settings that do nothing in the other training. ``epochs`` and ``halve_every``, of which the same holds,
stand in the preset of a sequence."""


@dataclass(frozen=True)
class LoREIN(ModelBased):
    """Settings of LoREIN.

    Those of the linear estimate serve both ways of training. Of the others, ``joint`` takes ``wnnm`` and all
    from ``shared_encoder`` to ``log2_rows`` and from ``epochs`` on, ``alternating`` all before ``epochs``,
    those of the Gauss-Newton steps included.
    """

    name: ClassVar[str] = "lorein"

    training: str = field(default="alternating", metadata={"choices": ("alternating", "joint")})
    """How the objective is minimised; ``joint``: as published."""
    preview: bool = True
    """Whether the maps of the linear estimate are sent as soon as they are there."""
    linear_iterations: int = field(default=10, metadata={"minimum": 1})
    """Conjugate gradient steps of the third pass: those of ``subspace``, whose maps are the preview."""
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
    """Whether the maps share a hash grid, with ``alternating`` the hidden layers too; as published: not."""
    levels: int = field(default=16, metadata={"minimum": 1, "maximum": 32})
    """Resolutions of the hash grid."""
    log2_rows: int = field(default=15, metadata={"minimum": 3, "maximum": 24})
    """A resolution's table has at most 2^log2_rows rows; as published: 19."""
    wnnm: float = field(default=0.1, metadata={"minimum": 0})
    """Strength of the weighted nuclear norm; 0 leaves it out. In units of the maps' noise; with ``joint`` a
    factor on the published weights, its patches 5 x 5, three to a stack, from 7 x 7 positions."""
    patch: int = field(default=3, metadata={"minimum": 2})
    """Edge of its patches [voxels], of ``alternating``; the next two likewise."""
    window: int = field(default=9, metadata={"minimum": 1})
    """Edge of the square of positions that are searched for similar patches, odd."""
    similar: int = field(default=16, metadata={"minimum": 2})
    """Patches in a stack."""

    t2star_distance: float = field(default=0.0, metadata={"minimum": 0})
    """Distance of the T2* found from that of the linear estimate, in units of the typical one, from which on
    it is drawn nearer to the latter, of ``alternating``; 0: T2* is that of the maps alone."""
    t2_edge: float = field(default=0.0, metadata={"minimum": 0})
    """Standard deviation of the logarithm of T2 in a voxel's neighbourhood from which on its T2 is nearer to
    that of the linear estimate, of ``alternating``; tissue beside fluid has 1. 0: that of the maps alone."""

    epochs: int = field(default=200, metadata={"minimum": 1})
    """Times through the data, of ``joint``, as all that follows."""
    halve_every: int = field(default=80, metadata={"minimum": 0})
    """Epochs after which the learning rate is halved; 0 never."""
    learning_rate: float = field(default=1e-3, metadata={"above": 0})
    """Of Adam."""
    low_rank_epochs: int = field(default=20, metadata={"minimum": 0})
    """Epochs in which the LRR block is trained alone; fewer than ``epochs``."""
    batch: int = field(default=1, metadata={"minimum": 1})
    """Readout positions in a step; as published: 4. The more steps an epoch has, the closer it comes."""
    voxels: str = field(default="object", metadata={"choices": ("object", "all")})
    """Where networks are evaluated: at the object's voxels, the others keeping the linear estimate's
    coefficients, or, as published, at all."""
    start_epochs: int = field(default=20, metadata={"minimum": 0})
    """Epochs of fitting the networks to the linear estimate and its maps beforehand, without any Fourier
    transform; 0, as published: they begin with constants. Amplitudes may then vanish and stay so."""
    convolution: bool = False
    """Whether the LRR block has its convolutional network, as published: it learns noise and aliasing."""
    coils: str = field(default="estimated", metadata={"choices": ("estimated", "given")})
    """Whether a network gives the coil maps, or they stay as ESPIRiT found them."""
    coil_start: str = field(default="espirit", metadata={"choices": ("espirit", "network")})
    """Whether the coil network changes ESPIRiT's maps or, as published, makes the coil maps from nothing."""
    coupling: str = field(default="curvature", metadata={"choices": ("curvature", "published")})
    """Weight of the term between the blocks: the mean curvature of the data term, about 1 / R, or 1."""
    wnnm_start: float = field(default=0.0, metadata={"minimum": 0, "maximum": 1})
    """Share of the epochs after which the weighted nuclear norm sets in."""
    wnnm_floor: float = field(default=FLOOR, metadata={"minimum": 0})
    """Bounds the weights of the norm (``weighted_nuclear_norm``); 0 as published."""
    data_term: str = field(default="reduced", metadata={"choices": ("reduced", "frames")})
    """The data term's form; ``frames`` is the reference, and takes the longer, the more frames there are."""
    held_out: float = field(default=0.03, metadata={"minimum": 0, "maximum": 0.5})
    """Share of the lines that are not trained on and end the training once they are predicted no better.

    The linear estimate, which the networks start from, has seen them."""
    patience: int = field(default=5, metadata={"minimum": 0})
    """Epochs without a better prediction after which it ends; 0: it runs to the end."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ValueError: if the end of a range is not above its start, the window is even or holds fewer
                patches than a stack, joint training ends before the maps have been trained, coil maps that
                are to stay as they are should begin with a network, or a setting of joint training is changed
                and another training chosen.
        """
        super().__post_init__()
        if self.training != "joint":
            every = {entry.name: entry.default for entry in fields(self)}
            changed = [name for name in OF_JOINT_TRAINING if getattr(self, name) != every[name]]
            if changed:
                verb = "changes" if len(changed) == 1 else "change"
                raise ValueError(
                    f"{', '.join(changed)} {verb} the training 'joint' alone, and training is "
                    f"'{self.training}'; set training to joint, or leave {' and '.join(changed)} out"
                )
        if self.coils == "given" and self.coil_start == "network":
            raise ValueError("coils 'given' are ESPIRiT's maps; coil_start 'network' has none: choose one")
        if self.training == "joint" and self.low_rank_epochs >= self.epochs:
            raise ValueError(
                f"low_rank_epochs {self.low_rank_epochs} leave none of the {self.epochs} epochs to the maps"
            )
        if self.window % 2 == 0:
            raise ValueError(f"window {self.window} is even; it has a patch in its middle and must be odd")
        places = (self.window // 2 + 1) ** 2
        if places < self.similar:
            raise ValueError(
                f"a window of {self.window} has {places} positions in the corner of a plane, fewer than the "
                f"{self.similar} similar patches of a stack"
            )

    @property
    def needs_lines(self) -> bool:
        """Joint training holds lines out, or goes through the frames."""
        return self.training == "joint" and (self.held_out > 0 or self.data_term == "frames")

    def check(self, encoding: Encoding, protocol: Protocol) -> None:
        """Refuse scans on which patches cannot be matched, before any work.

        Raises:
            ValueError: if a plane is smaller than a patch, or holds too few patches.
        """
        super().check(encoding, protocol)
        if self.wnnm > 0:
            _, ny, nx = encoding.matrix
            joint = self.training == "joint"
            blocks = PUBLISHED_BLOCKS if joint else (self.patch, self.window, self.similar)
            try:
                check_planes(nx, ny, *blocks)
            except ValueError as error:
                raise ValueError(f"{error}; set wnnm to 0 for them") from error

    def solve(self, problem: Problem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slice: the linear estimate's maps first, as a preview, then LoREIN's.

        Raises:
            ValueError: as ``check``, or if frames are asked for and the lines are not at hand.
        """
        self.check(problem.encoding, problem.protocol)
        if self.training == "joint" and self.data_term == "frames" and problem.kspace is None:
            raise ValueError("the data term by frames needs the sampled lines, which were not kept")
        estimate = self.linear_estimate(problem, lambda doing, share: progress(doing, 0.5 * share))
        linear = CartesianSolver.maps(
            self, estimate, estimate.coefficients, problem, lambda doing, _share: progress(doing, 0.45)
        )
        if self.preview:
            yield replace(linear, preview=True)
        start = start_from(estimate, linear, problem)
        if not len(start.theta):
            yield linear
        elif self.training == "joint":
            yield self._jointly(problem, estimate, linear, start, progress)
        else:
            found, failure = self._alternating(estimate, start, problem, progress)
            yield replace(self.delivered(estimate, linear, found, problem), failure=failure)
        progress("done", 1.0)

    def _jointly(
        self, problem: Problem, estimate: LinearEstimate, linear: Maps, start: MapEstimate, progress: Progress
    ) -> Maps:
        """The networks' maps; the linear estimate's, where the networks could not be trained."""
        settings = JointSettings(
            epochs=self.epochs,
            halve_every=self.halve_every,
            learning_rate=self.learning_rate,
            low_rank_epochs=self.low_rank_epochs,
            batch=self.batch,
            everywhere=self.voxels == "all",
            start_epochs=self.start_epochs,
            convolution=self.convolution,
            estimate_coils=self.coils == "estimated",
            multiply_coils=self.coil_start == "espirit",
            scaled_coupling=self.coupling == "curvature",
            frames=self.data_term == "frames",
            held_out=self.held_out,
            patience=self.patience,
            wnnm=self.wnnm,
            wnnm_start=self.wnnm_start,
            wnnm_floor=self.wnnm_floor,
            shared_encoder=self.shared_encoder,
            levels=self.levels,
            log2_rows=self.log2_rows,
        )
        training = JointTraining(problem, estimate, start, settings)
        try:
            networks, _ = training.run(lambda doing, share: progress(doing, 0.5 + 0.5 * share))
        except TrainingDiverged as error:
            return replace(linear, failure=f"lorein: {error}; the maps are those of the linear estimate")
        found = training.unknowns(networks)
        residual = training.residual_to_noise(networks, found)
        usual = estimate.residual_to_noise(start.coefficients())
        warn_of_poor_fit(residual, usual)
        return self.delivered(estimate, linear, found, problem, residual)

    def _alternating(
        self, estimate: LinearEstimate, start: MapEstimate, problem: Problem, progress: Progress
    ) -> tuple[MapEstimate, str]:
        """Gauss-Newton steps, networks, and WNNM in turns; and what went wrong, if anything did."""
        failure = ""
        variation = self.variation(estimate, start)
        found = self.descend(
            estimate,
            start,
            lambda share: progress("Gauss-Newton steps of the maps", 0.5 + 0.2 * share),
            variation=variation,
        )
        if not set(TIMES) & set(found.model.names):
            return found, failure  # one contrast at one echo: there is nothing but the amplitude
        networks: MapNetworks | None = None
        for number in range(self.network_rounds):
            precision = marginal_precision(found, estimate.operator.mean_diagonal())
            first, length = 0.7 + 0.2 * number / self.network_rounds, 0.2 / self.network_rounds

            def fitting(doing: str, share: float, first: float = first, length: float = length) -> None:
                progress(doing, first + length * share)

            try:
                networks = self._fitted(networks, found, estimate, precision, problem.seed, fitting)
            except TrainingDiverged as error:
                failure = f"lorein: {error}; the maps are those without networks"
                break
            found = self.descend(
                estimate,
                found,
                lambda _share: None,
                rounds=1,
                variation=variation,
                attraction=self._towards(found, networks, precision, estimate.noise),
            )
        if self.wnnm > 0:
            progress("weighted nuclear norm", 0.95)
            found = self._shrunk(estimate, found)
        return agreed(found, start, self.t2star_distance, self.t2_edge), failure

    def _fitted(
        self,
        networks: MapNetworks | None,
        found: MapEstimate,
        estimate: LinearEstimate,
        precision: Tensor,
        seed: int,
        progress: Progress,
    ) -> MapNetworks:
        """Networks, new ones where there are none, fitted to the maps; once more at half the rate if need be.

        Raises:
            TrainingDiverged: if both fits diverge.
        """
        given = iter([networks])

        def make() -> MapNetworks:
            return next(given, None) or MapNetworks(
                found,
                estimate.voxel_size,
                torch.Generator().manual_seed(seed),
                shared_encoder=self.shared_encoder,
                levels=self.levels,
                log2_rows=self.log2_rows,
            )

        fitted, _ = train_with_restart(
            make,
            lambda networks, schedule: networks.fit(found.theta, precision, schedule, progress),
            Schedule(self.network_steps, self.network_learning_rate),
        )
        return fitted

    def _towards(
        self, found: MapEstimate, networks: MapNetworks, precision: Tensor, noise: float
    ) -> Attraction:
        """The networks' times as an expectation of the maps'; amplitudes are left to the data.

        Where the networks differ from the maps by more than the noise explains, it is they that are wrong.
        """
        fitted = networks.logarithms()
        centre, strength = found.theta.clone(), torch.zeros_like(found.theta)
        for position, column in enumerate(networks.columns):
            if found.model.names[column] in TIMES:
                centre[:, column] = fitted[:, position]
                distance = (centre[:, column] - found.theta[:, column]).square() * precision[:, column]
                explained = MEDIAN_SQUARE * 0.5 * noise
                share = explained / max(explained, float(distance.median())) if explained > 0 else 0.0
                strength[:, column] = self.network_weight * share * precision[:, column]
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
        # The noise of a map is that of its middle voxel, prior aside; and no more than all that varies.
        precision = marginal_precision(found, estimate.operator.mean_diagonal())[:, columns]
        variance = torch.minimum(0.5 * estimate.noise / precision.median(0).values, spread.square())
        shrunk = found.values(
            shrink_stacks(images, matches, self.wnnm * self.patch**2 * variance).permute(1, 0, 2, 3)
        )
        theta = found.theta.clone()
        theta[:, columns] = shrunk + median
        return replace(found, theta=theta.clamp(*found.model.limits(theta)))
