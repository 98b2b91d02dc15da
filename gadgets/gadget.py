"""What every gadget is: a frozen dataclass whose fields are its XML properties, called as a generator."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ismrmrd
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quantitron.recon.data import (
    Basis,
    Encoding,
    FingerprintDictionary,
    FingerprintProblem,
    Problem,
    Protocol,
)
from quantitron.recon.networks.trained_network import TrainedNetwork

logger = logging.getLogger("quantitron")

SliceProblem = Problem | FingerprintProblem
"""What a solver gets: one slice of a scan of either family."""


@dataclass
class Context:
    """What the gadgets of one chain share: the scan's header, and what they tell each other about it."""

    header: ismrmrd.xsd.ismrmrdHeader
    encoding: Encoding
    protocol: Protocol
    axes: dict[str, str]
    """ISMRMRD counter of each contrast axis: keys ``ti``, ``tau``, ``te`` (``header.contrast_axes``)."""
    pipeline: str = ""
    """Name of the method, for provenance."""
    settings_hash: str = ""
    """Hash of all resolved settings, for provenance."""
    seed: int = 0
    device: str = ""
    """Device that the solver ran on, for provenance; set by reconstruct."""
    basis: Basis | None = None
    """Set before data flow by the basis gadget where the protocol alone determines the basis."""
    dictionary: FingerprintDictionary | None = None
    """Set before data flow by the basis gadget for fingerprints."""
    dictionary_b1: tuple[float, ...] | None = None
    """Actual over nominal flip angles of the dictionary to be; set by the basis gadget's ``prepare``."""
    b1: Tensor | None = None
    """(s, z, y, x) actual over nominal flip angle; set before data flow by reconstruct where it is given."""
    network: TrainedNetwork | None = None
    """Set before data flow by reconstruct where its solver asks for one."""
    needs_lines: bool = False
    """Set before data flow by the reconstruct gadget where its solver wants the sampled lines too."""
    needs_navigators: bool = False
    """Set before data flow by the basis gadget where the basis comes from navigator lines."""
    unused_navigators: int = 0
    """Navigator lines that came without being needed; counted by whichever gadget drops them."""
    noise_known: bool = False
    """Whether the samples were whitened with a noise scan; set by noise_adjust at the first imaging line."""
    geometry: dict[int, NDArray[np.void]] = field(default_factory=dict)
    """Slice -> acquisition header (``HEADER_DTYPE`` scalar) of its first imaging line; set by accumulate."""
    notes: list[str] = field(default_factory=list)
    """What was assumed or is missing, in sentences; logged when added, kept for provenance."""
    failures: list[str] = field(default_factory=list)
    """What went wrong after some results could still be delivered; the chain ends as failed if not empty."""

    def remember_geometry(self, heads: NDArray[np.void], slices: NDArray[np.int64]) -> None:
        """Keep the header of the first imaging line of each slice; ``heads`` and ``slices`` are (n,)."""
        for index, row in zip(*np.unique(slices, return_index=True), strict=True):
            if int(index) not in self.geometry:
                self.geometry[int(index)] = heads[row : row + 1].copy()[0]

    def note(self, sentence: str) -> None:
        """Log an assumption or a shortcoming of the data once and keep it."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            logger.warning("%s", sentence)

    def fail(self, sentence: str) -> None:
        """Record a failure that did not stop what could still be delivered."""
        self.failures.append(sentence)
        logger.error("%s", sentence)


@dataclass(frozen=True)
class Gadget:
    """Base of the gadgets. Fields of a subclass are its properties; its docstring gives their units."""

    name: ClassVar[str]
    """Name in the XML."""

    def prepare(self, context: Context) -> None:
        """Check the settings against the header and announce needs, before any data is read.

        Raises:
            ScanError: if the scan cannot be processed with these settings.
        """

    def make_ready(self, context: Context) -> None:
        """Do what takes time before data flow, once every gadget of the chain is prepared.

        Raises:
            ScanError: if that is impossible.
        """

    def __call__(self, items: Iterable[Any], context: Context) -> Iterator[Any]:
        """Turn the stream of items into another."""
        raise NotImplementedError  # abstract
