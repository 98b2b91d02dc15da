"""The Gaussian prior is what its formula says."""

import pytest
import torch

from quantitron.recon.priors.gaussian_field import GaussianField

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
