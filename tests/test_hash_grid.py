"""The hash grid follows tiny-cuda-nn's rules, and its sparse form is the same function as the plain one."""

from __future__ import annotations

import math
import struct
import sys
from itertools import product
from types import ModuleType

import pytest
import torch
from torch import nn

from quantitron.recon.networks import encoder as encoder_module
from quantitron.recon.networks import hash_grid as hash_grid_module
from quantitron.recon.networks.encoder import encoder
from quantitron.recon.networks.hash_grid import HashGrid
from quantitron.recon.networks.hash_layout import (
    HashGridLayout,
    corner_rows_and_weights,
    grid_coordinates,
)
from quantitron.recon.networks.tiny_cuda_grid import TinyCudaGrid, find_library

SMALL = HashGridLayout(levels=5, base_resolution=3, growth=1.7, log2_rows=7)  # the last two are hashed
FLAT = HashGridLayout(levels=4, base_resolution=4, growth=1.9, log2_rows=6, dimensions=2)
LINE = HashGridLayout(levels=3, base_resolution=2, growth=2.0, log2_rows=3, dimensions=1)
WIDE = HashGridLayout(levels=3, base_resolution=2, growth=2.0, log2_rows=5, features=4)
CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(count, dimensions=3, seed=1):
    inside = torch.rand(count, dimensions, generator=seeded(seed), dtype=torch.float64)
    return torch.cat((inside, torch.zeros(1, dimensions), torch.ones(1, dimensions)))


def single(value):
    """Round to single precision."""
    return struct.unpack("f", struct.pack("f", value))[0]


def by_the_rules(layout, level, point):
    """(row, weight) of every corner, one number after the other, in plain Python with 32-bit counters."""
    scale = single(
        single(2.0 ** single(level * single(math.log2(single(layout.growth))))) * layout.base_resolution
    )
    scale = single(scale - 1.0)
    resolution = math.ceil(scale) + 1
    rows = min((resolution**layout.dimensions + 7) // 8 * 8, 1 << layout.log2_rows)
    corners = []
    for corner in range(1 << layout.dimensions):
        weight, vertex = 1.0, []
        for axis, x in enumerate(point):
            position = x * scale + 0.5
            cell = math.floor(position)
            far = corner >> axis & 1
            weight *= position - cell if far else 1 - (position - cell)
            vertex.append(cell + far)
        row, stride = 0, 1
        for index in vertex:
            if stride > rows:
                break
            row += index * stride
            stride = stride * resolution % 2**32
        if rows < stride:
            row = 0
            for index, prime in zip(vertex, (1, 2654435761, 805459861), strict=False):
                row ^= index * prime % 2**32
        corners.append((row % rows, weight))
    return rows, corners


def gathered(grid, coordinates):
    """Features by the rules, from the full table of a grid."""
    layout = grid.layout
    table = grid.table.detach().view(-1, grid.networks, layout.features)
    result = torch.zeros(grid.networks, len(coordinates), layout.levels, layout.features, dtype=table.dtype)
    first = 0
    for level in range(layout.levels):
        for voxel, point in enumerate(coordinates.tolist()):
            rows, corners = by_the_rules(layout, level, point)
            for row, weight in corners:
                result[:, voxel, level] += weight * table[first + row]
        first += rows
    return result.flatten(2)


def test_numbers_worked_out_by_hand():
    """growth 2 from 4 vertices: scales 3, 7, 15; 64 rows, so that level 0 is dense and level 1 hashed."""
    layout = HashGridLayout(levels=3, base_resolution=4, growth=2.0, log2_rows=6)
    assert [layout.scale(level) for level in range(3)] == [3.0, 7.0, 15.0]
    assert [layout.resolution(level) for level in range(3)] == [4, 8, 16]
    assert [layout.rows(level) for level in range(3)] == [64, 64, 64]
    assert layout.strides(0) == (1, 4, 16)
    assert layout.strides(1) is None
    point = torch.tensor([[0.5, 0.25, 0.75]], dtype=torch.float64)
    # Level 0: positions 2.0, 1.25, 2.75; the corner (2, 1, 2) has row 2 + 4 + 32 and weight 1 * 3/4 * 1/4.
    rows, weights = corner_rows_and_weights(layout, point, 0)
    assert rows.tolist() == [[38, 39, 42, 43, 54, 55, 58, 59]]
    assert weights.tolist() == [[0.1875, 0, 0.0625, 0, 0.5625, 0, 0.1875, 0]]
    # Level 1: positions 4.0, 2.25, 5.75. Modulo 64 the primes are 49 and 21, and the exclusive or of the low
    # bits is the low bits of the exclusive or: (4, 2, 5) -> 4 ^ 98 ^ 105 = 15.
    rows, weights = corner_rows_and_weights(layout, point, 1)
    assert (2654435761 % 64, 805459861 % 64) == (49, 21)
    assert rows[0, 0] == 15
    assert rows[0].tolist() == [(x ^ 49 * y ^ 21 * z) % 64 for z, y, x in product((5, 6), (2, 3), (4, 5))]
    assert weights[0, 0] == 0.75 * 0.25


def test_a_level_of_one_vertex_is_constant():
    """Scale 0: every point lies half-way between the same rows, so coarse grids start from a constant."""
    layout = HashGridLayout.for_coils()
    assert layout.resolution(0) == 1
    assert layout.rows(0) == 8
    rows, weights = corner_rows_and_weights(layout, points(5), 0)
    assert (rows == torch.tensor([0, 1, 1, 2, 1, 2, 2, 3])).all()
    assert (weights == 0.125).all()


@pytest.mark.parametrize(
    "layout",
    [SMALL, FLAT, LINE, WIDE, HashGridLayout(levels=14, base_resolution=16, growth=2.0, log2_rows=10)],
    ids=["3d", "2d", "1d", "wide", "published"],
)
def test_rows_and_weights_follow_the_rules(layout):
    """Also where 32-bit strides overflow: at 65 536 vertices an axis, with the published growth of 2."""
    coordinates = points(20, layout.dimensions)
    for level in range(layout.levels):
        rows, weights = corner_rows_and_weights(layout, coordinates, level)
        for voxel, point in enumerate(coordinates.tolist()):
            total, corners = by_the_rules(layout, level, point)
            assert total == layout.rows(level)
            assert rows[voxel].tolist() == [row for row, _ in corners]
            assert weights[voxel].tolist() == pytest.approx([weight for _, weight in corners], abs=1e-9)


def test_both_kinds_of_level_occur():
    for layout in (SMALL, FLAT, WIDE):
        kinds = {layout.strides(level) is None for level in range(layout.levels)}
        assert kinds == {True, False}


@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("layout", [SMALL, FLAT, LINE, WIDE], ids=["3d", "2d", "1d", "wide"])
def test_the_sparse_form_is_the_plain_one(layout, networks, monkeypatch):
    monkeypatch.setattr(hash_grid_module, "_BLOCK", 7)  # several blocks, the last one not full
    grid = HashGrid(layout, networks, seeded(), dtype=torch.float64)
    coordinates = points(30, layout.dimensions)
    features = grid(grid.samples(coordinates))
    assert features.shape == (networks, 32, layout.width)
    torch.testing.assert_close(features, gathered(grid, coordinates), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("layout", [SMALL, WIDE], ids=["pairs", "wide"])
@pytest.mark.parametrize("stored", ["all", "touched"])
def test_the_gradient_is_the_slope(layout, stored, monkeypatch):
    monkeypatch.setattr(hash_grid_module, "_BLOCK", 4)
    coordinates = points(8)
    grid = HashGrid(layout, 2, seeded(), coordinates if stored == "touched" else None, dtype=torch.float64)
    samples = grid.samples(coordinates[:6])
    direction = torch.randn(2, 6, layout.width, generator=seeded(2), dtype=torch.float64)
    step = torch.randn(grid.table.shape, generator=seeded(3), dtype=torch.float64)
    (grid(samples) * direction).sum().backward()
    base = grid.table.detach().clone()
    ends = []
    for sign in (1, -1):
        grid.table.data = base + sign * 1e-3 * step
        ends.append((grid(samples) * direction).sum().item())
    # The function is linear in the table: a finite difference is exact up to rounding.
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx((grid.table.grad * step).sum().item(), rel=1e-9)


def test_the_transpose_is_the_adjoint():
    grid = HashGrid(SMALL, 2, seeded(), dtype=torch.float64)
    samples = grid.samples(points(50))
    table = torch.randn(grid.table.shape, generator=seeded(4), dtype=torch.float64)
    image = torch.randn(
        len(samples.matrix.starts) - 1, table.shape[1], generator=seeded(5), dtype=torch.float64
    )
    back = torch.zeros_like(table)
    for part in samples.transpose:
        part.product_into(back, image)
    left = ((samples.matrix @ table) * image).sum()
    torch.testing.assert_close(left, (table * back).sum(), rtol=1e-12, atol=0)


def test_long_rows_are_summed_in_pieces():
    """202 points share 8 rows of the coarsest level: 1616 entries, at most 64 of them in a piece."""
    layout = HashGridLayout(levels=2, base_resolution=2, growth=8.0 / 2, log2_rows=12)
    grid = HashGrid(layout, 1, seeded(), dtype=torch.float64)
    samples = grid.samples(points(200))
    coarse, fine = samples.transpose
    assert coarse.pieces.starts.diff().max() == 64
    assert coarse.join is not None
    assert fine.join is None
    grid(samples).sum().backward()
    # Weights of a point add up to 1 in every level.
    totals = grid.table.grad.split([layout.rows(0), layout.rows(1)])
    for total in totals:
        assert total[:, 0].sum().item() == pytest.approx(202)
    matrix = torch.zeros(len(grid.table), 202 * 2, dtype=torch.float64)
    for level in range(2):
        rows, weights = corner_rows_and_weights(layout, points(200), level)
        place = (torch.arange(202) + 202 * level)[:, None].expand_as(rows)
        matrix.index_put_((rows + layout.first_row(level), place), weights, accumulate=True)
    torch.testing.assert_close(grid.table.grad[:, 0], matrix.sum(1), rtol=1e-12, atol=1e-12)


def test_batches_of_readout_positions_are_parts_of_the_whole():
    matrix = (6, 3, 5)
    grid = HashGrid(HashGridLayout.for_matrix(matrix, levels=6, log2_rows=8, base_resolution=2), 2, seeded())
    coordinates = grid_coordinates(matrix, (2.0, 4.0, 2.0))
    whole = grid(grid.samples(coordinates))
    direction = torch.randn(whole.shape, generator=seeded(6))
    (expected,) = torch.autograd.grad((whole * direction).sum(), grid.table)
    summed = torch.zeros_like(expected)
    for first in range(0, 6, 2):
        run = slice(first * 15, (first + 2) * 15)
        batch = grid(grid.samples(coordinates[run]))
        assert torch.equal(batch, whole[:, run])
        summed += torch.autograd.grad((batch * direction[:, run]).sum(), grid.table)[0]
    torch.testing.assert_close(summed, expected, rtol=1e-5, atol=1e-6)


def test_storing_touched_rows_only_changes_nothing():
    matrix = (6, 3, 5)
    layout = HashGridLayout.for_matrix(matrix, levels=6, log2_rows=14)
    coordinates = grid_coordinates(matrix, (2.0, 4.0, 2.0))
    full, part = HashGrid(layout, 2, seeded()), HashGrid(layout, 2, seeded(), coordinates)
    assert len(part.table) < 0.5 * len(full.table)
    assert torch.equal(full(full.samples(coordinates)), part(part.samples(coordinates)))
    # Between the voxels, rows that no voxel touches count as 0: as good as their start.
    between = points(40)
    difference = full(full.samples(between)) - part(part.samples(between))
    assert 0 < difference.abs().max() <= 1e-4


def test_points_between_voxels_are_interpolated():
    """Along a line inside one cell of every level the features change linearly."""
    grid = HashGrid(SMALL, 1, seeded(), dtype=torch.float64)
    ends = torch.tensor([[0.501, 0.5, 0.5], [0.502, 0.5, 0.5]], dtype=torch.float64)
    middle = grid(grid.samples(ends.mean(0, keepdim=True)))
    torch.testing.assert_close(middle[:, 0], grid(grid.samples(ends)).mean(1), rtol=1e-9, atol=1e-15)


def test_features_start_small_and_repeat():
    first, again, other = (HashGrid(SMALL, 2, seeded(seed)).table for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().max() <= 1e-4
    assert first.std().item() == pytest.approx(1e-4 / math.sqrt(3), rel=0.1)


def test_the_finest_level_has_two_cells_a_voxel():
    layout = HashGridLayout.for_matrix((112, 16, 112))
    assert layout.resolution(0) == 16
    assert layout.resolution(15) == 224
    assert HashGridLayout.for_matrix((4, 4)).resolution(15) == 16  # never below the coarsest
    assert HashGridLayout.for_matrix((20,), levels=1).resolution(0) == 16
    assert HashGridLayout.for_phase((112, 16, 112)).rows(15) == 4096
    coils = HashGridLayout.for_coils()
    assert [coils.rows(level) for level in (0, 7)] == [8, 4096]
    assert all(coils.strides(level) for level in range(8))


def test_voxel_centres_fill_the_longest_axis():
    coordinates = grid_coordinates((4, 2, 3), (2.0, 3.0, 2.0))
    assert coordinates.shape == (24, 3)
    assert coordinates[0].tolist() == [0.125, 0.1875, 0.125]
    assert coordinates[1].tolist() == [0.125, 0.1875, 0.375]  # the last axis changes fastest
    assert coordinates[-1].tolist() == [0.875, 0.5625, 0.625]
    assert grid_coordinates((2, 4)).tolist()[-1] == [0.375, 0.875]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"levels": 0}, "levels"),
        ({"base_resolution": 0}, "base_resolution"),
        ({"growth": 0.5}, "growth"),
        ({"log2_rows": 30}, "log2_rows"),
        ({"features": 0}, "features"),
        ({"dimensions": 4}, "dimensions"),
    ],
)
def test_layouts_out_of_range_are_refused(values, name):
    good = {"levels": 4, "base_resolution": 4, "growth": 1.5, "log2_rows": 8}
    with pytest.raises(ValueError, match=name):
        HashGridLayout(**{**good, **values})


@pytest.mark.parametrize("matrix", [(), (0, 4)])
def test_an_empty_matrix_is_refused(matrix):
    with pytest.raises(ValueError, match="at least one voxel"):
        HashGridLayout.for_matrix(matrix)
    with pytest.raises(ValueError, match="no grid of voxels"):
        grid_coordinates(matrix)


@pytest.mark.parametrize(
    ("coordinates", "message"),
    [
        (torch.zeros(3, 2), "shape"),
        (torch.full((2, 3), 1.01), "between 0 and 1"),
        (torch.full((2, 3), math.nan), "between 0 and 1"),
    ],
)
def test_points_outside_are_refused(coordinates, message):
    with pytest.raises(ValueError, match=message):
        HashGrid(SMALL, 1, seeded()).samples(coordinates)


def test_samples_of_another_grid_are_refused():
    with pytest.raises(ValueError, match="another hash grid"):
        HashGrid(SMALL, 1, seeded())(HashGrid(WIDE, 1, seeded()).samples(points(3)))
    with pytest.raises(ValueError, match="another hash grid"):
        HashGrid(SMALL, 1, seeded(), points(3))(HashGrid(SMALL, 1, seeded()).samples(points(3)))
    with pytest.raises(ValueError, match="at least one network"):
        HashGrid(SMALL, 0, seeded())


def test_grids_of_one_layout_share_samples():
    one, three = HashGrid(SMALL, 1, seeded()), HashGrid(SMALL, 3, seeded())
    samples = one.samples(points(9))
    assert torch.equal(three(samples), three(three.samples(points(9))))


def test_no_gradient_without_its_matrix():
    grid = HashGrid(SMALL, 1, seeded())
    features = grid(grid.samples(points(9), gradient=False))
    with pytest.raises(RuntimeError, match="without a gradient"):
        features.sum().backward()


def test_no_points_give_no_features():
    grid = HashGrid(SMALL, 2, seeded())
    features = grid(grid.samples(torch.zeros(0, 3)))
    assert features.shape == (2, 0, SMALL.width)


class PlainEncoding(nn.Module):
    """What tinycudann.Encoding does, by the rules and by gathering."""

    def __init__(self, n_input_dims, encoding_config, seed=1337, dtype=None):
        super().__init__()
        assert encoding_config["otype"] == "HashGrid"
        assert encoding_config["n_features_per_level"] in (1, 2, 4, 8)
        assert dtype == torch.float32
        self.layout = HashGridLayout(
            levels=encoding_config["n_levels"],
            base_resolution=encoding_config["base_resolution"],
            growth=encoding_config["per_level_scale"],
            log2_rows=encoding_config["log2_hashmap_size"],
            features=encoding_config["n_features_per_level"],
            dimensions=n_input_dims,
        )
        rows = sum(by_the_rules(self.layout, level, [0.0])[0] for level in range(self.layout.levels))
        self.params = nn.Parameter(torch.zeros(rows * self.layout.features))

    def forward(self, coordinates):
        layout = self.layout
        table = self.params.view(-1, layout.features)
        levels, first = [], 0
        for level in range(layout.levels):
            voxels = []
            for point in coordinates.tolist():
                rows, corners = by_the_rules(layout, level, point)
                voxels.append(sum(weight * table[first + row] for row, weight in corners))
            levels.append(torch.stack(voxels))
            first += rows
        return torch.cat(levels, dim=1)


@pytest.fixture
def tinycudann(monkeypatch):
    library = ModuleType("tinycudann")
    library.Encoding = PlainEncoding
    monkeypatch.setitem(sys.modules, "tinycudann", library)
    return library


@pytest.mark.parametrize("networks", [1, 4, 7])
def test_both_backends_give_the_same_numbers(tinycudann, networks):
    layout = HashGridLayout(levels=3, base_resolution=3, growth=1.7, log2_rows=6)
    coordinates = points(4)
    ours = HashGrid(layout, networks, seeded())
    theirs = TinyCudaGrid(find_library(), layout, networks, seeded(), CPU)
    assert theirs.groups == {1: [1], 4: [4], 7: [4, 2, 1]}[networks]
    samples = theirs.samples(coordinates)
    features = theirs(samples)
    torch.testing.assert_close(features, ours(ours.samples(coordinates)), rtol=1e-5, atol=1e-10)
    direction = torch.randn(features.shape, generator=seeded(7))
    (features * direction).sum().backward()
    (ours(ours.samples(coordinates)) * direction).sum().backward()
    parts = [e.params.grad.view(len(ours.table), -1) for e in theirs.encodings]
    torch.testing.assert_close(torch.cat(parts, dim=1), ours.table.grad, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="another hash grid"):
        theirs(ours.samples(coordinates))


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_library() is None, reason="no GPU, or tiny-cuda-nn is not installed"
)
@pytest.mark.parametrize("networks", [1, 7])
@pytest.mark.parametrize("matrix", [(24, 6, 20), (112, 16, 112)])
def test_the_library_itself_gives_the_same_numbers(matrix, networks):
    """DESIGN decision 6: features and gradient where both exist, in single precision."""
    layout = HashGridLayout.for_matrix(matrix, log2_rows=12)
    ours = HashGrid(layout, networks, seeded())
    theirs = TinyCudaGrid(find_library(), layout, networks, seeded(), torch.device("cuda"))
    coordinates = torch.rand(500, 3, generator=seeded(4))
    features = theirs(theirs.samples(coordinates))
    expected = ours(ours.samples(coordinates))
    torch.testing.assert_close(features.cpu(), expected, rtol=1e-4, atol=1e-8)
    direction = torch.randn(expected.shape, generator=seeded(7))
    (features * direction.cuda()).sum().backward()
    (expected * direction).sum().backward()
    parts = [e.params.grad.cpu().view(len(ours.table), -1) for e in theirs.encodings]
    torch.testing.assert_close(torch.cat(parts, dim=1), ours.table.grad, rtol=1e-3, atol=1e-5)


def test_the_backend_is_chosen_by_device_and_library(tinycudann, monkeypatch):
    """A GPU is claimed, its modules stay on the CPU: what is tested is the choice."""
    chosen = []
    monkeypatch.setattr(
        encoder_module, "TinyCudaGrid", lambda *arguments: chosen.append(arguments) or "theirs"
    )
    monkeypatch.setattr(encoder_module, "HashGrid", lambda *arguments: "ours")
    cuda = torch.device("cuda", 0)
    assert encoder(SMALL, 2, CPU, seeded()) == "ours"
    assert encoder(SMALL, 2, cuda, seeded()) == "theirs"
    assert chosen[0][0] is tinycudann
    assert encoder(LINE, 2, cuda, seeded()) == "ours"  # no grid of one dimension there
    monkeypatch.setitem(sys.modules, "tinycudann", None)  # importing it raises ImportError
    assert encoder(SMALL, 2, cuda, seeded()) == "ours"


def test_a_library_that_does_not_run_here_counts_as_missing(monkeypatch, tmp_path):
    """tiny-cuda-nn raises EnvironmentError on import where there is no GPU."""
    (tmp_path / "tinycudann.py").write_text("raise EnvironmentError('Unknown compute capability.')\n")
    monkeypatch.delitem(sys.modules, "tinycudann", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_library() is None


def test_grids_that_the_library_lacks_are_refused(tinycudann):
    with pytest.raises(ValueError, match="1 dimensions"):
        TinyCudaGrid(tinycudann, LINE, 1, seeded(), CPU)
