"""The arrays that move through a reconstruction: frozen dataclasses, SI units, a shape on every field.

Axis letters used in this project's shape comments:

====  ==============================================================================
s     slice or slab of a multi-slice scan (1 for a single slab)
z     partition (kz, or slice direction in image space)
y     phase-encoding line (ky, or phase direction)
x     readout position in image space (the readout is Fourier transformed on arrival)
c     receive channel
w     contrast: flat index over (TI, tau), TI slowest; over flip angle for ``vfa_gre``; time
      point for ``fisp_mrf``
e     echo (TE)
t     frame: flat index over (TI, tau, TE), ``t = w * n_echoes + e``
l     component of the temporal basis over the contrasts
d     direction of k-space on any trajectory, in the order x, y[, z]
g     distinct readout: all readouts of one trajectory
n     sample along any trajectory
====  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantitron.recon.networks.trained_network import TrainedNetwork


@dataclass(frozen=True)
class Encoding:
    """Grid that k-space is sampled on or images are made on, and delivered grid. Tuples run (z, y, x)."""

    matrix: tuple[int, int, int]
    """Points of the k-space grid (z, y, x) after readout oversampling is removed; voxels, for a scan on any
    trajectory."""
    field_of_view: tuple[float, float, float]
    """Extent of ``matrix`` [m], (z, y, x)."""
    delivered_matrix: tuple[int, int, int]
    """Voxels of the maps (z, y, x): ``matrix`` less phase and slice oversampling."""
    slices: int = 1
    """Slices or slabs, each with a k-space of its own."""
    coils: int = 1
    """Receive channels."""
    trajectory: str = "cartesian"
    """As the header names it. All but ``cartesian`` bring the k-space position of every sample along."""

    @property
    def voxel_size(self) -> tuple[float, float, float]:
        """Voxel edge lengths [m], (z, y, x)."""
        fz, fy, fx = self.field_of_view
        nz, ny, nx = self.matrix
        return fz / nz, fy / ny, fx / nx

    @property
    def delivered_field_of_view(self) -> tuple[float, float, float]:
        """Extent of the delivered maps [m], (z, y, x)."""
        dz, dy, dx = self.voxel_size
        nz, ny, nx = self.delivered_matrix
        return dz * nz, dy * ny, dx * nx

    def crop(self, image: Tensor) -> Tensor:
        """Cut an image (..., z, y, x) on ``matrix`` to the delivered matrix about the centre voxel n/2."""
        for axis, (full, kept) in enumerate(zip(self.matrix, self.delivered_matrix, strict=True)):
            image = image.narrow(image.ndim - 3 + axis, full // 2 - kept // 2, kept)
        return image


@dataclass(frozen=True)
class Protocol:
    """What the sequence played. Times in seconds, angles in radians."""

    sequence: str
    """``t2ir_gre``, ``vfa_gre``, ``megre`` or ``fisp_mrf``."""
    echo_time: tuple[float, ...]
    """Echo times [s], (e,). ``fisp_mrf``: from an excitation to the first sample, one value."""
    repetition_time: tuple[float, ...]
    """Repetition time [s], one value, or for ``fisp_mrf`` one for each time point, (w,)."""
    flip_angle: tuple[float, ...]
    """Flip angles [rad]: one, or for ``vfa_gre`` and ``fisp_mrf`` one for each contrast, (w,)."""
    preparation_time: tuple[float, ...] = ()
    """T2-preparation times tau [s], (tau,); only ``t2ir_gre``."""
    inversion_time: tuple[float, ...] = ()
    """Inversion times [s] as the header gives them; excitation n otherwise follows at n TR. ``fisp_mrf``:
    one, from the inversion to the first excitation; none where nothing is inverted."""
    excitations: int = 1
    """Excitations N after each preparation; only ``t2ir_gre``."""
    inversion_efficiency: float | None = None
    """0..1, 1 a perfect inversion (B = -efficiency); None where it is to be estimated."""
    field_strength: float | None = None
    """Main field [T]."""
    phase_sign: int = 1
    """Sign of the echo phase: ``phase = phi0 + phase_sign 2 pi b0 TE``. It says nothing of where voxels lie:
    data that were conjugated as a whole are mirrored images too."""
    rf_phase: tuple[float, ...] = ()
    """Phase [rad] of each pulse of ``fisp_mrf``, (w,), which the receiver follows; empty: all alike."""

    @property
    def contrast_shape(self) -> tuple[int, int, int]:
        """Lengths of the contrast axes (TI, tau, TE) of the 6D k-space."""
        if self.sequence == "t2ir_gre":
            return self.excitations, len(self.preparation_time), len(self.echo_time)
        if self.sequence in ("vfa_gre", "fisp_mrf"):
            return len(self.flip_angle), 1, len(self.echo_time)
        return 1, 1, len(self.echo_time)

    @property
    def contrasts(self) -> int:
        """Number of contrasts w at each echo."""
        return self.contrast_shape[0] * self.contrast_shape[1]

    @property
    def echoes(self) -> int:
        """Number of echoes e."""
        return len(self.echo_time)

    @property
    def frames(self) -> int:
        """Number of frames T."""
        return self.contrasts * self.echoes


@dataclass(frozen=True)
class KSpace:
    """The lines that were sampled, whitened, in hybrid space (kz, ky, x). Repeated lines are averaged."""

    samples: Tensor
    """(line, c, x) complex: each line after the unitary inverse Fourier transform along the readout."""
    contrast: Tensor
    """(line,) int64: w of each line."""
    echo: Tensor
    """(line,) int64: e of each line."""
    slice: Tensor
    """(line,) int64: s of each line."""
    kz: Tensor
    """(line,) int64 in 0..z-1; k = 0 lies at z // 2."""
    ky: Tensor
    """(line,) int64 in 0..y-1; k = 0 lies at y // 2."""
    count: Tensor
    """(line,) float: how many acquisitions the line is the mean of; its noise variance is 1 / count."""
    energy: float
    """Sum of |s|^2 over all acquired samples before averaging."""
    contrast_shape: tuple[int, int, int]
    """Lengths of the axes (TI, tau, TE)."""
    grid: tuple[int, int, int, int]
    """(s, z, y, x) of the scan."""

    @property
    def acquired_samples(self) -> int:
        """Complex samples acquired (over coils and readout), repeats counted."""
        return int(self.count.sum().item()) * self.samples.shape[1] * self.samples.shape[2]

    def dense(self, slice_index: int = 0) -> Tensor:
        """The 6D view of one slice, zero where nothing was sampled.

        Returns:
            (c, kx, ky, kz, TI, tau, TE) complex, unitary centred Fourier transform along kx.
        """
        _, nz, ny, nx = self.grid
        n_ti, n_tau, n_te = self.contrast_shape
        coils = self.samples.shape[1]
        chosen = self.slice == slice_index
        buffer = self.samples.new_zeros(n_ti * n_tau, n_te, nz, ny, coils, nx)  # (w, e, z, y, c, x)
        buffer[self.contrast[chosen], self.echo[chosen], self.kz[chosen], self.ky[chosen]] = self.samples[
            chosen
        ]
        spectrum = torch.fft.fftshift(
            torch.fft.fft(torch.fft.ifftshift(buffer, dim=-1), dim=-1, norm="ortho"), dim=-1
        )
        spectrum = spectrum.reshape(n_ti, n_tau, n_te, nz, ny, coils, nx)  # (TI, tau, TE, z, y, c, kx)
        result: Tensor = spectrum.permute(5, 6, 4, 3, 0, 1, 2)  # (c, kx, ky, kz, TI, tau, TE)
        return result


@dataclass(frozen=True)
class TrajectoryKSpace:
    """Samples along any trajectory, whitened, readout after readout. A repeated readout stands there twice.

    With r the voxel index counted from n // 2: ``s(k) = sum_r I(r) exp(-2 pi i k.r) / sqrt(z y x)``.
    """

    samples: Tensor
    """(c, n) complex64: the samples of all readouts, one readout after the other."""
    trajectory: Tensor
    """(n, d) float32: k-space position in cycles per voxel, columns x, y[, z], -0.5..0.5; d is 2 or 3."""
    readout_length: Tensor
    """(readout,) int64: samples of each readout; their sum is n."""
    time_point: Tensor
    """(readout,) int64: w of each readout."""
    slice: Tensor
    """(readout,) int64: s of each readout."""
    density: Tensor | None
    """(n,) float32: density compensation weights, where the scan brought some."""
    energy: float
    """Sum of |s|^2 over all samples."""
    time_points: int
    """Length of the schedule; time points may be missing."""
    grid: tuple[int, int, int, int]
    """(s, z, y, x) of the images."""

    @property
    def acquired_samples(self) -> int:
        """Complex samples acquired, over coils."""
        return self.samples.numel()

    def of_slice(self, index: int) -> TrajectoryKSpace:
        """The readouts of one slice, as a scan of one slice (s = 1)."""
        return self.where(self.slice == index, (1, *self.grid[1:]))

    def where(self, chosen: Tensor, grid: tuple[int, int, int, int] | None = None) -> TrajectoryKSpace:
        """The readouts for which ``chosen`` (readout,) bool holds.

        Args:
            chosen: which of them.
            grid: (s, z, y, x) of the result, whose readouts then all belong to slice 0; the same if None.
        """
        whole = bool(chosen.all())
        points = None if whole else chosen.repeat_interleave(self.readout_length)  # (n,)
        samples = self.samples if points is None else self.samples[:, points]
        return replace(
            self,
            samples=samples,
            trajectory=self.trajectory if points is None else self.trajectory[points],
            readout_length=self.readout_length[chosen],
            time_point=self.time_point[chosen],
            slice=self.slice[chosen] * (1 if grid is None else 0),
            density=self.density if self.density is None or points is None else self.density[points],
            energy=self.energy if whole else float(samples.abs().square().sum(dtype=torch.float64)),
            grid=self.grid if grid is None else grid,
        )


@dataclass(frozen=True)
class Navigator:
    """Lines that sample the same k-space position in every contrast: the source of a measured basis."""

    samples: Tensor
    """(n, c, x) complex, whitened, hybrid space."""
    contrast: Tensor
    """(n,) int64."""
    echo: Tensor
    """(n,) int64."""


@dataclass(frozen=True)
class Calibration:
    """Calibration lines of one contrast and echo, for the coil maps."""

    samples: Tensor
    """(s, z, y, c, x) complex, whitened, hybrid space, averaged; zero where not acquired."""
    count: Tensor
    """(s, z, y) float: acquisitions at each point."""


@dataclass(frozen=True)
class Basis:
    """Temporal basis over the contrasts, shared by all echoes (the signal factorises, METHODS 2)."""

    contrast: Tensor
    """(w, l) real or complex, orthonormal columns."""
    variance: Tensor
    """(l,) float: mean square of each component over the dictionary or data, relative to their sum."""
    retained_energy: float
    """Share of the signal energy that the columns keep, 0..1."""
    source: str
    """``dictionary``, ``navigator`` or ``centre``."""

    @property
    def rank(self) -> int:
        """Number of columns."""
        return int(self.contrast.shape[1])


@dataclass(frozen=True)
class ReducedKSpace:
    """The least-squares data term in Gram form (METHODS 1), one term an echo.

    With the coefficient k-space ``u[e, c](k)`` (an l-vector at each k-space point) of echo e,

        1/2 sum |s - Psi u|^2 = 1/2 sum_{e,c,k} [u^H G_e(k) u - 2 Re(u^H b_{e,c}(k))] + 1/2 energy

    so that nothing after accumulation depends on the number of frames.
    """

    gram: Tensor
    """(s, e, z, y, l, l): G = sum over acquired lines of conj(Psi_w) Psi_w^T."""
    projected: Tensor
    """(s, e, z, y, l, c, x) complex: b = sum over acquired lines of conj(Psi_w) s, hybrid space."""
    count: Tensor
    """(s, e, z, y) float: lines acquired at each point."""
    energy: float
    """Sum of |s|^2 over all acquired samples."""
    samples: int
    """Complex samples acquired, over coils and readout."""
    basis: Basis
    """The basis that both are expressed in."""


@dataclass(frozen=True)
class Problem:
    """Everything that a solver may use. One slice or slab: s = 1 throughout."""

    encoding: Encoding
    protocol: Protocol
    reduced: ReducedKSpace
    """Gram form of the data of this slice."""
    kspace: KSpace | None = None
    """The sampled lines, for solvers that declare ``needs_lines``."""
    calibration: Calibration | None = None
    """Calibration lines, where the scan has them."""
    noise_known: bool = True
    """Whether the data were whitened with a noise scan (then E|n|^2 = 1 for each sample)."""
    network: TrainedNetwork | None = None
    """The trained network that the solver asked for (``Solver.network``)."""
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class FingerprintDictionary:
    """Simulated fingerprints over a grid of T1 x T2 (x B1), in their own temporal basis."""

    t1: Tensor
    """(i,) [s], ascending, spaced evenly in the logarithm."""
    t2: Tensor
    """(j,) [s], likewise."""
    b1: Tensor
    """(b,) actual over nominal flip angle, ascending, spaced evenly; (1.0,) where it was not varied."""
    axes: Tensor
    """(w, r) real or complex, orthonormal columns, the strongest first: they span the dictionary."""
    variance: Tensor
    """(r,) float: share of the energy of the normalised atoms that each column holds."""
    coefficients: Tensor
    """(b, i, j, r) of ``axes``' dtype: ``signal = axes @ coefficients``, not normalised, for unit PD."""

    @property
    def plausible(self) -> Tensor:
        """(i, j) bool: where T2 is not above T1. The others exist for interpolation's sake."""
        return self.t2 <= self.t1[:, None]

    def basis(self, rank: int | float) -> Basis:
        """The leading columns.

        Args:
            rank: their number (int), or the share of the energy to keep (float).

        Raises:
            ValueError: if there are fewer columns than ``rank``, or it is not positive.
        """
        columns = self.axes.shape[1]
        if rank <= 0 or (isinstance(rank, float) and rank > 1):
            raise ValueError(f"rank {rank} is neither a number of columns nor a share of the energy in 0..1")
        if isinstance(rank, int) and rank > columns:
            raise ValueError(f"rank {rank} is above the {columns} columns that span the dictionary")
        share = self.variance.double().cumsum(0)
        kept = rank if isinstance(rank, int) else min(columns, int((share < rank - 1e-12).sum()) + 1)
        return Basis(
            self.axes[:, :kept].contiguous(), self.variance[:kept], float(share[kept - 1]), "dictionary"
        )


@dataclass(frozen=True)
class FingerprintProblem:
    """Everything that a solver of fingerprints may use. One slice or slab: s = 1 throughout."""

    encoding: Encoding
    protocol: Protocol
    kspace: TrajectoryKSpace
    """The readouts of this slice."""
    basis: Basis
    """Temporal basis over the time points."""
    dictionary: FingerprintDictionary
    """What the coefficients are matched with. ``basis`` holds its leading columns, unless it was measured."""
    calibration: TrajectoryKSpace | None = None
    """Calibration readouts, where the scan has them."""
    b1: Tensor | None = None
    """(z, y, x) actual over nominal flip angle, where it is known."""
    noise_known: bool = True
    """Whether the data were whitened with a noise scan (then E|n|^2 = 1 for each sample)."""
    network: TrainedNetwork | None = None
    """The trained network that the solver asked for (``Solver.network``)."""
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


MAP_NAMES = ("t1", "t2", "t2star", "pd", "b0", "phase", "inversion")
"""Maps that a solver may return, in the order of delivery."""

SEQUENCE_MAPS: Mapping[str, tuple[str, ...]] = {
    "vfa_gre": ("t1", "t2star", "pd", "b0", "phase"),
    "t2ir_gre": ("t1", "t2", "t2star", "pd", "b0", "phase", "inversion"),
    "megre": ("t2star", "pd", "b0", "phase"),
    "fisp_mrf": ("t1", "t2", "pd"),
}
"""Which maps each sequence gives."""


@dataclass(frozen=True)
class Maps:
    """What a solver returns, on the delivered grid. Voxels with no estimate are NaN."""

    values: Mapping[str, Tensor]
    """Name -> (s, z, y, x) float32. t1, t2, t2star [s]; pd [a.u.]; b0 [Hz]; phase [rad]; inversion [0..1]."""
    mask: Tensor
    """(s, z, y, x) bool: where there is signal."""
    standard_deviation: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> (s, z, y, x) float32, in the unit of the map; empty where not estimated."""
    magnitude: Tensor | None = None
    """(e, s, z, y, x) float32: coil-combined echo images of the first contrast, where asked for."""
    rank: int = 0
    """Coefficient images that were solved for."""
    retained_energy: float = 1.0
    """Share of the dictionary's energy inside the solver's basis."""
    residual_to_noise: float = float("nan")
    """||s - A x||^2 / number of samples; 1 is pure noise. NaN where the noise level is not known."""
    failed_voxels: int = 0
    """Voxels inside the mask with no estimate."""
    preview: bool = False
    failure: str = ""
    """What went wrong, in one sentence, where these maps are less than what was asked for; else empty."""

    @staticmethod
    def stack(parts: list[Maps]) -> Maps:
        """Join the maps of consecutive slices along s.

        Raises:
            ValueError: if ``parts`` is empty or the parts hold different maps.
        """
        if not parts:
            raise ValueError("no maps to stack")
        names = list(parts[0].values)
        if any(list(part.values) != names for part in parts):
            raise ValueError("the slices hold different maps and cannot be stacked")
        magnitudes = [part.magnitude for part in parts if part.magnitude is not None]
        return replace(
            parts[0],
            values={name: torch.cat([part.values[name] for part in parts]) for name in names},
            mask=torch.cat([part.mask for part in parts]),
            standard_deviation={
                name: torch.cat([part.standard_deviation[name] for part in parts])
                for name in parts[0].standard_deviation
            },
            magnitude=torch.cat(magnitudes, dim=1) if len(magnitudes) == len(parts) else None,
            residual_to_noise=sum(part.residual_to_noise for part in parts) / len(parts),
            failed_voxels=sum(part.failed_voxels for part in parts),
            failure=next((part.failure for part in parts if part.failure), ""),
        )


@dataclass(frozen=True)
class ScanData:
    """What accumulation hands on: the lines, or their reduced form, or both; and what comes beside them."""

    kspace: KSpace | TrajectoryKSpace | None
    """Sampled lines; None where the basis was known beforehand and no solver asked for lines."""
    reduced: ReducedKSpace | None
    """Gram form of all slices; None where the basis must still be found in the data."""
    navigator: Navigator | None
    calibration: Calibration | TrajectoryKSpace | None
    noise_known: bool
    """Whether the samples were whitened with a noise scan."""
    energy: tuple[float, ...]
    """Sum of |s|^2 over the acquired samples of each slice, (s,)."""
