"""The one exception whose text is written for the person at the scanner."""

from __future__ import annotations


class ScanError(Exception):
    """Bad data, header or settings. Its text is one clear sentence that names what is wrong and where."""
