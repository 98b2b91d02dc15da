"""What every solver is: a frozen dataclass of settings with one method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from quantitron.recon.data import Encoding, Maps, Protocol
from quantitron.recon.networks.trained_network import NetworkDescription, NetworkRequest

Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0..1."""


@dataclass(frozen=True)
class Solver:
    """Base of the solvers. Fields of a subclass are its settings."""

    name: ClassVar[str]
    """Name in the XML."""
    sequences: ClassVar[tuple[str, ...]] = ()
    """Sequences that it can reconstruct."""

    def __post_init__(self) -> None:
        """Refuse settings that do not fit each other; subclasses add theirs."""

    @property
    def needs_lines(self) -> bool:
        """Whether the sampled lines are needed beside their reduced form; settings may decide."""
        return False

    @property
    def network(self) -> NetworkRequest | None:
        """The trained network that it is to find in the problem; settings may decide."""
        return None

    def check(self, encoding: Encoding, protocol: Protocol) -> None:
        """Refuse a scan that these settings do not fit, before any of its data are read.

        Args:
            encoding: the grid.
            protocol: the sequence.

        Raises:
            ValueError: in one clear sentence.
        """

    def check_network(self, network: NetworkDescription, encoding: Encoding, protocol: Protocol) -> None:
        """Refuse a trained network that suits these settings or this scan not, before any data are read.

        Args:
            network: what the one that was asked for is.
            encoding: the grid.
            protocol: the sequence.

        Raises:
            ValueError: in one clear sentence.
        """

    def solve(self, problem: Any, progress: Progress) -> Iterator[Maps]:
        """Yield previews, if any, and last the final maps of one slice, on the encoded grid (s = 1).

        Args:
            problem: a ``Problem``, or a ``FingerprintProblem`` for ``fisp_mrf``.
            progress: told of what is done.

        Raises:
            ValueError: if the settings do not fit the problem, in one clear sentence.
        """
        raise NotImplementedError(f"{type(self).__name__} has no solve")
