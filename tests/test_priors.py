"""The Gaussian prior is what its formula says."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from quantitron.recon.priors.gaussian_field import GaussianField
from quantitron.recon.priors.neighbourhood import neighbourhood_mean, neighbourhood_voxels

SHAPE = (6, 2, 4, 5)  # (x, k, z, y)
VOXEL = (1e-3, 3e-3, 2e-3)


def _random(seed):
    return torch.randn(SHAPE, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def _expected():
    return 0.1 + torch.rand(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("length", [0.0, 5e-3])
def test_precision_is_self_adjoint_and_positive(length):
    prior = GaussianField(_expected(), VOXEL, length)
    u, v = _random(0), _random(1)
    left = torch.vdot(v.flatten(), prior.precision(u).flatten())
    right = torch.vdot(prior.precision(v).flatten(), u.flatten())
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)
    assert torch.vdot(u.flatten(), prior.precision(u).flatten()).real > 0


@pytest.mark.parametrize("length", [0.0, 5e-3])
def test_diagonal_is_the_response_of_single_voxels(length):
    prior = GaussianField(_expected(), VOXEL, length)
    for place in ((0, 0, 0, 0), (3, 1, 2, 4)):
        point = torch.zeros(SHAPE, dtype=torch.complex128)
        point[place] = 1
        torch.testing.assert_close(
            prior.precision(point)[place].real, prior.diagonal()[place], rtol=1e-6, atol=1e-9
        )


def test_without_correlation_it_is_the_inverse_of_the_expected_mean_square():
    expected, u = _expected(), _random(0)
    torch.testing.assert_close(GaussianField(expected, VOXEL, 0.0).precision(u), u / expected)


def test_smooth_images_cost_less_than_rough_ones():
    prior = GaussianField(torch.ones(SHAPE, dtype=torch.float64), VOXEL, 5e-3)
    smooth = torch.ones(SHAPE, dtype=torch.complex128)
    rough = smooth.clone()
    rough[::2] = -1
    cost = [torch.vdot(u.flatten(), prior.precision(u).flatten()).real for u in (smooth, rough)]
    assert cost[0] < 0.1 * cost[1]


# ------------------------------------------------------------------------ what is learnt around each voxel


def test_neighbourhood_mean_is_a_gaussian_filter():
    images = _expected()
    expected = ndimage.gaussian_filter(images.numpy(), (1.3, 0, 0.7, 0), mode="nearest", truncate=4.0)
    found = neighbourhood_mean(images, (1.3, 0.7, 0.0))
    torch.testing.assert_close(found, torch.from_numpy(np.asarray(expected)), rtol=1e-6, atol=1e-6)


def test_neighbourhood_counts_independent_voxels():
    """A mean of white noise has the variance of one voxel over the number of voxels."""
    noise = torch.randn(40, 1, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    widths = (1.0, 1.5, 0.0)
    mean = neighbourhood_mean(noise, widths)[8:-8, :, 8:-8]
    assert 1 / float(mean.square().mean()) == pytest.approx(neighbourhood_voxels(widths), rel=0.1)
    assert neighbourhood_voxels((0.0, 0.1, 0.0)) == 1


def test_variances_are_learnt_where_they_are():
    """Half of the object ten times as strong: each half gets its own variance, the border lies between."""
    shape = (40, 2, 12, 12)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(shape, dtype=torch.complex128, generator=generator)
    u[:20] *= 10
    field = GaussianField(torch.ones(shape, dtype=torch.float64), (1e-3, 1e-3, 1e-3), 0.0)
    learnt = field.learnt_around(u, 1.0, voxels=1e-6)
    variance = 1 / learnt.diagonal()
    assert float(variance[:14].mean()) == pytest.approx(100, rel=0.1)
    assert float(variance[26:].mean()) == pytest.approx(1, rel=0.1)
    assert 20 < float(variance[19:21].mean()) < 80
    # Counted for ever more voxels, what was expected before decides.
    kept = field.learnt_around(u, 1.0, voxels=1e9).diagonal()
    torch.testing.assert_close(kept, field.diagonal(), rtol=1e-5, atol=0)


def test_neighbourhoods_are_round_in_space_and_end_in_one_slice():
    """A width of one voxel of 1 mm is a third of one of 3 mm; an axis of one voxel has no neighbours."""
    expected = torch.full((9, 1, 9, 1), 1e-3, dtype=torch.float64)
    point = torch.zeros(9, 1, 9, 1, dtype=torch.complex128)
    point[4, 0, 4, 0] = 1
    learnt = GaussianField(expected, (1e-3, 3e-3, 1e-3), 0.0).learnt_around(point, 1.0, voxels=1e-9)
    spread = 1 / learnt.diagonal()[:, 0, :, 0]
    assert spread[5, 4] == pytest.approx(float(spread[4, 4]) * np.exp(-0.5), rel=1e-3)
    assert spread[4, 5] == pytest.approx(float(spread[4, 4]) * np.exp(-4.5), rel=1e-3)
