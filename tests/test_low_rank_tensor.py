"""Tucker form over contrast and echo, low rank of local unfoldings; the quadratics that bound low rank."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantitron.recon.priors.low_rank import BlockLowRank
from quantitron.recon.priors.low_rank_tensor import TuckerBasis, UnfoldedLowRank

ECHOES, CONTRASTS, COMPONENTS = 4, 3, 7
CORE = (9, 3, 2, 4, 10)  # (x, m, n, z, y)


def _random(seed, *shape, dtype=torch.complex128):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _mixing(seed=0, components=COMPONENTS):
    """(e, l, k): orthonormal columns over (echo, contrast)."""
    columns, _ = torch.linalg.qr(_random(seed, ECHOES * CONTRASTS, components))
    return columns.reshape(ECHOES, CONTRASTS, components)


def _inner(left, right):
    return torch.vdot(left.flatten(), right.flatten())


# ------------------------------------------------------------------------------------------------ Tucker form


@pytest.mark.parametrize("rank", [2, 0.9, 1.0])
def test_core_and_images_are_adjoint(rank):
    tensor = TuckerBasis(_mixing(), _random(1, 50, COMPONENTS), rank)
    u, core = _random(2, 5, COMPONENTS, 2, 6), _random(3, 5, *tensor.lengths, 2, 6)
    assert tensor.core(u).shape == core.shape
    assert tensor.images(core).shape == u.shape
    torch.testing.assert_close(_inner(tensor.core(u), core), _inner(u, tensor.images(core)))


@pytest.mark.parametrize("voxels", [3, 50])
def test_a_core_of_full_length_is_an_isometry(voxels):
    """Fewer voxels than components leave factors orthonormal, too."""
    tensor = TuckerBasis(_mixing(), _random(1, voxels, COMPONENTS), max(ECHOES, CONTRASTS))
    assert tensor.lengths == (CONTRASTS, ECHOES)
    u = _random(2, 5, COMPONENTS, 2, 6)
    torch.testing.assert_close(tensor.images(tensor.core(u)), u)
    torch.testing.assert_close(_inner(tensor.core(u), tensor.core(u)), _inner(u, u))


def _of_multilinear_rank(contrast, echo, voxels=40):
    """Coefficients (v, k) in a basis of all frames whose signals have those ranks along contrast and echo."""
    mixing = _mixing(components=ECHOES * CONTRASTS)
    signals = torch.einsum(
        "vmn,ml,ne->vel",
        _random(4, voxels, contrast, echo),
        _random(5, contrast, CONTRASTS),
        _random(6, echo, ECHOES),
    )
    return mixing, signals, torch.einsum("elk,vel->vk", mixing.conj(), signals)


@pytest.mark.parametrize(("contrast", "echo"), [(1, 1), (2, 1), (1, 3), (2, 3), (3, 4)])
def test_a_tensor_of_low_multilinear_rank_fits_into_its_core(contrast, echo):
    mixing, signals, coefficients = _of_multilinear_rank(contrast, echo)
    tensor = TuckerBasis(mixing, coefficients, 1 - 1e-10)
    assert tensor.lengths == (contrast, echo)
    u = coefficients.T.reshape(1, -1, 5, 8)  # (x, k, z, y)
    torch.testing.assert_close(tensor.images(tensor.core(u)), u)
    # The core of a voxel is its signal in the factors: no more than a turn of both axes.
    core = tensor.core(u)[0].flatten(2)  # (m, n, v)
    expected = torch.linalg.matrix_norm(signals)  # (v,)
    torch.testing.assert_close(torch.linalg.vector_norm(core, dim=(0, 1)), expected)
    for axis, length in enumerate((contrast, echo)):
        assert torch.linalg.matrix_rank(core.movedim(axis, 0).flatten(1), rtol=1e-9) == length


def test_the_share_of_the_energy_sets_the_lengths():
    """Energies 1, 1e-2, 1e-4 along the contrasts and 1, 1e-3 along the echoes."""
    mixing = torch.eye(ECHOES * CONTRASTS, dtype=torch.complex128).reshape(ECHOES, CONTRASTS, -1)
    amplitude = torch.zeros(ECHOES, CONTRASTS, dtype=torch.float64)
    amplitude[:2] = torch.tensor([1, 1e-3]).sqrt()[:, None] * torch.tensor([1, 1e-2, 1e-4]).sqrt()
    signals = torch.diag(amplitude.flatten()).to(torch.complex128)  # (v, e*l): a voxel an entry
    for rank, lengths in ((0.98, (1, 1)), (0.995, (2, 1)), (0.9995, (2, 2)), (0.99999, (3, 2))):
        assert TuckerBasis(mixing, signals, rank).lengths == lengths
    for rank, lengths in ((1, (1, 1)), (2, (2, 2)), (9, (3, 4))):
        assert TuckerBasis(mixing, signals, rank).lengths == lengths
    # What is cut is what is weakest.
    kept = TuckerBasis(mixing, signals, 1)
    u = signals.T.reshape(1, -1, 1, len(signals))
    part = kept.images(kept.core(u))
    assert float(part.abs().square().sum()) == pytest.approx(1.0, rel=1e-9)


def test_images_without_signal_keep_everything():
    tensor = TuckerBasis(_mixing(), torch.zeros(20, COMPONENTS, dtype=torch.complex128), 0.999)
    assert tensor.lengths == (CONTRASTS, ECHOES)


# ------------------------------------------------------------------------------- low rank of local unfoldings


def _blocks(shape, block, shift):
    """Slices of a tiling of cores (x, m, n, z, y): voxel i lies in block (i + shift) // edge."""
    axes = []
    for n, offset in zip((shape[0], shape[3], shape[4]), shift, strict=True):
        edge = min(block, n)
        groups = itertools.groupby(range(n), key=lambda i, edge=edge, offset=offset: (i + offset) // edge)
        members = [list(group) for _, group in groups]
        axes.append([slice(group[0], group[-1] + 1) for group in members])
    return [(x, slice(None), slice(None), z, y) for x, z, y in itertools.product(*axes)]


def _unfold(core, place, axis):
    """(rows, columns): rows along one contrast axis."""
    return core[place].movedim(1 + axis, 0).flatten(1)


def _threshold(core, columns, block, axis):
    """Relative to that of a whole block."""
    rows, other = core.shape[1 + axis], core.shape[2 - axis]
    whole = other * min(block, core.shape[0]) * min(block, core.shape[3]) * min(block, core.shape[4])
    return (columns**0.5 + rows**0.5) / (whole**0.5 + rows**0.5)


SHIFTS = [(0, 0, 0), (1, 2, 0), (3, 1, 2), (2, 0, 3)]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("block", [4, 1, 30])
@pytest.mark.parametrize("shift", SHIFTS)
def test_proximal_thresholds_the_unfolding_of_every_block(shift, block, axis):
    shift = tuple(s % min(block, n) for s, n in zip(shift, (9, 4, 10), strict=True))
    core = _random(7, *CORE)
    expected = torch.empty_like(core)
    for place in _blocks(CORE, block, shift):
        matrix = _unfold(core, place, axis)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        threshold = 0.7 * 2.5 * _threshold(core, matrix.shape[1], block, axis)
        part = core[place].movedim(1 + axis, 0)
        shrunk = ((left * (values - threshold).clamp_min(0)) @ right).reshape(part.shape)
        expected[place] = shrunk.movedim(0, 1 + axis)
    image = UnfoldedLowRank(2.5, block, axis).proximal(core, 0.7, shift)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-10)
    assert 0.01 < float((image - core).norm() / core.norm()) < 0.99


@pytest.mark.parametrize("axis", [0, 1])
def test_proximal_is_firmly_nonexpansive_and_shrinks_singular_values(axis):
    prior, shift = UnfoldedLowRank(4.0, 4, axis), (3, 1, 2)
    for seed in range(4):
        u, v = _random(seed, *CORE), 0.7 * _random(seed + 50, *CORE)
        image = prior.proximal(u, 1.0, shift)
        change = image - prior.proximal(v, 1.0, shift)
        assert float(change.abs().square().sum()) <= float(_inner(change, u - v).real) + 1e-9
        # The residual is a subgradient: of norm one at most, and aligned with what is left.
        for place in _blocks(CORE, 4, shift):
            part = _unfold(image, place, axis)
            weight = 4.0 * _threshold(image, part.shape[1], 4, axis)
            subgradient = _unfold(u - image, place, axis) / weight
            assert float(torch.linalg.matrix_norm(subgradient, 2)) <= 1 + 1e-9
            aligned = float(_inner(subgradient, part).real)
            assert aligned == pytest.approx(float(torch.linalg.matrix_norm(part, "nuc")), abs=1e-7)


def test_each_axis_sees_its_own_rank():
    """A core of rank one along the contrasts loses one singular value there, and both along the echoes."""
    core = torch.einsum("m,xnzy->xmnzy", _random(8, 3), _random(9, 4, 2, 4, 4))
    lost = []
    for axis in (0, 1):
        change = core - UnfoldedLowRank(1.0, 4, axis).proximal(core, 1.0)
        values = torch.linalg.svdvals(_unfold(change, (slice(None),) * 5, axis))
        lost.append(int((values > 1e-7).sum()))
    assert lost == [1, 2]


def test_shifts_stay_within_a_block():
    prior, generator = UnfoldedLowRank(1.0, 4, 1), torch.Generator().manual_seed(0)
    shifts = [prior.random_shift(torch.Size(CORE), generator) for _ in range(200)]
    assert {s[0] for s in shifts} == {0, 1, 2, 3}
    assert {s[1] for s in shifts} == {0}  # a block spans the slab
    assert {s[2] for s in shifts} == {0, 1, 2, 3}


# ---------------------------------------------------------- quadratics that bound locally low rank from above

SHAPE, BLOCK, EPSILON = (7, 3, 2, 5), (4, 2, 3), 0.3
"""(x, k, z, y) of small images, blocks that do not fit, and the smoothing."""


def _smoothed(prior, u, shift):
    """R_eps: nuclear norms with every singular value s as (s^2 + epsilon^2 voxels)^(1/2)."""
    value = 0.0
    for region in prior._regions(u.shape, shift):
        blocks = region.blocks_of(u)
        values = torch.linalg.svdvals(blocks)
        missing = u.shape[1] - values.shape[1]  # fewer voxels than components: the others are zero
        values = torch.nn.functional.pad(values, (0, missing))
        root = (values.square() + EPSILON**2 * region.voxels).sqrt()
        value += prior._weight_of(region, u.shape) * float(root.sum())
    return value


@pytest.mark.parametrize("shift", [(0, 0, 0), (3, 0, 2)])
def test_the_quadratic_touches_and_lies_above(shift):
    prior, u = BlockLowRank(1.7, BLOCK), _random(10, *SHAPE)
    precision = prior.reweighting(u, EPSILON, shift)

    def quadratic(v):
        return 0.5 * float(_inner(v, precision(v)).real)

    constant = _smoothed(prior, u, shift) - quadratic(u)
    for seed in range(6):
        for size in (1e-3, 0.1, 1.0, 10.0):
            v = u + size * _random(20 + seed, *SHAPE)
            assert quadratic(v) + constant >= _smoothed(prior, v, shift) - 1e-9
    assert quadratic(0 * u) + constant >= _smoothed(prior, 0 * u, shift)
    # Touching from above makes the slopes equal.
    direction, step = _random(30, *SHAPE), 1e-5
    slope = (
        _smoothed(prior, u + step * direction, shift) - _smoothed(prior, u - step * direction, shift)
    ) / (2 * step)
    assert slope == pytest.approx(float(_inner(direction, precision(u)).real), rel=1e-6)


@pytest.mark.parametrize("shift", [(0, 0, 0), (3, 0, 2)])
def test_the_precision_is_a_hermitian_matrix_with_its_diagonal(shift):
    precision = BlockLowRank(1.7, BLOCK).reweighting(_random(11, *SHAPE), EPSILON, shift)
    units = torch.eye(7 * 3 * 2 * 5, dtype=torch.complex128).reshape(-1, *SHAPE)
    matrix = torch.stack([precision(unit).flatten() for unit in units], dim=1)
    torch.testing.assert_close(matrix, matrix.mH, rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(matrix)
    assert float(values.min()) > 0
    # No singular value costs more than the smoothing lets it: weight / (epsilon sqrt(voxels)).
    assert float(values.max()) <= 1.7 / EPSILON
    diagonal = precision.diagonal(_random(12, *SHAPE))
    torch.testing.assert_close(diagonal.flatten(), matrix.diagonal().real, rtol=0, atol=1e-12)
    assert float(diagonal.max()) > 1.01 * float(diagonal.min())


def test_reweighting_of_nothing_is_a_plain_square():
    """Where U vanishes all singular values cost alike."""
    prior = BlockLowRank(2.0, (4, 2, 5))
    shape = (4, 3, 2, 5)
    precision = prior.reweighting(torch.zeros(shape, dtype=torch.complex64), EPSILON)
    v = _random(13, *shape, dtype=torch.complex64)
    torch.testing.assert_close(precision(v), 2.0 / (EPSILON * 40**0.5) * v)
