"""Maps of the tissue that a dictionary search found, in place of those fitted to the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from quantitron.recon.data import Maps
from quantitron.recon.solvers.nearest_tissue import Tissue


def with_tissue(maps: Maps, tissue: Tissue, names: Sequence[str]) -> Maps:
    """Put T1, T2 or PD of the tissue found where maps of the same voxels stand.

    Args:
        maps: of one slice or slab (s = 1); where no tissue was searched for, they stay.
        tissue: as ``NearestTissue`` found it.
        names: those of ``t1``, ``t2`` [s] and ``pd`` (its magnitude) to replace. They lose their standard
            deviations, which were those of the fit.

    Returns:
        The maps; a voxel whose tissue has no PD, or that lacks a value in a map that stays, has none in any
        and counts among those that failed.
    """
    found = {"t1": tissue.t1, "t2": tissue.t2, "pd": tissue.pd.abs()}
    searched = maps.mask & (tissue.atom.cpu()[None] >= 0)  # (s, z, y, x)
    lacking = searched & ~(found["pd"].cpu()[None] > 0)
    values = {}
    for name, old in maps.values.items():
        if name in names:
            values[name] = torch.where(searched, found[name].cpu()[None].to(old), old)
        else:
            values[name] = old
            lacking |= maps.mask & old.isnan()
    values = {name: torch.where(lacking, torch.nan, new) for name, new in values.items()}
    deviation = {
        name: torch.where(lacking, torch.nan, old)
        for name, old in maps.standard_deviation.items()
        if name not in names
    }
    failed = maps.mask & torch.stack([new.isnan() for new in values.values()]).any(0)
    return replace(maps, values=values, standard_deviation=deviation, failed_voxels=int(failed.sum()))
