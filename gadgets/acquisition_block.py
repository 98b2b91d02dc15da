"""Consecutive acquisitions of one shape, as arrays: gadgets work on blocks, never on single lines.

The rule that cuts a stream into blocks depends on the acquisitions alone, never on how they were delivered,
so that a file, a socket and Gadgetron give the same blocks and therefore the same maps to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

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
    mixing: NDArray[np.complex64] | None = None
    """(k, c) that the channels are still to be multiplied with: the noise adjustment leaves it to
    ``remove_oversampling``, after whose cropping it costs half."""

    def __len__(self) -> int:
        return len(self.head)

    def has_flag(self, bit: int) -> NDArray[np.bool_]:
        """(n,) whether the ISMRMRD flag ``bit`` (1-based, ``ismrmrd.ACQ_...``) is set."""
        chosen: NDArray[np.bool_] = (self.head["flags"] & np.uint64(1 << (bit - 1))) != 0
        return chosen

    def where(self, chosen: NDArray[np.bool_]) -> AcquisitionBlock:
        """The acquisitions for which ``chosen`` (n,) holds."""
        if chosen.all():
            return self
        return AcquisitionBlock(
            self.head[chosen],
            self.data[chosen],
            self.trajectory[chosen],
            self.first,
            self.hybrid,
            self.mixing,
        )


class BlockBuilder:
    """The one rule that cuts a stream into blocks, shared by files, sockets and single acquisitions.

    A block ends after ``BLOCK_LENGTH`` acquisitions and where the number of channels, samples or trajectory
    dimensions changes. How many acquisitions are added at a time has no influence on the blocks.
    """

    def __init__(self) -> None:
        self._heads: list[NDArray[np.void]] = []
        self._data: list[NDArray[np.complex64]] = []
        self._trajectories: list[NDArray[np.float32]] = []
        self._length = 0
        self._first = 0

    def add(
        self, head: NDArray[np.void], data: NDArray[np.complex64], trajectory: NDArray[np.float32]
    ) -> Iterator[AcquisitionBlock]:
        """Add acquisitions of one shape; yields the blocks that are complete.

        The arrays must not change afterwards. Shapes: head (n,), data (n, c, sample),
        trajectory (n, sample, dimension).
        """
        start = 0
        if self._length and not (
            self._data[0].shape[1:] == data.shape[1:]
            and self._trajectories[0].shape[1:] == trajectory.shape[1:]
        ):
            yield from self.finish()
        while start < len(head):
            end = min(len(head), start + BLOCK_LENGTH - self._length)
            self._heads.append(head[start:end])
            self._data.append(data[start:end])
            self._trajectories.append(trajectory[start:end])
            self._length += end - start
            start = end
            if self._length == BLOCK_LENGTH:
                yield from self.finish()

    def finish(self) -> Iterator[AcquisitionBlock]:
        """Yield what is left as a last block, if anything."""
        if not self._length:
            return
        block = AcquisitionBlock(
            _joined(self._heads), _joined(self._data), _joined(self._trajectories), self._first
        )
        self._heads, self._data, self._trajectories = [], [], []
        self._first += self._length
        self._length = 0
        yield block

    def skip(self, acquisitions: int) -> None:
        """Count acquisitions that went past the builder: ``first`` stays the number within the scan."""
        self._first += acquisitions


_Scalar = TypeVar("_Scalar", bound=np.generic)


def _joined(parts: list[NDArray[_Scalar]]) -> NDArray[_Scalar]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def blocks_of(acquisitions: Iterable[ismrmrd.Acquisition | AcquisitionBlock]) -> Iterator[AcquisitionBlock]:
    """Cut a stream of single acquisitions into blocks by the rule of ``BlockBuilder``.

    Blocks pass through as they are.
    """
    builder = BlockBuilder()
    for item in acquisitions:
        if isinstance(item, AcquisitionBlock):
            yield from builder.finish()
            builder.skip(len(item))
            yield item
            continue
        head = np.frombuffer(item.getHead(), dtype=HEADER_DTYPE)
        yield from builder.add(head, item.data[np.newaxis], item.traj[np.newaxis])
    yield from builder.finish()
