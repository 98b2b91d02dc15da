"""Low rank: block thresholding against the SVD and its optimality conditions, the Tucker form's bounds."""

import itertools

import pytest
import torch

from quantitron.recon.priors.low_rank import BlockLowRank, BlockPrecision
from quantitron.recon.priors.tucker import compose, hosvd, tucker_truncate

SHAPE = (11, 4, 5, 8)  # (x, k, z, y)
BLOCK = (4, 3, 8)
SHIFTS = [(0, 0, 0), (1, 2, 0), (3, 1, 5), (2, 0, 7)]


def _random(seed, shape=SHAPE, dtype=torch.complex128):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _blocks(shape, block, shift):
    """Slices of a tiling, found voxel by voxel: voxel i lies in block (i + shift) // edge."""
    axes = []
    for n, edge, offset in zip((shape[0], shape[2], shape[3]), block, shift, strict=True):
        edge = min(edge, n)
        groups = itertools.groupby(range(n), key=lambda i, edge=edge, offset=offset: (i + offset) // edge)
        members = [list(group) for _, group in groups]
        axes.append([slice(group[0], group[-1] + 1) for group in members])
    return [(x, slice(None), z, y) for x, z, y in itertools.product(*axes)]


def _casorati(u, place):
    return u[place].movedim(1, 0).reshape(u.shape[1], -1)


def _weight(weight, voxels, block, shape):
    whole = min(block[0], shape[0]) * min(block[1], shape[2]) * min(block[2], shape[3])
    return weight * (voxels**0.5 + shape[1] ** 0.5) / (whole**0.5 + shape[1] ** 0.5)


def _reference(u, weight, block, shift):
    """Thresholded singular values of every block, and the sum of the weighted values left."""
    result, value = torch.empty_like(u), 0.0
    for place in _blocks(u.shape, block, shift):
        matrix = _casorati(u, place)
        threshold = _weight(weight, matrix.shape[1], block, u.shape)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        shrunk = (left * (values - threshold).clamp_min(0)) @ right
        part = u[place]
        result[place] = shrunk.reshape(part.shape[1], part.shape[0], *part.shape[2:]).movedim(0, 1)
        value += threshold * float(values.sum())
    return result, value


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("block", [BLOCK, (1, 1, 1), (20, 20, 20), (11, 5, 3)])
def test_proximal_thresholds_the_singular_values(shift, block):
    shift = tuple(s % min(b, n) for s, b, n in zip(shift, block, (11, 5, 8), strict=True))
    u, prior = _random(0), BlockLowRank(3.0, block)
    expected, _ = _reference(u, 3.0 * 0.8, block, shift)
    torch.testing.assert_close(prior.proximal(u, 0.8, shift), expected, rtol=0, atol=1e-10)
    _, value = _reference(u, 3.0, block, shift)
    assert prior.value(u, shift) == pytest.approx(value, rel=1e-7)  # zeros come as 1e-8


def test_single_precision_keeps_weak_components():
    """A component a ten thousandth of the strongest survives the Gram matrices."""
    graded = _random(1, (16, 5, 8, 8)) * torch.logspace(0, -4, 5, dtype=torch.float64)[:, None, None]
    turn, _ = torch.linalg.qr(_random(2, (5, 5)))
    prior = BlockLowRank(1e-4, (8, 8, 8))
    u = torch.einsum("kl,xlzy->xkzy", turn, graded)

    def weakest(image):
        return torch.einsum("k,xkzy->xzy", turn[:, 4].conj(), image.to(turn))

    exact, image = prior.proximal(u, 1.0), prior.proximal(u.to(torch.complex64), 1.0)
    assert image.dtype == torch.complex64
    error = torch.linalg.vector_norm(weakest(image) - weakest(exact))
    assert float(error) < 1e-2 * float(torch.linalg.vector_norm(weakest(exact)))


@pytest.mark.parametrize("shift", SHIFTS)
def test_residual_is_a_subgradient(shift):
    """(U - P)/step = weight Q in every block with ||Q|| <= 1 and Re <Q, P> = ||P||_*."""
    u, step, prior = _random(2), 0.7, BlockLowRank(4.0, BLOCK)
    image = prior.proximal(u, step, shift)
    for place in _blocks(SHAPE, BLOCK, shift):
        part = _casorati(image, place)
        subgradient = _casorati(u - image, place) / (step * _weight(4.0, part.shape[1], BLOCK, SHAPE))
        assert float(torch.linalg.matrix_norm(subgradient, 2)) <= 1 + 1e-9
        aligned = float(torch.vdot(subgradient.flatten(), part.flatten()).real)
        assert aligned == pytest.approx(float(torch.linalg.matrix_norm(part, "nuc")), abs=1e-8)


def test_proximal_is_firmly_nonexpansive_and_the_minimum():
    prior, shift = BlockLowRank(4.0, BLOCK), (3, 1, 5)
    for seed in range(5):
        u, v = _random(seed), 0.7 * _random(seed + 50)
        image = prior.proximal(u, 1.0, shift)
        change = image - prior.proximal(v, 1.0, shift)
        inner = torch.vdot(change.flatten(), (u - v).flatten()).real
        assert float(change.abs().square().sum()) <= float(inner) + 1e-9
        least = 0.5 * float((image - u).abs().square().sum()) + prior.value(image, shift)
        other = image + 0.1 * _random(seed + 100)
        objective = 0.5 * float((other - u).abs().square().sum()) + prior.value(other, shift)
        assert objective >= least + 0.5 * float((other - image).abs().square().sum()) - 1e-8


def test_moreau_decomposition():
    """U = prox_R(U) + projection onto the ball of the dual norm; the projection leaves itself alone."""
    prior, u = BlockLowRank(4.0, BLOCK), _random(3)
    projection = u - prior.proximal(u, 1.0, (1, 2, 3))
    assert float(prior.proximal(projection, 1.0, (1, 2, 3)).abs().max()) < 1e-7


def test_limits_of_the_weight_and_zeros():
    u = _random(4)
    torch.testing.assert_close(BlockLowRank(0.0, BLOCK).proximal(u, 1.0), u, rtol=0, atol=1e-12)
    assert not BlockLowRank(1e4, BLOCK).proximal(u, 1.0).any()
    zeros = torch.zeros(SHAPE, dtype=torch.complex64)
    for weight in (0.0, 1.0):
        assert torch.equal(BlockLowRank(weight, BLOCK).proximal(zeros, 1.0), zeros)


def test_noise_alone_is_removed_in_cut_blocks_as_in_whole_ones():
    """A weight just above the edge of the noise's singular values removes it wherever the tiling lies."""
    noise = _random(5, (24, 6, 8, 24))  # E|n|^2 = 1
    edge = (8 * 8 * 8) ** 0.5 + 6**0.5
    for shift in ((0, 0, 0), (3, 0, 5), (7, 4, 7)):
        kept = BlockLowRank(1.1 * edge, (8, 8, 8)).proximal(noise, 1.0, shift)
        assert not kept.any()
        assert BlockLowRank(0.8 * edge, (8, 8, 8)).proximal(noise, 1.0, shift).any()


def test_shifts_come_from_the_generator():
    prior = BlockLowRank(1.0, (4, 8, 3))

    def draw(seed, n=200):
        generator = torch.Generator().manual_seed(seed)
        return [prior.random_shift((11, 4, 5, 8), generator) for _ in range(n)]

    shifts = draw(0)
    assert shifts == draw(0)
    assert shifts != draw(1)
    assert {s[0] for s in shifts} == {0, 1, 2, 3}
    assert {s[1] for s in shifts} == {0}  # a block spans the slab
    assert {s[2] for s in shifts} == {0, 1, 2}


def test_mean_of_all_tilings():
    """Every tiling once, whatever the generator: the mean does not depend on it."""
    prior, u = BlockLowRank(4.0, (2, 3, 2)), _random(0)
    generator = torch.Generator().manual_seed(0)
    shifts = itertools.product(range(2), range(3), range(2))
    expected = sum(prior.proximal(u, 0.7, shift) for shift in shifts) / 12
    torch.testing.assert_close(prior.mean_proximal(u, 0.7, 12, generator), expected)
    few = prior.mean_proximal(u, 0.7, 2, generator)
    assert 0 < (few - expected).norm() < 0.5 * expected.norm()


def test_tilings_share_the_penalty():
    """The mean of several is their sum over their number, its diagonal too; of one, it is that one."""
    u, v, prior = _random(20), _random(21), BlockLowRank(2.0, BLOCK)
    parts = [prior.reweighting(u, 0.1, shift) for shift in SHIFTS]
    mean = BlockPrecision.mean(parts)
    torch.testing.assert_close(mean(v), sum(part(v) for part in parts) / len(parts), rtol=0, atol=1e-12)
    expected = sum(part.diagonal(v) for part in parts) / len(parts)
    torch.testing.assert_close(mean.diagonal(v), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(BlockPrecision.mean(parts[:1])(v), parts[0](v), rtol=0, atol=0)
    nested = BlockPrecision.mean([BlockPrecision.mean(parts[:3]), parts[3]])
    torch.testing.assert_close(nested(v), mean(v), rtol=0, atol=1e-12)  # each tiling counts alike


def test_tilings_of_a_round_all_differ():
    """As many as a block has voxels are all there are, in any order; in a slice fewer than that are left."""
    u, v = _random(20, (9, 2, 1, 9)), _random(21, (9, 2, 1, 9))
    prior = BlockLowRank(2.0, (3, 3, 3))
    every = [prior.reweighting(u, 0.1, (x, 0, y)) for x in range(3) for y in range(3)]
    expected = BlockPrecision.mean(every)(v)
    for seed, tilings in ((0, 9), (1, 9), (2, 100)):
        mean = prior.mean_reweighting(u, 0.1, tilings, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(mean(v), expected, rtol=0, atol=1e-12)


def test_the_mean_of_tilings_bounds_the_mean_penalty():
    """Its quadratic touches the mean of the penalties at U and lies above it elsewhere, Hermitian."""
    u, prior, epsilon = _random(22), BlockLowRank(2.0, BLOCK), 1e-5
    mean = BlockPrecision.mean([prior.reweighting(u, epsilon, shift) for shift in SHIFTS])

    def penalty(image):
        return sum(prior.value(image, shift) for shift in SHIFTS) / len(SHIFTS)

    def quadratic(image):
        return 0.5 * float(torch.vdot(image.flatten(), mean(image).flatten()).real)

    assert 2 * quadratic(u) == pytest.approx(penalty(u), rel=1e-4)
    for seed in range(5):
        other = u + 0.3 * _random(30 + seed)
        assert penalty(other) <= penalty(u) + quadratic(other) - quadratic(u) + 1e-3
    one, two = _random(40), _random(41)
    left, right = (
        torch.vdot(one.flatten(), mean(two).flatten()),
        torch.vdot(mean(one).flatten(), two.flatten()),
    )
    assert abs(complex(left - right)) < 1e-9 * abs(complex(left))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="negative"):
        BlockLowRank(-1.0, BLOCK)
    with pytest.raises(ValueError, match="at least one voxel"):
        BlockLowRank(1.0, (4, 0, 4))
    with pytest.raises(ValueError, match="from 0 to 3, not at 4"):
        BlockLowRank(1.0, BLOCK).proximal(_random(0), 1.0, (4, 0, 0))


TENSOR = (6, 5, 4, 3)


def _discarded(tensor, ranks):
    """Sum of squares of the singular values that each unfolding loses."""
    total = 0.0
    for axis, rank in enumerate(ranks):
        if rank is not None:
            values = torch.linalg.svdvals(tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1))
            total += float(values[rank:].square().sum())
    return total


@pytest.mark.parametrize("shape", [TENSOR, (40, 3, 2), (7,), (9, 1, 4)])
def test_full_rank_is_exact_and_factors_are_orthonormal(shape):
    tensor = _random(6, shape)
    core, factors = hosvd(tensor, shape)
    torch.testing.assert_close(compose(core, factors), tensor, rtol=0, atol=1e-11)
    for n, factor in zip(shape, factors, strict=True):
        torch.testing.assert_close(factor.mH @ factor, torch.eye(n, dtype=tensor.dtype), rtol=0, atol=1e-12)


def test_core_is_all_orthogonal_with_the_singular_values():
    """Slices of the core are orthogonal, and their norms the singular values of the unfolding."""
    tensor = _random(7, TENSOR)
    core, _ = hosvd(tensor, TENSOR)
    for axis, n in enumerate(TENSOR):
        slices = core.movedim(axis, 0).reshape(n, -1)
        values = torch.linalg.svdvals(tensor.movedim(axis, 0).reshape(n, -1))
        expected = torch.diag(values.square()).to(tensor.dtype)
        torch.testing.assert_close(slices @ slices.mH, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("ranks", [(3, 2, 2, 1), (6, 2, None, 3), (None, None, None, 1), (1, 1, 1, 1)])
def test_error_stays_within_the_discarded_singular_values(ranks):
    tensor = _random(8, TENSOR)
    truncated = tucker_truncate(tensor, ranks)
    assert truncated.shape == tensor.shape
    error = float((truncated - tensor).abs().square().sum())
    discarded = _discarded(tensor, ranks)
    assert 0 < error <= discarded * (1 + 1e-10)
    cut = sum(rank is not None and rank < n for rank, n in zip(ranks, TENSOR, strict=True))
    assert error >= discarded / cut * (1 - 1e-10)  # no better than the best for one axis
    if cut == 1:
        assert error == pytest.approx(discarded, rel=1e-10)  # one unfolding: Eckart and Young
    for axis, rank in enumerate(ranks):
        if rank is not None:
            unfolded = truncated.movedim(axis, 0).reshape(TENSOR[axis], -1)
            assert torch.linalg.matrix_rank(unfolded, rtol=1e-10) <= rank


@pytest.mark.parametrize(("dtype", "atol"), [(torch.complex128, 1e-11), (torch.complex64, 1e-4)])
def test_low_rank_tensors_stay_as_they_are(dtype, atol):
    core = _random(9, (2, 3, 2), dtype)
    tensor = compose(
        core, [_random(10 + i, (n, r), dtype) for i, (n, r) in enumerate(((50, 2), (6, 3), (4, 2)))]
    )
    torch.testing.assert_close(tucker_truncate(tensor, (2, 3, 2)), tensor, rtol=0, atol=atol)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(tucker_truncate(tensor, (2, 2, 2)), tensor, rtol=0, atol=0.1)


def test_axes_without_rank_form_no_factor():
    core, factors = hosvd(_random(11, (500, 4, 3)), (None, 2, 2))
    assert core.shape == (500, 2, 2)
    assert factors[0] is None


@pytest.mark.parametrize(
    ("ranks", "message"),
    [((2, 2), "as many ranks"), ((2, 2, 0, 2), "axis 2"), ((7, 2, 2, 2), "from 1 to 6, not at 7")],
)
def test_impossible_ranks_are_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        hosvd(_random(12, TENSOR), ranks)
