"""MRI2Qmap: maps with priors learnt from weighted images (Algorithm 1 of the paper).

    minimise   1/2 ||s - A U||^2 + field_share Q(U) + sum_m phi_m(q_m)
    subject to U = PD d(T1, T2)  and  q_m = |PD| e_m(T1, T2)

d is the scan's signal of a tissue, e_m its spin-echo image of modality m, and phi_m whatever prior the
denoiser of that modality stands for. In turns: the weighted images of the present maps are denoised, at a
level that falls from round to round (line 8 of the algorithm); the dictionary is searched for the tissue that
agrees with U and with the denoised images (9; eqs. 10, 11); conjugate gradients fit U to k-space, pulled
towards the signals found (10); multipliers remember what is left between each pair (11, 12). The penalty
rises as the level falls (5), so that they are scaled anew in each round (7, 13).

Q is the Gaussian prior of the linear estimate, which the paper does not have. Its maps are those of the last
search (9), on the grid of the dictionary: ``maps_from: joint``. Here U of the last round, which has seen
k-space since, is matched once more, off the grid. The paper shifts the images at random in every round, as an
augmentation, and cuts them into patches; here a slice or a slab that fits into one patch is denoised whole,
and not shifted (``network_denoiser``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.data import Encoding, FingerprintProblem, Maps, Problem, Protocol
from quantitron.recon.networks.trained_network import NetworkDescription, NetworkRequest, TrainedNetwork
from quantitron.recon.priors.block_matching_denoiser import BlockMatchingDenoiser
from quantitron.recon.priors.denoiser import Denoiser, annealed_levels, intensity
from quantitron.recon.priors.network_denoiser import NetworkDenoiser, check_contrasts
from quantitron.recon.priors.variation_denoiser import VariationDenoiser
from quantitron.recon.signal.spin_echo import SpinEchoProtocol
from quantitron.recon.solvers.cartesian import CartesianSolver, LinearEstimate
from quantitron.recon.solvers.coefficient_solver import CoefficientEstimate, CoefficientSolver
from quantitron.recon.solvers.fingerprint import FingerprintEstimate, FingerprintSolver
from quantitron.recon.solvers.lrtv import LowRankTotalVariation
from quantitron.recon.solvers.nearest_contrast import NearestContrast
from quantitron.recon.solvers.nearest_tissue import NearestTissue, Tissue
from quantitron.recon.solvers.solver import Progress
from quantitron.recon.solvers.tissue_maps import with_tissue

KIND = "contrast_denoiser"
DENOISERS = ("network", "tv", "bm4d")
STARTS = ("estimate", "least_squares")
SOURCES = ("series", "joint")


@dataclass(frozen=True)
class Agreement:
    """What the rounds end with."""

    coefficients: Tensor
    """U (x, k, z, y)."""
    tissue: Tissue
    """Of the last search."""


MatchTissue = Callable[[Tensor, Tensor | None, Tensor | None], Tissue]
"""Coefficients (x, k, z, y), contrasts (m, z, y, x), weights (m,) -> the tissue that is nearest to both."""


@dataclass(frozen=True)
class WeightedImagePriors(CoefficientSolver):
    """Settings of the rounds between k-space, dictionary and denoiser, for any kind of scan."""

    linear_iterations: int = field(default=4, metadata={"minimum": 1})
    """Conjugate gradient steps of the last pass of the linear estimate: only a start is wanted here."""
    denoiser: str = field(default="network", metadata={"choices": DENOISERS})
    """``network`` is trained on weighted images; ``tv`` and ``bm4d`` need no training."""
    weights: str = ""
    """File with the weights of the network; empty: those that come with the package."""
    start: str = field(default="estimate", metadata={"choices": STARTS})
    """``estimate``: the linear one; ``least_squares``: as published, a few conjugate gradient steps from
    zero, without any prior, whose noise is bounded by their number."""
    rounds: int = field(default=20, metadata={"minimum": 1})
    """Rounds of the splitting."""
    iterations: int = field(default=10, metadata={"minimum": 1})
    """Conjugate gradient steps in each of them, and of the start ``least_squares``."""
    first_level: float = field(default=0.05, metadata={"above": 0})
    """Noise level of the first round, relative to the intensity of the images."""
    last_level: float = field(default=0.02, metadata={"above": 0})
    """Noise level of the last one; those between are spaced evenly in the logarithm."""
    penalty: float = field(default=1.0, metadata={"above": 0})
    """Trust in what is restored: penalty = this x noise variance / (level x intensity)^2."""
    t1w_weight: float = field(default=0.3, metadata={"minimum": 0})
    """Weight of the T1-weighted image in matching, beside the signal's 1, both taken as of equal energy."""
    t2w_weight: float = field(default=0.3, metadata={"minimum": 0})
    """Weight of the T2-weighted image; 0 leaves a modality out altogether."""
    pdw_weight: float = field(default=0.3, metadata={"minimum": 0})
    """Weight of the PD-weighted image."""
    field_share: float = field(default=0.1, metadata={"minimum": 0})
    """Share of the linear estimate's prior that is kept; 0, as published: none."""
    maps_from: str = field(default="series", metadata={"choices": SOURCES})
    """``series``: the coefficient images of the last round, matched alone and off the grid; ``joint``: T1 and
    T2 (of fingerprints PD too) of the last search for tissue that agrees with both, as published."""

    def __post_init__(self) -> None:
        """Refuse levels that rise, or no modality at all.

        Raises:
            ValueError: in one sentence, or as for all solvers of such scans.
        """
        super().__post_init__()
        annealed_levels(self.first_level, self.last_level, self.rounds)
        if not self.modalities:
            raise ValueError("t1w_weight, t2w_weight and pdw_weight are all 0; use mrf_admm without priors")

    @property
    def modalities(self) -> dict[str, float]:
        """Those that take part, with their weights."""
        every = {"T1w": self.t1w_weight, "T2w": self.t2w_weight, "PDw": self.pdw_weight}
        return {name: weight for name, weight in every.items() if weight > 0}

    @property
    def spin_echoes(self) -> SpinEchoProtocol:
        """TR and TE of the modalities that take part."""
        return SpinEchoProtocol().only(tuple(self.modalities))

    @property
    def levels(self) -> list[float]:
        """Noise level of each round."""
        return annealed_levels(self.first_level, self.last_level, self.rounds)

    @property
    def network(self) -> NetworkRequest | None:
        """A denoiser of weighted images, where one is plugged in."""
        return NetworkRequest(KIND, self.weights) if self.denoiser == "network" else None

    def check_network(self, network: NetworkDescription, encoding: Encoding, protocol: Protocol) -> None:
        """Refuse a network that does not know the modalities or the levels, or takes larger volumes only."""
        del protocol
        check_contrasts(network, tuple(self.modalities), (self.first_level, self.last_level), encoding.matrix)

    def plugged_in(self, network: TrainedNetwork | None, device: torch.device) -> Denoiser:
        """The denoiser.

        Args:
            network: that came with the problem.
            device: to run it on.

        Raises:
            ValueError: if it should be a network, and none came or one for something else.
        """
        if self.denoiser == "tv":
            return VariationDenoiser()
        if self.denoiser == "bm4d":
            return BlockMatchingDenoiser()
        if network is None:
            raise ValueError("the denoiser 'network' needs a trained network")
        return NetworkDenoiser(network, device=device)

    def agree(
        self,
        estimate: CoefficientEstimate,
        nearest: MatchTissue,
        denoise: Denoiser,
        seed: int,
        progress: Progress,
    ) -> Agreement:
        """Where k-space, dictionary and denoiser agree.

        Args:
            estimate: where to start.
            nearest: the dictionary.
            denoise: the denoiser.
            seed: of its shifts.
            progress: takes the share of the rounds that are done.
        """
        modalities = tuple(self.modalities)
        generator = torch.Generator().manual_seed(seed)

        def fitted(target: Tensor, penalty: float, last: Tensor | None) -> Tensor:
            """Proximal step of the data term (line 10)."""
            return estimate.proximal(target, penalty, last, self.iterations, self.field_share)

        u = estimate.coefficients
        if self.start == "least_squares":
            # With a little of the prior the steps would be preconditioned and arrive where noise decides.
            u = estimate.proximal(torch.zeros_like(u), 0.0, None, self.iterations, 0.0)
        tissue = nearest(u, None, None)
        scale = float(intensity(torch.linalg.vector_norm(u, dim=1)[None])[0])
        weights = self._normalised_weights(estimate, tissue)
        multiplier_u, multiplier_q = torch.zeros_like(u), torch.zeros_like(tissue.contrasts)
        for number, level in enumerate(self.levels):
            progress("restoring weighted images", number / self.rounds)
            penalty = self.penalty * estimate.noise / (level * scale) ** 2
            scaled_u, scaled_q = multiplier_u / penalty, multiplier_q / penalty
            q = denoise(tissue.contrasts - scaled_q, level, modalities, generator)
            tissue = nearest(u + scaled_u, q + scaled_q, weights)
            u = fitted(tissue.coefficients - scaled_u, penalty, u)
            multiplier_u = multiplier_u + penalty * (u - tissue.coefficients)
            multiplier_q = multiplier_q + penalty * (q - tissue.contrasts)
        return Agreement(u, tissue)

    def _normalised_weights(self, estimate: CoefficientEstimate, tissue: Tissue) -> Tensor:
        """(m,) the weights times the energy of the signal over that of each modality (line 4)."""
        energy = estimate.inside(tissue.coefficients).abs().square().sum()
        contrasts = tissue.contrasts.square().sum((1, 2, 3)).clamp_min(torch.finfo(torch.float32).tiny)
        return torch.tensor(list(self.modalities.values())).to(contrasts) * energy / contrasts


@dataclass(frozen=True)
class FingerprintMri2Qmap(WeightedImagePriors, FingerprintSolver):
    """Settings for fingerprints."""

    name: ClassVar[str] = "mri2qmap"

    def solve(self, problem: FingerprintProblem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slice; yields the final maps only."""
        estimate = self.linear_estimate(problem, progress)
        agreed = self.agreed(estimate, problem.seed, _within(progress, 0.4, 0.45))
        residual = estimate.residual_to_noise(agreed.coefficients)
        progress("matching", 0.85)
        maps = self.matched(agreed.coefficients, estimate.basis, problem, residual, estimate.image_noise**2)
        yield with_tissue(maps, agreed.tissue, ("t1", "t2", "pd")) if self.maps_from == "joint" else maps
        progress("done", 1.0)

    def refine(self, estimate: FingerprintEstimate, seed: int, progress: Progress) -> Tensor:
        """U (x, k, z, y) of the last round."""
        return self.agreed(estimate, seed, progress).coefficients

    def agreed(self, estimate: FingerprintEstimate, seed: int, progress: Progress) -> Agreement:
        """Rounds from the linear estimate on.

        Args:
            estimate: where to start.
            seed: of everything random.
            progress: takes the share of the rounds alone, 0..1.
        """
        problem = estimate.problem
        nearest = NearestTissue.of_fingerprints(estimate, self.match_groups, self.spin_echoes)
        denoise = self.plugged_in(problem.network, problem.device)
        return self.agree(estimate, nearest, denoise, seed, progress)


@dataclass(frozen=True)
class CartesianMri2Qmap(WeightedImagePriors, CartesianSolver):
    """Settings for scans on a Cartesian grid that tell both T1 and T2."""

    name: ClassVar[str] = "mri2qmap"
    sequences: ClassVar[tuple[str, ...]] = ("t2ir_gre",)

    edges_weight: float = field(default=0.15, metadata={"above": 0})
    """Weight of the total variation (``lrtv``) that restores the images which the rounds start from. T2*
    shows in no weighted image, and stays what it is there."""
    match_groups: int = field(default=256, metadata={"minimum": 0})
    """Groups of atoms for fast matching (Cauley 2015); 0 compares with every atom."""

    def solve(self, problem: Problem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slab; yields the final maps only."""
        estimate = self.linear_estimate(problem, progress)
        agreed = self.agreed(estimate, problem.seed, _within(progress, 0.4, 0.45))
        maps = self.maps(estimate, agreed.coefficients, problem, progress)
        # The tissue's PD is weighted by T2* here, which it knows nothing of.
        yield with_tissue(maps, agreed.tissue, ("t1", "t2")) if self.maps_from == "joint" else maps
        progress("done", 1.0)

    def refine(self, estimate: LinearEstimate, seed: int, progress: Progress) -> Tensor:
        """U (x, k, z, y) of the last round."""
        return self.agreed(estimate, seed, progress).coefficients

    def agreed(self, estimate: LinearEstimate, seed: int, progress: Progress) -> Agreement:
        """Rounds from images with few edges on, whose echo trains are kept.

        Args:
            estimate: where to start.
            seed: of everything random.
            progress: takes the share of both alone, 0..1.
        """
        problem = estimate.problem
        progress("total variation", 0.0)
        edges = LowRankTotalVariation(weight=self.edges_weight, field_share=0.0)
        images = edges.refine(estimate, seed, _within(progress, 0.0, 0.2))
        nearest = NearestContrast.of_estimate(estimate, self.match_groups, self.spin_echoes, images)
        denoise = self.plugged_in(problem.network, problem.device)
        start = replace(estimate, coefficients=images)
        return self.agree(start, nearest, denoise, seed, _within(progress, 0.2, 0.8))


def _within(progress: Progress, begin: float, length: float) -> Progress:
    """Progress of a part, told as that of the whole."""
    return lambda doing, share: progress(doing, begin + length * share)
