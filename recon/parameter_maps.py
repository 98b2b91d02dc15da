"""Echo images in the contrast basis -> parameter maps: mask, fit of every voxel inside, and what failed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantitron.recon.coefficient_basis import CoefficientBasis
from quantitron.recon.coefficient_fit import fit_coefficients
from quantitron.recon.data import SEQUENCE_MAPS, Maps, Problem, Protocol
from quantitron.recon.inversion_efficiency import mean_of_free_fits, shared_efficiency
from quantitron.recon.masks import signal_mask
from quantitron.recon.match import Fit, fit
from quantitron.recon.signal.map_model import MapModel


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
    agreement: bool = False,
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
        agreement: as for ``fit_components``.

    Returns:
        Maps with s = 1 on the encoded grid; NaN outside the mask and where the fit gave nothing finite.
    """
    protocol = problem.protocol
    mask = signal_mask(images.abs().square().sum((0, 1)).sqrt(), mask_threshold)  # (z, y, x)
    inside = images[:, :, mask].permute(2, 0, 1)  # (voxel, e, l)
    if components is None:
        result = _fit_images(inside.contiguous(), mask, problem)
    else:
        u = torch.einsum("elk,vel->vk", components.mixing.to(inside).conj(), inside)
        result = fit_components(u, mask, components, problem, noise_variance, agreement)
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


def fit_components(
    coefficients: Tensor,
    mask: Tensor,
    components: CoefficientBasis,
    problem: Problem,
    noise_variance: float | None = None,
    agreement: bool = False,
) -> Fit:
    """Fit voxels in the components that their images were reconstructed in.

    An inversion efficiency that the header does not tell is found first and then given: left free in each
    voxel it takes up T1's noise.

    Args:
        coefficients: U (v, k) complex of the voxels in the mask.
        mask: (z, y, x) bool.
        components: the basis of U.
        problem: the slice.
        noise_variance: E|n|^2 of each component; None: from each voxel's residual.
        agreement: whether the efficiency is the one that neighbours agree on, in place of the mean of their
            free fits (``inversion_efficiency.py``).
    """
    protocol, psi = problem.protocol, problem.reduced.basis.contrast
    mixing = components.mixing.to(coefficients)  # (e, l, k)
    images = torch.einsum("elk,vk->vel", mixing, coefficients).contiguous()

    def refit(start: Fit) -> Fit:
        return fit_coefficients(coefficients, start, psi, mixing, protocol, noise_variance=noise_variance)

    if not agreement:
        return refit(_fit_images(images, mask, problem))
    result = fit(images, problem.reduced.basis, protocol)
    if _efficiency_unknown(result, protocol):
        model = MapModel(protocol, psi, mixing)
        shared = shared_efficiency(result, mask, coefficients, model, refit, noise_variance)
        result = replace(result, parameters={**result.parameters, "inversion": shared})
    return refit(result)


def _fit_images(images: Tensor, mask: Tensor, problem: Problem) -> Fit:
    """Fit V (v, e, l) of the voxels in the mask (z, y, x) as whole signals, an unknown efficiency first."""
    protocol, basis = problem.protocol, problem.reduced.basis
    result = fit(images, basis, protocol)
    if not _efficiency_unknown(result, protocol):
        return result
    given = {"inversion": mean_of_free_fits(result, mask)}
    return fit(images, basis, protocol, known=given, start=result.parameters)


def _efficiency_unknown(result: Fit, protocol: Protocol) -> bool:
    return "inversion" in result.parameters and protocol.inversion_efficiency is None and len(result.pd) > 0
