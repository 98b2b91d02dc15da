"""What a solver must give: a sentence on what is wrong with it, before it passes for maps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantitron.recon.data import MAP_NAMES, Encoding, Maps


def check_result(maps: object, encoding: Encoding) -> Maps:
    """The maps of one slice, if they are such.

    Args:
        maps: what a solver yielded.
        encoding: the grid that it was to be on.

    Raises:
        ValueError: if it is something else, or a map has a name, a shape or a kind of number that none has.
    """
    if not isinstance(maps, Maps):
        raise ValueError(f"the solver yielded {type(maps).__name__}, not Maps")
    if not maps.values:
        raise ValueError("the solver yielded Maps that hold no map")
    for name in (*maps.values, *maps.standard_deviation):
        if name not in MAP_NAMES:
            raise ValueError(f"the solver yielded a map '{name}'; maps are {', '.join(MAP_NAMES)}")
    shape = (1, *encoding.matrix)
    for name, values in {**maps.values, **_deviations(maps.standard_deviation)}.items():
        _check(f"map {name}", values, shape)
        if values.is_complex():
            raise ValueError(f"map {name} of the solver is complex, where it must be real")
    _check("the mask", maps.mask, shape)
    if maps.mask.dtype != torch.bool:
        raise ValueError(f"the mask of the solver is of type {maps.mask.dtype}, where it must be bool")
    for echo in () if maps.magnitude is None else maps.magnitude:
        _check("an echo of the magnitude", echo, shape)
    return maps


def _deviations(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name} of the standard deviation": values for name, values in maps.items()}


def _check(what: str, values: object, shape: tuple[int, ...]) -> None:
    if not isinstance(values, Tensor):
        raise ValueError(f"{what} of the solver is {type(values).__name__}, where it must be a tensor")
    if values.shape != shape:
        raise ValueError(
            f"{what} of the solver has shape {tuple(values.shape)}, where (s, z, y, x) must be {shape}"
        )
