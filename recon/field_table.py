"""Atoms that depend on a field which is known in each voxel, tabulated at even steps of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIELD_STEP = 0.01
"""Width of the steps of the field in which voxels are taken together."""


@dataclass(frozen=True)
class FieldTable:
    """The atoms at some values of the field; between them they are interpolated linearly."""

    atoms: Tensor
    """(b, a, l) real or complex, not normalised."""
    values: Tensor
    """(b,) of the field, ascending at even steps; of B1, actual over nominal flip angle."""
    nominal: float = 1.0
    """The field where none is given."""

    def __post_init__(self) -> None:
        """Refuse values that do not fit the atoms.

        Raises:
            ValueError: if there is not one value for each table.
        """
        if self.atoms.ndim != 3 or len(self.values) != len(self.atoms) or not len(self.values):
            raise ValueError(
                f"atoms of shape {tuple(self.atoms.shape)} do not go with {len(self.values)} field values"
            )

    def check(self, field: Tensor | None) -> None:
        """Refuse a field that the atoms do not depend on.

        Raises:
            ValueError: if one is given and the table holds a single value.
        """
        if field is not None and len(self.values) == 1:
            raise ValueError(
                "a B1 map was given, but the dictionary holds a single B1: simulate it over several"
            )

    def at(self, value: float) -> Tensor:
        """Atoms (a, l) at one value; that of the end where it lies beyond."""
        if len(self.values) == 1:
            return self.atoms[0]
        first, last = float(self.values[0]), float(self.values[-1])
        place = (min(max(value, first), last) - first) / (last - first) * (len(self.values) - 1)
        below = min(int(place), len(self.values) - 2)
        return torch.lerp(self.atoms[below], self.atoms[below + 1], place - below)

    def of(self, atom: Tensor, field: Tensor | None) -> Tensor:
        """Atoms (v, l) of index ``atom`` (v,), each at the field (v,) of its voxel."""
        if len(self.values) == 1:
            return self.atoms[0, atom]
        device = self.atoms.device
        values = torch.full((len(atom),), self.nominal, device=device) if field is None else field.to(device)
        first, last = float(self.values[0]), float(self.values[-1])
        place = (values.clamp(first, last) - first) / (last - first) * (len(self.values) - 1)  # (v,)
        below = place.long().clamp_max(len(self.values) - 2)
        share = (place - below).to(self.atoms.real.dtype)[:, None]
        return torch.lerp(self.atoms[below, atom], self.atoms[below + 1, atom], share.to(self.atoms.dtype))

    def steps(self, field: Tensor | None, voxels: int) -> list[tuple[float, Tensor | slice]]:
        """Values of the field, each with the voxels that are taken there."""
        if field is None:
            return [(self.nominal, slice(0, voxels))]
        step = (field / FIELD_STEP).round().long()
        order = step.argsort(stable=True)
        values, counts = torch.unique(step, return_counts=True)
        places = torch.split(order, counts.tolist())
        return [(value * FIELD_STEP, place) for value, place in zip(values.tolist(), places, strict=True)]
