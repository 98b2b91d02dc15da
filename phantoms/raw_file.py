"""Writing ISMRMRD raw files in bulk: many acquisitions a call, memory bounded by the call."""

from __future__ import annotations

from pathlib import Path

import h5py
import ismrmrd
import numpy as np
from ismrmrd.hdf5 import acquisition_dtype
from numpy.typing import NDArray

from quantitron.gadgets.image_file import reserve

GROUP = "dataset"
ROWS_PER_CHUNK = 128
_HEAP = 1 << 12
"""More than HDF5 takes [byte] for one line beside its samples."""


class RawFile:
    """An ISMRMRD file that is being written; it is closed between calls, and so whole after each."""

    def __init__(self, path: Path, header: ismrmrd.xsd.ismrmrdHeader) -> None:
        """Create the file and write the header.

        Args:
            path: file to create; an existing one is replaced.
            header: the scan's header.

        Raises:
            OSError: if the file cannot be written.
        """
        text = ismrmrd.xsd.ToXML(header).encode()
        self.path = path
        self.lines = 0
        path.unlink(missing_ok=True)
        reserve(path, len(text))
        with h5py.File(path, "w") as file:
            group = file.create_group(GROUP)
            xml = group.create_dataset("xml", (1,), dtype=h5py.special_dtype(vlen=bytes))
            xml[0] = text
            group.create_dataset(
                "data", (0,), maxshape=(None,), dtype=acquisition_dtype, chunks=(ROWS_PER_CHUNK,)
            )

    def append(
        self,
        head: NDArray[np.void],
        samples: NDArray[np.complex64],
        trajectory: NDArray[np.float32] | None = None,
    ) -> None:
        """Write acquisitions.

        Args:
            head: (n,) acquisition headers; number of samples, channels and scan counter are set here.
            samples: (n, c, sample) complex64.
            trajectory: (n, sample, d) k-space positions; None for Cartesian lines.

        Raises:
            OSError: if the disk is full.
        """
        count, channels, points = samples.shape
        start = self.lines
        head = head.copy()
        head["number_of_samples"] = points
        head["trajectory_dimensions"] = 0 if trajectory is None else trajectory.shape[2]
        head["active_channels"] = channels
        head["available_channels"] = channels
        head["scan_counter"] = start + np.arange(count)
        rows = np.zeros(count, dtype=acquisition_dtype)
        rows["head"] = head
        numbers = np.ascontiguousarray(samples, dtype=np.complex64).reshape(count, -1).view(np.float32)
        places = np.zeros((count, 0), dtype=np.float32)
        if trajectory is not None:
            places = np.ascontiguousarray(trajectory, dtype=np.float32).reshape(count, -1)
        for row in range(count):
            rows["traj"][row] = places[row]
            rows["data"][row] = numbers[row]
        reserve(self.path, numbers.nbytes + places.nbytes + count * _HEAP)
        with h5py.File(self.path, "r+") as file:
            data = file[GROUP]["data"]
            data.resize(start + count, axis=0)
            data[start:] = rows
        self.lines += count
