"""One file a method; SOLVERS lists them all."""

from quantitron.recon.solvers.arnet import ArtifactRemoval
from quantitron.recon.solvers.joint_inr import JointINR
from quantitron.recon.solvers.llr import FingerprintLocallyLowRank, LocallyLowRank
from quantitron.recon.solvers.lorein import LoREIN
from quantitron.recon.solvers.lrt import LowRankTensor
from quantitron.recon.solvers.lrtv import FingerprintTotalVariation, LowRankTotalVariation
from quantitron.recon.solvers.model_based import ModelBased
from quantitron.recon.solvers.mrf_admm import FingerprintAdmm
from quantitron.recon.solvers.mrf_pnp import PlugAndPlay
from quantitron.recon.solvers.mri2qmap import CartesianMri2Qmap, FingerprintMri2Qmap
from quantitron.recon.solvers.solver import Solver
from quantitron.recon.solvers.subspace import FingerprintSubspace, Subspace
from quantitron.recon.solvers.summit import Summit
from quantitron.recon.solvers.svdmrf import SvdMrf

__all__ = [
    "SOLVERS",
    "ArtifactRemoval",
    "CartesianMri2Qmap",
    "FingerprintAdmm",
    "FingerprintLocallyLowRank",
    "FingerprintMri2Qmap",
    "FingerprintSubspace",
    "FingerprintTotalVariation",
    "JointINR",
    "LoREIN",
    "LocallyLowRank",
    "LowRankTensor",
    "LowRankTotalVariation",
    "ModelBased",
    "PlugAndPlay",
    "Solver",
    "Subspace",
    "Summit",
    "SvdMrf",
]

SOLVERS: tuple[type[Solver], ...] = (
    Subspace,
    LocallyLowRank,
    LowRankTotalVariation,
    LowRankTensor,
    ModelBased,
    LoREIN,
    Summit,
    SvdMrf,
    FingerprintSubspace,
    FingerprintLocallyLowRank,
    FingerprintTotalVariation,
    FingerprintAdmm,
    FingerprintMri2Qmap,
    CartesianMri2Qmap,
    JointINR,
    PlugAndPlay,
    ArtifactRemoval,
)
"""Every method that the XML can name; two of one name reconstruct different sequences."""
