"""Anatomy + schedule + spirals -> ISMRMRD raw file of a fingerprint (``fisp_mrf``) with its ground truth.

Every slice, and every partition of a stack of spirals, plays the whole train from equilibrium; one interleaf
a time point. In place of a stack, a volume can be scanned by spirals in upright planes at many angles, where
consecutive time points lie in planes far apart (as TGAS does; Cao et al., MRM 88:133, 2022).

The fingerprints come from the extended phase graph (``signal_table``), k-space from the object on a grid
finer than the scan's (``spiral_encode``). Off-resonance and decay during a readout are not simulated.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header import make_header
from quantitron.gadgets.image_file import TRUTH_GROUP, reason, write_images
from quantitron.gadgets.output_file import check_no_input
from quantitron.gadgets.readable_header import require_readable
from quantitron.gadgets.unfinished_file import clear_abandoned, discard, unfinished_file
from quantitron.phantoms.coils import noise_covariance
from quantitron.phantoms.encode import POINT_SPREADS, PointSpread
from quantitron.phantoms.fingerprint_order import (
    Train,
    acquired_interleaves,
    check_order,
    readout_headers,
    stacked_trains,
    tilted_trains,
    with_calibration,
)
from quantitron.phantoms.noise import NOISE_SAMPLES, ChannelNoise, noise_headers
from quantitron.phantoms.raw_file import RawFile
from quantitron.phantoms.scene import FieldSettings, Scene, make_scene, scan_mask
from quantitron.phantoms.schedules import INVERSION_TIME, make_schedule
from quantitron.phantoms.signal_table import SignalBasis, signal_basis, tabulate
from quantitron.phantoms.simulate import Simulation, check_scan, default_field_of_view, load_anatomy
from quantitron.phantoms.spiral import SpiralDesign, design_spiral, rotate, tilt
from quantitron.phantoms.spiral_encode import partition_spectra, volume_samples
from quantitron.phantoms.truth import transmit_map
from quantitron.phantoms.truth_images import truth_images
from quantitron.recon.data import Encoding

logger = logging.getLogger("quantitron")

VOLUMES = ("stack", "tilted")
CALIBRATIONS = ("none", "separate")
LINES_AT_ONCE = 128
"""Readouts that are written together; changes memory, never the result."""


def simulate_fingerprint(
    *,
    output: str | os.PathLike[str],
    phantom: str | os.PathLike[str] = "mni",
    schedule: str | os.PathLike[str] = "jiang",
    points: int | None = None,
    interleaves: int = 48,
    acquired: int | None = None,
    order: str = "sequential",
    step: int = 1,
    matrix: tuple[int, int, int] = (192, 192, 1),
    fov: tuple[float, float, float] | None = None,
    volume: str = "stack",
    trains: int | None = None,
    slices: int = 1,
    height: float = 0.0,
    coils: int = 8,
    snr: float | None = 10.0,
    seed: int = 0,
    supersampling: int | tuple[int, int, int] = 2,
    point_spread: PointSpread = "truncation",
    echo_time: float | None = None,
    inversion_time: float | None = INVERSION_TIME,
    inversion_efficiency: float | None = None,
    calibration: str = "none",
    calibration_radius: float = 0.08,
    b1: float = 0.0,
    receive_phase: float = 1.5,
    b1_map: str | os.PathLike[str] | None = None,
    spiral: SpiralDesign | None = None,
    overwrite: bool = False,
) -> Simulation:
    """Simulate a fingerprint and write it as an ISMRMRD file with its truth in group ``truth``.

    Args:
        output: file to write.
        phantom: ``mni``, ``nist`` (whose T2 plate lies at height 0) or a ``FILE.npz``.
        schedule: ``jiang``, ``tgas`` or a ``FILE.csv`` (see ``make_schedule``).
        points: time points; None for the schedule's own number.
        interleaves: rotated copies of the spiral that fill k-space; one is played a time point.
        acquired: how many of them are played, evenly spread over the turn; None for all. 6 of 48 is 8-fold
            undersampling in interleaves: k-space stays unfilled even by all time points together. Only
            slices and stacks; tilted spirals are undersampled by fewer ``trains``.
        order: ``sequential``: time point t plays interleaf ``step t`` mod ``interleaves``; ``shuffled``:
            all interleaves in a new random order in every pass. Of fewer ``acquired``, the same over those.
        step: how far apart consecutive interleaves are; only ``sequential``.
        matrix: scan matrix (x, y, z); z = 1 for 2D.
        volume: how z > 1 is scanned: ``stack`` of spirals, each partition with a train of its own, or
            ``tilted``: spirals in upright planes, ceil(pi/2 max(x, y)) of them over half a turn. From one
            readout to the next the plane goes on by the golden section of half a turn (sequential), or
            planes too come in random order (shuffled). ``kspace_encode_step_2`` counts the planes,
            ``average`` the trains.
        trains: trains of a ``tilted`` scan; None takes as many as there are partitions.
        fov: field of view (x, y, z) [mm] of one slice; None takes one that suits the phantom.
        slices: slices (z = 1) or slabs, contiguous along z.
        height: centre of the middle slice along z [mm]; 0 is the middle of the phantom. The NIST phantom has
            its T1 plate at 20, its T2 plate at 0 and its PD plate at -20.
        coils: receive channels.
        snr: mean over the brain of the rms over time of the coil-combined signal over the standard deviation
            of the complex noise of an average channel; None or infinite for no noise (and no noise scan).
        seed: equal seeds give equal files.
        supersampling: fine voxels of the object along the edges of a scan voxel, one number or (x, y, z).
        point_spread: ``truncation`` cuts the object's k-space as a scanner does, ringing included;
            ``average`` makes each scan voxel the mean of its fine voxels.
        echo_time: from an excitation to the first sample [s]; None for the schedule's own.
        inversion_time: from the inversion to the first excitation [s]; None for no inversion.
        inversion_efficiency: 0..1; stated in the header if given, else 1.
        calibration: ``none``, or ``separate``: all interleaves at low resolution before each slice, flagged
            as calibration only, at the brightest time point.
        calibration_radius: extent of the calibration in k-space [cycles per voxel].
        b1: spread of the transmit field, where the phantom has none of its own; 0 is none.
        receive_phase: spread of the receive phase [rad], where the phantom's PD is real.
        b1_map: a ``FILE.npz`` to write the true transmit field to, as ``b1`` (s, z, y, x), for
            reconstructions that can use one.
        spiral: density and gradient limits; matrix, field of view and interleaves are set here.
        overwrite: replace an existing file.

    Raises:
        ScanError: if an argument or the phantom makes no sense, the file exists, or it cannot be written.
    """
    output = Path(output)
    check_no_input(output, phantom, schedule)
    if output.exists() and not overwrite:
        raise ScanError(f"{output} exists; overwrite replaces it")
    if b1_map is not None:
        b1_map = Path(b1_map)
        check_no_input(b1_map, phantom, schedule)
        if b1_map.suffix != ".npz":
            raise ScanError(f"b1_map is '{b1_map}'; it must end in .npz")
        if b1_map.exists() and not overwrite:
            raise ScanError(f"{b1_map} exists; overwrite replaces it")
    if isinstance(supersampling, int):
        supersampling = (supersampling, supersampling, supersampling)
    efficiency = 1.0 if inversion_efficiency is None else inversion_efficiency
    check_scan(matrix, fov, coils, snr, supersampling, slices, 1.0, efficiency)
    check_order(order, step, interleaves, acquired)
    _check(volume, matrix[2], trains, acquired, calibration, calibration_radius, point_spread, height)
    protocol = make_schedule(
        schedule,
        points,
        echo_time=echo_time,
        inversion_time=inversion_time,
        inversion_efficiency=inversion_efficiency,
        seed=seed,
    )
    anatomy = load_anatomy(phantom)
    if fov is None:
        fov = default_field_of_view(str(phantom), anatomy, matrix[2])
    grid = (matrix[2], matrix[1], matrix[0])
    extent = (fov[2] * 1e-3, fov[1] * 1e-3, fov[0] * 1e-3)
    encoding = Encoding(grid, extent, grid, slices, coils, trajectory="spiral")
    header = make_header(encoding, protocol, interleaves=interleaves, relative_receiver_noise_bandwidth=1.0)
    if calibration == "separate":
        header.encoding[0].parallelImaging.calibrationMode = ismrmrd.xsd.calibrationModeType.SEPARATE
    require_readable(header, protocol)
    arms = _arms(spiral or SpiralDesign(), grid, extent, interleaves)
    heights = [1e-3 * height + (number - slices // 2) * extent[0] for number in range(slices)]
    scenes = [
        make_scene(
            anatomy,
            protocol,
            grid,
            extent,
            coils=coils,
            supersampling=(supersampling[2], supersampling[1], supersampling[0]),
            height=place,
            fields=FieldSettings(b1=b1, receive_phase=receive_phase),
            seed=seed,
        )
        for place in heights
    ]
    basis = signal_basis(tabulate(scenes, protocol), [scene.pd for scene in scenes])
    signal, brightest = signal_level(scenes, basis)
    noise_free = snr is None or math.isinf(snr)
    deviation = 0.0 if noise_free or snr is None else signal / snr
    covariance = deviation**2 * noise_covariance(coils, np.random.default_rng([seed, 3]))
    noise = ChannelNoise(covariance, seed)

    planes = math.ceil(math.pi / 2 * max(matrix[:2]))
    if volume == "stack":
        chosen = acquired_interleaves(interleaves, acquired)
        played = stacked_trains(order, step, protocol.contrasts, chosen, slices, grid[0], seed)
    else:
        count = grid[0] if trains is None else trains
        played = tilted_trains(order, step, protocol.contrasts, interleaves, planes, count, slices, seed)
        # The counter of the planes takes not every value at every time point: it announces nothing.
        limits = header.encoding[0].encodingLimits
        limits.kspace_encoding_step_2 = None
        limits.average = ismrmrd.xsd.limitType(minimum=0, maximum=count - 1, center=0)
    low = arms[:, : int(np.searchsorted(np.linalg.norm(arms[0], axis=1), calibration_radius)) + 1]
    if calibration == "separate":
        played = with_calibration(played, interleaves, grid[0], calibration_radius, brightest)
    positions = [(0.0, 0.0, 1e3 * place) for place in heights]
    heads = readout_headers(played, protocol, positions, (spiral or SpiralDesign()).dwell_time)
    if volume == "tilted":
        for number, head in enumerate(heads):
            head["idx"]["average"] = number % count

    points_of_noise = arms.shape[1]
    noise_lines = 0 if noise_free else -(-NOISE_SAMPLES // points_of_noise)
    part = unfinished_file(output)
    clear_abandoned(output)
    samples = 0
    try:
        raw = RawFile(part, header)
        if noise_lines:
            head = noise_headers(noise_lines, points_of_noise, (spiral or SpiralDesign()).dwell_time)
            raw.append(head, noise.draw(noise_lines, points_of_noise))
        if volume == "stack":
            readouts = _stacked_readouts(scenes, basis, played, heads, arms, low, point_spread)
        else:
            readouts = _tilted_readouts(scenes, basis, played, heads, arms, planes, point_spread)
        for head, places, lines in readouts:
            if not noise_free:
                lines += noise.draw(len(lines), lines.shape[2])
            raw.append(head, lines, places)
            samples += lines.shape[0] * lines.shape[2]
        write_images(part, TRUTH_GROUP, truth_images(scenes, protocol, positions, extent, covariance, seed))
        if b1_map is not None:
            _write_b1(b1_map, np.stack([transmit_map(scene) for scene in scenes]))
        os.replace(part, output)
    except OSError as error:
        raise ScanError(f"cannot write {output}: {reason(error)}") from error
    finally:
        discard(part)
    total = sum(len(train.time_point) for train in played)
    reached = slices * protocol.contrasts * math.prod(grid) / samples
    logger.info("%s: %d spirals of %d x %d samples, R = %.2f", output, total, coils, arms.shape[1], reached)
    return Simulation(output, total, noise_lines, reached, deviation, covariance, brightest)


def _write_b1(path: Path, b1: NDArray[np.float32]) -> None:
    """Write a transmit field (s, z, y, x), or say in one sentence (ScanError) why not."""
    try:
        np.savez_compressed(path, b1=b1)
    except OSError as error:
        raise ScanError(f"cannot write {path}: {reason(error)}") from error


Readouts: TypeAlias = Iterator[tuple[NDArray[np.void], NDArray[np.float32], NDArray[np.complex64]]]
"""Noise-free readouts, some at a time, in order: headers (n,), trajectories (n, m, d), samples (n, c, m)."""


def _stacked_readouts(
    scenes: list[Scene],
    basis: SignalBasis,
    trains: list[Train],
    heads: list[NDArray[np.void]],
    arms: NDArray[np.float32],
    low: NDArray[np.float32],
    point_spread: PointSpread,
) -> Readouts:
    """Spirals in planes of constant kz; those of the calibration on the arms ``low``."""
    axes = basis.axes.numpy()
    for train, head in zip(trains, heads, strict=True):
        curves = low if train.flags else arms
        spectrum = partition_spectra(
            scenes[train.slice],
            basis.coefficients[train.slice],
            curves,
            int(train.partition[0]),
            point_spread,
        )
        for start in range(0, len(head), LINES_AT_ONCE):
            rows = slice(start, min(start + LINES_AT_ONCE, len(head)))
            interleaf = train.interleaf[rows]
            lines = np.empty((len(interleaf), *spectrum.shape[2:]), dtype=np.complex64)
            for row, (number, time) in enumerate(zip(interleaf, train.time_point[rows], strict=True)):
                lines[row] = np.tensordot(axes[time], spectrum[number], axes=1)
            yield head[rows], curves[interleaf], lines


def _tilted_readouts(
    scenes: list[Scene],
    basis: SignalBasis,
    trains: list[Train],
    heads: list[NDArray[np.void]],
    arms: NDArray[np.float32],
    planes: int,
    point_spread: PointSpread,
) -> Readouts:
    """Spirals in planes about kz. All samples of a slab are made at once: every transform serves them all."""
    for number, scene in enumerate(scenes):
        chosen = [index for index, train in enumerate(trains) if train.slice == number]
        plane, interleaf, time = (
            np.concatenate([getattr(trains[index], name) for index in chosen])
            for name in ("partition", "interleaf", "time_point")
        )
        head = np.concatenate([heads[index] for index in chosen])
        places = tilt(arms, interleaf, np.pi * plane / planes)
        weights = basis.axes.numpy()[time]
        samples = volume_samples(scene, basis.coefficients[number], weights, places, point_spread)
        for start in range(0, len(head), LINES_AT_ONCE):
            rows = slice(start, min(start + LINES_AT_ONCE, len(head)))
            yield head[rows], places[rows], np.ascontiguousarray(samples[rows])


def signal_level(scenes: list[Scene], basis: SignalBasis) -> tuple[float, int]:
    """Mean over the mask of the rms over time of the coil-combined signal, and the brightest time point.

    With coil maps of unit root-sum-of-squares the coil-combined signal of a scan voxel is the modulus of the
    mean of its fine voxels' complex signal.
    """
    time_points = len(basis.axes)
    total, voxels, energy = 0.0, 0, np.zeros(time_points)
    for scene, coefficients in zip(scenes, basis.coefficients, strict=True):
        mask = scan_mask(scene)
        if not mask.any():
            continue
        images = np.stack([scene.block_mean(scene.embed(scene.pd * part))[mask] for part in coefficients])
        total += float(np.sqrt((np.abs(images) ** 2).sum(axis=0) / time_points).sum())
        voxels += int(mask.sum())
        gram = images @ images.conj().T
        axes = basis.axes.numpy()
        energy += np.einsum("wl,lk,wk->w", axes, gram, axes.conj()).real
    if voxels == 0:
        raise ScanError("no voxel of the scan lies in the phantom's mask")
    return total / voxels, int(np.argmax(energy))


def _arms(
    design: SpiralDesign, grid: tuple[int, int, int], extent: tuple[float, float, float], interleaves: int
) -> NDArray[np.float32]:
    """(interleaves, m, 2) the spirals of a scan in cycles per voxel."""
    edges = [extent[axis] / grid[axis] for axis in (1, 2)]
    if abs(edges[0] - edges[1]) > 1e-3 * max(edges):
        raise ScanError(
            f"voxels of {1e3 * edges[1]:.4g} x {1e3 * edges[0]:.4g} mm are not square, as spirals need; "
            "change matrix or fov"
        )
    larger = max(grid[1:])
    whole = replace(design, matrix=larger, field_of_view=larger * edges[0], interleaves=interleaves)
    return rotate(design_spiral(whole), interleaves)


def _check(
    volume: str,
    partitions: int,
    trains: int | None,
    acquired: int | None,
    calibration: str,
    radius: float,
    point_spread: str,
    height: float,
) -> None:
    """Refuse arguments that make no fingerprint."""
    if volume not in VOLUMES:
        raise ScanError(f"volume is '{volume}'; it must be one of {', '.join(VOLUMES)}")
    if volume == "tilted" and partitions == 1:
        raise ScanError("tilted spirals scan a volume; the matrix has one partition")
    if trains is not None and volume == "stack":
        raise ScanError("a stack of spirals has a train for each partition; trains belongs to tilted spirals")
    if acquired is not None and volume == "tilted":
        raise ScanError(
            "acquired belongs to slices and stacks; tilted spirals are undersampled by fewer trains"
        )
    if trains is not None and not 1 <= trains <= 65536:
        raise ScanError(f"trains is {trains}; it must be in 1..65536")
    if calibration not in CALIBRATIONS:
        raise ScanError(
            f"calibration is '{calibration}'; for fisp_mrf it must be one of {', '.join(CALIBRATIONS)}"
        )
    if calibration != "none" and volume == "tilted":
        raise ScanError("calibration of its own comes with a stack of spirals, not with tilted ones")
    if not 0 < radius <= 0.5:
        raise ScanError(f"calibration_radius is {radius:g}; it must be in 0..0.5 cycles per voxel")
    if point_spread not in POINT_SPREADS:
        raise ScanError(f"point spread is '{point_spread}'; it must be one of {', '.join(POINT_SPREADS)}")
    if not math.isfinite(height):
        raise ScanError(f"height is {height} mm")
