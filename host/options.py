"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quantitron.gadgets.settings import LARGEST_SEED

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of everything random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]


def numbers(
    text: str | None, kind: type[int] | type[float], count: int | None, option: str
) -> tuple[Any, ...] | None:
    """Comma-separated numbers of an option."""
    if text is None:
        return None
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or (count is not None and len(values) != count):
        what = "whole numbers" if kind is int else "numbers"
        raise typer.BadParameter(
            f"{text!r} is not {count or 'a list of'} {what} with commas between", param_hint=option
        )
    return values


def noise_levels(text: str, option: str) -> tuple[float, float, int]:
    """Lowest and highest noise level, and how many, of an option."""
    low, high, count = numbers(text, float, 3, option) or (0.0, 0.0, 0.0)
    if not count.is_integer():
        raise typer.BadParameter(f"{text!r} asks for {count:g} levels, not a whole number", param_hint=option)
    return low, high, int(count)
