"""SUMMIT: networks of the coordinates fitted to k-space through the signal model (Lao 2025; METHODS 2, 4).

    minimise over the networks:   mean |s - M F C I(A, T1, T2, T2*, phi_e, B)| + lambda sum_m lambda_m WNNM(m)

Amplitude, relaxation times, echo phases, inversion efficiency and coil maps are networks
(``scan_networks.py``), trained by Adam over batches of readout positions (``scan_fit.py``). The data term is
the mean absolute error of all frames, in units of what noise alone gives; WNNM is the weighted nuclear norm
of stacks of similar patches of the maps, one plane at a time.

``start: constant``, ``coil_start: network`` and ``held_out: 0`` are the published form. By default the
networks begin with the linear estimate's maps and ESPIRiT's coil maps, and training ends where lines that
were kept aside are no longer predicted better.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from quantitron.recon.data import Encoding, Maps, Problem, Protocol
from quantitron.recon.priors.block_matching import check_planes
from quantitron.recon.solvers.cartesian import CartesianSolver
from quantitron.recon.solvers.scan_fit import ScanFit
from quantitron.recon.solvers.solver import Progress
from quantitron.recon.solvers.training import Schedule, TrainingDiverged, train_with_restart


@dataclass(frozen=True)
class Summit(CartesianSolver):
    """Settings of SUMMIT."""

    name: ClassVar[str] = "summit"

    preview: bool = True
    """Whether the maps of the linear estimate are sent as soon as they are there."""
    start: Literal["maps", "constant"] = "maps"
    """What the networks begin with: the linear estimate's maps, or the medians of these."""
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
    shared_encoder: bool = False
    """One hash grid for amplitude and relaxation times in place of one for each."""
    log2_rows: int = field(default=15, metadata={"minimum": 3, "maximum": 24})
    """A resolution of their hash grid has at most 2^log2_rows rows."""
    phase_log2_rows: int = field(default=15, metadata={"minimum": 3, "maximum": 24})
    """The same for the echo phases; LoREIN has 12, which leaves more of the field than the noise hides."""
    held_out: float = field(default=0.03, metadata={"minimum": 0, "maximum": 0.5})
    """Share of the lines kept aside; 0: none, and the last epoch's networks count."""
    check_every: int = field(default=2, metadata={"minimum": 1})
    """Epochs between looks at the lines kept aside."""
    patience: int = field(default=5, metadata={"minimum": 0})
    """Looks without a better prediction of them after which training ends; 0: it runs to the end."""

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
        yield fit.maps()
        progress("done", 1.0)
