"""Weighted nuclear norm: against a plain SVD, its gradient against differences, matching against a search."""

import itertools

import numpy as np
import pytest
import torch

from quantitron.recon.priors import weighted_nuclear_norm as module
from quantitron.recon.priors.block_matching import match_blocks
from quantitron.recon.priors.weighted_nuclear_norm import shrink_stacks, weighted_nuclear_norm

SHAPE = (13, 3, 11)  # (x, z, y)


def _random(seed, shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _similar_maps(seed=0, dtype=torch.float64):
    """Three smooth maps of different scales with a little noise: stacks of nearly equal patches."""
    x, z, y = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in SHAPE), indexing="ij")
    smooth = 2 + torch.sin(0.6 * x) * torch.cos(0.5 * y + z)
    noise = _random(seed, (3, *SHAPE))
    return torch.stack([smooth, 1e-3 * smooth.square(), 500 * smooth.flip(0)]).mul(1 + 0.02 * noise).to(dtype)


def _stacks(image, matches):
    """(stack, voxel, member) of one map."""
    return image.flatten()[matches.voxel.long()].permute(2, 1, 0).numpy()


def _singular(stack, epsilon, floor):
    """Singular values and weights by the formulas, one stack at a time."""
    values = np.linalg.svd(stack, compute_uv=False)
    residual = stack[:, 0] - stack.mean(1)
    below = stack.shape[1] * residual.var()
    weights = 1 / np.sqrt(np.maximum(values**2 - below, 0) + epsilon + floor * (stack**2).sum())
    return values, weights


def _reference(image, matches, epsilon, floor):
    pairs = (_singular(stack, epsilon, floor) for stack in _stacks(image, matches))
    return np.mean([np.sum(weights * values) for values, weights in pairs])


@pytest.mark.parametrize(
    ("patch", "window", "similar", "stride"), [(5, 7, 3, 1), (3, 5, 2, 2), (4, 5, 6, 3), (5, 9, 4, 4)]
)
def test_matching_finds_the_nearest_patches(patch, window, similar, stride):
    image = _random(1)
    matches = match_blocks(image, patch, window, similar, stride)
    grid = [sorted({*range(0, n - patch, stride), n - patch}) for n in (SHAPE[0], SHAPE[2])]
    reach, found = window // 2, iter(matches.voxel.permute(2, 0, 1))
    for x, z, y in itertools.product(grid[0], range(SHAPE[1]), grid[1]):
        candidates = []
        for dx, dy in itertools.product(range(-reach, reach + 1), repeat=2):
            a, b = x + dx, y + dy
            if 0 <= a <= SHAPE[0] - patch and 0 <= b <= SHAPE[2] - patch:
                block, other = image[x : x + patch, z, y : y + patch], image[a : a + patch, z, b : b + patch]
                candidates.append((float((block - other).square().sum()), a, b))
        stack = next(found)
        for (_, a, b), place in zip(sorted(candidates)[:similar], stack, strict=True):
            expected = torch.arange(image.numel()).reshape(SHAPE)[a : a + patch, z, b : b + patch]
            assert torch.equal(place.long(), expected.flatten())
    assert next(found, None) is None
    assert matches.stacks == len(grid[0]) * len(grid[1]) * SHAPE[1]


def test_scatter_is_the_adjoint_of_gather():
    matches = match_blocks(_random(2), stride=2)
    columns, entries = _random(3, (matches.count.numel(), 2)), _random(4, (matches.voxel.numel(), 2))
    left = (matches.gather(columns, slice(None)).reshape(entries.shape) * entries).sum()
    torch.testing.assert_close(left, (columns * matches.scatter(entries)).sum())
    assert int(matches.count.sum()) == matches.voxel.numel()
    assert int(matches.count.min()) > 0  # every voxel of the planes is in some patch


def test_mask_keeps_the_patches_that_touch_it():
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[6, 1, 5] = True
    matches = match_blocks(_random(5), mask=mask)
    assert matches.stacks == 25
    point = int(torch.arange(mask.numel()).reshape(SHAPE)[6, 1, 5])
    assert bool((matches.voxel[0] == point).any(0).all())
    maps = _similar_maps().requires_grad_()
    covered = (matches.count > 0).reshape(SHAPE)
    assert 0 < int(covered.sum()) < covered.numel()
    (gradient,) = torch.autograd.grad(weighted_nuclear_norm(maps, matches, torch.ones(3)), maps)
    assert float(gradient[:, ~covered].abs().max()) == 0
    assert float(gradient[:, covered].abs().min()) > 0
    shrunk = shrink_stacks(maps.detach(), matches, torch.full((3,), 1e-3))
    assert torch.equal(shrunk[:, ~covered], maps.detach()[:, ~covered])
    assert not torch.equal(shrunk[:, covered], maps.detach()[:, covered])


@pytest.mark.parametrize(("epsilon", "floor"), [(1e-16, 0.0), (1e-16, 1e-4), (1e-2, 0.0)])
@pytest.mark.parametrize("similar", [2, 3, 5])
def test_value_is_that_of_the_svd(similar, epsilon, floor):
    maps = _similar_maps()
    matches = match_blocks(maps[0], similar=similar)
    weights = torch.tensor([0.05, 0.2, 2.0], dtype=torch.float64)
    expected = sum(
        float(w) * _reference(m, matches, epsilon, floor) for w, m in zip(weights, maps, strict=True)
    )
    value = weighted_nuclear_norm(maps, matches, weights, epsilon, floor)
    assert float(value) == pytest.approx(expected, rel=1e-7)


def test_single_precision_is_as_good_as_an_svd_of_the_same_numbers():
    maps = _similar_maps(dtype=torch.float32)
    # Small singular values, 1e-6 of the largest, that a Gram matrix of the patches themselves would lose.
    maps = 1 + 2.0**-17 * torch.round(maps / maps.amax((1, 2, 3), keepdim=True) * 30)
    matches = match_blocks(maps[0])
    expected = sum(_reference(m.double(), matches, 1e-16, 0.0) for m in maps)
    value = weighted_nuclear_norm(maps, matches, torch.ones(3), floor=0.0)
    assert float(value) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("similar", [2, 3, 4])
def test_gradient_is_that_of_differences_with_the_weights_held(similar):
    maps = _similar_maps().requires_grad_()
    matches = match_blocks(maps[0].detach(), similar=similar, stride=2)
    outer = torch.tensor([0.05, 0.2, 2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(3 * weighted_nuclear_norm(maps, matches, outer, floor=1e-4), maps)
    frozen = [[_singular(s, 1e-16, 1e-4)[1] for s in _stacks(m, matches)] for m in maps.detach()]

    def value(changed):
        total = 0.0
        for w, m, weights in zip(outer.tolist(), changed, frozen, strict=True):
            spectra = np.linalg.svd(_stacks(m, matches), compute_uv=False)
            total += 3 * w * np.mean([np.sum(a * b) for a, b in zip(weights, spectra, strict=True)])
        return total

    for number, scale in enumerate((1.0, 1e-3, 500.0)):  # each map alone, along two directions
        for seed in (7, 8):
            direction = torch.zeros_like(maps)
            direction[number] = scale * _random(seed)
            step = 1e-6 * direction
            slope = (value(maps.detach() + step) - value(maps.detach() - step)) / 2e-6
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_constant_and_empty_maps_have_a_finite_gradient(dtype, floor):
    maps = torch.stack([torch.full(SHAPE, c, dtype=dtype) for c in (0.0, 1.7, 1e-20, 3e8)]).requires_grad_()
    matches = match_blocks(maps[1].detach())
    value = weighted_nuclear_norm(maps, matches, torch.ones(4), floor=floor)
    (gradient,) = torch.autograd.grad(value, maps)
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[0].abs().max()) == 0
    shrunk = shrink_stacks(maps.detach(), matches, torch.full((4,), 1e-3), floor=floor)
    assert bool(torch.isfinite(shrunk).all())
    torch.testing.assert_close(shrunk[1], maps[1].detach(), rtol=1e-4, atol=0)


def test_equal_singular_values_do_no_harm():
    """Orthogonal patches of equal norm: any vector is singular, the gradient of an eigensolver infinite."""
    image = torch.zeros(6, 1, 6, dtype=torch.float64)
    image[[0, 1, 2, 3, 4, 5], 0, [0, 3, 1, 4, 2, 5]] = 1
    maps = image[None].clone().requires_grad_()
    matches = match_blocks(image, patch=3, similar=3, window=7)
    (gradient,) = torch.autograd.grad(weighted_nuclear_norm(maps, matches, torch.ones(1)), maps)
    assert bool(torch.isfinite(gradient).all())


def test_scale_order_and_company_of_maps_change_nothing():
    maps = _similar_maps()
    matches = match_blocks(maps[0])
    one = [float(weighted_nuclear_norm(m[None], matches, torch.ones(1))) for m in maps]
    scaled = [float(weighted_nuclear_norm(40 * m[None], matches, torch.ones(1))) for m in maps]
    assert scaled == pytest.approx(one, rel=1e-6)
    together = weighted_nuclear_norm(maps[[2, 0, 1]], matches, torch.tensor([1.0, 2.0, 4.0]))
    assert float(together) == pytest.approx(one[2] + 2 * one[0] + 4 * one[1], rel=1e-12)
    flipped = weighted_nuclear_norm(maps[0].flip(0)[None], match_blocks(maps[0].flip(0)), torch.ones(1))
    assert float(flipped) == pytest.approx(one[0], rel=1e-12)


def test_working_set_changes_nothing(monkeypatch):
    maps = _similar_maps().requires_grad_()
    matches = match_blocks(maps[0].detach())
    results = []
    for entries in (1, 5000, 1 << 30):
        monkeypatch.setattr(module, "_ENTRIES", entries)
        value = weighted_nuclear_norm(maps, matches, torch.ones(3))
        results.append((value, *torch.autograd.grad(value, maps)))
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("patch", "similar"), [(5, 3), (2, 6)])
def test_shrinking_is_that_of_the_svd(patch, similar):
    """Also of stacks of more patches than a patch has voxels."""
    maps = _similar_maps()
    matches = match_blocks(maps[0], patch, similar=similar, stride=2)
    strength = torch.tensor([2e-2, 1e-8, 5e3], dtype=torch.float64)
    result = shrink_stacks(maps, matches, strength, floor=1e-5)
    for image, shrunk, power in zip(maps, result, strength.tolist(), strict=True):
        total, count = np.zeros(image.numel()), np.zeros(image.numel())
        for stack, voxel in zip(_stacks(image, matches), matches.voxel.permute(2, 1, 0).numpy(), strict=True):
            left, values, right = np.linalg.svd(stack, full_matrices=False)
            weights = _singular(stack, 1e-16, 1e-5)[1]
            np.add.at(total, voxel, (left * np.maximum(values - power * weights, 0)) @ right)
            np.add.at(count, voxel, 1)
        np.testing.assert_allclose(shrunk.flatten().numpy(), total / count, rtol=1e-7)
    torch.testing.assert_close(shrink_stacks(maps, matches, 0 * strength), maps, rtol=1e-10, atol=0)


def _piecewise_constant():
    x, y = torch.meshgrid(torch.arange(44), torch.arange(40), indexing="ij")
    plane = ((x - 20) ** 2 + (y - 18) ** 2 < 200).float() + 0.5 * ((x - 17) ** 2 + (y - 22) ** 2 < 40)
    return plane[:, None].repeat(1, 2, 1)


@pytest.mark.parametrize(("noise", "bound"), [(0.03, 0.60), (0.1, 0.55)])
def test_shrinking_takes_noise_away(noise, bound):
    truth = _piecewise_constant()
    noisy = truth + noise * _random(9, truth.shape, torch.float32)
    shrunk = shrink_stacks(noisy[None], match_blocks(noisy), torch.tensor([40 * noise**2]))[0]
    assert float((shrunk - truth).norm() / (noisy - truth).norm()) < bound


def test_as_a_penalty_it_takes_noise_away():
    """Adam on distance to the noisy map plus penalty, as a network's training would use it."""
    truth, noise = _piecewise_constant(), 0.1
    noisy = truth + noise * _random(10, truth.shape, torch.float32)
    matches = match_blocks(noisy)
    estimate = noisy[None].clone().requires_grad_()
    optimiser = torch.optim.Adam([estimate], lr=0.015)
    for step in range(40):
        optimiser.param_groups[0]["lr"] = 0.015 * (1 - step / 40)
        optimiser.zero_grad()
        fit = (estimate[0] - noisy).square().sum() / (2 * noise**2)
        (fit + 0.3 * matches.stacks * weighted_nuclear_norm(estimate, matches, torch.ones(1))).backward()
        optimiser.step()
    error = estimate.detach()[0] - truth
    assert float(error.norm() / (noisy - truth).norm()) < 0.4


@pytest.mark.parametrize(
    ("shape", "settings", "sentence"),
    [
        ((4, 2, 20), {}, "planes of 4 x 20 voxels are smaller than a patch of 5 x 5"),
        ((5, 2, 5), {}, "hold 1 patches"),
        (SHAPE, {"window": 6}, "odd window"),
        (SHAPE, {"similar": 1}, "similar >= 2"),
        (SHAPE, {"stride": 0}, "stride >= 1"),
        (SHAPE, {"mask": torch.zeros(SHAPE, dtype=torch.bool)}, "no patch touches the mask"),
    ],
)
def test_impossible_matching_is_refused(shape, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        match_blocks(_random(0, shape), **settings)


def test_maps_that_do_not_fit_are_refused():
    image = _random(0)
    matches = match_blocks(image)
    with pytest.raises(ValueError, match="real and finite"):
        match_blocks(image * float("nan"))
    with pytest.raises(ValueError, match="real maps"):
        weighted_nuclear_norm(image[None, :-1], matches, torch.ones(1))
    with pytest.raises(ValueError, match="as many weights"):
        weighted_nuclear_norm(image[None], matches, torch.ones(2))
