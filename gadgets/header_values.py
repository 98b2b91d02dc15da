"""Numbers of a header, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantitron.gadgets.errors import ScanError


def listed(values: Sequence[float]) -> str:
    """The first eight values, for a sentence."""
    shown = ", ".join(f"{value:g}" for value in values[:8])
    return shown + (", ..." if len(values) > 8 else "")


def single(values: Sequence[float], name: str, sequence: str) -> float:
    """The one value of a parameter that does not vary within a sequence.

    Raises:
        ScanError: if there is none, or several.
    """
    if not values or values[0] <= 0:
        raise ScanError(f"the header gives no {name}, which {sequence} needs")
    if any(abs(value - values[0]) > 1e-6 * values[0] for value in values):
        raise ScanError(f"the header gives several values of {name}; {sequence} has one")
    return values[0]


def numbered(user: Mapping[str, float], name: str) -> list[float]:
    """Values of the user parameters ``name_0``, ``name_1``, ... in the order of their numbers.

    Args:
        user: user parameters by name, their numbers with or without zeros in front.
        name: up to the underscore.

    Returns:
        As many as there are; none where there are none.

    Raises:
        ScanError: if a number is missing. Without what follows it, the list might mean something else: one
            value stands for all.
    """
    found: dict[int, float] = {}
    for key, value in user.items():
        start, _, digits = key.rpartition("_")
        if start == name:
            found[int(digits)] = value
    for expected, number in enumerate(sorted(found)):
        if number != expected:
            raise ScanError(f"the header has {name}_{number} but no {name}_{expected}")
    return [found[number] for number in range(len(found))]


def inversion_efficiency(user: Mapping[str, float]) -> float | None:
    """The user parameter ``InversionEfficiency``, 0..1; None where it is absent.

    Raises:
        ScanError: if it lies outside.
    """
    efficiency = user.get("InversionEfficiency")
    if efficiency is not None and not 0 <= efficiency <= 1:
        raise ScanError(f"the header's InversionEfficiency is {efficiency:g}; it must lie in 0..1")
    return efficiency
