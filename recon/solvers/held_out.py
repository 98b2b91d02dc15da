"""Lines kept aside from a fit, to see when it stops learning what the other lines share with them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantitron.recon.data import KSpace


def split_lines(kspace: KSpace, share: float, generator: torch.Generator) -> tuple[KSpace, KSpace | None]:
    """Draw lines at random.

    Args:
        kspace: the lines of a slice.
        share: of the lines that is held out, 0..1; at least one line where it is above 0.
        generator: the source of chance, on the CPU.

    Returns:
        The lines to fit, and those held out; None where there are none, or too few to spare any.
    """
    lines = len(kspace.echo)
    count = min(max(round(share * lines), 1), lines - 1) if share > 0 else 0
    if count <= 0:
        return kspace, None
    order = torch.randperm(lines, generator=generator)
    return _some(kspace, order[count:].sort().values), _some(kspace, order[:count].sort().values)


def _some(kspace: KSpace, chosen: Tensor) -> KSpace:
    """Some of the lines, as if nothing else had been acquired."""
    samples, count = kspace.samples[chosen], kspace.count[chosen]
    energy = (samples.abs().square().sum((1, 2), dtype=torch.float64) * count).sum()
    return replace(
        kspace,
        samples=samples,
        contrast=kspace.contrast[chosen],
        echo=kspace.echo[chosen],
        slice=kspace.slice[chosen],
        kz=kspace.kz[chosen],
        ky=kspace.ky[chosen],
        count=count,
        energy=float(energy),
    )
