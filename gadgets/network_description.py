"""The description of a trained network as JSON, and back from a file that nobody vouches for.

Whoever made a file decides what stands in its description, so everything in it is bounded and checked by type
before a network is made from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from quantitron.recon.networks.conditional_unet import UNetShape
from quantitron.recon.networks.trained_network import NetworkDescription

LONGEST_DESCRIPTION = 1 << 18
"""Characters of a description, its card included."""
DEEPEST_CARD = 8
"""Lists and objects within one another in a card."""
MOST_LEVELS = 6
"""Resolution levels of a network."""
MOST_BLOCKS = 8
"""Residual blocks of a level."""
WIDEST = 4096
"""Channels, features, heads, modalities, or the length of the embedding."""
LARGEST_PATCH = 4096
"""Voxels along one axis of a patch."""
MOST_NOISE_LEVELS = 1000
LONGEST_NAME = 64
"""Characters of a modality's name."""


def description_text(description: NetworkDescription) -> str:
    """A description as JSON.

    Raises:
        ValueError: in a few words, if it cannot be read back: too large, or a card of anything but text,
            finite numbers, yes and no, lists and objects.
    """
    card = _plain(description.card)
    values = {**asdict(replace(description, card={})), "card": card}
    text = json.dumps(values, allow_nan=False, sort_keys=True)
    if len(text) > LONGEST_DESCRIPTION:
        raise ValueError(f"its description is longer than {LONGEST_DESCRIPTION} characters")
    read_description(text)
    return text


def read_description(text: str) -> NetworkDescription:
    """The description in a text.

    Raises:
        ValueError: in a few words, if it is none, or describes a network of absurd size.
    """
    if len(text) > LONGEST_DESCRIPTION:
        raise ValueError(f"its description is longer than {LONGEST_DESCRIPTION} characters")
    values = _object(strict_json(text), _names(NetworkDescription), "description")
    shape = _object(values["shape"], _names(UNetShape), "shape")
    modalities = _entries(values["modalities"], "modalities", WIDEST)
    if not all(
        isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable() for name in modalities
    ):
        raise ValueError(f"modalities are names of 1 to {LONGEST_NAME} characters")
    if len(set(modalities)) < len(modalities):
        raise ValueError("a modality is named twice")
    levels = _entries(values["noise_levels"], "noise_levels", MOST_NOISE_LEVELS)
    if not all(isinstance(level, int | float) and not isinstance(level, bool) for level in levels):
        raise ValueError("noise_levels are numbers")
    if not isinstance(values["kind"], str) or len(values["kind"]) > LONGEST_NAME:
        raise ValueError("its kind is no name")
    if not isinstance(shape["noise"], bool):
        raise ValueError("'noise' of its shape is neither true nor false")
    return NetworkDescription(
        kind=values["kind"],
        shape=UNetShape(
            in_channels=_count(shape["in_channels"], "in_channels"),
            out_channels=_count(shape["out_channels"], "out_channels"),
            channels=_counts(shape["channels"], "channels", MOST_LEVELS),
            blocks=_count(shape["blocks"], "blocks", most=MOST_BLOCKS),
            attention=_counts(shape["attention"], "attention", MOST_LEVELS, least=0),
            heads=_count(shape["heads"], "heads"),
            modalities=_count(shape["modalities"], "modalities", least=0),
            noise=shape["noise"],
            embedding=_count(shape["embedding"], "embedding"),
        ),
        modalities=tuple(modalities),
        noise_levels=tuple(float(level) for level in levels),
        patch=_size(values["patch"], "patch"),
        least=_size(values["least"], "least"),
        card=_plain(values["card"]),
    )


def strict_json(text: str | bytes) -> Any:
    """JSON whose objects name nothing twice and whose numbers are finite.

    Raises:
        ValueError: if it is anything else.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite_number
        )
    except RecursionError:
        raise ValueError("lists within lists without end") from None


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:LONGEST_NAME]!a} is named twice")
        found[key] = value
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is beyond all bounds")
    return value


def _plain(value: object, depth: int = 0) -> Any:
    """A card of lists and dictionaries; what JSON would not give back as it was is refused."""
    if depth > DEEPEST_CARD:
        raise ValueError(f"its card holds more than {DEEPEST_CARD} lists within one another")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"its card has the key {key!r:.40}, which is no text")
        return {key: _plain(entry, depth + 1) for key, entry in value.items()}
    if depth == 0:
        raise ValueError("its card is no object")
    if isinstance(value, list | tuple):
        return [_plain(entry, depth + 1) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"its card holds {value}, which is no finite number")
    if value is None or type(value) in (str, bool, int, float):
        return value
    raise ValueError(f"its card holds a {type(value).__name__}, no text, number, list or object")


def _names(kind: type[Any]) -> set[str]:
    return {entry.name for entry in fields(kind)}


def _object(value: object, expected: set[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"its {what} is no object")
    if set(value) != expected:
        wrong = sorted(set(value) ^ expected)[0]
        raise ValueError(f"its {what} {'lacks' if wrong in expected else 'holds'} {wrong[:LONGEST_NAME]!a}")
    return value


def _entries(value: object, what: str, most: int) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"its {what} are no list")
    if len(value) > most:
        raise ValueError(f"its {what} are {len(value)}, more than {most}")
    return value


def _count(value: object, what: str, least: int = 1, most: int = WIDEST) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"'{what}' is no whole number")
    if not least <= value <= most:
        # of a number without end only the beginning
        raise ValueError(f"'{what}' is {value if abs(value) < 10**9 else 'absurd'}, not in {least}..{most}")
    return value


def _counts(value: object, what: str, entries: int, least: int = 1) -> tuple[int, ...]:
    return tuple(_count(entry, what, least) for entry in _entries(value, what, entries))


def _size(value: object, what: str) -> tuple[int, int, int]:
    sizes = [_count(entry, what, most=LARGEST_PATCH) for entry in _entries(value, what, 3)]
    if len(sizes) != 3:
        raise ValueError(f"'{what}' has {len(sizes)} axes, not 3")
    return sizes[0], sizes[1], sizes[2]
