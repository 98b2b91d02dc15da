"""The inversion efficiency of t2ir_gre where the header does not tell it, and what it does to T1 and T2.

    python benchmarks/inversion_efficiency.py

Coefficients of a slab 6x48x48 with noise, in as many components as hold 99.95 and 99.99 % of the tissue's
energy: brain, brain in a ring of fat (T1 370 ms) or of T1 250 ms, and T1 of 200 and 300 ms throughout. Beside
the map on which the voxels of a neighbourhood agree stands the mean of fits that leave the efficiency free in
each voxel. Noise is relative to the root mean square of all components together.
"""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from quantitron.recon.coefficient_basis import coefficient_basis
from quantitron.recon.coefficient_fit import fit_coefficients
from quantitron.recon.data import Problem, Protocol
from quantitron.recon.inversion_efficiency import mean_of_free_fits
from quantitron.recon.match import Fit, fit
from quantitron.recon.parameter_maps import fit_components
from quantitron.recon.signal.models import signal
from quantitron.recon.temporal_basis import dictionary_basis

GRID = (6, 48, 48)
PROTOCOL = Protocol(
    "t2ir_gre",
    (0.0045, 0.0112, 0.0179, 0.0246),
    (0.03,),
    (math.radians(10),),
    (0.025, 0.05, 0.09, 0.15),
    (),
    40,
)
SHORT = 0.4
"""T1 [s] below which tissue is short."""
# white matter, grey matter, fluid: T1, T2, T2* [s] and PD
BRAIN = ((0.85, 0.065, 0.05, 70.0), (1.4, 0.085, 0.06, 80.0), (4.0, 1.0, 0.1, 100.0))
CASES = {
    "brain": (BRAIN, None),
    "ring of fat": (BRAIN, (0.37, 0.07, 0.03, 80.0)),
    "ring of 0.25 s": (BRAIN, (0.25, 0.05, 0.03, 80.0)),
    "0.2 and 0.3 s": (((0.2, 0.04, 0.05, 70.0), (0.3, 0.06, 0.06, 80.0), (0.3, 0.06, 0.06, 80.0)), None),
}
NAMES = ("t1", "t2", "t2star", "pd")


def slab(case: str) -> tuple[dict[str, Tensor], Tensor]:
    """Maps (z, y, x) and mask of a case."""
    z, y, x = torch.meshgrid(*((torch.arange(n) - n // 2) / n for n in GRID), indexing="ij")
    radius = ((y / 0.42).square() + (x / 0.42).square()).sqrt()
    white = torch.sin(25 * x + 9 * y) * torch.cos(21 * y + 5 * z) > 0
    kind = torch.where(radius < 0.2, 2, torch.where(white, 0, 1))
    tissues, ring = CASES[case]
    if ring is not None:
        tissues, kind = (*tissues, ring), torch.where(radius > 0.85, 3, kind)
    values = torch.tensor(tissues)[kind]  # (z, y, x, name)
    maps = dict(zip(NAMES, values.unbind(-1), strict=True))
    maps["inversion"] = 0.93 + 0.04 * x - 0.05 * y.square()
    maps["b0"] = torch.zeros(GRID)
    return maps, radius < 1


def measure(case: str, share: float, noise: float) -> list[str]:
    """Rows of the table: the mean of free fits, and the agreement of neighbours."""
    maps, mask = slab(case)
    truth = {name: values[mask] for name, values in maps.items()}
    basis = dictionary_basis(PROTOCOL, 0.9999)
    components = coefficient_basis(basis, PROTOCOL, 3.0, share)
    frames = truth["pd"][:, None] * signal(truth, PROTOCOL)
    images = torch.einsum(
        "vwe,wl->vel",
        frames.unflatten(1, (PROTOCOL.contrasts, PROTOCOL.echoes)),
        basis.contrast.to(frames.dtype),
    )
    mixing = components.mixing
    u = torch.einsum("elk,vel->vk", mixing.conj(), images)
    level = noise * float(u.abs().square().sum(1).mean().sqrt())
    u = u + level * torch.randn(u.shape, dtype=u.dtype, generator=torch.Generator().manual_seed(5))
    images = torch.einsum("elk,vk->vel", mixing, u)
    free = fit(images, basis, PROTOCOL)
    mean = fit(
        images, basis, PROTOCOL, known={"inversion": mean_of_free_fits(free, mask)}, start=free.parameters
    )
    problem = cast(Problem, SimpleNamespace(protocol=PROTOCOL, reduced=SimpleNamespace(basis=basis)))
    found = {
        "mean of free fits": fit_coefficients(u, mean, basis.contrast, mixing, PROTOCOL),
        "agreement": fit_components(u, mask, components, problem, level**2 or None, True),
    }
    return [
        f"| {case} | {components.rank} | {noise:g} | {name} | {errors(result, truth)} |"
        for name, result in found.items()
    ]


def errors(result: Fit, truth: dict[str, Tensor]) -> str:
    """Mean error of the efficiency; median relative errors [%] of T1 and T2, of usual and of short tissue."""
    short = truth["t1"] < SHORT
    cells = [f"{float((result.parameters['inversion'] - truth['inversion']).mean()):+.3f}"]
    for chosen in (~short, short):
        cells.append(
            " / ".join(
                f"{100 * float((result.parameters[name] / truth[name] - 1)[chosen].median()):+.1f}"
                if chosen.any()
                else "-"
                for name in ("t1", "t2")
            )
        )
    return " | ".join(cells)


def main() -> None:
    """Print the table."""
    sys.stdout.write(
        "| case | components | noise | efficiency from | its error | T1 / T2 of tissue | of short T1 |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    for share in (0.9995, 0.9999):
        for noise in (0.0, 0.01, 0.03):
            for case in CASES:
                sys.stdout.write("\n".join(measure(case, share, noise)) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
