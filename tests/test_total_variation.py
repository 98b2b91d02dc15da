"""Total variation: its operator, its proximal operator, the quadratics that bound it."""

import math

import pytest
import torch
from skimage.restoration import denoise_tv_chambolle

from quantitron.recon.priors.finite_difference import FiniteDifference
from quantitron.recon.priors.total_variation import JointTotalVariation

SHAPE = (7, 3, 4, 6)  # (x, k, z, y)
VOXEL = (1e-3, 4e-3, 2e-3)


def _random(seed, shape=SHAPE, dtype=torch.complex128):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _inner(left, right):
    return torch.vdot(left.flatten(), right.flatten())


@pytest.mark.parametrize("shape", [SHAPE, (5, 2, 1, 6), (1, 1, 1, 2), (1, 3, 1, 1)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.complex128, 1e-12), (torch.complex64, 1e-5)])
def test_difference_and_its_adjoint(shape, dtype, rtol):
    difference = FiniteDifference(VOXEL)
    u, d = _random(0, shape, dtype), _random(1, (3, *shape), dtype)
    left, right = _inner(d, difference(u)), _inner(difference.adjoint(d), u)
    torch.testing.assert_close(left, right, rtol=rtol, atol=rtol)


def test_difference_is_a_slope_per_smallest_edge():
    """A ramp of 1 per millimetre has slope 1 along every axis of the voxel, and 0 at the end."""
    x, z, y = (
        torch.arange(n, dtype=torch.float64) * edge * 1e3 for n, edge in zip((7, 4, 6), VOXEL, strict=True)
    )
    ramp = (x[:, None, None] + z[:, None] + y)[:, None].to(torch.complex128)
    for axis, d in zip((0, 2, 3), FiniteDifference(VOXEL)(ramp), strict=True):
        n = ramp.shape[axis]
        torch.testing.assert_close(d.narrow(axis, 0, n - 1), torch.ones_like(ramp).narrow(axis, 0, n - 1))
        assert not d.narrow(axis, n - 1, 1).any()


@pytest.mark.parametrize("shape", [SHAPE, (5, 1, 1, 6)])
def test_norm_of_difference_is_exact(shape):
    difference = FiniteDifference(VOXEL)
    units = torch.eye(math.prod(shape), dtype=torch.complex128).reshape(-1, *shape)
    matrix = torch.stack([difference(unit).flatten() for unit in units], dim=1)
    norm = torch.linalg.matrix_norm(matrix, 2)
    assert difference.norm(shape) == pytest.approx(float(norm), rel=1e-10)


def test_voxels_without_extent_are_refused():
    with pytest.raises(ValueError, match="voxel edges must be above zero"):
        FiniteDifference((1e-3, 0.0, 1e-3))


@pytest.mark.parametrize("separable", [False, True])
def test_value_is_the_formula(separable):
    u, weights = _random(2), torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    squares = (weights[:, None, None] * FiniteDifference(VOXEL)(u)).abs().square()
    roots = squares.sum(0).sqrt() if separable else squares.sum((0, 2)).sqrt()
    prior = JointTotalVariation(0.7, VOXEL, separable, weights)
    assert prior.value(u) == pytest.approx(0.7 * float(roots.sum()), rel=1e-12)


def test_shared_edges_cost_less_than_edges_apart():
    """What joint total variation is for: the same steps in other places cost more."""
    together, apart = torch.zeros((2, 8, 2, 1, 1), dtype=torch.complex128)
    together[4:] = 1
    apart[4:, 0], apart[2:, 1] = 1, 1
    joint, separable = JointTotalVariation(1.0, VOXEL), JointTotalVariation(1.0, VOXEL, separable=True)
    assert joint.value(together) == pytest.approx(2**0.5)
    assert joint.value(apart) == pytest.approx(2.0)
    assert separable.value(together) == pytest.approx(separable.value(apart))


def _objective(prior, v, u, step):
    return float((0.5 * (v - u).abs().square() / step).sum()) + prior.value(v)


def _priors():
    field = 0.1 + torch.rand((7, 1, 4, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    components = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    yield pytest.param(JointTotalVariation(0.4, VOXEL), 1.5, id="joint")
    yield pytest.param(JointTotalVariation(0.4, VOXEL, separable=True), 1.5, id="separable")
    yield pytest.param(JointTotalVariation(field, VOXEL), 0.7, id="weights in space")
    steps = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)[:, None, None]
    yield pytest.param(JointTotalVariation(0.3, VOXEL, False, components), steps, id="metric")


@pytest.mark.parametrize(("prior", "step"), list(_priors()))
def test_proximal_closes_the_duality_gap(prior, step):
    """Weak duality: no image can have a lower objective than the minimiser's less the gap."""
    u = _random(3)
    image, dual = prior.proximal(u, step, iterations=1000)
    objective = _objective(prior, image, u, step)
    gap = prior.duality_gap(u, step, dual)
    assert gap < 1e-8 * objective
    # The gap is primal less dual objective, the latter by its own formula.
    lower = float((0.5 * (u.abs().square() - image.abs().square()) / step).sum())
    assert objective - lower == pytest.approx(gap, abs=1e-9 * objective)
    assert objective < min(_objective(prior, u, u, step), _objective(prior, u.mean((0, 2, 3), True), u, step))
    for seed in range(20):
        other = image + 10.0 ** -(seed % 5) * _random(100 + seed)
        distance = float((0.5 * (other - image).abs().square() / step).sum())
        assert _objective(prior, other, u, step) >= objective + distance - 1e-7 * objective


@pytest.mark.parametrize("start", [False, True])
def test_gap_bounds_the_distance_to_the_minimiser(start):
    prior, u = JointTotalVariation(0.5, VOXEL), _random(4)
    exact, _ = prior.proximal(u, 1.0, iterations=500)
    for iterations in (1, 5, 25):
        image, dual = prior.proximal(u, 1.0, _random(9, (3, *SHAPE)) if start else None, iterations)
        gap = prior.duality_gap(u, 1.0, dual)
        assert float((image - exact).abs().square().sum()) <= 2 * gap + 1e-9
        # The dual is feasible, else the gap would say nothing.
        assert float(dual.abs().square().sum((0, 2)).sqrt().max()) <= 0.5 * (1 + 1e-12)


def test_tolerance_is_kept_and_ends_the_iterations():
    prior, u = JointTotalVariation(0.5, VOXEL), _random(4)
    image, dual = prior.proximal(u, 1.0, iterations=3000, tolerance=1e-3)
    gap = prior.duality_gap(u, 1.0, dual)
    assert 1e-7 < gap / _objective(prior, image, u, 1.0) <= 1e-3


def test_warm_start_saves_iterations():
    """From the dual of a nearby image and step five iterations do what takes ten from zero."""
    prior, u = JointTotalVariation(0.5, VOXEL), _random(4)
    _, dual = prior.proximal(u, 1.0, iterations=300)
    near = u + 1e-3 * _random(6)
    _, warm = prior.proximal(near, 1.1, dual, iterations=5)
    _, cold = prior.proximal(near, 1.1, iterations=10)
    assert prior.duality_gap(near, 1.1, warm) < prior.duality_gap(near, 1.1, cold)


def test_start_is_left_as_it_was():
    prior, u = JointTotalVariation(0.1, VOXEL), _random(4)
    start = _random(9, (3, *SHAPE))
    kept, before = start.clone(), u.clone()
    prior.proximal(u, 1.0, start, iterations=3)
    assert torch.equal(start, kept)
    assert torch.equal(u, before)


def test_proximal_is_firmly_nonexpansive():
    """||P u - P v||^2 <= Re <P u - P v, u - v>, the mark of a proximal operator."""
    prior = JointTotalVariation(0.6, VOXEL)
    for seed in range(4):
        u, v = _random(seed), _random(seed + 50) * 0.5
        change = prior.proximal(u, 1.0, iterations=400)[0] - prior.proximal(v, 1.0, iterations=400)[0]
        assert float(_inner(change, change).real) <= float(_inner(change, u - v).real) + 1e-8


@pytest.mark.parametrize("weight", [1e3, 0.0])
def test_limits_of_the_weight(weight):
    """A large weight leaves the mean of every component, no weight the image."""
    u = _random(7)
    image, _ = JointTotalVariation(weight, VOXEL).proximal(u, 1.0, iterations=500)
    expected = u if weight == 0 else u.mean((0, 2, 3), keepdim=True).expand_as(u)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


def test_flat_images_are_fixed_points():
    u = torch.full(SHAPE, 2 - 1j, dtype=torch.complex128)
    image, dual = JointTotalVariation(0.3, VOXEL).proximal(u, 1.0)
    assert torch.equal(image, u)
    assert not dual.any()


def test_step_of_one_component_is_the_closed_form():
    """Two voxels: the difference is shrunk by 2 weight step, the mean stays."""
    u = torch.tensor([3.0 + 1j, 1.0 + 1j], dtype=torch.complex128).reshape(2, 1, 1, 1)
    image, _ = JointTotalVariation(0.25, (1.0, 1.0, 1.0)).proximal(u, 2.0, iterations=200)
    torch.testing.assert_close(image.flatten(), torch.tensor([2.5 + 1j, 1.5 + 1j], dtype=torch.complex128))


def test_proximal_against_scikit_image():
    """A real image of one component, isotropic voxels: the model of `denoise_tv_chambolle`."""
    noisy = torch.rand((24, 20), dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    noisy[6:14, 5:12] += 2
    peer = torch.from_numpy(denoise_tv_chambolle(noisy.numpy(), weight=0.4, eps=1e-12, max_num_iter=20000))
    u = noisy.to(torch.complex128)[:, None, None, :]
    image, _ = JointTotalVariation(0.4, (1.0, 1.0, 1.0)).proximal(u, 1.0, iterations=3000)
    torch.testing.assert_close(image[:, 0, 0].real, peer, rtol=0, atol=2e-4)
    # Where they differ, the peer is the one that is not there yet.
    prior = JointTotalVariation(0.4, (1.0, 1.0, 1.0))
    other = peer.to(torch.complex128)[:, None, None, :]
    assert _objective(prior, image, u, 1.0) <= _objective(prior, other, u, 1.0)


def test_proximal_turns_with_the_components():
    """Joint total variation does not care in which orthonormal basis or phase the components are given."""
    turn, _ = torch.linalg.qr(_random(11, (3, 3)))
    prior, u = JointTotalVariation(0.5, VOXEL), _random(12)
    before = torch.einsum("kl,xlzy->xkzy", turn, prior.proximal(u, 1.0, iterations=50)[0])
    after = prior.proximal(torch.einsum("kl,xlzy->xkzy", turn, u), 1.0, iterations=50)[0]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-10)


def test_single_precision_and_order_in_memory():
    prior, u = JointTotalVariation(0.5, VOXEL), _random(13)
    exact, _ = prior.proximal(u, 1.0, iterations=100)
    strided = u.to(torch.complex64).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    image, dual = prior.proximal(strided, 1.0, iterations=100)
    assert image.dtype == dual.dtype == torch.complex64
    torch.testing.assert_close(image.to(exact), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("separable", [False, True])
def test_reweighted_quadratic_touches_and_lies_above(separable):
    epsilon, components = 0.3, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    prior = JointTotalVariation(0.7, VOXEL, separable, components)

    def smoothed(v):
        squares = (components[:, None, None] * FiniteDifference(VOXEL)(v)).abs().square()
        squares = squares.sum(0) if separable else squares.sum((0, 2))
        return 0.7 * float((squares + epsilon**2).sqrt().sum())

    u = _random(14)
    weights = prior.reweighting(u, epsilon)

    def quadratic(v):
        return 0.5 * float(_inner(v, prior.precision(v, weights)).real)

    constant = smoothed(u) - quadratic(u)
    for seed in range(20):
        v = u + 10.0 ** (-(seed % 4)) * _random(200 + seed)
        assert quadratic(v) + constant >= smoothed(v) - 1e-10
    # Touching: the slope of both is the same.
    direction, small = _random(15), 1e-5
    slope = (smoothed(u + small * direction) - smoothed(u - small * direction)) / (2 * small)
    assert float(_inner(direction, prior.precision(u, weights)).real) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("separable", [False, True])
def test_diagonal_of_the_quadratic_is_exact(separable):
    prior = JointTotalVariation(0.7, VOXEL, separable, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    weights = prior.reweighting(_random(16), 0.1)
    units = torch.eye(math.prod(SHAPE), dtype=torch.complex128).reshape(-1, *SHAPE)
    matrix = torch.stack([prior.precision(unit, weights).flatten() for unit in units], dim=1)
    torch.testing.assert_close(matrix, matrix.mH)
    diagonal = prior.diagonal(weights).expand(SHAPE)
    assert not diagonal.is_complex()
    torch.testing.assert_close(diagonal.flatten(), matrix.diagonal().real)


@pytest.mark.parametrize("separable", [False, True])
def test_shrinking_and_projecting_share_out_the_differences(separable):
    """Moreau: d = shrink(d) + projection(d) for a step of 1; shrinking shortens vectors by the weight."""
    field = torch.rand((7, 1, 4, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    field[0, 0, 0, 0] = 0
    prior = JointTotalVariation(field, VOXEL, separable)
    d = _random(17, (3, *SHAPE))
    d[:, 0, :, 0, 0] = 0
    torch.testing.assert_close(prior.shrink(d, 1.0) + prior.project(d), d)
    axes = (0,) if separable else (0, 2)
    length = torch.linalg.vector_norm(d, dim=axes, keepdim=True)
    expected = (length - 2.0 * field).clamp_min(0)
    torch.testing.assert_close(
        torch.linalg.vector_norm(prior.shrink(d, 2.0), dim=axes, keepdim=True), expected
    )


def test_precision_of_settings_leaves_that_of_images():
    """Settings in double do not turn single images into double ones."""
    weight, components = torch.ones((1, 1, 1, 1), dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    prior, u = JointTotalVariation(weight, VOXEL, False, components), _random(18, dtype=torch.complex64)
    image, dual = prior.proximal(u, 1.0, iterations=2, tolerance=1e-3)
    weights = prior.reweighting(u, 0.1)
    assert {image.dtype, dual.dtype, prior.precision(u, weights).dtype} == {torch.complex64}
    assert {weights.dtype, prior.diagonal(weights).dtype} == {torch.float32}


def test_gap_in_single_precision_is_that_in_double():
    """The gap is a small difference of large sums; the tolerance needs it to seven digits of those."""
    prior, u = JointTotalVariation(0.5, VOXEL), _random(19, (64, 4, 8, 64), torch.complex64)
    image, dual = prior.proximal(u, 1.0, iterations=40)
    objective = _objective(prior, image.to(torch.complex128), u.to(torch.complex128), 1.0)
    exact = prior.duality_gap(u.to(torch.complex128), 1.0, dual.to(torch.complex128))
    assert prior.duality_gap(u, 1.0, dual) == pytest.approx(exact, abs=1e-7 * objective)
