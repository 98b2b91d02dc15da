"""One file a method; SOLVERS lists them all."""

from quantitron.recon.solvers.solver import Solver
from quantitron.recon.solvers.subspace import Subspace

__all__ = ["SOLVERS", "Solver", "Subspace"]

SOLVERS: tuple[type[Solver], ...] = (Subspace,)
"""Every method that the XML can name."""
