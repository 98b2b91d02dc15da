"""Values of voxels as images, and back."""

from __future__ import annotations

import pytest
import torch

from quantitron.recon.networks.voxel_images import images_of, values_of

SHAPE = (3, 2, 4)
PLACES = torch.tensor([1, 5, 6, 17, 23])


@pytest.mark.parametrize("places", [None, PLACES])
def test_values_lie_where_their_voxels_are(places):
    count = 24 if places is None else len(places)
    values = torch.randn(2, count, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    images = images_of(values, SHAPE, places)
    assert images.shape == (3, 2, 2, 4)
    for number, place in enumerate(range(24) if places is None else places.tolist()):
        x, z, y = place // 8, place // 4 % 2, place % 4
        assert torch.equal(images[x, :, z, y], values[:, number])
    assert torch.equal(values_of(images, places), values)
    assert float(images.abs().sum()) == pytest.approx(float(values.abs().sum()))


def test_values_of_is_the_adjoint_and_the_gradient():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    images = torch.randn(3, 2, 2, 4, dtype=torch.float64, generator=generator)
    product = (images_of(values, SHAPE, PLACES) * images).sum()
    assert float(product.detach()) == pytest.approx(
        float((values * values_of(images, PLACES)).sum().detach())
    )
    (gradient,) = torch.autograd.grad(product, values)
    torch.testing.assert_close(gradient, values_of(images, PLACES))
