"""Plug-and-play fingerprinting: ADMM with a denoiser on the coefficient images (Fatania 2022).

    minimise 1/2 ||s - A U||^2 + field_share Q(U) + R(U)

R is whatever prior the denoiser stands for: in the place of its proximal step the images are denoised. In
turns: conjugate gradients for U, pulled towards the denoised images; the denoiser, on U plus the multipliers;
the multipliers. A network that was trained on perfect images has learnt that they are fingerprints, voxel by
voxel; with ``fingerprints`` a denoiser that was not is told so: the fingerprints nearest to its images take
their place. As published, noise level and penalty stay the same; with a first level above the last one
the level falls from round to round and the penalty rises with its inverse square (Zhang 2021). Q is the
Gaussian prior of the linear estimate. METHODS 4.

``network`` was trained on coefficient images of one protocol; ``tv`` and ``bm4d`` know no protocol, and
restore each image alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.algorithms.admm import Splitting, admm
from quantitron.recon.canonical_series import canonical_series, check_protocol, tissue_axes
from quantitron.recon.data import Encoding, FingerprintProblem, Maps, Protocol
from quantitron.recon.networks.trained_network import NetworkDescription, NetworkRequest, TrainedNetwork
from quantitron.recon.priors.block_matching_denoiser import BlockMatchingDenoiser
from quantitron.recon.priors.denoiser import annealed_levels
from quantitron.recon.priors.network_denoiser import nearest_level
from quantitron.recon.priors.series_denoiser import (
    ImageByImage,
    NetworkSeriesDenoiser,
    SeriesDenoiser,
    check_series_grid,
    check_series_network,
    series_intensity,
)
from quantitron.recon.priors.variation_denoiser import VariationDenoiser
from quantitron.recon.solvers.fingerprint import FingerprintEstimate, FingerprintSolver
from quantitron.recon.solvers.nearest_fingerprint import NearestFingerprint
from quantitron.recon.solvers.solver import Progress

KIND = "series_denoiser"
DENOISERS = ("tv", "bm4d", "network")


@dataclass(frozen=True)
class PlugAndPlay(FingerprintSolver):
    """Settings of the rounds between k-space and denoiser."""

    name: ClassVar[str] = "mrf_pnp"

    linear_iterations: int = field(default=4, metadata={"minimum": 1})
    """Conjugate gradient steps of the second pass: only a start is wanted here."""
    denoiser: str = field(default="tv", metadata={"choices": DENOISERS})
    """``network`` is trained on coefficient images; ``tv`` and ``bm4d`` need no training."""
    weights: str = ""
    """File with the weights of the network, from ``quantitron train-series-denoiser``."""
    rounds: int = field(default=20, metadata={"minimum": 1})
    """Rounds of the splitting."""
    iterations: int = field(default=10, metadata={"minimum": 1})
    """Conjugate gradient steps in each of them."""
    first_level: float = field(default=0.1, metadata={"above": 0})
    """Noise level of the first round, relative to the intensity of the strongest component. A network did
    best from 0.3 to 0.05 on scans 8-fold undersampled; it must have been trained up to there."""
    last_level: float = field(default=0.02, metadata={"above": 0})
    """Noise level of the last one; those between are spaced evenly in the logarithm."""
    penalty: float = field(default=1.0, metadata={"above": 0})
    """Trust in what is restored: penalty = this x noise variance / (level x intensity)^2."""
    fingerprints: bool = True
    """Whether the fingerprints nearest to the denoised images take their place; as published: no."""
    field_share: float = field(default=0.3, metadata={"minimum": 0})
    """Share of the linear estimate's prior that is kept; 0, as published: none."""

    def __post_init__(self) -> None:
        """Refuse levels that rise.

        Raises:
            ValueError: if the first level is below the last one.
        """
        super().__post_init__()
        annealed_levels(self.first_level, self.last_level, self.rounds)

    @property
    def network(self) -> NetworkRequest | None:
        """Of a denoiser of series, where one is plugged in."""
        return NetworkRequest(KIND, self.weights) if self.denoiser == "network" else None

    def check_network(self, network: NetworkDescription, encoding: Encoding, protocol: Protocol) -> None:
        """Refuse a network of other channels or levels, for larger slices or for another protocol."""
        check_series_network(network, KIND)
        for level in (self.first_level, self.last_level):
            nearest_level(network.noise_levels, level)
        check_series_grid(network, encoding.matrix)
        check_protocol(network, protocol)

    def solve(self, problem: FingerprintProblem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slice; yields the final maps only.

        A network that is missing or does not suit is found out before the linear estimate.
        """
        if self.denoiser == "network":
            trained = self._trained(problem)
            components = check_series_network(trained.description, KIND)
            tissue_axes(problem.basis, problem.dictionary, components)
        yield from super().solve(problem, progress)

    def refine(self, estimate: FingerprintEstimate, seed: int, progress: Progress) -> Tensor:
        """U (x, k, z, y) where k-space and denoiser agree."""
        denoise = self.series_denoiser(estimate)
        lowest, highest = self._level_range(estimate.problem)
        nearest = NearestFingerprint(estimate, self.match_groups) if self.fingerprints else None
        generator = torch.Generator().manual_seed(seed)
        form = canonical_series(estimate.coefficients, self._axes(estimate), estimate.voxel_size)
        scale = series_intensity(form.images(estimate.coefficients))

        def closest(target: Tensor, factor: float, last: Tensor) -> Tensor:
            return estimate.proximal(target, factor, last, self.iterations, self.field_share)

        u = estimate.coefficients
        state = Splitting(u, u, torch.zeros_like(u), 1.0, 0, 1.0, 1.0)
        for number, level in enumerate(annealed_levels(self.first_level, self.last_level, self.rounds)):
            progress("denoising", number / self.rounds)
            penalty = self.penalty * estimate.noise / (level * scale) ** 2

            def restored(images: Tensor, _step: float, level: float = level) -> Tensor:
                series = form.images(images)
                # The level is one of noise beside the scan's own intensity, whatever the images' is now. That
                # may lead beyond the levels of a network, which the settings kept within.
                own = min(max(level * scale / series_intensity(series), lowest), highest)
                clean = form.replaced(images, denoise(series, own, generator))
                return clean if nearest is None else nearest(clean)

            # The multiplier is kept as multiplier / penalty.
            state = replace(state, u=state.u * (state.penalty / penalty), penalty=penalty)
            state = admm(closest, restored, state, iterations=1, tolerance=0.0)
        return state.x

    def series_denoiser(self, estimate: FingerprintEstimate) -> SeriesDenoiser:
        """What is plugged in.

        Raises:
            ValueError: if it is a network, and none or one for something else came with the problem.
        """
        if self.denoiser == "tv":
            dx, dz, dy = estimate.voxel_size
            return ImageByImage(VariationDenoiser(voxel_size=(dz, dy, dx)))
        if self.denoiser == "bm4d":
            return ImageByImage(BlockMatchingDenoiser())
        return NetworkSeriesDenoiser(self._trained(estimate.problem), estimate.problem.device)

    def _trained(self, problem: FingerprintProblem) -> TrainedNetwork:
        """The network that came with the problem, if it suits.

        Raises:
            ValueError: in one sentence.
        """
        if problem.network is None:
            raise ValueError("the denoiser 'network' needs a trained network")
        self.check_network(problem.network.description, problem.encoding, problem.protocol)
        return problem.network

    def _level_range(self, problem: FingerprintProblem) -> tuple[float, float]:
        """Lowest and highest noise level that the denoiser knows."""
        if self.denoiser != "network" or problem.network is None:
            return 0.0, math.inf
        levels = problem.network.description.noise_levels
        return levels[0], levels[-1]

    def _axes(self, estimate: FingerprintEstimate) -> Tensor:
        """(k, K) the canonical axes for a network; the scan's own for what knows none."""
        problem = estimate.problem
        mixing = estimate.basis.mixing[0]  # (l, k)
        if self.denoiser != "network" or problem.network is None:
            return torch.eye(mixing.shape[1])
        components = check_series_network(problem.network.description, KIND)
        axes = tissue_axes(problem.basis, problem.dictionary, components).axes  # (l, K)
        return mixing.mH @ axes.to(mixing)
