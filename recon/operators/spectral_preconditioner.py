"""An inverse of A^H A and penalties that is right where it matters: in the density of the sampling.

    P = D^-1/2 F^H E^-1 F D^-1/2

Spirals visit the centre of k-space far more often than its edge, which no factor for each voxel can
make good: conjugate gradients with one settle edges last, and images stay blurred. E_k(q) is what the data
term and the penalties do to a wave of frequency q in component k. D_k(r), relative to that, is how much more
the penalties weigh at voxel r than they do in the object.
"""

from __future__ import annotations

import torch
from torch import Tensor

OBJECT = 0.53
"""Share of the object's voxels: penalties that vary are taken as those weigh at most. Outside of the object
they are larger by decades."""
_AXES = (0, 2, 3)  # (x, z, y) of (x, k, z, y)


class SpectralPreconditioner:
    """Residuals (x, k, z, y) to steps."""

    def __init__(self, spectrum: Tensor, penalty: Tensor, mask: Tensor) -> None:
        """Keep E and D.

        Args:
            spectrum: (x, k, z, y) real, as ``ToeplitzSense.spectrum``.
            penalty: (x, k, z, y) real: diagonal of the penalties' curvature, above zero.
            mask: (x, z, y) bool: where the object is.
        """
        mean = spectrum.mean(_AXES)[:, None, None]  # (k, 1, 1)
        inside = _inside(penalty, mask)
        self._curvature = spectrum + inside
        self._factor = ((mean + inside) / (mean + penalty)).sqrt()

    def __call__(self, residual: Tensor) -> Tensor:
        """P r."""
        waves = torch.fft.fftn(self._factor * residual, dim=_AXES)
        step: Tensor = self._factor * torch.fft.ifftn(waves / self._curvature, dim=_AXES)
        return step


def _inside(penalty: Tensor, mask: Tensor) -> Tensor:
    """What a penalty (x, k, z, y) weighs at most in the object: (k, 1, 1)."""
    voxels = penalty.permute(0, 2, 3, 1)  # (x, z, y, k)
    voxels = voxels[mask] if bool(mask.any()) else voxels.flatten(0, 2)
    place = max(1, round(OBJECT * len(voxels)))
    return voxels.kthvalue(place, dim=0).values[:, None, None]
