"""One file a method; SOLVERS lists them all."""

from quantitron.recon.solvers.llr import LocallyLowRank
from quantitron.recon.solvers.lorein import LoREIN
from quantitron.recon.solvers.lrt import LowRankTensor
from quantitron.recon.solvers.lrtv import LowRankTotalVariation
from quantitron.recon.solvers.model_based import ModelBased
from quantitron.recon.solvers.solver import Solver
from quantitron.recon.solvers.subspace import Subspace
from quantitron.recon.solvers.summit import Summit

__all__ = [
    "SOLVERS",
    "LoREIN",
    "LocallyLowRank",
    "LowRankTensor",
    "LowRankTotalVariation",
    "ModelBased",
    "Solver",
    "Subspace",
    "Summit",
]

SOLVERS: tuple[type[Solver], ...] = (
    Subspace,
    LocallyLowRank,
    LowRankTotalVariation,
    LowRankTensor,
    ModelBased,
    LoREIN,
    Summit,
)
"""Every method that the XML can name."""
