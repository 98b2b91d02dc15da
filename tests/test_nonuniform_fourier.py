"""The non-uniform Fourier transform is the sum that defines it."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

from quantitron.recon.operators.nonuniform_fourier import NonuniformFourier

CASES = {
    "2d": ((1, 24, 20), 2),
    "2d odd": ((1, 15, 17), 2),
    "2d even and odd": ((1, 16, 9), 2),
    "planes": ((3, 9, 8), 2),
    "3d": ((6, 8, 10), 3),
    "3d odd": ((5, 7, 8), 3),
}


def trajectory(columns: int, points: int = 150) -> Tensor:
    return torch.rand(points, columns, generator=torch.Generator().manual_seed(1)) - 0.5


def images(*shape: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(2))


def direct(points: Tensor, image: Tensor) -> Tensor:
    """The defining sum, in double precision, (..., z, y, x) -> (..., n) or (..., z, n)."""
    grid = image.shape[-3:]
    z, y, x = torch.meshgrid(*[torch.arange(n) - n // 2 for n in grid], indexing="ij")
    if points.shape[1] == 3:
        place = torch.stack([x, y, z]).flatten(1).double()
        matrix = torch.exp(-2j * math.pi * (points.double() @ place)) / math.sqrt(math.prod(grid))
        return image.to(torch.complex128).flatten(-3) @ matrix.mT
    place = torch.stack([x[0], y[0]]).flatten(1).double()
    matrix = torch.exp(-2j * math.pi * (points.double() @ place)) / math.sqrt(grid[1] * grid[2])
    samples = image.to(torch.complex128).flatten(-2) @ matrix.mT
    return samples if grid[0] > 1 else samples.squeeze(-2)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.complex64, 1e-5), (torch.complex128, 1e-10)])
def test_equals_the_direct_sum(name: str, dtype: torch.dtype, error: float) -> None:
    grid, columns = CASES[name]
    points = trajectory(columns)
    operator = NonuniformFourier(points, grid)
    image = images(2, 3, *grid, dtype=dtype)
    samples = operator(image)
    expected = direct(points, image)
    assert samples.dtype == dtype
    assert samples.shape == expected.shape
    assert (samples - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.complex64, 1e-6), (torch.complex128, 1e-14)])
def test_adjoint(name: str, dtype: torch.dtype, error: float) -> None:
    grid, columns = CASES[name]
    operator = NonuniformFourier(trajectory(columns), grid)
    image = images(3, *grid, dtype=dtype)
    samples = operator(image)
    other = images(*samples.shape, dtype=dtype)
    back = operator.H(other)
    assert back.shape == image.shape
    left, right = torch.vdot(other.flatten(), samples.flatten()), torch.vdot(back.flatten(), image.flatten())
    assert abs(left - right) < error * other.norm() * samples.norm()


def test_a_large_grid_in_single_precision() -> None:
    points = trajectory(2)
    image = images(1, 200, 192, dtype=torch.complex64)
    expected = direct(points, image)
    assert (NonuniformFourier(points, (1, 200, 192))(image) - expected).norm() < 1e-5 * expected.norm()
    quick = NonuniformFourier(points, (1, 200, 192), tolerance=5e-5)
    assert (quick(image) - expected).norm() < 5e-5 * expected.norm()
    back = NonuniformFourier(points, (1, 200, 192)).adjoint(expected)
    assert (quick.adjoint(expected.to(torch.complex64)) - back).norm() < 5e-5 * back.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.complex64, 1e-5), (torch.complex128, 1e-10)])
def test_gpu_gives_the_same(name: str, dtype: torch.dtype, error: float) -> None:
    pytest.importorskip("cufinufft")
    grid, columns = CASES[name]
    points = trajectory(columns)
    operator = NonuniformFourier(points.cuda(), grid)
    image = images(3, *grid, dtype=dtype)
    expected = direct(points, image)
    samples = operator(image.cuda())
    assert samples.is_cuda
    assert (samples.cpu() - expected).norm() < error * expected.norm()
    one = operator(image[:1].cuda()).cpu()
    assert (one - expected[:1]).norm() < error * expected.norm()
    back = operator.adjoint(samples).cpu()
    there = NonuniformFourier(points, grid).adjoint(samples.cpu())
    assert (back - there).norm() < 2 * error * there.norm()


def test_many_images_at_once_are_the_same() -> None:
    operator = NonuniformFourier(trajectory(2), (1, 8, 6))
    image = images(130, 1, 8, 6)
    together = operator(image)
    single = torch.stack([operator(one) for one in image])
    assert (together - single).norm() < 1e-12 * single.norm()
    assert operator(image[:0]).shape == (0, 150)


def test_gradient_is_the_adjoint() -> None:
    operator = NonuniformFourier(trajectory(2, 9), (1, 4, 5))
    image = images(2, 1, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(operator, image)
    samples = images(2, 9).requires_grad_()
    assert torch.autograd.gradcheck(operator.adjoint, samples)


def test_unit_image_at_the_centre_is_flat() -> None:
    image = torch.zeros(1, 7, 8, dtype=torch.complex128)
    image[0, 7 // 2, 8 // 2] = 1
    samples = NonuniformFourier(trajectory(2), (1, 7, 8))(image)
    assert (samples - 1 / math.sqrt(56)).abs().max() < 1e-11


def test_says_what_is_wrong() -> None:
    points = trajectory(2)
    for value in (math.nan, math.inf):
        bad = points.clone()
        bad[3, 1] = value
        with pytest.raises(ValueError, match="trajectory holds values that are not finite"):
            NonuniformFourier(bad, (1, 8, 8))
    bad = points.clone()
    bad[3, 1] = -0.6
    with pytest.raises(ValueError, match=r"reaches 0.6 cycles per voxel"):
        NonuniformFourier(bad, (1, 8, 8))
    bad[3, 1] = 0.5 + 1e-6
    assert torch.isfinite(NonuniformFourier(bad, (1, 8, 8))(images(1, 8, 8))).all()
    for shape in ((5, 1), (5, 4), (5,), (0, 2)):
        with pytest.raises(ValueError, match="2 or 3"):
            NonuniformFourier(torch.zeros(shape), (1, 8, 8))
    with pytest.raises(ValueError, match="expects"):
        NonuniformFourier(points, (1, 8, 8))(images(1, 8, 9))


def test_a_gpu_without_its_library_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "cufinufft", None)  # importing it raises ImportError
    operator = NonuniformFourier(trajectory(2), (1, 8, 8))
    with pytest.raises(ValueError, match="need the package cufinufft on a GPU, or the device cpu"):
        operator._cuda_plan(1, 1, torch.complex64, 1e-4, torch.device("cuda"))


def test_several_threads_give_the_same_bits_every_time():
    """Where threads share a transform, its samples are added up in the order in which they finish."""
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(40_000, 2, generator=generator) - 0.5
    samples = torch.randn(3, 40_000, dtype=torch.complex64, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first = NonuniformFourier(points, (1, 64, 64)).adjoint(samples)
        for _ in range(4):
            assert torch.equal(NonuniformFourier(points, (1, 64, 64)).adjoint(samples), first)
            assert torch.equal(NonuniformFourier(points, (1, 64, 64)).adjoint(samples[:1]), first[:1])
    finally:
        torch.set_num_threads(threads)
