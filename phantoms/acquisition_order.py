"""When each line is acquired, and the acquisition headers that say so."""

from __future__ import annotations

from dataclasses import dataclass

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import HEADER_DTYPE
from quantitron.gadgets.image_geometry import axial_header
from quantitron.gadgets.sequence import contrast_axes
from quantitron.phantoms.sampling import Sampling
from quantitron.recon.data import Protocol

TICK = 2.5e-3
"""Unit of acquisition time stamps [s]."""


@dataclass(frozen=True)
class Pass:
    """Lines acquired together: one flip angle, one preparation time, or the calibration of one slice."""

    slice: int
    contrast: NDArray[np.int64]
    """(n,) w of each line."""
    echo: NDArray[np.int64]
    """(n,) e."""
    kz: NDArray[np.int64]
    """(n,)"""
    ky: NDArray[np.int64]
    """(n,)"""
    flags: NDArray[np.uint64]
    """(n,) ISMRMRD flags."""
    excitation: NDArray[np.int64]
    """(n,) number of the excitation within the pass; its echoes share it."""

    def __len__(self) -> int:
        return len(self.kz)


def flag(bit: int) -> np.uint64:
    """Flag word of one ISMRMRD flag (``ismrmrd.ACQ_...``, 1-based)."""
    return np.uint64(1 << (bit - 1))


def order_passes(samplings: list[Sampling], protocol: Protocol, calibration_frame: int) -> list[Pass]:
    """Put the lines of all slices in the order in which a scanner would play them.

    Slice after slice; separate calibration lines first, then flip angle after flip angle (``vfa_gre``) or
    preparation after preparation (``t2ir_gre``), where every shot is a train of N excitations with all
    echoes. Line j of a frame belongs to shot j.

    Args:
        samplings: points of each slice.
        protocol: the sequence.
        calibration_frame: the frame whose contrast separate calibration lines have.
    """
    echoes, preparations = protocol.echoes, max(1, len(protocol.preparation_time))
    passes = []
    for number, sampling in enumerate(samplings):
        if len(sampling.separate):
            kz, ky = sampling.separate.T
            passes.append(
                Pass(
                    slice=number,
                    contrast=np.full(len(kz), calibration_frame // echoes),
                    echo=np.full(len(kz), calibration_frame % echoes),
                    kz=kz,
                    ky=ky,
                    flags=np.full(len(kz), flag(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)),
                    excitation=np.arange(len(kz)),
                )
            )
        contrast, echo = sampling.frame // echoes, sampling.frame % echoes
        first_of_frame = np.searchsorted(sampling.frame, sampling.frame)
        shot = np.arange(len(sampling.frame)) - first_of_frame
        # A pass is what runs between two changes of flip angle or preparation.
        if protocol.sequence == "t2ir_gre":
            which, train = contrast % preparations, contrast // preparations
        else:
            which, train = contrast, np.zeros_like(contrast)
        embedded = flag(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
        for value in np.unique(which):
            chosen = np.flatnonzero(which == value)
            chosen = chosen[np.lexsort((echo[chosen], train[chosen], shot[chosen]))]
            passes.append(
                Pass(
                    slice=number,
                    contrast=contrast[chosen],
                    echo=echo[chosen],
                    kz=sampling.kz[chosen],
                    ky=sampling.ky[chosen],
                    flags=np.where(sampling.calibration[chosen], embedded, np.uint64(0)),
                    excitation=shot[chosen] * protocol.excitations + train[chosen],
                )
            )
    return passes


def acquisition_headers(
    passes: list[Pass],
    protocol: Protocol,
    positions: list[tuple[float, float, float]],
    centre_sample: int,
    dwell_time: float,
) -> list[NDArray[np.void]]:
    """Headers of all lines, pass by pass: counters by the contract, flags, times, geometry.

    Args:
        passes: from ``order_passes``.
        protocol: the sequence.
        positions: centre of voxel n/2 of each slice (x, y, z) [mm].
        centre_sample: sample at k = 0.
        dwell_time: time between samples [s].
    """
    axes = contrast_axes(protocol.sequence)
    preparations = max(1, len(protocol.preparation_time))
    headers, now = [], 0.0
    for lines in passes:
        head = np.empty(len(lines), dtype=HEADER_DTYPE)
        head[:] = axial_header()
        counters = head["idx"]
        counters["kspace_encode_step_1"] = lines.ky
        counters["kspace_encode_step_2"] = lines.kz
        counters["slice"] = lines.slice
        counters[axes["te"]] = lines.echo
        if "ti" in axes:
            counters[axes["ti"]] = lines.contrast // preparations
        if "tau" in axes:
            counters[axes["tau"]] = lines.contrast % preparations
        head["flags"] = lines.flags
        head["position"] = positions[lines.slice]
        head["center_sample"] = centre_sample
        head["sample_time_us"] = dwell_time * 1e6
        repetition = protocol.repetition_time[0]
        time = now + lines.excitation * repetition + np.asarray(protocol.echo_time)[lines.echo]
        head["acquisition_time_stamp"] = np.round(time / TICK).astype(np.uint32)
        now += (int(lines.excitation.max()) + 1) * repetition
        headers.append(head)
    mark_ends(headers, set(axes.values()))
    return headers


def mark_ends(headers: list[NDArray[np.void]], counters: set[str]) -> None:
    """Set the FIRST_IN and LAST_IN flags of slice, repetition, measurement and the contrast counters."""
    imaging = [
        np.flatnonzero((head["flags"] & flag(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)) == 0) for head in headers
    ]
    place = np.concatenate([np.full(len(rows), i) for i, rows in enumerate(imaging)])
    row = np.concatenate(imaging)
    values = {
        name: np.concatenate([head["idx"][name][rows] for head, rows in zip(headers, imaging, strict=True)])
        for name in {*counters, "slice"}
    }
    for name, value in values.items():
        first = np.unique(value, return_index=True)[1]
        last = len(value) - 1 - np.unique(value[::-1], return_index=True)[1]
        for which, rows in (("FIRST", first), ("LAST", last)):
            bit = flag(getattr(ismrmrd, f"ACQ_{which}_IN_{name.upper()}"))
            for number in rows:
                headers[place[number]]["flags"][row[number]] |= bit
    start, end = headers[place[0]]["flags"], headers[place[-1]]["flags"]
    start[row[0]] |= flag(ismrmrd.ACQ_FIRST_IN_REPETITION)
    end[row[-1]] |= flag(ismrmrd.ACQ_LAST_IN_REPETITION) | flag(ismrmrd.ACQ_LAST_IN_MEASUREMENT)
