"""Whether a class in ``SOLVERS`` can be named in the XML and given settings."""

from __future__ import annotations

from collections.abc import Iterable

from quantitron.gadgets.errors import ScanError
from quantitron.recon.solvers import Solver


def require_complete(solvers: Iterable[type[Solver]]) -> None:
    """Refuse solvers of which something is missing that every method has.

    Raises:
        ScanError: if a class has no name, lists no sequences, or is no dataclass of its own, whose fields
            would be no settings; the sentence names the class and its module.
    """
    for kind in solvers:
        called = f"the solver class {kind.__module__}.{kind.__qualname__}"
        if not isinstance(getattr(kind, "name", None), str) or not kind.name:
            raise ScanError(f'{called} has no name; give it one: name: ClassVar[str] = "..."')
        if not kind.sequences:
            raise ScanError(
                f"{called} lists no sequences that it reconstructs; give it some: "
                'sequences: ClassVar[tuple[str, ...]] = ("megre",)'
            )
        if "__dataclass_fields__" not in vars(kind):
            raise ScanError(f"{called} is no dataclass, so that its fields are no settings")
