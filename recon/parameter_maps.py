"""Echo images in the contrast basis -> parameter maps: mask, fit of every voxel inside, and what failed."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from quantitron.recon.coefficient_basis import CoefficientBasis
from quantitron.recon.coefficient_fit import fit_coefficients
from quantitron.recon.data import SEQUENCE_MAPS, Maps, Problem
from quantitron.recon.masks import signal_mask
from quantitron.recon.match import Fit, fit


def parameter_maps(
    images: Tensor,
    b0: Tensor,
    problem: Problem,
    *,
    mask_threshold: float,
    rank: int,
    retained_energy: float,
    residual_to_noise: float,
    standard_deviations: bool,
    components: CoefficientBasis | None = None,
    noise_variance: float | None = None,
) -> Maps:
    """Fit the voxels that hold signal.

    Args:
        images: V (e, l, z, y, x) complex, with the off-resonance ``b0`` taken out.
        b0: (z, y, x) [Hz].
        problem: the slice that the images belong to.
        mask_threshold: share of the brightest amplitude below which a voxel is background.
        rank, retained_energy, residual_to_noise: handed on to the maps.
        standard_deviations: whether the fit's standard deviations are handed on.
        components: that span the images; the fit ends in them. None: the images count in full.
        noise_variance: E|n|^2 of each component, for the standard deviations; None: from each voxel's
            residual, as where there are no components.

    Returns:
        Maps with s = 1 on the encoded grid; NaN outside the mask and where the fit gave nothing finite.
    """
    protocol = problem.protocol
    mask = signal_mask(images.abs().square().sum((0, 1)).sqrt(), mask_threshold)  # (z, y, x)
    inside = images[:, :, mask].permute(2, 0, 1)  # (voxel, e, l)
    result = _fit(inside.contiguous(), mask, problem)
    if components is not None:
        mixing = components.mixing.to(inside)  # (e, l, k)
        u = torch.einsum("elk,vel->vk", mixing.conj(), inside)
        psi = problem.reduced.basis.contrast
        result = fit_coefficients(u, result, psi, mixing, protocol, noise_variance=noise_variance)
    fitted = dict(result.parameters)
    if protocol.echoes == 1:
        fitted.pop("t2star", None)
        fitted.pop("b0", None)
    else:
        fitted["b0"] = fitted["b0"] + b0[mask]
    fitted["pd"] = result.pd.abs()
    fitted["phase"] = result.pd.angle()
    good = torch.stack([values.isfinite() for values in fitted.values()]).all(0) & (fitted["pd"] > 0)

    def on_grid(values: Tensor) -> Tensor:
        grid = torch.full(mask.shape, float("nan"))
        grid[mask] = torch.where(good, values.float(), torch.nan)
        return grid[None]  # (s, z, y, x)

    names = [name for name in SEQUENCE_MAPS[protocol.sequence] if name in fitted]
    return Maps(
        values={name: on_grid(fitted[name]) for name in names},
        mask=mask[None],
        standard_deviation={
            name: on_grid(result.standard_deviation[name])
            for name in names
            # The inversion efficiency was given to the last fit, which says 0 of it.
            if standard_deviations and name in result.standard_deviation and name != "inversion"
        },
        magnitude=images[:, 0].abs()[:, None] if protocol.contrasts == 1 else None,
        rank=rank,
        retained_energy=retained_energy,
        residual_to_noise=residual_to_noise,
        failed_voxels=int((~good).sum()),
    )


INVERSION_WIDTH = 4.0
"""Standard deviation [voxels] over which the inversion efficiency is averaged."""


def _fit(inside: Tensor, mask: Tensor, problem: Problem) -> Fit:
    """Fit all voxels; an unknown inversion efficiency is fitted first, averaged over space, and then given.

    The efficiency follows the transmit field and is smooth; left free in each voxel it takes up T1's noise.
    It comes from whole signals: images of so few components that they hold tissue badly (0.1 % of the energy
    lost and more) bias it by up to a per cent.

    Args:
        inside: (voxel, e, l) of the voxels in the mask.
        mask: (z, y, x) bool.
        problem: the slice.
    """
    protocol, basis = problem.protocol, problem.reduced.basis
    result = fit(inside, basis, protocol)
    if "inversion" not in result.parameters or protocol.inversion_efficiency is not None or not len(inside):
        return result
    given = efficiency_map(result, mask)[mask]
    return fit(inside, basis, protocol, known={"inversion": given}, start=result.parameters)


def efficiency_map(result: Fit, mask: Tensor) -> Tensor:
    """The inversion efficiency of a fit that left it free in each voxel, averaged over space.

    Args:
        result: of the voxels in the mask.
        mask: (z, y, x) bool.

    Returns:
        (z, y, x) at most 1; 0 far outside the mask.
    """
    deviation = result.standard_deviation["inversion"]
    typical = deviation.median().clamp_min(1e-6)
    weight = np.zeros(mask.shape, dtype=np.float32)
    # Voxels that know the efficiency well speak loudest; none so loud that it stands alone.
    weight[mask.numpy()] = (1 / (deviation.square() + (0.3 * typical) ** 2)).numpy()
    values = np.zeros(mask.shape, dtype=np.float32)
    values[mask.numpy()] = result.parameters["inversion"].numpy()
    sigma = [min(INVERSION_WIDTH, n / 4) if n > 1 else 0 for n in mask.shape]
    smooth = ndimage.gaussian_filter(values * weight, sigma) / np.maximum(
        ndimage.gaussian_filter(weight, sigma), np.finfo(np.float32).tiny
    )
    return torch.from_numpy(np.minimum(smooth, 1.0).astype(np.float32))
