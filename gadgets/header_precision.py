"""Headers at the precision that Gadgetron leaves them.

Gadgetron hands on a header that went through the single-precision fields of ISMRMRD's C++ library: TE 4.92
comes out as 4.92000008. Read as the shortest decimal of the same single-precision number, both are 4.92
again, and a scan gives the same maps to the last bit whichever way its header came.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np
from ismrmrd.xsd import userParameterDoubleType

_T = TypeVar("_T")


def single_precision(header: _T) -> _T:
    """The header, or a part of it, with its floating-point fields as shortest decimals; changed in place.

    User parameters are double precision in the library too and stay as they are.
    """
    if not dataclasses.is_dataclass(header) or isinstance(header, userParameterDoubleType):
        return header
    for entry in dataclasses.fields(header):
        value = getattr(header, entry.name)
        if isinstance(value, list):
            value[:] = [_shortest(item) for item in value]
        elif value is not None:
            setattr(header, entry.name, _shortest(value))
    return header


def _shortest(value: Any) -> Any:
    return float(str(np.float32(value))) if isinstance(value, float) else single_precision(value)
