"""How far coefficient images are from the data of a scan on any trajectory, by one transform of each image.

    ||s - A U||^2 = sum_(n, c) [ v^H G_g(n) v - 2 Re v^H b_nc ] + ||s||^2,    v = (F C_c U)(k_n)

For images that come without iterations no kernels are made (``toeplitz.py``), which would cost far more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantitron.recon.operators.nonuniform_fourier import SINGLE_PRECISION, NonuniformFourier
from quantitron.recon.trajectory_sums import TrajectorySums

_POINTS = 65536
"""Points whose matrices are held at once; bounds memory, changes no result."""


def residual_energy(sums: TrajectorySums, csm: Tensor, mixing: Tensor, coefficients: Tensor) -> float:
    """||s - A U||^2 over all samples.

    Args:
        sums: of one slice.
        csm: (x, c, z, y) coil sensitivity maps.
        mixing: (l, k): components in the basis of the sums.
        coefficients: U (x, k, z, y) in these components.
    """
    device = csm.device
    tolerance = 1e-12 if csm.dtype == torch.complex128 else SINGLE_PRECISION
    fourier = NonuniformFourier(sums.trajectory.to(device), sums.grid, tolerance)
    mixing = mixing.to(device)
    if mixing.is_complex() and not bool(mixing.imag.any()) and not sums.gram.is_complex():
        mixing = mixing.real
    kind = torch.promote_types(mixing.dtype, sums.gram.dtype)
    gram = mixing.to(kind).mH @ sums.gram.to(device, kind) @ mixing.to(kind)  # (g, k, k)
    gram = gram.to(csm.dtype if gram.is_complex() else csm.real.dtype)
    readout = sums.readout.to(device)
    images = coefficients.to(csm).permute(1, 2, 3, 0)  # (k, z, y, x)
    total = sums.energy
    for coil, sensitivity in enumerate(csm.permute(1, 2, 3, 0)):  # (z, y, x)
        spectra = fourier((sensitivity * images).contiguous())  # (k, n)
        data = sums.projected.mixed(mixing.to(csm), slice(coil, coil + 1))[:, 0]  # (k, n)
        for part in torch.split(torch.arange(spectra.shape[1], device=device), _POINTS):
            v, matrices = spectra[:, part].T, gram[readout[part]]  # (p, k), (p, k, k)
            if not matrices.is_complex():
                pairs = torch.view_as_real(v)
                predicted = torch.view_as_complex((matrices @ pairs).contiguous())
            else:
                predicted = (matrices @ v[..., None])[..., 0]
            # In double precision: the terms may nearly cancel.
            difference = predicted.to(torch.complex128) - 2 * data[:, part].T
            total += float(torch.vdot(v.to(torch.complex128).flatten(), difference.flatten()).real)
    return total
