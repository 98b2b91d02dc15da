"""Artifact removal (ARNet): a network that was shown what undersampling does to coefficient images.

    U = U0 + size net(U0 / size)

U0 is the linear estimate in the canonical form of ``canonical_series``, its intensity normalised and its
components brought to like size. The network was trained with pairs of such estimates and perfect images, and
works where scans are undersampled as those were; where this one differs, the log says in what.
One pass, nothing is asked of k-space again (MRI2Qmap, S.III). METHODS 4.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor

from quantitron.recon.canonical_series import TissueAxes, canonical_series, check_protocol, tissue_axes
from quantitron.recon.coefficient_basis import CoefficientBasis
from quantitron.recon.data import Encoding, FingerprintProblem, Maps, Protocol
from quantitron.recon.networks.trained_network import NetworkDescription, NetworkRequest, TrainedNetwork
from quantitron.recon.priors.network_denoiser import PatchwiseNetwork
from quantitron.recon.priors.series_denoiser import (
    as_trained,
    check_series_grid,
    check_series_network,
    from_trained,
    series_intensity,
)
from quantitron.recon.scan_conditions import ScanConditions, differences, visited_share
from quantitron.recon.solvers.fingerprint import FingerprintEstimate, FingerprintSolver
from quantitron.recon.solvers.solver import Progress

KIND = "artifact_removal"
TRAINED_ON = "trained_on"
"""Under which a card holds the conditions of the scans."""
_AFTERWARDS = ("weights", "match_groups", "off_grid", "standard_deviations")
"""Settings of what comes after the linear estimate."""

logger = logging.getLogger("quantitron")


@dataclass(frozen=True)
class ArtifactRemoval(FingerprintSolver):
    """Settings of the linear estimate that the network was trained on, and of the network."""

    name: ClassVar[str] = "arnet"

    tolerance: float = field(default=3.0, metadata={"minimum": 0})
    """As in the training: another estimate has other artifacts."""
    weights: str = ""
    """File with the weights of the network, from ``quantitron train-arnet``."""

    @property
    def network(self) -> NetworkRequest:
        """Of artifact removal."""
        return NetworkRequest(KIND, self.weights)

    def check_network(self, network: NetworkDescription, encoding: Encoding, protocol: Protocol) -> None:
        """Refuse a network of other channels, for larger slices or for another protocol."""
        check_series_network(network, KIND)
        check_series_grid(network, encoding.matrix)
        check_protocol(network, protocol)

    def solve(self, problem: FingerprintProblem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slice; yields the final maps only."""
        trained = problem.network
        if trained is None:
            raise ValueError("artifact removal needs a trained network")
        self.check_network(trained.description, problem.encoding, problem.protocol)
        components = check_series_network(trained.description, KIND)
        axes = tissue_axes(problem.basis, problem.dictionary, components)
        estimate = self.linear_estimate(problem, lambda doing, share: progress(doing, share))
        progress("removing artifacts", 0.4)
        # In the dictionary's own basis: the network may bring back what the scan's basis left out.
        mixing = estimate.basis.mixing[0].to(estimate.coefficients)  # (l, k)
        images = torch.einsum("lk,xkzy->xlzy", mixing, estimate.coefficients)
        self._compare(trained.description, estimate, images, axes)
        images = self.restored(images, axes, trained, problem, estimate.voxel_size)
        inside = torch.einsum("lk,xlzy->xkzy", mixing.conj(), images)
        residual = estimate.residual_to_noise(inside)  # of what the scan's own components hold
        progress("matching", 0.85)
        known = known_components(axes.axes, estimate.basis.mixing[0])
        energy = problem.basis.retained_energy * axes.retained(known)
        basis = CoefficientBasis(known[None].to(torch.complex64), torch.ones(known.shape[1]), energy)
        images = torch.einsum("lk,xlzy->xkzy", known.conj().to(images), images)
        # The noise of the linear estimate: what the network leaves of it nobody knows.
        yield self.matched(images, basis, problem, residual, estimate.image_noise**2)
        progress("done", 1.0)

    @property
    def estimate_settings(self) -> dict[str, object]:
        """Settings that the linear estimate depends on, and with it what artifacts there are."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name not in _AFTERWARDS}

    def _compare(
        self, network: NetworkDescription, estimate: FingerprintEstimate, images: Tensor, axes: TissueAxes
    ) -> None:
        """Say in the log in what a scan differs from those that the network was trained on."""
        problem = estimate.problem
        series = canonical_series(images, axes.axes, estimate.voxel_size).images(images)
        conditions = ScanConditions(
            coils=problem.kspace.samples.shape[0],
            calibrated=problem.calibration is not None and problem.calibration.samples.numel() > 0,
            visited=visited_share(problem.kspace),
            signal_to_noise=series_intensity(series) / estimate.noise**0.5,
            solver=self.estimate_settings,
        )
        found = differences(network.card.get(TRAINED_ON), conditions)
        if found:
            logger.warning(
                "arnet: the network was trained on other scans than this one, whose artifacts may stay: %s",
                "; ".join(found),
            )

    def restored(
        self,
        images: Tensor,
        axes: TissueAxes,
        trained: TrainedNetwork,
        problem: FingerprintProblem,
        voxel_size: tuple[float, float, float],
    ) -> Tensor:
        """Images without artifacts.

        Args:
            images: (x, l, z, y) in the basis of the problem.
            axes: the canonical ones.
            trained: the network.
            problem: the slice.
            voxel_size: edges [m] along x, z, y.

        Returns:
            (x, l, z, y).
        """
        form = canonical_series(images, axes.axes, voxel_size)
        series = form.images(images)
        scale = series_intensity(series) * axes.channels().to(series)
        network = PatchwiseNetwork(trained, problem.device)
        change = from_trained(network.map(as_trained(series / scale, trained.description))).to(series)
        return form.replaced(images, series + scale * change)


def known_components(restored: Tensor, scan: Tensor) -> Tensor:
    """The components that restored images can be compared in.

    They are those that the network restores, and of the scan's own what is orthogonal to all of these. In
    any other direction the images hold a part of the signal only.

    Args:
        restored: (l, K) orthonormal columns, the canonical ones.
        scan: (l, k) orthonormal columns that the linear estimate was made in.

    Returns:
        (l, max(k, K)) orthonormal columns.
    """
    overlap = restored.to(scan).mH @ scan  # (K, k)
    if not bool(overlap.imag.any()):
        overlap, scan = overlap.real, scan.real
    unseen = torch.linalg.svd(overlap).Vh[len(overlap) :].mH  # (k, k - K)
    return torch.cat([restored.to(scan), scan @ unseen], 1)
