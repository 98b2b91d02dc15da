"""In which order the spirals of a fingerprint are played, and the acquisition headers that say so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import HEADER_DTYPE
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_geometry import axial_header
from quantitron.phantoms.acquisition_order import TICK, flag, mark_ends
from quantitron.recon.data import Protocol

ORDERS = ("sequential", "shuffled")
GOLDEN = (math.sqrt(5) - 1) / 2
PAUSE = 5.0
"""From the end of a train to the next inversion [s]."""
LEAST_REACH = 3
"""Partitions on either side of kz = 0 that the calibration of a slab holds at least."""


@dataclass(frozen=True)
class Train:
    """Readouts after one inversion, in the order in which they are played."""

    slice: int
    partition: NDArray[np.int64]
    """(n,) number of the partition, all the same; or, of tilted spirals, of the plane."""
    time_point: NDArray[np.int64]
    """(n,) w."""
    interleaf: NDArray[np.int64]
    """(n,) which trajectory."""
    flags: np.uint64
    """Of all its readouts."""


def check_order(order: str, step: int, interleaves: int, acquired: int | None = None) -> None:
    """Refuse orders that do not exist or leave interleaves out that are to be acquired.

    Raises:
        ScanError: if ``order`` is unknown, ``step`` does not go with it, or more interleaves are to be
            acquired than there are.
    """
    if order not in ORDERS:
        raise ScanError(f"order is '{order}'; it must be one of {', '.join(ORDERS)}")
    if not 1 <= interleaves <= 65536:
        raise ScanError(f"interleaves is {interleaves}; it must be in 1..65536")
    if acquired is not None and not 1 <= acquired <= interleaves:
        raise ScanError(f"acquired is {acquired}; of {interleaves} interleaves it must be 1..{interleaves}")
    if order == "shuffled" and step != 1:
        raise ScanError("a step between interleaves belongs to the order sequential, not to shuffled")
    count = interleaves if acquired is None else acquired
    if step < 1 or math.gcd(step, count) != 1:
        raise ScanError(f"with a step of {step} not all of {count} interleaves would be played")


def acquired_interleaves(interleaves: int, acquired: int | None = None) -> NDArray[np.int64]:
    """(acquired,) numbers of the interleaves that an undersampled scan acquires, evenly spread, from 0 on."""
    count = interleaves if acquired is None else acquired
    return np.arange(count) * interleaves // count


def stacked_trains(
    order: str,
    step: int,
    points: int,
    interleaves: NDArray[np.int64],
    slices: int,
    partitions: int,
    seed: int,
) -> list[Train]:
    """A train for each partition of each slice; ``order`` runs over ``interleaves``, numbers of spirals."""
    return [
        Train(
            slice=number,
            partition=np.full(points, partition),
            time_point=np.arange(points),
            interleaf=interleaves[
                interleaf_order(order, points, len(interleaves), step, [seed, 13, number, partition])
            ],
            flags=np.uint64(0),
        )
        for number in range(slices)
        for partition in range(partitions)
    ]


def tilted_trains(
    order: str, step: int, points: int, interleaves: int, planes: int, trains: int, slices: int, seed: int
) -> list[Train]:
    """Trains of spirals in planes about kz: ``partition`` is the number of the plane, of ``planes``.

    Sequential: over all trains of a slab, readout j lies in the plane next to j times the golden section of
    half a turn, so that each time point sees other planes in other trains. Shuffled: both random.
    """
    result = []
    for slab in range(slices):
        for train in range(trains):
            interleaf = interleaf_order(order, points, interleaves, step, [seed, 13, slab, train])
            if order == "sequential":
                turned = (np.arange(points) + train * points) * GOLDEN % 1
                plane = np.floor(turned * planes).astype(np.int64)
                interleaf = (interleaf + train * step) % interleaves
            else:
                plane = interleaf_order(order, points, planes, 1, [seed, 14, slab, train])
            result.append(Train(slab, plane, np.arange(points), interleaf, np.uint64(0)))
    return result


def interleaf_order(
    order: str, points: int, interleaves: int, step: int, seed: list[int]
) -> NDArray[np.int64]:
    """(points,) interleaf of each time point (see ``simulate_fingerprint``)."""
    if order == "sequential":
        return np.arange(points) * step % interleaves
    random = np.random.default_rng(seed)
    passes = [random.permutation(interleaves) for _ in range(-(-points // interleaves))]
    return np.concatenate(passes)[:points].astype(np.int64)


def readout_headers(
    trains: list[Train],
    protocol: Protocol,
    positions: list[tuple[float, float, float]],
    dwell_time: float,
) -> list[NDArray[np.void]]:
    """Headers of all readouts, train by train: counters by the contract, flags, times, geometry.

    Args:
        trains: in the order of acquisition.
        protocol: the fingerprint.
        positions: centre of voxel n/2 of each slice (x, y, z) [mm].
        dwell_time: time between samples [s].
    """
    excitation = np.concatenate([[0.0], np.cumsum(protocol.repetition_time)])
    headers, now = [], 0.0
    for train in trains:
        head = np.empty(len(train.time_point), dtype=HEADER_DTYPE)
        head[:] = axial_header()
        head["idx"]["kspace_encode_step_1"] = train.interleaf
        head["idx"]["kspace_encode_step_2"] = train.partition
        head["idx"]["slice"] = train.slice
        head["idx"]["repetition"] = train.time_point
        head["flags"] = train.flags
        head["position"] = positions[train.slice]
        head["center_sample"] = 0
        head["sample_time_us"] = dwell_time * 1e6
        if train.flags:  # one excitation after another, each long after the train's own
            time = now + np.arange(len(head)) * (excitation[-1] + PAUSE) + excitation[train.time_point]
        else:
            time = now + excitation[train.time_point]
        now = float(time[-1]) + PAUSE
        head["acquisition_time_stamp"] = np.round((time + protocol.echo_time[0]) / TICK).astype(np.uint32)
        headers.append(head)
    mark_ends(headers, {"repetition"})
    return headers


def with_calibration(
    trains: list[Train], interleaves: int, partitions: int, radius: float, time_point: int
) -> list[Train]:
    """Calibration before the imaging of each slice: every interleaf, in the partitions near kz = 0, within
    ``LEAST_REACH`` of it however small the radius: of one plane no coil map tells how it changes along z.

    Args:
        trains: of the imaging, slice after slice.
        interleaves: number of spirals.
        partitions: number of partitions.
        radius: of the calibration in k-space [cycles per voxel].
        time_point: whose contrast it has.
    """
    reach = max(radius * partitions, LEAST_REACH)
    near = [kz for kz in range(partitions) if abs(kz - partitions // 2) <= reach]
    result = []
    for number, train in enumerate(trains):
        if number == 0 or train.slice != trains[number - 1].slice:
            result += [
                Train(
                    slice=train.slice,
                    partition=np.full(interleaves, kz),
                    time_point=np.full(interleaves, time_point),
                    interleaf=np.arange(interleaves),
                    flags=flag(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION),
                )
                for kz in near
            ]
        result.append(train)
    return result
