"""Values of a header that its parser could not convert: taken for what they mean, or named in one sentence.

The parser leaves text where a number or a name of the schema should stand, and stops where the schema demands
what is absent. Here both matter only in elements that decide something about the reconstruction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

import ismrmrd.xsd as xsd

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.sequence import is_sequence_parameter

_T = TypeVar("_T")

READ = (
    "acquisitionSystemInformation.systemFieldStrength_T",
    "acquisitionSystemInformation.relativeReceiverNoiseBandwidth",
    "acquisitionSystemInformation.receiverChannels",
    "experimentalConditions",
    "encoding.encodedSpace",
    "encoding.reconSpace",
    "encoding.encodingLimits",
    "encoding.trajectory",
    "sequenceParameters.TR",
    "sequenceParameters.TE",
    "sequenceParameters.TI",
    "sequenceParameters.flipAngle_deg",
)
"""Elements that must make sense, with all that is in them; the sequences' user parameters come on top."""
MAY_BE_ABSENT = ("encoding.encodingLimits",)
"""Of these, what the schema demands and real files leave out."""
MEASURED = ("experimentalConditions.H1resonanceFrequency_Hz",)
"""Whole in the schema, but no count: any number has a meaning."""
_USER = "userParameters."
_SHOWN = 40
"""Characters of a value in a sentence."""


def with_absent_elements(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """One element of the header, with None for what the schema demands and the file does not have.

    Args:
        kind: of the element, a dataclass.
        values: its parts.
    """
    absent = {
        entry.name: None
        for entry in dataclasses.fields(kind)  # type: ignore[arg-type]
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    }
    return kind(**{**absent, **values})


def convert_values(header: xsd.ismrmrdHeader) -> None:
    """Make whole numbers of such as 48.0 and names of the schema of such as Cartesian, in place.

    Raises:
        ScanError: if an element of ``READ``, or a user parameter of a sequence, is absent where the schema
            demands it or has a value that is none; the sentence names both.
    """
    _convert(header, "")


def _convert(part: Any, where: str) -> None:
    """Convert what is in one element.

    Args:
        part: the element.
        where: its path, with a dot at the end except for the root's.
    """
    element: type = type(part)
    for name, kinds in _kinds(element).items():
        value, path = getattr(part, name), f"{where}{name}"
        if isinstance(value, list):
            value[:] = [_converted(item, kinds, _numbered(path, index)) for index, item in enumerate(value)]
        elif value is not None:
            setattr(part, name, _converted(value, kinds, path))
        elif type(None) not in kinds and path not in MAY_BE_ABSENT and _is_read(path):
            raise ScanError(f"the header is not an ISMRMRD header: it has no {path}")


def _converted(value: Any, kinds: tuple[type, ...], path: str) -> Any:
    if isinstance(value, (xsd.userParameterDoubleType, xsd.userParameterLongType)):
        path = path.rpartition(".")[0] + f".{value.name}"
    if dataclasses.is_dataclass(value):
        _convert(value, f"{path}.")
        return value
    if not isinstance(value, str) or str in kinds or not _is_read(path):
        return value
    text = value.strip()
    if not text and type(None) in kinds:
        return None
    names = [member for kind in kinds if issubclass(kind, Enum) for member in kind]
    if names:
        for member in names:
            if str(member.value).casefold() == text.casefold():
                return member
        wanted = f"none of {', '.join(str(member.value) for member in names)}"
        raise ScanError(f"the header's {path} is '{_short(text)}', {wanted}")
    whole = int in kinds and path not in MEASURED and not path.startswith(_USER)
    try:
        number = float(text)
    except ValueError:
        raise ScanError(f"the header's {path} is '{_short(text)}', not a number") from None
    if whole and not number.is_integer():
        raise ScanError(f"the header's {path} is '{_short(text)}', not a whole number")
    return int(number) if whole else number


@cache
def _kinds(element: type) -> dict[str, tuple[type, ...]]:
    """Name of each part of an element -> types that its value, or each of its values, may have."""
    return {
        name: get_args(hint) or (hint,)
        for name, hint in get_type_hints(element).items()
        if not name.startswith("_")
    }


def _numbered(path: str, index: int) -> str:
    """Encodings after the first, which are not reconstructed, have paths that nothing reads."""
    return f"{path}[{index}]" if path == "encoding" and index else path


def _is_read(path: str) -> bool:
    if path.startswith(_USER):
        return is_sequence_parameter(path.removeprefix(_USER).removesuffix(".value"))
    return f"{path}.".startswith(tuple(f"{element}." for element in READ))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
