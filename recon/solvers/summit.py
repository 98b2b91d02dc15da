"""SUMMIT: networks of the coordinates fitted to k-space through the signal model (Lao 2025; METHODS 2, 4).

    minimise over the networks:   mean |s - M F C I(A, T1, T2, T2*, phi_e, B)| + lambda sum_m lambda_m WNNM(m)

Amplitude, relaxation times, echo phases, inversion efficiency and coil maps are networks
(``scan_networks.py``), trained by Adam over batches of readout positions (``scan_fit.py``). The data term is
the mean absolute error of all frames, in units of what noise alone gives; WNNM is the weighted nuclear norm
of stacks of similar patches of the maps, one plane at a time.

The published form has ``start: constant``, ``coil_start: network``, ``held_out: 0``, ``log2_rows: 19``,
``wnnm_start: 0`` and ``wnnm_floor: 0``. By default the networks begin with the linear estimate's maps and
ESPIRiT's coil maps, grids have about as many rows as there are voxels, the norm sets in half-way with bounded
weights, and training ends where lines that were kept aside are no longer predicted better.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from quantitron.recon.data import Encoding, Maps, Problem, Protocol
from quantitron.recon.priors.block_matching import check_planes
from quantitron.recon.solvers.cartesian import CartesianSolver
from quantitron.recon.solvers.scan_fit import FitSettings, ScanFit
from quantitron.recon.solvers.solver import Progress
from quantitron.recon.solvers.training import Schedule, TrainingDiverged, train_with_restart, warn_of_poor_fit


@dataclass(frozen=True)
class Summit(FitSettings, CartesianSolver):
    """Settings of SUMMIT."""

    name: ClassVar[str] = "summit"

    preview: bool = True
    """Whether the maps of the linear estimate are sent as soon as they are there."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ValueError: if coil maps that are to stay as they are should begin with a network.
        """
        super().__post_init__()
        if self.coils == "given" and self.coil_start == "network":
            raise ValueError("coils 'given' are ESPIRiT's maps; coil_start 'network' has none: choose one")

    @property
    def needs_lines(self) -> bool:
        """The mean absolute error has no reduced form."""
        return True

    def check(self, encoding: Encoding, protocol: Protocol) -> None:
        """Refuse scans on which patches cannot be matched.

        Raises:
            ValueError: if the planes are too small for the patches, or the window is even.
        """
        super().check(encoding, protocol)
        _, ny, nx = encoding.matrix
        if self.wnnm > 0:
            check_planes(nx, ny, self.patch, self.window, self.similar)

    def solve(self, problem: Problem, progress: Progress) -> Iterator[Maps]:
        """Reconstruct one slice: the linear estimate's maps first, as a preview, then SUMMIT's.

        Raises:
            ValueError: if the scan is too small for the patches, or its lines were not kept.
        """
        self.check(problem.encoding, problem.protocol)
        if problem.kspace is None:
            raise ValueError("summit needs the sampled lines, which were not kept")
        estimate = self.linear_estimate(problem, lambda doing, share: progress(doing, 0.25 * share))
        linear = CartesianSolver.maps(
            self, estimate, estimate.coefficients, problem, lambda doing, _share: progress(doing, 0.1)
        )
        if self.preview:
            yield replace(linear, preview=True)
        if not bool(linear.mask.any()):
            yield linear
            return
        schedule = Schedule(self.epochs, self.learning_rate, self.halve_every)
        try:
            fit, _ = train_with_restart(
                lambda: ScanFit(self, problem, estimate, linear),
                lambda fit, schedule: fit.run(schedule, progress),
                schedule,
            )
        except TrainingDiverged as error:
            yield replace(linear, failure=f"summit: {error}; these are the linear estimate's maps")
            return
        maps = fit.maps(self.standard_deviations)
        if problem.noise_known:
            warn_of_poor_fit(maps.residual_to_noise, linear.residual_to_noise)
        yield maps
        progress("done", 1.0)
