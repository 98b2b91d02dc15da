"""Density compensation makes the adjoint an inverse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from spirals import spirals
from torch import Tensor

from quantitron.recon.operators.density_compensation import density_weights, normalised, pipe_menon, voronoi
from quantitron.recon.operators.nonuniform_fourier import NonuniformFourier

GRID = (1, 32, 24)


def cartesian(grid: tuple[int, int, int] = GRID) -> Tensor:
    _, ny, nx = grid
    ky, kx = torch.meshgrid(*[(torch.arange(n) - n // 2) / n for n in (ny, nx)], indexing="ij")
    return torch.stack([kx.flatten(), ky.flatten()], -1)


def radial(spokes: int, points: int) -> Tensor:
    angle = torch.arange(spokes, dtype=torch.float64) * math.pi / spokes
    radius = (torch.arange(points, dtype=torch.float64) - points // 2) / points
    line = torch.stack([angle.cos(), angle.sin()], -1)
    return (radius[None, :, None] * line[:, None]).flatten(0, 1).float()


def by_iteration(trajectory: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return pipe_menon(NonuniformFourier(trajectory, grid))


METHODS = [pytest.param(voronoi, id="voronoi"), pytest.param(by_iteration, id="pipe-menon")]
Method = Callable[[Tensor, tuple[int, int, int]], Tensor]


@pytest.mark.parametrize("weights", METHODS)
def test_cartesian_grid_has_weights_one(weights: Method) -> None:
    found = weights(cartesian(), GRID)
    assert found.shape == (32 * 24,)
    assert found.dtype == torch.float32
    assert (found - 1).abs().max() < 1e-3


@pytest.mark.parametrize("weights", METHODS)
def test_radial_lines_give_a_ramp(weights: Method) -> None:
    grid, spokes, points = (1, 32, 32), 56, 32
    trajectory = radial(spokes, points)
    found = weights(trajectory, grid)
    radius = trajectory.norm(dim=1)
    # Each point stands for a piece of ring: radius * angle wide, one sample long.
    expected = radius * (math.pi / spokes) / points * 32 * 32
    middle = (radius > 0.1) & (radius < 0.4)
    assert ((found - expected).norm() / expected.norm()) < 0.12
    assert ((found - expected)[middle].norm() / expected[middle].norm()) < 0.1
    # The points at k = 0 share one disc of a quarter of a sample's area times pi.
    centre = radius < 1e-6
    assert float(found[centre].sum()) == pytest.approx(math.pi / 4, rel=0.3)


@pytest.mark.parametrize("weights", METHODS)
def test_weighted_adjoint_inverts_a_spiral(weights: Method) -> None:
    grid = (1, 48, 48)
    trajectory = spirals(16, 400, turns=4.0, power=1.2).flatten(0, 1)
    fourier = NonuniformFourier(trajectory, grid)
    axis = (torch.arange(48) - 24.0) ** 2
    bump = torch.exp(-(axis[:, None] + axis) / 2 / 2.0**2).to(torch.complex64)[None]
    back = fourier.adjoint(fourier(bump) * weights(trajectory, grid))
    assert float(back.abs().max()) == pytest.approx(1, abs=0.03)
    assert float((back - bump).norm() / bump.norm()) < 0.05


def test_repeated_points_share_their_cell() -> None:
    once = cartesian()
    found = voronoi(torch.cat([once, once[:100]]), GRID)
    assert (found[100:768] - 1).abs().max() < 1e-3
    assert (found[:100] - 0.5).abs().max() < 1e-3
    assert (found[768:] - 0.5).abs().max() < 1e-3


def slab(grid: tuple[int, int, int]) -> Tensor:
    axes = [(torch.arange(n) - n // 2) / n for n in grid]
    kz, ky, kx = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([kx, ky, kz], -1).flatten(0, 2)


@pytest.mark.parametrize("weights", METHODS)
def test_three_dimensions(weights: Method) -> None:
    grid = (4, 6, 8)
    assert (weights(slab(grid), grid) - 1).abs().max() < 1e-3


def test_cells_of_a_sheared_grid_in_no_planes_of_kz_have_the_same_volume() -> None:
    grid = (4, 6, 8)
    sheared = 0.8 * slab(grid) @ torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.0, 0.07], [0.0, 0.0, 1.0]])
    assert (voronoi(sheared, grid) / 0.8**3 - 1).abs().max() < 1e-3


def test_planes_stand_for_the_share_of_kz_between_their_neighbours() -> None:
    grid = (4, *GRID[1:])
    heights = torch.tensor([-0.5, -0.25, 0.0, 0.125, 0.375])
    plane = cartesian()
    stack = torch.cat([torch.cat([plane, torch.full((len(plane), 1), float(z))], 1) for z in heights])
    found = voronoi(stack, grid).reshape(5, -1)
    expected = 4 * torch.tensor([0.25, 0.25, 0.1875, 0.1875, 0.25])
    torch.testing.assert_close(found, expected[:, None].expand_as(found), rtol=1e-3, atol=0)
    alone = voronoi(torch.cat([plane, torch.zeros(len(plane), 1)], 1), grid)
    torch.testing.assert_close(alone, torch.ones(len(plane)), rtol=1e-3, atol=0)


def test_planes_may_be_a_little_uneven_and_one_spoke_a_plane_is_no_stack() -> None:
    grid = (4, *GRID[1:])
    points = slab(grid)
    even = voronoi(points, grid)
    uneven = points.clone()
    uneven[::7, 2] += 2e-6
    torch.testing.assert_close(voronoi(uneven, grid), even, rtol=1e-3, atol=0)
    # Radial lines that turn from partition to partition.
    heights = (torch.arange(16) - 8.0) / 16
    lines = [torch.stack([torch.linspace(-0.5, 0.5, 24)] * 2, -1) for _ in heights]
    turned = [
        torch.stack([(2 * z).cos() * line[:, 0], (2 * z).sin() * line[:, 1], torch.full((24,), float(z))], -1)
        for z, line in zip(3 * heights, lines, strict=True)
    ]
    found = voronoi(torch.cat([spoke * torch.tensor([1, 1, 1 / 3]) for spoke in turned]), (16, 24, 24))
    assert bool((found > 0).all())


def test_cells_in_3d_fill_the_ball_and_invert_what_lies_in_it() -> None:
    """Points drawn at random, the denser the nearer to the centre: the volumes make up for that."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(12000, 3, generator=generator)
    radius = 0.5 * torch.rand(12000, 1, generator=generator).sqrt()  # density as 1 / radius
    trajectory = radius * direction / direction.norm(dim=1, keepdim=True)
    grid = (12, 12, 12)
    found = voronoi(trajectory, grid)
    # The outermost cells, which have no end, are as large as the next ones.
    assert float(found.sum()) == pytest.approx(
        12**3 * math.pi / 6, rel=0.05
    )  # the outermost cells are those within
    axis = (torch.arange(12) - 6.0) ** 2
    square = axis[:, None, None] + axis[:, None] + axis
    bump = torch.exp(-square / 2 / 1.5**2).to(torch.complex64)
    fourier = NonuniformFourier(trajectory, grid)
    back = fourier.adjoint(fourier(bump) * found)
    assert float((back - bump).norm() / bump.norm()) < 0.1
    assert float((fourier.adjoint(fourier(bump)) - bump).norm() / bump.norm()) > 1


@pytest.mark.parametrize("scale", [1e-12, 1.0, 3e15])
def test_weights_of_any_scale_get_the_density_one(scale: float) -> None:
    trajectory = cartesian()
    weights = torch.ones(len(trajectory))
    torch.testing.assert_close(normalised(scale * weights, trajectory, GRID), weights, rtol=1e-3, atol=0)
    assert not normalised(0 * weights, trajectory, GRID).any()


def test_weights_by_name() -> None:
    trajectory = cartesian()
    assert torch.equal(density_weights(trajectory, GRID), by_iteration(trajectory, GRID))
    assert torch.equal(density_weights(trajectory, GRID, "voronoi"), voronoi(trajectory, GRID))
    with pytest.raises(ValueError, match="'hamming' is none of pipe, voronoi"):
        density_weights(trajectory, GRID, "hamming")


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"\(n, 2\) and \(n, 3\), not \(5, 4\)"):
        voronoi(torch.zeros(5, 4), GRID)
    with pytest.raises(ValueError, match=r"not \(0, 3\)"):
        voronoi(torch.zeros(0, 3), GRID)
    square = torch.tensor([[-0.4, -0.4], [-0.4, 0.4], [0.4, -0.4], [0.4, 0.4]])
    with pytest.raises(ValueError, match="all 4 points reach beyond"):
        voronoi(square, GRID)
    with pytest.raises(ValueError, match="in a plane"):
        voronoi(torch.rand(50, 2) @ torch.tensor([[1.0, 0.0, 0.3], [0.0, 1.0, 0.2]]) - 0.5, GRID)
    with pytest.raises(ValueError, match="on a line"):
        voronoi(torch.linspace(-0.5, 0.5, 20)[:, None] * torch.tensor([1.0, 0.5]), GRID)
    with pytest.raises(ValueError, match="at least one iteration"):
        pipe_menon(NonuniformFourier(cartesian(), GRID), 0)
