"""Echo images in the contrast basis -> parameter maps: mask, fit of every voxel inside, and what failed."""

from __future__ import annotations

import torch
from torch import Tensor

from quantitron.recon.data import SEQUENCE_MAPS, Maps, Problem
from quantitron.recon.masks import signal_mask
from quantitron.recon.match import fit


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
) -> Maps:
    """Fit the voxels that hold signal.

    Args:
        images: V (e, l, z, y, x) complex, with the off-resonance ``b0`` taken out.
        b0: (z, y, x) [Hz].
        problem: the slice that the images belong to.
        mask_threshold: share of the brightest amplitude below which a voxel is background.
        rank, retained_energy, residual_to_noise: handed on to the maps.
        standard_deviations: whether the fit's standard deviations are handed on.

    Returns:
        Maps with s = 1 on the encoded grid; NaN outside the mask and where the fit gave nothing finite.
    """
    protocol = problem.protocol
    mask = signal_mask(images.abs().square().sum((0, 1)).sqrt(), mask_threshold)  # (z, y, x)
    inside = images[:, :, mask].permute(2, 0, 1)  # (voxel, e, l)
    result = fit(inside.contiguous(), problem.reduced.basis, protocol)
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
            if standard_deviations and name in result.standard_deviation
        },
        magnitude=images[:, 0].abs()[:, None] if protocol.contrasts == 1 else None,
        rank=rank,
        retained_energy=retained_energy,
        residual_to_noise=residual_to_noise,
        failed_voxels=int((~good).sum()),
    )
