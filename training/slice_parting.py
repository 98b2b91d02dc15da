"""Which slices of phantoms are learned from and which tell how well: none of either show the same tissue.

Slices lie closer together than they are thick, so that a slice between two that were learned from is nothing
new. Held out are whole phantoms where there are many, else the upper end of each, with the slices left out
that would overlap it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantitron.gadgets.errors import ScanError
from quantitron.training.series_pairs import PairPlan

PHANTOMS = 5
"""From how many on whole ones are held out."""

Place = tuple[int, int]
"""Numbers of a phantom and of a slice in it."""


@dataclass(frozen=True)
class SliceParting:
    """The parts, each in ascending order; a slice of neither is not used."""

    learned: tuple[Place, ...]
    held: tuple[Place, ...]
    by: str
    """What was held out, for the card."""

    @property
    def places(self) -> tuple[Place, ...]:
        """All slices that are used, in ascending order."""
        return tuple(sorted(self.learned + self.held))

    def of(self, part: Sequence[Place]) -> list[int]:
        """Where the slices of a part stand among ``places``."""
        where = {place: number for number, place in enumerate(self.places)}
        return [where[place] for place in part]


def part_slices(phantoms: int, plan: PairPlan, share: float) -> SliceParting:
    """Part the slices of a plan.

    Args:
        phantoms: how many there are.
        plan: of their slices.
        share: to hold out.

    Raises:
        ScanError: if the share makes no sense, or nothing would be left to learn from.
    """
    if not 0 < share <= 0.5:
        raise ScanError(f"a share of {share:g} to hold out for validation is not within 0..0.5")
    if phantoms >= PHANTOMS:
        order = np.random.default_rng([plan.seed, 41]).permutation(phantoms).tolist()
        chosen = set(order[: max(1, round(share * phantoms))])
        every = [(number, place) for number in range(phantoms) for place in range(plan.slices)]
        return SliceParting(
            tuple(place for place in every if place[0] not in chosen),
            tuple(place for place in every if place[0] in chosen),
            "phantoms",
        )
    if phantoms * plan.slices < 2:
        raise ScanError("one slice alone cannot be learned from and held out for validation")
    held = max(1, round(share * plan.slices))
    gap = _gap(plan)
    kept = plan.slices - held - gap
    if kept < 1:
        thickness, spacing = _thickness(plan), plan.extent / plan.slices
        raise ScanError(
            f"of {plan.slices} slices of {thickness:g} mm, {spacing:.3g} mm apart, none is left to learn "
            f"from beside {held} to hold out and {gap} in between that overlap: spread them wider"
        )
    return SliceParting(
        tuple((number, place) for number in range(phantoms) for place in range(kept)),
        tuple((number, place) for number in range(phantoms) for place in range(kept + gap, plan.slices)),
        f"the upper end of each phantom, without {gap} slices that overlap it"
        if gap
        else "the upper end of each phantom",
    )


def _gap(plan: PairPlan) -> int:
    """Slices to leave out between two parts that are not to overlap.

    Slices lie within half their spacing of where an even spread has them, so that two of them, n apart in
    number, are at least n - 1/2 spacings apart.
    """
    if plan.extent == 0:
        return plan.slices
    return max(0, math.ceil(_thickness(plan) * plan.slices / plan.extent + 0.5) - 1)


def _thickness(plan: PairPlan) -> float:
    """Of the thickest slices [mm]."""
    return max(scan.fov[2] for scan in plan.scans)
