"""The tissue whose signal, and whose weighted images, are nearest to those of each voxel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quantitron.recon.fingerprint_match import FingerprintAtoms, dictionary_table
from quantitron.recon.joint_match import JointMatcher
from quantitron.recon.signal.spin_echo import SpinEchoProtocol, spin_echo_signal
from quantitron.recon.solvers.fingerprint import FingerprintEstimate


@dataclass(frozen=True)
class Tissue:
    """What was found, and its images."""

    atom: Tensor
    """(z, y, x) int64: number of the atom; -1 where no signal is."""
    t1: Tensor
    """(z, y, x) [s]; 0 where no signal is."""
    t2: Tensor
    """(z, y, x) [s]; likewise."""
    pd: Tensor
    """(z, y, x) complex; likewise."""
    coefficients: Tensor
    """(x, k, z, y) complex: those of the tissue; where no signal is, as they were given."""
    contrasts: Tensor
    """(m, z, y, x) real: weighted images of the tissue; 0 where no signal is. m is 0 if there are none."""


class NearestTissue:
    """Matching of whole images; what the search takes is kept from one call to the next."""

    def __init__(
        self,
        matcher: JointMatcher,
        t1: Tensor,
        t2: Tensor,
        mask: Tensor,
        field: Tensor | None = None,
    ) -> None:
        """Keep what belongs to the scan.

        Args:
            matcher: with atoms (a, k) in the components of the images, on the device where those will be.
            t1: (a,) [s] of the atoms.
            t2: (a,) [s] of the atoms.
            mask: (z, y, x) bool: where there is signal.
            field: (z, y, x) that the atoms depend on, if they do.
        """
        device = t1.device
        self._matcher, self._t1, self._t2 = matcher, t1, t2
        self._mask = mask.permute(2, 0, 1).to(device)  # (x, z, y)
        self._field = None if field is None else field.permute(2, 0, 1).to(device)[self._mask]  # (v,)

    @staticmethod
    def of_fingerprints(
        estimate: FingerprintEstimate, groups: int, protocol: SpinEchoProtocol | None = None
    ) -> NearestTissue:
        """For the coefficients of a fingerprint scan.

        Args:
            estimate: of the scan, for basis, mask and dictionary.
            groups: of atoms, for fast matching; 0 compares with every atom.
            protocol: of the weighted images that take part; None: no such images.
        """
        problem, device = estimate.problem, estimate.coefficients.device
        mixing = estimate.basis.mixing[0].cpu()
        table = dictionary_table(problem.dictionary, problem.basis, mixing).to(device)  # (b, i, j, k)
        atoms = FingerprintAtoms(problem.dictionary, table)
        contrasts = None if protocol is None else spin_echo_signal(atoms.t1, atoms.t2, protocol)
        matcher = JointMatcher(atoms.table, contrasts, groups)
        return NearestTissue(matcher, atoms.t1, atoms.t2, estimate.mask, problem.b1)

    def __call__(
        self, coefficients: Tensor, contrasts: Tensor | None = None, weights: Tensor | None = None
    ) -> Tissue:
        """Match every voxel with signal.

        Args:
            coefficients: (x, k, z, y) complex.
            contrasts: (m, z, y, x) real, of either sign; None: the coefficients alone count.
            weights: (m,) of the contrasts beside the coefficients, not negative.

        Raises:
            ValueError: as ``JointMatcher``.
        """
        mask = self._mask
        values = coefficients.permute(0, 2, 3, 1)  # (x, z, y, k)
        inside = values[mask]  # (v, k)
        also = None if contrasts is None else contrasts.permute(3, 1, 2, 0)[mask]  # (v, m)
        found = self._matcher(inside, also, weights, self._field)
        signals = self._matcher.signals(found, self._field)  # (v, k)
        result = values.clone()
        result[mask] = signals.to(result.dtype)
        images = self._matcher.contrasts(found)  # (v, m)
        return Tissue(
            atom=self._on_grid(found.atom + 1) - 1,
            t1=self._on_grid(self._t1[found.atom]),
            t2=self._on_grid(self._t2[found.atom]),
            pd=self._on_grid(found.pd),
            coefficients=result.permute(0, 3, 1, 2),
            contrasts=self._on_grid(images).movedim(-1, 0),
        )

    def _on_grid(self, values: Tensor) -> Tensor:
        """Values (v, ...) of the voxels in the mask as (z, y, x, ...), 0 elsewhere."""
        grid = values.new_zeros(*self._mask.shape, *values.shape[1:])
        grid[self._mask] = values
        return grid.movedim(0, 2).contiguous()
