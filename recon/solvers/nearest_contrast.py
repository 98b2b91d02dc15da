"""The tissue that is nearest to each voxel's echo images, of a Cartesian scan, and to its weighted images.

    minimise over T1, T2 and complex PD:   ||V - PD g p(T1, T2)^T||^2 + sum_m w_m (q_m - |PD| e_m(T1, T2))^2

V (e, l) are the coefficients of a voxel, echo by echo, p its contrasts in the basis and g its echo train, of
unit length. V is of rank one where the model holds, so that g is the principal left vector of V, whatever
T2* and off-resonance made it; what is left, p beside g^H V, is the matching of fingerprints. PD is that of
the tissue times the length of its echo train, a T2*-weighted PD, as that of fingerprints is weighted by
their TE.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantitron.recon.data import Basis, Protocol
from quantitron.recon.field_table import FieldTable
from quantitron.recon.inversion_efficiency import mean_of_free_fits
from quantitron.recon.joint_match import JointMatcher
from quantitron.recon.match import fit
from quantitron.recon.signal.dictionary import contrast_dictionary
from quantitron.recon.signal.spin_echo import SpinEchoProtocol, spin_echo_signal
from quantitron.recon.solvers.cartesian import LinearEstimate
from quantitron.recon.solvers.nearest_tissue import NearestTissue, Tissue

POINTS = {"t1": 150, "t2": 120}
"""Grid of the atoms. Between its points the maps, which are fitted to what k-space makes of the atoms, are
free to lie."""
ATOM_RANGE = {"t1": (0.1, 6.0), "t2": (0.01, 3.0)}
"""Where the atoms lie [s]."""


class NearestContrast:
    """Matching of whole images; what the search takes is kept from one call to the next."""

    def __init__(
        self, nearest: NearestTissue, mixing: Tensor, mask: Tensor, known: Tensor | None = None
    ) -> None:
        """Keep what belongs to the scan.

        Args:
            nearest: matches contrast sides (x, l, z, y).
            mixing: (e, l, k) orthonormal columns: V = ``mixing @ U``.
            mask: (z, y, x) bool: where there is signal.
            known: (x, k, z, y) coefficients whose echo trains are taken for those of all; None: of each
                images their own.
        """
        self._nearest, self._mixing = nearest, mixing
        self._mask = mask.permute(2, 0, 1).to(mixing.device)  # (x, z, y)
        self._echo = None if known is None else echo_side(self._measured(known))  # (v, e)

    @staticmethod
    def of_estimate(
        estimate: LinearEstimate,
        groups: int,
        protocol: SpinEchoProtocol | None = None,
        known: Tensor | None = None,
    ) -> NearestContrast:
        """For the coefficients of a scan whose contrasts depend on T1 and T2.

        Args:
            estimate: of the scan, for basis, mask and, where the header does not tell it, the inversion
                efficiency.
            groups: of atoms, for fast matching; 0 compares with every atom.
            protocol: of the weighted images that take part; None: no such images.
            known: as for ``NearestContrast``.
        """
        problem, device = estimate.problem, estimate.coefficients.device
        table, t1, t2 = contrast_table(problem.protocol, problem.reduced.basis, device)
        contrasts = None if protocol is None else spin_echo_signal(t1, t2, protocol)
        efficiency = None
        if problem.protocol.inversion_efficiency is None:
            efficiency = _efficiency(estimate).to(device)
        matcher = JointMatcher(table, contrasts, groups)
        nearest = NearestTissue(matcher, t1, t2, estimate.mask, field=efficiency)
        return NearestContrast(nearest, estimate.basis.mixing.to(device), estimate.mask, known)

    def __call__(
        self, coefficients: Tensor, contrasts: Tensor | None = None, weights: Tensor | None = None
    ) -> Tissue:
        """Match every voxel with signal.

        Args:
            coefficients: U (x, k, z, y) complex.
            contrasts: (m, z, y, x) real, of either sign; None: the coefficients alone count.
            weights: (m,) of the contrasts beside the coefficients, not negative.

        Raises:
            ValueError: as ``JointMatcher``.
        """
        values = coefficients.permute(0, 2, 3, 1)  # (x, z, y, k)
        mixing = self._mixing.to(coefficients)
        measured = self._measured(coefficients)
        echo = echo_side(measured) if self._echo is None else self._echo  # (v, e)
        sides = values.new_zeros(*self._mask.shape, mixing.shape[1])  # (x, z, y, l)
        sides[self._mask] = torch.einsum("ve,vel->vl", echo.conj(), measured)
        tissue = self._nearest(sides.permute(0, 3, 1, 2), contrasts, weights)
        found = tissue.coefficients.permute(0, 2, 3, 1)[self._mask]  # (v, l) PD p
        result = values.clone()
        result[self._mask] = torch.einsum("elk,ve,vl->vk", mixing.conj(), echo, found)
        return replace(tissue, coefficients=result.permute(0, 3, 1, 2))

    def _measured(self, coefficients: Tensor) -> Tensor:
        """V (v, e, l) of the voxels with signal."""
        inside = coefficients.permute(0, 2, 3, 1)[self._mask]
        return torch.einsum("elk,vk->vel", self._mixing.to(inside), inside)


def echo_side(measured: Tensor) -> Tensor:
    """Principal left vectors (v, e), of unit length, first echo real, of V (v, e, l)."""
    _, vectors = torch.linalg.eigh(measured @ measured.mH)  # small: over the echoes
    echo: Tensor = vectors[:, :, -1]
    first = echo[:, :1]
    return echo * torch.where(first == 0, 1, first.sgn().conj())


def contrast_table(
    protocol: Protocol, basis: Basis, device: torch.device
) -> tuple[FieldTable, Tensor, Tensor]:
    """The contrasts of tissue in the basis.

    Args:
        protocol: the sequence, whose contrasts depend on T1, T2 and the inversion efficiency.
        basis: Psi (w, l).
        device: of the result.

    Returns:
        Atoms over the efficiency where that is not known, T1 (a,) and T2 (a,) [s], T2 nowhere above T1.
    """
    # Contrasts are linear in the efficiency: two of them tell all.
    dictionary = contrast_dictionary(protocol, ATOM_RANGE, {**POINTS, "inversion": 2})
    psi = basis.contrast.to(torch.promote_types(basis.contrast.dtype, torch.float64))
    atoms = dictionary.atoms.to(psi.dtype) @ psi.conj()  # (t1 t2 efficiency, l)
    values = torch.unique(dictionary.parameters["inversion"])  # (b,)
    t1, t2 = (dictionary.parameters[name].reshape(-1, len(values))[:, 0] for name in ("t1", "t2"))
    plausible = t2 <= t1
    atoms = atoms.reshape(len(t1), len(values), -1)[plausible].transpose(0, 1)  # (b, a, l)
    single = torch.promote_types(basis.contrast.dtype, torch.float32)
    table = FieldTable(atoms.to(device, single).contiguous(), values.float(), float(values[-1]))
    return table, t1[plausible].to(device, torch.float32), t2[plausible].to(device, torch.float32)


def _efficiency(estimate: LinearEstimate) -> Tensor:
    """(z, y, x) inversion efficiency, smooth, from a fit of the linear estimate."""
    problem, mask = estimate.problem, estimate.mask.cpu()
    efficiency = torch.full(mask.shape, 1.0)
    inside = estimate.coefficients.cpu().permute(2, 3, 0, 1)[mask]  # (v, k)
    if len(inside):
        images = torch.einsum("elk,vk->vel", estimate.basis.mixing.to(inside), inside)
        free = fit(images, problem.reduced.basis, problem.protocol)
        efficiency[mask] = mean_of_free_fits(free, mask).to(efficiency)
    return efficiency
