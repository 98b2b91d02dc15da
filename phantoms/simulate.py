"""Anatomy + protocol -> ISMRMRD raw file with its ground truth."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import ismrmrd
import numpy as np
import torch
from numpy.typing import NDArray

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header import make_header
from quantitron.gadgets.image_file import TRUTH_GROUP, reason, write_images
from quantitron.gadgets.output_file import check_no_input
from quantitron.gadgets.readable_header import require_readable
from quantitron.gadgets.unfinished_file import clear_abandoned, discard, unfinished_file
from quantitron.phantoms.acquisition_order import Pass, acquisition_headers, order_passes
from quantitron.phantoms.anatomy import Anatomy
from quantitron.phantoms.coils import noise_covariance
from quantitron.phantoms.encode import POINT_SPREADS, PointSpread, encode
from quantitron.phantoms.file import read_anatomy
from quantitron.phantoms.mni import mni_brain
from quantitron.phantoms.nist import nist_phantom
from quantitron.phantoms.noise import NOISE_SAMPLES, ChannelNoise, noise_headers
from quantitron.phantoms.protocols import make_protocol
from quantitron.phantoms.raw_file import RawFile
from quantitron.phantoms.sampling import random_sampling
from quantitron.phantoms.scene import FieldSettings, Scene, brightest_frame, make_scene
from quantitron.phantoms.truth_images import truth_images
from quantitron.recon.data import Encoding, Protocol

logger = logging.getLogger("quantitron")

DEFAULT_FIELD_OF_VIEW = {"mni": (224.0, 224.0, 64.0), "nist": (224.0, 224.0, 64.0)}
"""x, y, z [mm]."""
SLICE_THICKNESS = 4.0
"""Default extent along z of a scan with one partition [mm]."""
DWELL_TIME = 5e-6
"""Time between samples of the oversampled readout [s]."""
LINES_AT_ONCE = 256
"""Lines that are made and written together; changes memory, never the result."""


@dataclass(frozen=True)
class Simulation:
    """What a simulated scan turned out to be."""

    output: Path
    lines: int
    """Acquisitions written, noise lines not counted."""
    noise_lines: int
    acceleration: float
    """Points of all frames over points acquired, calibration included."""
    noise_deviation: float
    """Standard deviation of the complex noise of an average channel; 0 without noise."""
    noise_covariance: NDArray[np.complex128]
    """(c, c) E[n n^H]; its mean diagonal is ``noise_deviation`` squared."""
    calibration_frame: int
    """Frame t that has the calibration lines, the brightest."""


def load_anatomy(phantom: str | os.PathLike[str]) -> Anatomy:
    """The phantom named ``mni`` or ``nist``, or read from a ``FILE.npz``.

    Raises:
        ScanError: if it is none of them, or the file is not a phantom.
    """
    if phantom == "mni":
        return mni_brain()
    if phantom == "nist":
        return nist_phantom()
    path = Path(phantom)
    if path.suffix == ".npz" or path.exists():
        return read_anatomy(path)
    raise ScanError(f"phantom '{phantom}' is neither mni, nist nor a FILE.npz")


def simulate(
    *,
    sequence: str,
    output: str | os.PathLike[str],
    phantom: str | os.PathLike[str] = "mni",
    matrix: tuple[int, int, int] = (112, 112, 16),
    fov: tuple[float, float, float] | None = None,
    coils: int = 8,
    acceleration: float = 1.0,
    snr: float | None = 30.0,
    seed: int = 0,
    supersampling: int | tuple[int, int, int] = 2,
    point_spread: PointSpread = "truncation",
    slices: int = 1,
    excitations: int | None = None,
    echo_times: tuple[float, ...] | None = None,
    repetition_time: float | None = None,
    flip_angles: tuple[float, ...] | None = None,
    preparation_times: tuple[float, ...] | None = None,
    inversion_efficiency: float = 1.0,
    state_efficiency: bool = False,
    calibration: str = "embedded",
    calibration_lines: tuple[int, int] = (24, 8),
    density_power: float = 2.0,
    elliptical: bool = False,
    readout_oversampling: float = 2.0,
    b0: float = 40.0,
    b1: float = 0.0,
    receive_phase: float = 1.5,
    overwrite: bool = False,
) -> Simulation:
    """Simulate a Cartesian scan and write it as an ISMRMRD file with its truth in group ``truth``.

    Args:
        sequence: ``vfa_gre``, ``t2ir_gre`` or ``megre``.
        output: file to write.
        phantom: ``mni``, ``nist`` or a ``FILE.npz``.
        matrix: scan matrix (x, y, z); z = 1 for 2D.
        fov: field of view (x, y, z) [mm] of one slab; None takes one that suits the phantom.
        coils: receive channels.
        acceleration: R, points of all frames over points acquired, calibration included.
        snr: mean over the brain of the coil-combined signal of the brightest frame over the standard
            deviation of the complex noise of an average channel; None or infinite for no noise (and no
            noise scan).
        seed: equal seeds give equal files.
        supersampling: fine voxels of the object along the edges of a scan voxel, one number or (x, y, z); 1
            puts the object on the scan's own grid.
        point_spread: ``truncation`` cuts the object's k-space as a scanner does, ringing included;
            ``average`` makes each scan voxel the mean of its fine voxels, as published simulations mostly do.
        slices: slices (z = 1) or slabs, contiguous along z.
        excitations: N of ``t2ir_gre``.
        echo_times: TE [s].
        repetition_time: TR [s].
        flip_angles: [rad].
        preparation_times: tau of ``t2ir_gre`` [s].
        inversion_efficiency: of ``t2ir_gre``, 0..1.
        state_efficiency: whether the header states it (``InversionEfficiency``), so that it need
            not be estimated.
        calibration: ``embedded`` (calibration-and-imaging lines of the brightest frame), ``separate``
            (calibration-only lines before the scan) or ``none``.
        calibration_lines: (ky, kz) lines about the centre, cut to the matrix.
        density_power: how fast the sampling density falls from the centre; 0 is uniform.
        elliptical: leave out the corners of k-space.
        readout_oversampling: encoded over delivered readout.
        b0: largest smooth off-resonance [Hz], where the phantom has no B0 of its own.
        b1: variation of the flip angle, 0 for none.
        receive_phase: smooth phase of a real PD [rad].
        overwrite: replace an existing file.

    Raises:
        ScanError: if an argument or the phantom makes no sense, the file exists, or it cannot be written.
    """
    output = Path(output)
    check_no_input(output, phantom)
    if output.exists() and not overwrite:
        raise ScanError(f"{output} exists; overwrite replaces it")
    if isinstance(supersampling, int):
        supersampling = (supersampling, supersampling, supersampling)
    check_scan(matrix, fov, coils, snr, supersampling, slices, readout_oversampling, inversion_efficiency)
    if point_spread not in POINT_SPREADS:
        raise ScanError(f"point spread is '{point_spread}'; it must be one of {', '.join(POINT_SPREADS)}")
    protocol = make_protocol(
        sequence,
        echo_times=echo_times,
        repetition_time=repetition_time,
        flip_angles=flip_angles,
        preparation_times=preparation_times,
        excitations=excitations,
    )
    anatomy = load_anatomy(phantom)
    if fov is None:
        fov = default_field_of_view(str(phantom), anatomy, matrix[2])
    grid = (matrix[2], matrix[1], matrix[0])
    extent = (fov[2] * 1e-3, fov[1] * 1e-3, fov[0] * 1e-3)
    encoding = Encoding(matrix=grid, field_of_view=extent, delivered_matrix=grid, slices=slices, coils=coils)
    stated = state_efficiency and sequence == "t2ir_gre"
    header = make_header(
        encoding,
        replace(protocol, inversion_efficiency=inversion_efficiency) if stated else protocol,
        readout_oversampling=readout_oversampling,
        acceleration=(1, max(1, round(acceleration))),
        calibration=calibration == "embedded",
        relative_receiver_noise_bandwidth=1.0,
    )
    if calibration == "separate":
        header.encoding[0].parallelImaging.calibrationMode = ismrmrd.xsd.calibrationModeType.SEPARATE
    require_readable(header, protocol)
    heights = [(number - slices // 2) * extent[0] for number in range(slices)]
    scenes = [
        make_scene(
            anatomy,
            protocol,
            grid,
            extent,
            coils=coils,
            supersampling=(supersampling[2], supersampling[1], supersampling[0]),
            height=height,
            fields=FieldSettings(b0=b0, b1=b1, receive_phase=receive_phase),
            inversion_efficiency=inversion_efficiency,
            seed=seed,
        )
        for height in heights
    ]
    contrast, echo, signal = brightest_frame(scenes, protocol)
    frame = contrast * protocol.echoes + echo
    samplings = [
        random_sampling(
            grid[:2],
            protocol.frames,
            acceleration,
            seed=[seed, 2, number],
            calibration=calibration,
            calibration_frame=frame,
            calibration_size=(calibration_lines[1], calibration_lines[0]),
            power=density_power,
            elliptical=elliptical,
        )
        for number in range(slices)
    ]
    noise_free = snr is None or math.isinf(snr)
    deviation = 0.0 if noise_free or snr is None else signal / snr
    covariance = deviation**2 * noise_covariance(coils, np.random.default_rng([seed, 3]))
    noise = ChannelNoise(covariance, seed)

    points = int(header.encoding[0].encodedSpace.matrixSize.x)
    passes = order_passes(samplings, protocol, frame)
    positions = [(0.0, 0.0, 1e3 * height) for height in heights]
    heads = acquisition_headers(passes, protocol, positions, points // 2, DWELL_TIME)

    part = unfinished_file(output)
    clear_abandoned(output)
    noise_lines = 0 if noise_free else -(-NOISE_SAMPLES // points)
    try:
        raw = RawFile(part, header)
        if noise_lines:
            raw.append(noise_headers(noise_lines, points, DWELL_TIME), noise.draw(noise_lines, points))
        for lines, head in zip(passes, heads, strict=True):
            for rows, samples in _pass_samples(scenes[lines.slice], protocol, lines, points, point_spread):
                if not noise_free:
                    samples += noise.draw(len(samples), points)
                raw.append(head[rows], samples)
        write_images(part, TRUTH_GROUP, truth_images(scenes, protocol, positions, extent, covariance, seed))
        os.replace(part, output)
    except OSError as error:
        raise ScanError(f"cannot write {output}: {reason(error)}") from error
    finally:
        discard(part)
    total = sum(len(lines) for lines in passes)
    reached = slices * protocol.frames * grid[0] * grid[1] / total
    logger.info("%s: %d lines of %d x %d samples, R = %.2f", output, total, coils, points, reached)
    return Simulation(output, total, noise_lines, reached, deviation, covariance, frame)


def _pass_samples(
    scene: Scene, protocol: Protocol, lines: Pass, points: int, point_spread: PointSpread
) -> Iterator[tuple[slice, NDArray[np.complex64]]]:
    """Noise-free samples (n, c, points) of the lines of a pass, some at a time, in order."""
    contrasts, contrast = np.unique(lines.contrast, return_inverse=True)
    echoes, echo = np.unique(lines.echo, return_inverse=True)
    encoded = encode(scene, protocol, contrasts.tolist(), echoes.tolist(), points, point_spread)
    for start in range(0, len(lines), LINES_AT_ONCE):
        rows = slice(start, min(start + LINES_AT_ONCE, len(lines)))
        index = [
            torch.from_numpy(values[rows].reshape(-1)) for values in (contrast, echo, lines.kz, lines.ky)
        ]
        yield rows, encoded.lines(*index).numpy()


def default_field_of_view(phantom: str, anatomy: Anatomy, partitions: int) -> tuple[float, float, float]:
    """x, y, z [mm]: a usual one for the built-in phantoms, else the extent of the file's maps."""
    dz, dy, dx = (1e3 * size for size in anatomy.voxel_size)
    nz, ny, nx = anatomy.shape
    x, y, z = DEFAULT_FIELD_OF_VIEW.get(phantom, (nx * dx, ny * dy, nz * dz))
    return x, y, SLICE_THICKNESS if partitions == 1 else z


MOST_SNR = 1e7
"""Beyond, noise is lost in the rounding of single precision."""


def check_scan(
    matrix: tuple[int, int, int],
    fov: tuple[float, float, float] | None,
    coils: int,
    snr: float | None,
    supersampling: tuple[int, int, int],
    slices: int,
    readout_oversampling: float,
    inversion_efficiency: float,
) -> None:
    """Refuse arguments that make no scan."""
    if len(matrix) != 3 or min(matrix) < 1 or min(matrix[:2]) < 2 or max(matrix) > 2048:
        raise ScanError(f"matrix is {matrix}; it must be x, y, z with x, y in 2..2048 and z in 1..2048")
    if fov is not None and (len(fov) != 3 or not all(0 < length < 10000 for length in fov)):
        raise ScanError(f"fov is {fov}; it must be three positive lengths x, y, z in mm")
    if not 1 <= coils <= 128:
        raise ScanError(f"coils is {coils}; it must be in 1..128")
    if snr is not None and not snr > 0:
        raise ScanError(f"snr is {snr:g}; it must be positive, or none for a scan without noise")
    if snr is not None and MOST_SNR < snr < math.inf:
        raise ScanError(f"snr is {snr:g}; it must be at most {MOST_SNR:g}, or none for a scan without noise")
    if len(supersampling) != 3 or not all(1 <= factor <= 8 for factor in supersampling):
        raise ScanError(f"supersampling is {supersampling}; each factor must be in 1..8")
    if slices < 1:
        raise ScanError(f"slices is {slices}; it must be at least 1")
    if not 1 <= readout_oversampling <= 4:
        raise ScanError(f"readout_oversampling is {readout_oversampling:g}; it must be in 1..4")
    if not 0 <= inversion_efficiency <= 1:
        raise ScanError(f"inversion_efficiency is {inversion_efficiency:g}; it must be in 0..1")
