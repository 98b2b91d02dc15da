"""Whether a header that is about to be written would be read back as the scan that it was made from."""

from __future__ import annotations

import math

import ismrmrd.xsd as xsd

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header import read_encoding, read_protocol
from quantitron.gadgets.sequence import contrast_axes, detect_sequence
from quantitron.recon.data import Protocol


def require_readable(header: xsd.ismrmrdHeader, protocol: Protocol) -> None:
    """Refuse a scan, before it is written, whose header no reconstruction would take, or take for another.

    Args:
        header: of the scan, from ``make_header``.
        protocol: that the header was made from.

    Raises:
        ScanError: as ``make_context`` does; and if times or angles would be read in another unit.
    """
    notes: list[str] = []
    name, _ = detect_sequence(header)
    read_encoding(header, notes)
    found = read_protocol(header, name, contrast_axes(name, ""), protocol.phase_sign, notes)
    for quantity in ("echo_time", "repetition_time", "flip_angle", "preparation_time", "inversion_time"):
        given, read = getattr(protocol, quantity), getattr(found, quantity)
        if len(read) != len(given) or not all(
            math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
            for one, other in zip(given, read, strict=True)
        ):
            raise ScanError(f"no header can say this {quantity.replace('_', ' ')}: {'; '.join(notes)}")
