"""Coefficient images of a fingerprint -> T1, T2 and PD maps: mask, matching, refinement, and what failed."""

from __future__ import annotations

import torch
from torch import Tensor

from quantitron.recon.data import SEQUENCE_MAPS, FingerprintProblem, Maps
from quantitron.recon.fingerprint_match import dictionary_table, match_fingerprints
from quantitron.recon.fingerprint_refine import FingerprintRefinement
from quantitron.recon.masks import signal_mask


def fingerprint_maps(
    coefficients: Tensor,
    mixing: Tensor | None,
    problem: FingerprintProblem,
    *,
    mask_threshold: float,
    groups: int = 0,
    refine: bool = True,
    rank: int,
    retained_energy: float,
    residual_to_noise: float,
    standard_deviations: bool,
    noise_variance: float | None = None,
) -> Maps:
    """Match the voxels that hold signal, and take them off the grid.

    Atoms are compared in the components of the images: see ``fingerprint_match.py``.

    Args:
        coefficients: U (x, k, z, y) complex; the signals are ``problem.basis.contrast @ mixing @ U``.
        mixing: (l, k) orthonormal columns; None: U stands in the basis itself, and holds all of it.
        problem: the slice that the images belong to.
        mask_threshold: share of the brightest amplitude below which a voxel is background.
        groups: groups of similar atoms of the fast search; 0 compares with every atom.
        refine: whether the maps leave the grid of the dictionary.
        rank, retained_energy, residual_to_noise: handed on to the maps.
        standard_deviations: whether the fit's standard deviations are handed on; they need ``refine``.
        noise_variance: E|n|^2 of each coefficient, for them; None: from the residual of each voxel's fit.

    Returns:
        Maps with s = 1; NaN outside the mask and where there is no finite estimate.
    """
    images = coefficients.permute(2, 3, 0, 1)  # (z, y, x, k)
    finite = torch.isfinite(images).all(-1)
    if problem.b1 is not None:
        finite &= torch.isfinite(problem.b1.to(finite.device))
    images = torch.where(finite[..., None], images, 0)
    mask = signal_mask(torch.linalg.vector_norm(images, dim=-1).cpu(), mask_threshold)  # (z, y, x)
    mask |= ~finite.cpu()  # so that they count among those that failed
    inside, finite = images[mask.to(images.device)], finite[mask.to(images.device)]  # (v, k), (v,)
    if mixing is not None and mixing.shape[0] == mixing.shape[1]:
        # Turned back, the atoms stay real, which halves the arithmetic.
        inside, mixing = inside @ mixing.to(inside).T, None
    table = dictionary_table(problem.dictionary, problem.basis, mixing).to(inside.device)
    b1 = None if problem.b1 is None else problem.b1.to(table)[mask.to(table.device)].nan_to_num(1.0, 1.0, 1.0)
    found = match_fingerprints(inside, problem.dictionary, table, b1, groups)
    values, deviation = {"t1": found.t1, "t2": found.t2, "pd": found.pd.abs()}, {}
    if refine:
        refinement = FingerprintRefinement(problem.dictionary, table)
        refined = refinement.run(inside, found.t1, found.t2, b1, noise_variance=noise_variance)
        values = {"t1": refined.t1, "t2": refined.t2, "pd": refined.pd.abs()}
        deviation = refined.standard_deviation if standard_deviations else {}
    good = torch.stack([part.isfinite() for part in values.values()]).all(0) & (values["pd"] > 0) & finite

    def on_grid(part: Tensor) -> Tensor:
        grid = torch.full(mask.shape, float("nan"))
        grid[mask] = torch.where(good, part.float(), torch.nan).cpu()
        return grid[None]  # (s, z, y, x)

    names = SEQUENCE_MAPS[problem.protocol.sequence]
    return Maps(
        values={name: on_grid(values[name]) for name in names},
        mask=mask[None],
        standard_deviation={name: on_grid(deviation[name]) for name in names if name in deviation},
        rank=rank,
        retained_energy=retained_energy,
        residual_to_noise=residual_to_noise,
        failed_voxels=int((~good).sum()),
    )
