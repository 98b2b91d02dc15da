"""The Toeplitz operator is the direct normal operator, frame by frame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from spirals import scan, spirals
from torch import Tensor

from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient
from quantitron.recon.data import Basis, TrajectoryKSpace
from quantitron.recon.operators.nonuniform_fourier import NonuniformFourier
from quantitron.recon.operators.spectral_preconditioner import SpectralPreconditioner
from quantitron.recon.operators.toeplitz import ToeplitzSense, adjoint_images
from quantitron.recon.operators.trajectory_residual import residual_energy
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


def unequal(kspace: TrajectoryKSpace, lengths: list[int]) -> TrajectoryKSpace:
    """The first so many samples of each readout."""
    every = [torch.arange(part) + start for part, start in zip(lengths, starts(kspace), strict=True)]
    points = torch.cat(every)
    samples = kspace.samples[:, points]
    return replace(
        kspace,
        samples=samples,
        trajectory=kspace.trajectory[points],
        readout_length=torch.tensor(lengths),
        energy=float(samples.abs().double().square().sum()),
    )


def starts(kspace: TrajectoryKSpace) -> list[int]:
    return (kspace.readout_length.cumsum(0) - kspace.readout_length).tolist()


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


def plain(
    complex_basis: bool = False, grid: tuple[int, int, int] = (1, 12, 16)
) -> tuple[TrajectoryKSpace, Basis, Tensor]:
    kspace, basis = scan(spirals(5, 60), grid, 13, 4, 3, complex_basis, torch.complex128)
    return kspace, basis, maps(grid, 4, torch.complex128)


@pytest.mark.parametrize("complex_basis", [False, True])
def test_data_and_residual_equal_the_frames(complex_basis: bool) -> None:
    kspace, basis, csm = plain(complex_basis=complex_basis)
    mixing = torch.randn(3, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(7))
    operator = ToeplitzSense(sum_readouts(kspace, basis), csm, mixing)
    phi = basis.contrast.to(mixing) @ mixing
    samples = [part for _, part, _ in frames(kspace)]
    assert relative(operator.adjoint_data(), adjoint(kspace, phi, csm, samples)) < 1e-9
    u = torch.randn(operator.shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(9))
    residual = sum(
        float((a - b).abs().square().sum())
        for a, b in zip(predicted(kspace, phi, csm, u), samples, strict=True)
    )
    assert operator.residual_energy(u) == pytest.approx(residual, rel=1e-9)
    assert operator.residual_energy(u, operator.adjoint_data()) == pytest.approx(residual, rel=1e-9)
    assert residual_energy(sum_readouts(kspace, basis), csm, mixing, u) == pytest.approx(residual, rel=1e-9)
    assert operator.samples == kspace.samples.numel()
    assert operator.energy == pytest.approx(kspace.energy)


def test_weights_equal_the_frames() -> None:
    kspace, basis, csm = plain()
    sums = sum_readouts(kspace, basis)
    weights = torch.rand(len(sums.readout), generator=torch.Generator().manual_seed(2))
    of_readouts = weights.double().reshape(5, 60)[kspace.time_point % 5]
    samples = [part * w for (_, part, _), w in zip(frames(kspace), of_readouts, strict=True)]
    expected = adjoint(kspace, basis.contrast.to(torch.complex128), csm, samples)
    assert relative(adjoint_images(sums, csm, torch.eye(3), weights), expected) < 1e-9


def test_readouts_of_unequal_length() -> None:
    kspace, basis, csm = plain()
    kspace = unequal(kspace, [60, 50, 60, 40, 60, 60, 50, 31, 40, 60, 60, 50, 60])
    sums = sum_readouts(kspace, basis)
    assert sums.count.tolist() == [3, 3, 2, 2, 2, 1]
    operator = ToeplitzSense(sums, csm, torch.eye(3))
    u = torch.randn(operator.shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(9))
    phi = basis.contrast.to(torch.complex128)
    assert relative(operator(u), adjoint(kspace, phi, csm, predicted(kspace, phi, csm, u))) < 1e-9
    samples = [part for _, part, _ in frames(kspace)]
    assert relative(operator.adjoint_data(), adjoint(kspace, phi, csm, samples)) < 1e-9


@pytest.mark.parametrize("complex_basis", [False, True])
def test_is_self_adjoint_and_positive(complex_basis: bool) -> None:
    kspace, basis, csm = plain(complex_basis=complex_basis, grid=(1, 9, 14))
    operator = ToeplitzSense(sum_readouts(kspace, basis), csm, torch.eye(3))
    generator = torch.Generator().manual_seed(4)
    u, v = (torch.randn(operator.shape, dtype=torch.complex128, generator=generator) for _ in range(2))
    left, right = (
        torch.vdot(v.flatten(), operator(u).flatten()),
        torch.vdot(operator(v).flatten(), u.flatten()),
    )
    assert abs(left - right) < 1e-13 * u.norm() * operator(v).norm()
    assert float(torch.vdot(u.flatten(), operator(u).flatten()).real) > 0


def test_few_components_equal_the_frames() -> None:
    """Kernels are those of the components that are reached alone."""
    kspace, basis, csm = plain()
    generator = torch.Generator().manual_seed(6)
    narrow = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    operator = ToeplitzSense(sum_readouts(kspace, basis), csm, narrow)
    u = torch.randn(operator.shape, dtype=torch.complex128, generator=generator)
    phi = (basis.contrast.double() @ narrow).to(torch.complex128)
    assert relative(operator(u), adjoint(kspace, phi, csm, predicted(kspace, phi, csm, u))) < 1e-9
    samples = [part for _, part, _ in frames(kspace)]
    assert relative(operator.adjoint_data(), adjoint(kspace, phi, csm, samples)) < 1e-9


def test_mean_diagonal_is_that_of_the_matrix() -> None:
    kspace, basis, csm = plain(grid=(1, 5, 6))
    mixing = torch.randn(3, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(8))
    operator = ToeplitzSense(sum_readouts(kspace, basis), csm, mixing)
    diagonal = torch.zeros(3, dtype=torch.float64)
    for k in range(3):
        for voxel in range(30):
            unit = torch.zeros(operator.shape, dtype=torch.complex128)
            unit[voxel % 6, k, 0, voxel // 6] = 1
            diagonal[k] += operator(unit)[voxel % 6, k, 0, voxel // 6].real / 30
    assert torch.allclose(operator.mean_diagonal(), diagonal)


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("complex_basis", [False, True])
def test_the_mean_of_the_spectrum_is_the_mean_diagonal(name: str, complex_basis: bool) -> None:
    distinct, grid = SCANS[name]
    kspace, basis = scan(distinct, grid, 2 * len(distinct) + 1, 2, 3, complex_basis, torch.complex128)
    mixing = torch.randn(3, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(7))
    operator = ToeplitzSense(sum_readouts(kspace, basis), maps(grid, 2, torch.complex128), mixing)
    spectrum = operator.spectrum()
    assert spectrum.shape == operator.shape
    assert torch.allclose(spectrum.mean((0, 2, 3)), operator.mean_diagonal())


def gridded() -> tuple[ToeplitzSense, tuple[int, int, int]]:
    """One coil, one component, each point of k-space sampled once to three times."""
    grid = (1, 6, 8)
    places = torch.cartesian_prod(torch.arange(8) / 8 - 0.5, torch.arange(6) / 6 - 0.5)
    distinct = torch.cat([places, places[:20], places[:7]])[None]
    kspace, basis = scan(distinct, grid, 1, 1, 1, dtype=torch.complex128)
    csm = torch.ones(8, 1, 1, 6, dtype=torch.complex128)
    return ToeplitzSense(sum_readouts(kspace, basis), csm, torch.ones(1, 1, dtype=torch.float64)), grid


def test_waves_of_a_scan_on_the_grid_are_scaled_by_the_spectrum() -> None:
    operator, _ = gridded()
    u = torch.randn(operator.shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(4))
    waves = torch.fft.fftn(u, dim=(0, 2, 3)) * operator.spectrum()
    assert relative(torch.fft.ifftn(waves, dim=(0, 2, 3)), operator(u)) < 1e-5


def test_the_preconditioner_inverts_a_convolution_with_an_even_penalty() -> None:
    operator, _ = gridded()
    everywhere = torch.ones(8, 1, 6, dtype=torch.bool)
    u = torch.randn(operator.shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(4))
    for mask in (everywhere, ~everywhere):
        precondition = SpectralPreconditioner(operator.spectrum(), torch.full(operator.shape, 0.3), mask)
        assert relative(precondition(operator(u) + 0.3 * u), u) < 1e-5


@pytest.mark.parametrize("half", [5, 11])
def test_the_preconditioner_brings_the_edge_of_k_space_as_fast_as_its_centre(half: int) -> None:
    """Spirals of falling density: ten steps leave half of what a factor for each voxel leaves, whether the
    object fills a tenth of the image or half of it."""
    grid = (1, 32, 32)
    distinct = spirals(12, 300, turns=6, power=2.5)
    kspace, basis = scan(distinct, grid, 24, 1, 1, dtype=torch.complex128)
    csm = torch.ones(32, 1, 1, 32, dtype=torch.complex128)
    operator = ToeplitzSense(sum_readouts(kspace, basis), csm, torch.ones(1, 1, dtype=torch.float64))
    generator = torch.Generator().manual_seed(4)
    outside = (torch.arange(32) - 15.5).abs() > half
    penalty = torch.full(operator.shape, 0.02 * float(operator.mean_diagonal()), dtype=torch.float64)
    penalty[outside] *= 50
    penalty[..., outside] *= 50
    exact = torch.randn(operator.shape, dtype=torch.complex128, generator=generator) / penalty.sqrt()

    def normal(u: Tensor) -> Tensor:
        return operator(u) + penalty * u

    mask = ~(outside[:, None, None] | outside)  # (x, z, y)
    spectral = SpectralPreconditioner(operator.spectrum().clamp_min(1e-9), penalty, mask)
    other = torch.randn(operator.shape, dtype=torch.complex128, generator=generator)
    left, right = (
        torch.vdot(spectral(exact).flatten(), other.flatten()),
        torch.vdot(exact.flatten(), spectral(other).flatten()),
    )
    assert torch.allclose(left, right)  # self-adjoint, as conjugate gradients want it
    diagonal = operator.mean_diagonal()[:, None, None] + penalty
    left_over = [
        relative(
            conjugate_gradient(
                normal, normal(exact), preconditioner=preconditioner, iterations=10, tolerance=0
            ),
            exact,
        )
        for preconditioner in (spectral, lambda residual: residual / diagonal)
    ]
    assert left_over[0] < 0.6 * left_over[1]  # 0.50


def test_memory_options_do_not_change_the_result() -> None:
    kspace, basis, csm = plain()
    sums = sum_readouts(kspace, basis)
    whole = ToeplitzSense(sums, csm, torch.eye(3))
    u = torch.randn(whole.shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(9))
    for working_set in (1, 60_000, 10**9):
        part = ToeplitzSense(sums, csm, torch.eye(3), working_set=working_set)
        assert relative(part(u), whole(u)) < 1e-13


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_gpu_gives_the_same() -> None:
    pytest.importorskip("cufinufft")
    kspace, basis, csm = plain()
    sums = sum_readouts(kspace, basis)
    here = ToeplitzSense(sums, csm, torch.eye(3))
    there = ToeplitzSense(sums, csm.cuda(), torch.eye(3).cuda())
    u = torch.randn(here.shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(9))
    assert relative(there(u.cuda()).cpu(), here(u)) < 1e-9
    assert relative(there.adjoint_data().cpu(), here.adjoint_data()) < 1e-9
    assert torch.allclose(there.mean_diagonal().cpu(), here.mean_diagonal())


def test_partitions_on_the_grid_need_no_doubling() -> None:
    """What a stack of spirals off the grid by a part in a thousand gives is not much different."""
    distinct = spirals(3, 40)
    results = []
    for shift in (0.0, 1e-4):
        kspace, basis = scan(stack(distinct, (torch.arange(5) - 2) / 5 + shift), (5, 8, 10), 20, 2)
        operator = ToeplitzSense(
            sum_readouts(kspace, basis), maps((5, 8, 10), 2, torch.complex64), torch.eye(3)
        )
        u = torch.randn(operator.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(9))
        results.append(operator(u))
    assert 1e-6 < relative(results[1], results[0]) < 5e-3


def test_says_what_is_wrong() -> None:
    kspace, basis, csm = plain()
    sums = sum_readouts(kspace, basis)
    with pytest.raises(ValueError, match="not on the grid"):
        ToeplitzSense(sums, csm[:-1], torch.eye(3))
    with pytest.raises(ValueError, match="two columns"):
        ToeplitzSense(replace(sums, grid=(2, 12, 16)), csm.expand(-1, -1, 2, -1), torch.eye(3))


def test_measured_spirals() -> None:
    file = Path(__file__).parents[2] / "shared" / "data" / "usc_vdspiral_48arm.mat"
    if not file.exists():
        pytest.skip("the measured spirals are not here")
    data = scipy.io.loadmat(file)
    points = torch.from_numpy(np.stack([data["kx_GIRF"], data["ky_GIRF"]], -1)).permute(1, 0, 2)[::8].float()
    kspace, basis = scan(points.contiguous(), (1, 96, 96), 14, 2, 2)
    csm = maps((1, 96, 96), 2, torch.complex64)
    operator = ToeplitzSense(sum_readouts(kspace, basis), csm, torch.eye(2))
    u = torch.randn(operator.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(9))
    phi, wide = basis.contrast.to(torch.complex128), csm.to(torch.complex128)
    expected = adjoint(kspace, phi, wide, predicted(kspace, phi, wide, u.to(torch.complex128)))
    assert relative(operator(u).to(torch.complex128), expected) < 1e-5


@pytest.mark.parametrize("complex_basis", [False, True])
def test_threads_that_share_the_kernels_change_no_bit(complex_basis: bool) -> None:
    kspace, basis = scan(spirals(3, 40), (1, 8, 8), 7, 2, 3, complex_basis)
    sums = sum_readouts(kspace, basis)
    maps = torch.ones(8, 1, 1, 8, dtype=torch.complex64)
    images = torch.randn(8, 3, 1, 8, dtype=torch.complex64)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            operator = ToeplitzSense(sums, maps, torch.eye(3))
            torch.set_num_threads(1)
            found.append(operator(images))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
