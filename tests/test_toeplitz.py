"""The Toeplitz operator is the direct normal operator, frame by frame."""

from __future__ import annotations

import pytest
import torch
from spirals import scan, spirals
from torch import Tensor

from quantitron.recon.data import TrajectoryKSpace
from quantitron.recon.operators.nonuniform_fourier import NonuniformFourier
from quantitron.recon.operators.toeplitz import ToeplitzSense
from quantitron.recon.trajectory_gram import sum_readouts


def stack(distinct: Tensor, partitions: Tensor) -> Tensor:
    """Each spiral (g, n, 2) at each kz (p,): (g * p, n, 3)."""
    kz = partitions[None, :, None].expand(len(distinct), -1, distinct.shape[1])
    flat = distinct[:, None].expand(-1, len(partitions), -1, -1)
    return torch.cat([flat, kz[..., None].to(flat)], -1).flatten(0, 1)


SCANS = {
    "2d": (spirals(5, 60), (1, 12, 16)),
    "odd": (spirals(5, 60), (1, 13, 9)),
    "3d": (torch.rand(6, 50, 3, generator=torch.Generator().manual_seed(3)) - 0.5, (6, 7, 8)),
    "stack": (stack(spirals(3, 40), (torch.arange(5) - 2) / 5), (5, 8, 10)),
}


def maps(grid: tuple[int, int, int], coils: int, dtype: torch.dtype) -> Tensor:
    nz, ny, nx = grid
    csm = torch.randn(nx, coils, nz, ny, dtype=dtype, generator=torch.Generator().manual_seed(5))
    return csm / csm.abs().square().sum(1, keepdim=True).sqrt()


def frames(kspace: TrajectoryKSpace) -> list[tuple[Tensor, Tensor, int]]:
    """Trajectory, samples and time point of each readout."""
    lengths = kspace.readout_length.tolist()
    return list(
        zip(
            kspace.trajectory.split(lengths),
            kspace.samples.split(lengths, 1),
            kspace.time_point.tolist(),
            strict=True,
        )
    )


def predicted(kspace: TrajectoryKSpace, phi: Tensor, csm: Tensor, u: Tensor) -> list[Tensor]:
    """A u of each readout, in double precision."""
    result = []
    for trajectory, _, time_point in frames(kspace):
        image = torch.einsum("k,xkzy->xzy", phi[time_point], u)
        coils = (image[:, None] * csm).permute(1, 2, 3, 0)  # (c, z, y, x)
        result.append(NonuniformFourier(trajectory, kspace.grid[1:])(coils))
    return result


def adjoint(kspace: TrajectoryKSpace, phi: Tensor, csm: Tensor, data: list[Tensor]) -> Tensor:
    """A^H of samples of each readout."""
    result = 0.0
    for (trajectory, _, time_point), samples in zip(frames(kspace), data, strict=True):
        coils = NonuniformFourier(trajectory, kspace.grid[1:]).adjoint(samples)  # (c, z, y, x)
        image = (coils.permute(3, 0, 1, 2) * csm.conj()).sum(1)
        result = result + image[:, None] * phi[time_point].conj()[:, None, None]
    return result


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("complex_basis", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_equals_the_frames(name: str, complex_basis: bool, dtype: torch.dtype) -> None:
    distinct, grid = SCANS[name]
    kspace, basis = scan(distinct, grid, 2 * len(distinct) + 1, 2, 3, complex_basis, dtype)
    csm = maps(grid, 2, dtype)
    mixing = torch.randn(3, 3, dtype=dtype, generator=torch.Generator().manual_seed(7))
    operator = ToeplitzSense(sum_readouts(kspace, basis), csm, mixing)
    u = torch.randn(operator.shape, dtype=dtype, generator=torch.Generator().manual_seed(9))
    phi = (basis.contrast.to(dtype) @ mixing).to(torch.complex128)
    wide = csm.to(torch.complex128)
    expected = adjoint(kspace, phi, wide, predicted(kspace, phi, wide, u.to(torch.complex128)))
    assert relative(operator(u).to(torch.complex128), expected) < (1e-5 if dtype == torch.complex64 else 1e-9)
