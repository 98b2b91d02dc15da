"""Small fingerprint scans of known tissue in memory, as a solver gets them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from scan_of_ellipses import ellipses
from spirals import spirals
from torch import Tensor

from quantitron.phantoms.schedules import make_schedule
from quantitron.recon.data import (
    Encoding,
    FingerprintDictionary,
    FingerprintProblem,
    Protocol,
    TrajectoryKSpace,
)
from quantitron.recon.operators.nonuniform_fourier import NonuniformFourier
from quantitron.recon.signal.fingerprint_dictionary import fingerprint_dictionary

POINTS = 60
VOXEL = 3e-3


@cache
def protocol_and_dictionary(shortest_t2: float = 0.02) -> tuple[Protocol, FingerprintDictionary]:
    protocol = make_schedule("jiang", POINTS)
    return protocol, fingerprint_dictionary(protocol, (0.3, 4.5), (shortest_t2, 0.5), 40, 40)


@dataclass(frozen=True)
class FingerprintScan:
    """A problem, and what it was made from."""

    problem: FingerprintProblem
    coefficients: Tensor
    """(l, z, y, x) of the true images in the problem's basis."""
    csm: Tensor
    """(c, z, y, x) of unit root-sum-of-squares."""
    mask: Tensor
    """(z, y, x) where the object is."""
    t1: Tensor
    """(z, y, x) [s], a value of the dictionary's everywhere."""
    t2: Tensor
    """Likewise."""
    pd: Tensor
    """(z, y, x) real."""


def every_point(n: int) -> Tensor:
    """The Cartesian grid as one readout (1, n * n, 2)."""
    axis = (torch.arange(n) - n // 2) / n
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1)[None]


def arms(n: int, interleaves: int = 8) -> Tensor:
    """Spirals (interleaves, points, 2) that sample n x n voxels fully together."""
    return spirals(interleaves, 12 * n, turns=0.7 * n / interleaves, power=1.0)


def fingerprint_scan(
    n: int = 32,
    coils: int = 4,
    pd: float = 100.0,
    noise: float = 0.0,
    distinct: Tensor | None = None,
    every: bool = False,
    seed: int = 0,
    rank: int = 5,
    t2_factor: float = 1.0,
) -> FingerprintScan:
    """A scan of nested ellipses whose signals lie in the basis.

    Args:
        n: voxels along x and y.
        coils: number of coils.
        pd: proton density of the object, the brightest tissue's.
        noise: standard deviation of a complex sample. The problem says that it is 1.
        distinct: (g, m, 2) readouts, ``arms`` if None; time point t plays number t modulo g.
        every: each time point plays all of them.
        seed: of the noise.
        rank: of the basis.
        t2_factor: on T2 in the half of smaller x, for tissue that is not the usual one.
    """
    protocol, dictionary = protocol_and_dictionary(0.02 * min(t2_factor, 1.0))
    grid = (1, n, n)
    tissue, mask, csm = ellipses(grid, coils, texture=0.1)
    tissue["t2"] = torch.where(torch.arange(n) < n // 2, t2_factor, 1.0) * tissue["t2"]
    if coils == 1:
        csm = torch.ones_like(csm)
    basis = dictionary.basis(rank)
    atoms = [
        (axis.log()[:, None] - values.flatten().log()).abs().argmin(0)
        for axis, values in ((dictionary.t1, tissue["t1"]), (dictionary.t2, tissue["t2"]))
    ]
    density = pd * mask * (0.7 + 0.3 * (tissue["t1"] > 1))
    true = density.flatten()[:, None] * dictionary.coefficients[0][atoms[0], atoms[1]][:, :rank]
    coefficients = true.T.reshape(rank, *grid).to(torch.complex64)

    distinct = arms(n) if distinct is None else distinct
    number = torch.arange(POINTS) % len(distinct)
    time_point = torch.arange(POINTS)
    if every:
        number, time_point = (
            torch.arange(len(distinct)).repeat(POINTS),
            time_point.repeat_interleave(len(distinct)),
        )
    fourier = NonuniformFourier(distinct.flatten(0, 1), grid)
    spectra = fourier((csm.to(torch.complex64)[:, None] * coefficients).contiguous())  # (c, l, g m)
    spectra = spectra.unflatten(2, distinct.shape[:2])  # (c, l, g, m)
    psi = basis.contrast[time_point].to(spectra)  # (readout, l)
    samples = torch.einsum("rl,clrm->crm", psi, spectra[:, :, number]).flatten(1)
    generator = torch.Generator().manual_seed(seed)
    samples = samples + noise * torch.randn(samples.shape, dtype=samples.dtype, generator=generator)
    kspace = TrajectoryKSpace(
        samples=samples,
        trajectory=distinct[number].flatten(0, 1),
        readout_length=torch.full((len(number),), distinct.shape[1]),
        time_point=time_point,
        slice=torch.zeros(len(number), dtype=torch.int64),
        density=None,
        energy=float(samples.abs().double().square().sum()),
        time_points=POINTS,
        grid=(1, *grid),
    )
    size = (VOXEL, n * VOXEL, n * VOXEL)
    problem = FingerprintProblem(
        encoding=Encoding(grid, size, grid, 1, coils, "spiral"),
        protocol=protocol,
        kspace=kspace,
        basis=basis,
        dictionary=dictionary,
    )
    t1, t2 = (
        axis[index].reshape(grid) for axis, index in zip((dictionary.t1, dictionary.t2), atoms, strict=True)
    )
    return FingerprintScan(problem, coefficients, csm.to(torch.complex64), mask, t1, t2, density)
