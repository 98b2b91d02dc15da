"""Makes the bare checkout importable as ``quantitron`` where it is not installed."""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if "quantitron" not in sys.modules:
    package = types.ModuleType("quantitron")
    package.__path__ = [str(ROOT)]
    sys.modules["quantitron"] = package
