"""The set of all fingerprints, and the one of it that is nearest to the signal of each voxel."""

from __future__ import annotations

from torch import Tensor

from quantitron.recon.solvers.fingerprint import FingerprintEstimate
from quantitron.recon.solvers.nearest_tissue import NearestTissue


class NearestFingerprint:
    """Coefficient images to those of the fingerprints that match them; where no signal is, they stay."""

    def __init__(self, estimate: FingerprintEstimate, groups: int) -> None:
        """Keep the dictionary in the scan's basis.

        Args:
            estimate: of the scan, for basis, mask and dictionary.
            groups: of atoms, for fast matching; 0 compares with every atom.
        """
        self._nearest = NearestTissue.of_fingerprints(estimate, groups)

    def __call__(self, images: Tensor) -> Tensor:
        """(x, k, z, y) -> (x, k, z, y)."""
        return self._nearest(images).coefficients
