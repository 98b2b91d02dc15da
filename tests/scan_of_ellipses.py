"""Small scans of known tissue, as a solver gets them: nested ellipses, smooth coil maps and off-resonance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantitron.recon.data import Calibration, Encoding, KSpace, Maps, Problem, Protocol
from quantitron.recon.gram import reduce_kspace
from quantitron.recon.metrics import CAPS, nrmse
from quantitron.recon.operators.fourier import centred_fft, centred_ifft
from quantitron.recon.signal.models import signal
from quantitron.recon.temporal_basis import dictionary_basis

PROTOCOLS = {
    "vfa_gre": Protocol(
        "vfa_gre",
        tuple(0.002 + 0.004 * e for e in range(6)),
        (0.046,),
        tuple(math.radians(a) for a in (5, 15, 30, 40)),
    ),
    "t2ir_gre": Protocol(
        "t2ir_gre",
        (0.0045, 0.0112, 0.0179, 0.0246),
        (0.03,),
        (math.radians(10),),
        (0.025, 0.05, 0.09),
        (),
        30,
        inversion_efficiency=None,
    ),
    "megre": Protocol("megre", tuple(0.004 + 0.005 * e for e in range(5)), (0.4,), (0.5,)),
}

CENTRE_LINES = 12
"""Calibration lines along ky, through all of kz."""


def ellipses(
    grid: tuple[int, int, int], coils: int, texture: float = 0.0
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The object.

    Args:
        grid: (z, y, x).
        coils: number of coils.
        texture: relative amplitude of a ripple in the relaxation times: no tissue is all alike.

    Returns:
        Maps (z, y, x) of tissue [s] and field [Hz], the mask of the object, and coil maps (c, z, y, x).
    """
    z, y, x = torch.meshgrid(*((torch.arange(n) - n // 2) / n for n in grid), indexing="ij")
    outer = (y / 0.40) ** 2 + (x / 0.36) ** 2 < 1
    inner = ((y - 0.05) / 0.25) ** 2 + (x / 0.2) ** 2 < 1
    core = ((y + 0.05) / 0.08) ** 2 + ((x - 0.04) / 0.08) ** 2 < 1
    ripple = 1 + texture * torch.sin(20 * x + 6 * y) * torch.cos(17 * y + 4 * z)

    def tissue(outside: float, middle: float, centre: float) -> Tensor:
        values = torch.where(core, centre, torch.where(inner, middle, torch.tensor(outside)))
        return values * ripple

    maps = {
        "t1": tissue(1.4, 0.85, 2.2),
        "t2": tissue(0.085, 0.065, 0.15),
        "t2star": tissue(0.06, 0.05, 0.08),
        "inversion": torch.full(grid, 0.93),
        "b0": 25 * torch.sin(4 * x) + 15 * y + 10 * z,
    }
    angle = 2 * torch.pi * torch.arange(coils)[:, None, None, None] / coils
    distance = (y - 0.8 * torch.sin(angle)) ** 2 + (x - 0.8 * torch.cos(angle)) ** 2
    csm = torch.polar(torch.exp(-distance / 0.6), angle + x * torch.cos(angle) + 0.5 * z)
    return maps, outer, csm / torch.linalg.vector_norm(csm, dim=0)


def scan_of_ellipses(
    protocol: Protocol,
    grid: tuple[int, int, int] = (4, 32, 32),
    acceleration: float = 1.0,
    noise: float = 0.0,
    rank: int | float = 0.99999,
    coils: int = 6,
    texture: float = 0.0,
    unit: float = 1.0,
    offset: float = 0.0,
) -> tuple[Problem, dict[str, Tensor], Tensor]:
    """A scan of the object: random lines, denser in the centre; calibration lines from the last contrast.

    Args:
        protocol: what is played.
        grid: (z, y, x).
        acceleration: of the lines, calibration not counted.
        noise: standard deviation of a complex sample where the object's proton density is 100. Data with
            noise are whitened; without it, noise counts as unknown.
        rank: of the contrast basis.
        coils: number of coils.
        texture: of the object.
        unit: factor on noise-free data.
        offset: off-resonance of the whole object [Hz].

    Returns:
        The problem, the true maps (z, y, x) and the mask of the object.
    """
    maps, mask, csm = ellipses(grid, coils, texture)
    maps["b0"] = maps["b0"] + offset
    nz, ny = grid[:2]
    generator = torch.Generator().manual_seed(4)
    frames = signal({name: values.flatten() for name, values in maps.items()}, protocol)  # (voxel, t)
    frames = (100 * mask.flatten()[:, None] * frames).T.reshape(-1, 1, *grid)  # (t, 1, z, y, x)
    kspace = centred_fft(csm * frames, (2, 3, 4))  # (t, c, z, y, x)
    kspace = kspace + noise * torch.randn(kspace.shape, dtype=kspace.dtype, generator=generator)
    hybrid = centred_ifft(kspace, (4,)).permute(0, 2, 3, 1, 4)  # (t, z, y, c, x)
    density = 1 / (1 + (2 * (torch.arange(ny) - ny // 2) / ny / 0.3) ** 2)  # falls from the centre
    density = density / density.mean() / acceleration if acceleration > 1 else torch.ones(ny)
    sampled = torch.rand(protocol.frames, nz, ny, generator=generator) < density
    centre = slice(ny // 2 - CENTRE_LINES // 2, ny // 2 + CENTRE_LINES // 2)
    bright = protocol.frames - protocol.echoes  # the last contrast's first echo
    sampled[bright, :, centre] = True
    t, kz, ky = torch.nonzero(sampled, as_tuple=True)
    scale = 1 / noise if noise > 0 else unit  # whitened: E|n|^2 = 1
    lines = scale * hybrid[t, kz, ky].to(torch.complex64)
    scan = KSpace(
        lines,
        t // protocol.echoes,
        t % protocol.echoes,
        torch.zeros_like(t),
        kz,
        ky,
        torch.ones(len(t)),
        float(lines.abs().square().sum()),
        protocol.contrast_shape,
        (1, *grid),
    )
    count = torch.zeros(1, nz, ny)
    count[:, :, centre] = 1
    calibration = (scale * hybrid[bright] * count[0, :, :, None, None])[None].to(torch.complex64)
    problem = Problem(
        Encoding(grid, (0.1, 0.2, 0.2), grid, coils=coils),
        protocol,
        reduce_kspace(scan, dictionary_basis(protocol, rank)),
        kspace=scan,
        calibration=Calibration(calibration, count),
        noise_known=noise > 0,
    )
    return problem, maps, mask


def map_error(maps: Maps, truth: dict[str, Tensor], mask: Tensor, name: str) -> float:
    """NRMSE of one map inside the object; voxels without an estimate count as 0."""
    estimate = maps.values[name][0].numpy()
    return nrmse(estimate, truth[name].numpy(), mask.numpy(), CAPS[name])
