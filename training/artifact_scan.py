"""Fingerprint scans in memory, and what a perfect scan of the same object would have given.

As ``phantoms.simulate_fingerprint`` makes them, without the raw file: the readouts are whitened with the
noise covariance that they were given, and one slice is one scan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantitron.gadgets.dictionary_cache import cached_dictionary
from quantitron.gadgets.errors import ScanError
from quantitron.phantoms.anatomy import Anatomy
from quantitron.phantoms.coils import noise_covariance
from quantitron.phantoms.fingerprint_order import acquired_interleaves, check_order, stacked_trains
from quantitron.phantoms.scene import FieldSettings, Scene, make_scene
from quantitron.phantoms.schedules import make_schedule
from quantitron.phantoms.signal_table import SignalBasis, signal_basis, tabulate
from quantitron.phantoms.simulate_fingerprint import signal_level
from quantitron.phantoms.spiral import SpiralDesign, design_spiral, rotate
from quantitron.phantoms.spiral_encode import partition_spectra
from quantitron.recon.data import (
    Basis,
    Encoding,
    FingerprintDictionary,
    FingerprintProblem,
    Protocol,
    TrajectoryKSpace,
)

CALIBRATION_RADIUS = 0.08
"""Extent of the calibration in k-space [cycles per voxel], that of ``simulate_fingerprint``."""


@dataclass(frozen=True)
class ScanPlan:
    """How slices are scanned; fields as those of ``simulate_fingerprint``."""

    schedule: str = "jiang"
    """``jiang``, ``tgas`` or a ``FILE.csv``."""
    points: int | None = None
    """Time points; None for the schedule's own number."""
    schedule_seed: int = 0
    """Seed that ``jiang`` was made with: another one is another protocol."""
    interleaves: int = 48
    """Spirals that fill k-space."""
    acquired: int | None = None
    """Those of them that are played; None for all."""
    order: str = "shuffled"
    """``sequential`` or ``shuffled``."""
    matrix: tuple[int, int] = (192, 192)
    """Voxels (x, y)."""
    fov: tuple[float, float, float] = (220.0, 220.0, 5.0)
    """Field of view (x, y) and thickness [mm]."""
    coils: int = 8
    """Receive channels."""
    snr: float = 10.0
    """As ``simulate_fingerprint`` has it; infinite for none."""
    calibration: bool = False
    """Whether all spirals are played at low resolution beforehand, for the coil maps: undersampled scans of
    several coils need that."""
    supersampling: tuple[int, int, int] = (2, 2, 2)
    """Fine voxels of the object along the edges (x, y, z) of a scan voxel."""

    def protocol(self) -> Protocol:
        """What is played."""
        return make_schedule(self.schedule, self.points, seed=self.schedule_seed)

    def dictionary(self) -> FingerprintDictionary:
        """Of the protocol, from the cache."""
        return cached_dictionary(self.protocol())

    @property
    def visited(self) -> float:
        """Samples of all distinct readouts over voxels (see ``recon.scan_conditions``)."""
        protocol = self.protocol()
        played = min(len(acquired_interleaves(self.interleaves, self.acquired)), protocol.contrasts)
        samples = int(spirals(self).shape[1])
        return played * samples / math.prod(self.matrix)

    @property
    def encoding(self) -> Encoding:
        """The grid of one slice."""
        (nx, ny), (fx, fy, fz) = self.matrix, self.fov
        grid = (1, ny, nx)
        return Encoding(grid, (1e-3 * fz, 1e-3 * fy, 1e-3 * fx), grid, 1, self.coils, "spiral")


@dataclass(frozen=True)
class PlacedSlice:
    """A slice of an object under a scanner, and the basis in which its fingerprints are reconstructed."""

    scene: Scene
    signals: SignalBasis
    """Basis of the object's fingerprints, and the object in it."""
    whitening: NDArray[np.complex128]
    """(c, c), applied to the channels: their noise then has variance 1."""
    basis: Basis
    """Temporal basis of the reconstruction."""
    brightest: int
    """Time point of the most signal."""

    @property
    def sensitivities(self) -> Tensor:
        """(c, v) of the whitened channels."""
        return torch.from_numpy(self.whitening.astype(np.complex64)) @ self.scene.coils

    def perfect(self, csm: Tensor) -> Tensor:
        """What all of k-space without noise gives, combined with the coil maps of a reconstruction.

        Args:
            csm: (x, c, z, y) coil maps of unit root-sum-of-squares, of whatever phase.

        Returns:
            (x, l, z, y) coefficient images in the temporal basis of the problem.
        """
        total = None
        for coil, sensitivity in enumerate(self.sensitivities):
            images = torch.stack(
                [
                    truncated(self.scene, self.scene.pd * sensitivity * part)
                    for part in self.signals.coefficients[0].to(torch.complex64)
                ]
            )  # (l', z, y, x)
            images = images * csm[:, coil].permute(1, 2, 0).conj()
            total = images if total is None else total + images
        assert total is not None
        return self._in_basis(total)

    def combined(self) -> Tensor:
        """The same for coil maps of the root-sum-of-squares of the whitened channels and the object's phase.

        Returns:
            (x, l, z, y).
        """
        gain = torch.linalg.vector_norm(self.sensitivities, dim=0)  # (v,)
        density = self.scene.pd * gain
        parts = self.signals.coefficients[0].to(torch.complex64)
        return self._in_basis(torch.stack([truncated(self.scene, density * part) for part in parts]))

    def _in_basis(self, images: Tensor) -> Tensor:
        """(l', z, y, x) -> (x, l, z, y)."""
        turn = self.basis.contrast.mH @ self.signals.axes.to(self.basis.contrast)  # (l, l')
        turned: Tensor = torch.einsum("lm,mzyx->xlzy", turn.to(images), images)
        return turned


@dataclass(frozen=True)
class SimulatedSlice:
    """A slice as a solver gets it, and the object that it is of."""

    problem: FingerprintProblem
    placed: PlacedSlice


def place_slice(
    anatomy: Anatomy,
    plan: ScanPlan,
    basis: Basis,
    *,
    height: float = 0.0,
    receive_phase: float = 1.5,
    b1: float = 0.0,
    seed: int = 0,
) -> PlacedSlice:
    """Put an object under the scanner.

    Args:
        anatomy: the object.
        plan: of the scan.
        basis: temporal basis of the reconstruction.
        height: centre of the slice along z [m]; 0 is the middle of the object.
        receive_phase: spread of the receive phase [rad], where the object's PD is real.
        b1: spread of the transmit field.
        seed: of fields and noise.

    Raises:
        ScanError: if nothing of the object lies in the slice.
    """
    protocol, encoding = plan.protocol(), plan.encoding
    qx, qy, qz = plan.supersampling
    scene = make_scene(
        anatomy,
        protocol,
        encoding.matrix,
        encoding.field_of_view,
        coils=plan.coils,
        supersampling=(qz, qy, qx),
        height=height,
        fields=FieldSettings(b1=b1, receive_phase=receive_phase),
        seed=seed,
    )
    signals = signal_basis(tabulate([scene], protocol), [scene.pd])
    level, brightest = signal_level([scene], signals)
    deviation = level / plan.snr if math.isfinite(plan.snr) else 1e-3 * level
    covariance = deviation**2 * noise_covariance(plan.coils, np.random.default_rng([seed, 3]))
    whitening = np.linalg.inv(np.linalg.cholesky(covariance)).astype(np.complex128)
    return PlacedSlice(scene, signals, whitening, basis, brightest)


def simulate_slice(
    placed: PlacedSlice, plan: ScanPlan, dictionary: FingerprintDictionary, seed: int = 0
) -> SimulatedSlice:
    """Scan a slice.

    Args:
        placed: the object, as ``place_slice`` has it for this plan.
        plan: of the scan.
        dictionary: of its protocol.
        seed: of order and noise.

    Raises:
        ScanError: if the plan makes no sense.
    """
    check_order(plan.order, 1, plan.interleaves, plan.acquired)
    scene, points = placed.scene, dictionary.axes.shape[0]
    arms = spirals(plan)
    played = acquired_interleaves(plan.interleaves, plan.acquired)
    train = stacked_trains(plan.order, 1, points, played, 1, 1, seed)[0]
    random = np.random.default_rng([seed, 21]) if math.isfinite(plan.snr) else None

    kspace = _readouts(
        placed, random, arms[played], np.searchsorted(played, train.interleaf), train.time_point
    )
    calibration = None
    if plan.calibration:
        low = arms[:, : int(np.searchsorted(np.linalg.norm(arms[0], axis=1), CALIBRATION_RADIUS)) + 1]
        every = np.arange(plan.interleaves)
        calibration = _readouts(placed, random, low, every, np.full_like(every, placed.brightest))
    problem = FingerprintProblem(
        replace(plan.encoding, coils=len(scene.coils)),
        plan.protocol(),
        kspace,
        placed.basis,
        dictionary,
        calibration,
        seed=seed,
    )
    return SimulatedSlice(problem, placed)


def _readouts(
    placed: PlacedSlice,
    random: np.random.Generator | None,
    arms: NDArray[np.float32],
    number: NDArray[np.int64],
    time_point: NDArray[np.int64],
) -> TrajectoryKSpace:
    """Whitened samples of arms (g, m, 2), of which readout i plays number[i] at time_point[i]."""
    scene, signals = placed.scene, placed.signals
    spectra = partition_spectra(scene, signals.coefficients[0], arms, 0)  # (g, l, c, m)
    spectra = np.einsum("dc,glcm->gldm", placed.whitening.astype(np.complex64), spectra)
    axes = signals.axes.numpy()
    channels, samples = spectra.shape[2:]
    found = np.empty((channels, len(number), samples), dtype=np.complex64)
    for row, (arm, time) in enumerate(zip(number, time_point, strict=True)):
        found[:, row] = np.tensordot(axes[time], spectra[arm], axes=1)
    if random is not None:
        noise = random.standard_normal((*found.shape, 2), dtype=np.float32)
        found += noise.view(np.complex64)[..., 0] * np.float32(math.sqrt(0.5))
    return TrajectoryKSpace(
        samples=torch.from_numpy(found.reshape(channels, -1)),
        trajectory=torch.from_numpy(np.ascontiguousarray(arms[number]).reshape(-1, 2)),
        readout_length=torch.full((len(number),), samples),
        time_point=torch.from_numpy(np.ascontiguousarray(time_point)),
        slice=torch.zeros(len(number), dtype=torch.int64),
        density=None,
        energy=float((np.abs(found).astype(np.float64) ** 2).sum()),
        time_points=len(axes),
        grid=(1, *scene.matrix),
    )


def spirals(plan: ScanPlan) -> NDArray[np.float32]:
    """(interleaves, m, 2) all spirals of a plan, in cycles per voxel.

    Raises:
        ScanError: if the voxels are not square.
    """
    edges = [extent / n for extent, n in zip(plan.fov[:2], plan.matrix, strict=True)]
    if abs(edges[0] - edges[1]) > 1e-3 * max(edges):
        raise ScanError(f"voxels of {edges[0]:.4g} x {edges[1]:.4g} mm are not square, as spirals need")
    larger = max(plan.matrix)
    design = replace(
        SpiralDesign(), matrix=larger, field_of_view=1e-3 * larger * edges[0], interleaves=plan.interleaves
    )
    return rotate(design_spiral(design), plan.interleaves)


def truncated(scene: Scene, values: Tensor) -> Tensor:
    """Fine values (v,) as an image (z, y, x) of the part of k-space that spirals in planes reach."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(torch.from_numpy(scene.embed(values)))))
    radius = torch.zeros(())
    for axis, (size, factor) in enumerate(zip(scene.matrix, scene.supersampling, strict=True)):
        fine = size * factor
        spectrum = spectrum.narrow(axis, fine // 2 - size // 2, size) / factor
        frequency = (torch.arange(size) - size // 2) / size  # cycles per scan voxel
        # The transform counts fine voxels from n // 2; the scan's origin is the centre of its voxel n // 2.
        shift = (fine // 2 - factor * (size // 2) - (factor - 1) / 2) / factor
        shape = [-1 if axis == other else 1 for other in range(3)]
        spectrum = spectrum * torch.exp(-2j * torch.pi * shift * frequency).reshape(shape)
        if axis:
            radius = radius + frequency.reshape(shape) ** 2
    image: Tensor = torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(spectrum * (radius <= 0.25))))
    return image
