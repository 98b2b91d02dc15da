"""Acquisitions made in memory: blocks of lines with given counters, flags and samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import HEADER_DTYPE, AcquisitionBlock, BlockBuilder
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.header import make_context, make_header
from quantitron.recon.data import Encoding, Protocol

LAST = ismrmrd.ACQ_LAST_IN_MEASUREMENT


def megre(echoes: int = 2) -> Protocol:
    return Protocol("megre", tuple(5e-3 * (e + 1) for e in range(echoes)), (0.4,), (math.radians(20),))


def vfa(angles: Sequence[float] = (5, 15, 30), echoes: int = 2) -> Protocol:
    times = tuple(4e-3 * (e + 1) for e in range(echoes))
    return Protocol("vfa_gre", times, (0.03,), tuple(math.radians(angle) for angle in angles))


def t2ir(excitations: int = 6, echoes: int = 2) -> Protocol:
    times = tuple(4e-3 * (e + 1) for e in range(echoes))
    return Protocol(
        "t2ir_gre", times, (0.03,), (math.radians(10),), (0.025, 0.05, 0.09), excitations=excitations
    )


def encoding(
    matrix: tuple[int, int, int] = (1, 8, 16), coils: int = 2, slices: int = 1, delivered: Any = None
) -> Encoding:
    return Encoding(
        matrix, (0.004 * matrix[0], 0.002 * matrix[1], 0.002 * matrix[2]), delivered or matrix, slices, coils
    )


def context(protocol: Protocol, grid: Encoding, oversampling: float = 2, **options: Any) -> Context:
    return make_context(make_header(grid, protocol, readout_oversampling=oversampling, **options))


def noise(shape: Sequence[int], seed: int = 0) -> NDArray[np.complex64]:
    rng = np.random.default_rng(seed)
    pair = rng.standard_normal((2, *shape))
    samples: NDArray[np.complex64] = ((pair[0] + 1j * pair[1]) / math.sqrt(2)).astype(np.complex64)
    return samples


def block(
    data: NDArray[np.complexfloating],
    flags: Iterable[int] = (),
    first: int = 0,
    hybrid: bool = False,
    **fields: Any,
) -> AcquisitionBlock:
    """Lines of the samples (n, c, sample). ``fields``: header fields or counters, one value or one a line."""
    n, channels, samples = data.shape
    head = np.zeros(n, dtype=HEADER_DTYPE)
    head["version"] = 1
    head["number_of_samples"], head["active_channels"], head["available_channels"] = (
        samples,
        channels,
        channels,
    )
    head["center_sample"] = samples // 2
    head["sample_time_us"] = 5
    head["read_dir"], head["phase_dir"], head["slice_dir"] = np.eye(3)
    head["flags"] = sum(1 << (flag - 1) for flag in flags)
    for name, value in fields.items():
        if name.startswith("user_"):
            head["idx"]["user"][:, int(name[5:])] = value
        elif name in head["idx"].dtype.names:
            head["idx"][name] = value
        else:
            head[name] = value
    trajectory = np.zeros((n, samples, 0), dtype=np.float32)
    return AcquisitionBlock(head, data.astype(np.complex64), trajectory, first, hybrid)


def joined(*blocks: AcquisitionBlock) -> AcquisitionBlock:
    """Blocks of one shape as one."""
    return AcquisitionBlock(
        np.concatenate([part.head for part in blocks]),
        np.concatenate([part.data for part in blocks]),
        np.concatenate([part.trajectory for part in blocks]),
        blocks[0].first,
        blocks[0].hybrid,
    )


def recut(whole: AcquisitionBlock, length: int) -> Iterator[AcquisitionBlock]:
    """The same lines in blocks of another length."""
    for start in range(0, len(whole), length):
        part = slice(start, start + length)
        yield AcquisitionBlock(
            whole.head[part], whole.data[part], whole.trajectory[part], whole.first + start, whole.hybrid
        )


def numbered(*blocks: AcquisitionBlock) -> Iterator[AcquisitionBlock]:
    """Blocks one after another as a stream: numbered, and cut by the rule for streams."""
    builder = BlockBuilder()
    for part in blocks:
        yield from builder.add(part.head, part.data, part.trajectory)
    yield from builder.finish()


def full_scan(protocol: Protocol, grid: Encoding, samples: int, seed: int = 0) -> AcquisitionBlock:
    """Every line of every frame and slice once, frames slowest, random samples; the last one is flagged."""
    n_ti, n_tau, n_te = protocol.contrast_shape
    nz, ny, _ = grid.matrix
    axes = np.meshgrid(*(np.arange(n) for n in (grid.slices, n_ti, n_tau, n_te, nz, ny)), indexing="ij")
    s, ti, tau, te, kz, ky = (axis.ravel() for axis in axes)
    lines = block(
        noise((len(s), grid.coils, samples), seed),
        slice=s,
        contrast=te,
        kspace_encode_step_2=kz,
        kspace_encode_step_1=ky,
    )
    index = lines.head["idx"]
    if protocol.sequence == "t2ir_gre":
        index["segment"], index["set"] = ti, tau
    elif protocol.sequence == "vfa_gre":
        index["set"] = ti
    lines.head["flags"][-1] = 1 << (LAST - 1)
    return lines


def shuffled(lines: AcquisitionBlock, seed: int = 1) -> AcquisitionBlock:
    """The same lines in another order; the end of the measurement stays at the end."""
    order = np.random.default_rng(seed).permutation(len(lines))
    head = lines.head[order].copy()
    head["flags"] &= ~np.uint64(1 << (LAST - 1))
    head["flags"][-1] |= np.uint64(1 << (LAST - 1))
    return AcquisitionBlock(head, lines.data[order], lines.trajectory[order], lines.first, lines.hybrid)


def hybrid(lines: AcquisitionBlock) -> AcquisitionBlock:
    """The lines as if their samples were in image space along the readout already."""
    return AcquisitionBlock(lines.head, lines.data, lines.trajectory, lines.first, True)
