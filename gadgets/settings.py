"""Settings of gadgets and solvers: strings from XML or values from YAML become checked dataclass fields.

A field's type says what is accepted: ``int``, ``float``, ``bool``, ``str``, ``Literal[...]``, ``tuple[T,
...]``, unions and ``None``. Limits are the field's metadata: ``minimum`` and ``maximum`` (inclusive),
``above`` and ``below`` (exclusive), ``choices``. They hold for each entry of a tuple.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from quantitron.gadgets.errors import ScanError

LARGEST_SEED = 2**63 - 1
"""What every generator of random numbers takes, from 0 on."""

_T = TypeVar("_T")

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


def build(cls: type[_T], values: Mapping[str, object], where: str) -> _T:
    """Make a dataclass from values of any source.

    Args:
        cls: the dataclass.
        values: field name -> string or value; fields that are absent keep their default.
        where: what the sentence of an error begins with, such as ``settings/subspace.yaml, reconstruct``.

    Raises:
        ScanError: for an unknown key, a wrong type or a value out of range; the sentence names the place,
        the key
            and the nearest allowed one.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ScanError(unknown(key, fields, where, "property"))
        try:
            converted = _convert(value, hints[key])
        except ValueError as error:
            raise ScanError(f"{where}: property '{key}' is {_shown(value)}, but must be {error}") from None
        for entry in converted if isinstance(converted, tuple) else (converted,):
            limit = _broken_limit(entry, fields[key].metadata)
            if limit:
                raise ScanError(f"{where}: property '{key}' is {_shown(value)}, but must be {limit}")
        arguments[key] = converted
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ScanError(f"{where}: {error}") from error


def unknown(key: str, allowed: Iterable[str], where: str, kind: str) -> str:
    """The sentence for a name that does not exist, with the nearest one that does."""
    names = sorted(allowed)
    if not names:
        return f"{where}: unknown {kind} '{key}'; there are none to set"
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(names)}"
    return f"{where}: unknown {kind} '{key}'; {hint}"


def resolved(instance: object) -> dict[str, object]:
    """All settings of a gadget as plain values, for the hash and for listing.

    The settings of a solver inside a gadget stand beside the gadget's own, as they do in the XML.
    """
    if not dataclasses.is_dataclass(instance) or isinstance(instance, type):
        raise TypeError(f"{type(instance).__name__} is not a dataclass instance")
    found: dict[str, object] = {}
    for entry in dataclasses.fields(instance):
        value = getattr(instance, entry.name)
        if dataclasses.is_dataclass(value):
            found.update(resolved(value))
        else:
            found[entry.name] = value
    return found


def settings_hash(settings: Mapping[str, object]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of all resolved settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _convert(value: object, kind: Any) -> Any:
    """``value`` as type ``kind``; raises ValueError with the words that follow "must be"."""
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(kind))
    if origin is Literal:
        choices = get_args(kind)
        for choice in choices:
            if value == choice or (isinstance(value, str) and value.strip() == str(choice)):
                return choice
        raise ValueError(_one_of(value, choices))
    if origin is tuple:
        return _convert_tuple(value, get_args(kind))
    if kind is type(None):
        if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none")):
            return None
        raise ValueError("none")
    if kind is bool:
        return _convert_bool(value)
    if kind is int:
        return _convert_int(value)
    if kind is float:
        return _convert_float(value)
    if kind is str:
        if isinstance(value, (str, int, float)):
            return value.strip() if isinstance(value, str) else str(value)
        raise ValueError("text")
    raise TypeError(f"settings of type {kind} are not supported")


def _convert_union(value: object, kinds: tuple[Any, ...]) -> Any:
    words = []
    # str takes anything, so it comes last; int before float, so that a rank of 15 stays a number of columns
    order = [type(None), bool, int, float]
    for kind in sorted(kinds, key=lambda k: order.index(k) if k in order else len(order) + (k is str)):
        try:
            return _convert(value, kind)
        except ValueError as error:
            words.append(str(error))
    raise ValueError(" or ".join(dict.fromkeys(words)))


def _convert_tuple(value: object, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        entries: list[object] = list(filter(None, value.replace(",", " ").split()))
    elif isinstance(value, (list, tuple)):
        entries = list(value)
    else:
        entries = [value]
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(entries)
    if len(entries) != len(kinds):
        raise ValueError(f"{len(kinds)} values")
    return tuple(_convert(entry, kind) for entry, kind in zip(entries, kinds, strict=True))


def _convert_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("true or false")


def _convert_int(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value.strip())
        except ValueError:
            raise ValueError("a whole number") from None
    raise ValueError("a whole number")


def _convert_float(value: object) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            raise ValueError("a number") from None
        if math.isfinite(number):
            return number
        if math.isinf(number):
            raise ValueError("a finite number")
    raise ValueError("a number")


def _broken_limit(value: object, limits: Mapping[str, Any]) -> str | None:
    """What the value must be, where it breaks a limit."""
    if value is None:
        return None
    if "choices" in limits and value not in limits["choices"]:
        return _one_of(value, limits["choices"])
    if not isinstance(value, (int, float)):
        return None
    if "minimum" in limits and value < limits["minimum"]:
        return f"at least {limits['minimum']}"
    if "maximum" in limits and value > limits["maximum"]:
        return f"at most {limits['maximum']}"
    if "above" in limits and value <= limits["above"]:
        return f"above {limits['above']}"
    if "below" in limits and value >= limits["below"]:
        return f"below {limits['below']}"
    return None


def _one_of(value: object, choices: Iterable[object]) -> str:
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    return f"one of {', '.join(names)}" + (f" (nearest: {near[0]})" if near else "")


def _shown(value: object) -> str:
    text = f"'{value}'" if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
