"""Consecutive acquisitions of one shape, as arrays: gadgets work on blocks, never on single lines.

The rule that cuts a stream into blocks depends on the acquisitions alone, never on how they were delivered,
so that a file, a socket and Gadgetron give the same blocks and therefore the same maps to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import ismrmrd
import numpy as np
from ismrmrd.hdf5 import acquisition_header_dtype
from numpy.typing import NDArray

BLOCK_LENGTH = 128
"""Most acquisitions in one block."""

HEADER_DTYPE: np.dtype[np.void] = np.dtype(acquisition_header_dtype)
"""The 340-byte ISMRMRD acquisition header, as on the wire and in the file."""


@dataclass(frozen=True)
class AcquisitionBlock:
    """Acquisitions of one shape, in the order in which they arrived."""

    head: NDArray[np.void]
    """(n,) of ``HEADER_DTYPE``."""
    data: NDArray[np.complex64]
    """(n, c, sample) samples; (n, c, x) in image space along the readout once ``hybrid`` is set."""
    trajectory: NDArray[np.float32]
    """(n, sample, dimension); dimension is 0 for Cartesian scans."""
    first: int = 0
    """Number of the first acquisition within the scan, for messages."""
    hybrid: bool = False
    """Whether the readout has been placed, Fourier transformed and cropped (``remove_oversampling``)."""

    def __len__(self) -> int:
        return len(self.head)

    def has_flag(self, bit: int) -> NDArray[np.bool_]:
        """(n,) whether the ISMRMRD flag ``bit`` (1-based, ``ismrmrd.ACQ_...``) is set."""
        return (self.head["flags"] & np.uint64(1 << (bit - 1))) != 0

    def where(self, chosen: NDArray[np.bool_]) -> AcquisitionBlock:
        """The acquisitions for which ``chosen`` (n,) holds."""
        if chosen.all():
            return self
        return AcquisitionBlock(
            self.head[chosen], self.data[chosen], self.trajectory[chosen], self.first, self.hybrid
        )


def blocks_of(acquisitions: Iterable[ismrmrd.Acquisition | AcquisitionBlock]) -> Iterator[AcquisitionBlock]:
    """Cut a stream of single acquisitions into blocks; blocks pass through as they are.

    A block ends after ``BLOCK_LENGTH`` acquisitions and where the number of channels, samples or trajectory
    dimensions changes.
    """
    heads: list[NDArray[np.void]] = []
    data: list[NDArray[np.complex64]] = []
    trajectories: list[NDArray[np.float32]] = []
    shape: tuple[int, ...] = ()
    first = count = 0

    def block() -> AcquisitionBlock:
        return AcquisitionBlock(np.concatenate(heads), np.stack(data), np.stack(trajectories), first)

    for item in acquisitions:
        if isinstance(item, AcquisitionBlock):
            if heads:
                yield block()
                heads, data, trajectories = [], [], []
            count += len(item)
            yield item
            continue
        item_shape = (*item.data.shape, item.traj.shape[1])
        if heads and (item_shape != shape or len(heads) == BLOCK_LENGTH):
            yield block()
            heads, data, trajectories = [], [], []
        if not heads:
            first, shape = count, item_shape
        heads.append(np.frombuffer(item.getHead(), dtype=HEADER_DTYPE))
        data.append(item.data)
        trajectories.append(item.traj)
        count += 1
    if heads:
        yield block()
