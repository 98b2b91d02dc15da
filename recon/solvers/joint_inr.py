"""Joint INR: one coordinate network for all coefficient images of a fingerprint scan (Yu 2026).

With ``start: adjoint`` the network is fitted once, in the image domain, to the density-compensated adjoint,
without looking at the data again, as published. It removes what is incoherent in these images. What is not,
it keeps, and most of the adjoint's error is not: with numbers for density weights, as published, its
components stay mixed near the centre of k-space, which biases the maps by up to a quarter. Weights that are
matrices (``unmix``) undo that, still without an iteration. ``start: cg``, the preset, fits the network to
the linear estimate.

The published form is ``start: adjoint``, ``unmix: 0`` (all components, numbers as weights),
``adjoint_low_rank: 0``, ``heads: trained``, ``phase_width: 0`` and a ``decay_encoder`` above 0, all else as
preset; the paper names neither the weight decays nor the number of steps.

With ``start: cg``, ``rounds`` draw the images towards the network's as well as towards the data,

    minimise over U:   1/2 ||s - A U||^2 + attraction Q(U - f) + field_share Q(U) + R(U) + P(U),

f the network's images, Q the Gaussian prior of the linear estimate, R that of locally low rank (``llr.py``)
and P the distance of each voxel from its nearest fingerprint, minus the logarithm of Student's t; from the
second round on the network is fitted anew. METHODS 4.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.coefficient_basis import CoefficientBasis
from quantitron.recon.data import FingerprintProblem, Maps
from quantitron.recon.masks import signal_mask
from quantitron.recon.operators.subspace_density import unmixed_data
from quantitron.recon.operators.toeplitz import adjoint_images
from quantitron.recon.priors.low_rank import BlockLowRank, BlockPrecision
from quantitron.recon.solvers.fingerprint import (
    LEAST_COMPONENTS,
    FingerprintEstimate,
    FingerprintSolver,
    Prepared,
)
from quantitron.recon.solvers.joint_fit import JointFitSettings, fit_joint_network
from quantitron.recon.solvers.nearest_fingerprint import NearestFingerprint
from quantitron.recon.solvers.solver import Progress
from quantitron.recon.solvers.svdmrf import DensityCompensated

logger = logging.getLogger("quantitron")

_BLOCK = 3
"""Edge [voxels] of the blocks of low rank; as in ``llr``."""
_SMOOTHING = 0.1
"""Singular values below this share of the noise's cost their square; as in ``llr``."""
_TILINGS = 9
"""Tilings by blocks that share the penalty; as in ``llr``."""
_CONSISTENT_FROM = 1
"""Reweightings before fingerprints pull: by then most of them are right."""
_STEPS = 3
"""Least conjugate gradient steps from one covariance to the next."""
_MOST_PULL = 10.0
"""In units of the data term's curvature: where there is hardly a signal, the nearest fingerprint is noise."""
_LEAST_AROUND = 30
"""Voxels around the object for each component, from which noise and aliasing are told."""
_LEAST_NOISE = 1e-6
"""Variance that a component around the object has at least, in units of the sum of all."""
_BORDER = 2
"""Voxels around the signal that the network is fitted to as well: it is to know where the object ends."""


@dataclass(frozen=True)
class JointINR(DensityCompensated, FingerprintSolver):
    """Settings of the joint network.

    Those of density compensation serve ``start: adjoint``, those of the linear estimate ``start: cg``.
    """

    name: ClassVar[str] = "joint_inr"

    linear_iterations: int = field(default=4, metadata={"minimum": 1})
    """Conjugate gradient steps of the linear estimate's passes, at least."""
    start: str = field(default="adjoint", metadata={"choices": ("adjoint", "cg")})
    """Fitted to: the density-compensated adjoint, as published, or the linear estimate."""
    unmix: float = field(default=3e-3, metadata={"minimum": 0})
    """With ``start: adjoint``: density weights that are matrices over the components, this share being added
    to their eigenvalues (``subspace_density.py``); 0, as published: numbers."""
    adjoint_rank: int = field(default=4, metadata={"minimum": LEAST_COMPONENTS})
    """Components that are unmixed, the strongest ones of tissue; the others are left out."""
    adjoint_low_rank: float = field(default=0.2, metadata={"minimum": 0})
    """With ``start: adjoint``: weight of locally low rank of the images that the network is fitted to, in
    units of the largest singular value of what lies around the object; 0, as published: none."""
    epochs: int = field(default=120, metadata={"minimum": 1})
    """Steps of the fit, over all voxels each, where its images are the result (``start: adjoint``, or no
    ``rounds``); many of them teach the network the aliasing."""
    pull_epochs: int = field(default=10, metadata={"minimum": 1})
    """Steps of the fit where ``rounds`` draw the images towards the network's: coarse ones pull as well."""
    learning_rate: float = field(default=1e-2, metadata={"above": 0})
    """Of Adam."""
    features: int = field(default=64, metadata={"minimum": 1})
    """Features that all components share."""
    hidden: int = field(default=2, metadata={"minimum": 1})
    """Hidden layers; the last one gives the features."""
    levels: int = field(default=8, metadata={"minimum": 1, "maximum": 32})
    """Resolutions of the hash grid; the finest has about as many cells as the images have voxels."""
    grid_features: int = field(default=8, metadata={"minimum": 1, "maximum": 8})
    """Numbers that a vertex of the grid holds, for each resolution."""
    log2_rows: int = field(default=16, metadata={"minimum": 3, "maximum": 24})
    """A resolution's table has at most 2^log2_rows rows."""
    decay_encoder: float = field(default=0.0, metadata={"minimum": 0})
    """Weight decay of the hash grid, for images of mean square 1; as published it is above 0, and how much is
    not said. 1e-5 lowers the errors of a brain a little and blurs small objects: biases in spheres grow."""
    decay_network: float = field(default=2e-4, metadata={"minimum": 0})
    """Weight decay of the perceptron and the heads."""
    whitening: float = field(default=0.0, metadata={"minimum": 0, "maximum": 1})
    """0, as published: strong components count most and form the features; 1: all count alike."""
    heads: str = field(default="exact", metadata={"choices": ("exact", "trained")})
    """Whether heads are solved for in every step, or follow the gradient, as published."""
    phase_width: float = field(default=2.0, metadata={"minimum": 0})
    """Standard deviation [voxels] over which the phase taken out beforehand is averaged; 0, as published: it
    stays in."""
    fits: int = field(default=1, metadata={"minimum": 1})
    """Networks from different starts, whose images are averaged."""
    rounds: int = field(default=1, metadata={"minimum": 0})
    """With ``start: cg``: times that the images are drawn towards the network's and the data; 0, as
    published: the network's images are the result."""
    attraction: float = field(default=0.1, metadata={"minimum": 0})
    """How much the network's images are worth in that, in units of the linear estimate's prior."""
    field_share: float = field(default=0.3, metadata={"minimum": 0})
    """Share of the linear estimate's prior that is kept in that, as ``llr``'s."""
    low_rank: float = field(default=0.6, metadata={"minimum": 0})
    """Weight of locally low rank in that, as ``llr``'s."""
    reweightings: int = field(default=3, metadata={"minimum": 1})
    """Times in each round that blocks are given the covariance of their signals."""
    consistency: float = field(default=1.0, metadata={"minimum": 0})
    """Factor on the pull towards the nearest fingerprints in that, once blocks have been reweighted; 1 is the
    statistical estimate if voxels differ from fingerprints by ``mismatch``, few by much more; 0: none."""
    mismatch: float = field(default=0.07, metadata={"above": 0})
    """Root mean square by which a voxel's signal is expected to differ from the nearest fingerprint, as a
    share of the signal: several tissues in a voxel, and what the signal model does not know. The pull so
    grows with the noise, and where there is little signal."""

    def solve(self, problem: FingerprintProblem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slice; yields the final maps only."""
        if self.start == "cg":
            yield from super().solve(problem, progress)
            return
        prepared = self.prepare(problem, progress)
        progress("adjoint", 0.3)
        images, basis = self._adjoint(prepared)
        energy = images.abs().square().sum(1).permute(1, 2, 0)  # (z, y, x)
        mask = signal_mask(energy.sqrt().cpu(), self.mask_threshold)
        dz, dy, dx = problem.encoding.voxel_size
        generator = torch.Generator().manual_seed(problem.seed)
        images = self._low_rank(images, mask, generator)
        images = self._fitted(
            images,
            mask,
            (dx, dz, dy),
            self.epochs,
            generator,
            lambda doing, share: progress(doing, 0.4 + 0.3 * share),
        )
        progress("residual", 0.7)
        residual = self.residual_to_noise(prepared, basis, images)
        progress("matching", 0.75)
        yield self.matched(images, basis, problem, residual)
        progress("done", 1.0)

    def _adjoint(self, prepared: Prepared) -> tuple[Tensor, CoefficientBasis]:
        """Density-compensated images (x, k, z, y), and their basis."""
        basis, sums, csm = prepared.basis, prepared.sums, prepared.csm
        if not self.unmix:
            return self.adjoint(prepared), basis
        rank = min(self.adjoint_rank, basis.rank)
        kept = float(basis.variance[:rank].sum() / basis.variance.sum())
        basis = CoefficientBasis(
            basis.mixing[:, :, :rank], basis.variance[:rank], basis.retained_energy * kept
        )
        weights = self.weights(sums)
        unmixed = replace(sums, projected=unmixed_data(sums, weights, basis.mixing[0], self.unmix))
        images = adjoint_images(unmixed, csm, torch.eye(rank, device=csm.device), weights.to(csm.device))
        return images, basis

    def _low_rank(self, images: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Images (x, k, z, y) of low rank in blocks, mask (z, y, x) of the object.

        Noise and aliasing, alike in all places as far as they are incoherent, are those around the object.
        """
        if not self.adjoint_low_rank:
            return images
        rank = images.shape[1]
        around = images.permute(0, 2, 3, 1)[~_widened(mask).permute(2, 0, 1)]  # (v, k)
        around = around[around.abs().amax(1) > 0]  # coil maps may end with the object
        if len(around) < _LEAST_AROUND * rank:
            logger.info(
                "too little lies around the object to tell noise and aliasing: no low rank of its images"
            )
            return images
        around = around.to(torch.complex128)
        covariance = around.mT @ around.conj() / len(around)
        diagonal = covariance.diagonal().real
        covariance = covariance + _LEAST_NOISE * diagonal.sum() * torch.eye(rank).to(covariance)
        deviation = torch.linalg.cholesky(covariance)
        whitening = torch.linalg.inv(deviation).to(images)
        voxels = prod(min(_BLOCK, n) for n in (images.shape[0], *images.shape[2:]))
        penalty = BlockLowRank(self.adjoint_low_rank * (rank**0.5 + voxels**0.5), (_BLOCK,) * 3)
        white = torch.einsum("ij,xjzy->xizy", whitening, images)
        low = penalty.mean_proximal(white, 1.0, _TILINGS, generator)
        return torch.einsum("ij,xjzy->xizy", deviation.to(images), low)

    def refine(self, estimate: FingerprintEstimate, seed: int, progress: Progress) -> Tensor:
        """The network's images, or what the rounds make of them."""
        generator = torch.Generator().manual_seed(seed)
        parts = 2 * self.rounds + 1
        nearest = (
            NearestFingerprint(estimate, self.match_groups) if self.rounds and self.consistency else None
        )

        def fitted(images: Tensor, number: int) -> Tensor:
            def told(doing: str, share: float) -> None:
                progress(doing, (number + share) / parts)

            epochs = self.pull_epochs if self.rounds else self.epochs
            return self._fitted(images, estimate.mask, estimate.voxel_size, epochs, generator, told)

        images = fitted(estimate.coefficients, 0)
        drawn = estimate.coefficients
        for number in range(self.rounds):
            if number:
                images = fitted(drawn, 2 * number)
            progress("towards data and network", (2 * number + 1) / parts)
            drawn = self._drawn(estimate, images, drawn, generator, nearest)
        return drawn if self.rounds else images

    def _drawn(
        self,
        estimate: FingerprintEstimate,
        network: Tensor,
        u: Tensor,
        generator: torch.Generator,
        nearest: NearestFingerprint | None,
    ) -> Tensor:
        """Images between data and network, from u on; blocks take their covariance from the last ones."""
        operator, prior, share = estimate.operator, estimate.prior, self.attraction + self.field_share
        voxels = prod(min(_BLOCK, n) for n in (u.shape[0], *u.shape[2:]))
        threshold = estimate.noise_threshold(u.shape[1], voxels)
        penalty = BlockLowRank(self.low_rank * threshold, (_BLOCK,) * 3)
        curvature = operator.mean_diagonal()[:, None, None]
        attracted = estimate.data + self.attraction * prior.precision(network)
        for number in range(self.reweightings):
            blocks = penalty.mean_reweighting(u, _SMOOTHING * estimate.image_noise, _TILINGS, generator)
            right_hand_side, pull = attracted, 0.0 * curvature
            if nearest is not None and number >= _CONSISTENT_FROM:
                fingerprints = nearest(u)
                pull = curvature * self._pull(estimate.image_noise, u, fingerprints)
                right_hand_side = attracted + pull * fingerprints

            def normal(image: Tensor, blocks: BlockPrecision = blocks, pull: Tensor = pull) -> Tensor:
                return operator(image) + blocks(image) + share * prior.precision(image) + pull * image

            preconditioner = estimate.preconditioner(blocks.diagonal(u) + pull, share)
            u = self.settle(operator, estimate.noise, normal, right_hand_side, preconditioner, _STEPS, u)
        return u

    def _pull(self, image_noise: float, u: Tensor, fingerprints: Tensor) -> Tensor:
        """(x, 1, z, y) pull of images u (x, k, z, y) towards fingerprints, in units of the data's curvature.

        The variance of the noise over that of the mismatch, both of all components. A voxel that is further
        from its fingerprint than expected is believed to be: Student's t in place of a Gaussian, by the
        quadratic that touches it at u (Lange, Little and Taylor 1989).
        """
        noise = self.consistency * fingerprints.shape[1] * image_noise**2
        energy = fingerprints.abs().square().sum(1, keepdim=True)  # (x, 1, z, y)
        distance = (u - fingerprints).abs().square().sum(1, keepdim=True)  # (x, 1, z, y)
        expected = self.mismatch**2 * energy + distance + noise / _MOST_PULL
        return noise / expected.clamp_min(torch.finfo(energy.dtype).tiny)

    def _fitted(
        self,
        images: Tensor,
        mask: Tensor,
        voxel_size: tuple[float, float, float],
        epochs: int,
        generator: torch.Generator,
        progress: Progress,
    ) -> Tensor:
        """Images (x, k, z, y) of a network fitted to others, mask (z, y, x)."""
        settings = JointFitSettings(
            steps=epochs,
            learning_rate=self.learning_rate,
            features=self.features,
            hidden=self.hidden,
            levels=self.levels,
            grid_features=self.grid_features,
            log2_rows=self.log2_rows,
            decay_encoder=self.decay_encoder,
            decay_network=self.decay_network,
            whitening=self.whitening,
            phase_width=self.phase_width,
            heads=self.heads,
            fits=self.fits,
        )
        return fit_joint_network(
            images,
            _widened(mask).permute(2, 0, 1),
            voxel_size,
            settings,
            generator,
            lambda share: progress("joint network", share),
        )


def _widened(mask: Tensor) -> Tensor:
    """A mask (z, y, x) with some voxels around it."""
    reach = tuple(min(_BORDER, size - 1) for size in mask.shape)
    window = tuple(2 * voxels + 1 for voxels in reach)
    wide: Tensor = torch.nn.functional.max_pool3d(mask[None, None].float(), window, stride=1, padding=reach)
    return wide[0, 0] > 0
