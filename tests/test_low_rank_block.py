"""LoREIN's LRR block: where it starts, what its networks see, and that all of it learns."""

from __future__ import annotations

import pytest
import torch

from quantitron.recon.networks.fields import ComplexField, CoordinateNetwork
from quantitron.recon.networks.hash_layout import HashGridLayout, grid_coordinates
from quantitron.recon.networks.low_rank_block import (
    LowRankBlock,
    SharedFeatureAttention,
    SharedFeatureNetwork,
)

RANK, CHANNELS = 3, 6


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _images(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.complex64, generator=_generator(seed))


def _network(seed=0, awake=True):
    """A network whose last layer adds something, too."""
    network = SharedFeatureNetwork(RANK, CHANNELS, _generator(seed))
    if awake:
        with torch.no_grad():
            network.last.weight.copy_(0.1 * torch.randn(network.last.weight.shape, generator=_generator(2)))
    return network


def _block(shape, convolution=True, seed=0):
    coordinates = grid_coordinates(shape)
    layout = HashGridLayout.for_matrix((max(shape),) * 3, 4, log2_rows=8)
    generator = _generator(seed)
    network = CoordinateNetwork(layout, 2 * RANK, generator, torch.device("cpu"), 2, coordinates=coordinates)
    start = torch.tensor([1.0, 0.5j, -0.25])
    return LowRankBlock(
        ComplexField(network, start),
        SharedFeatureNetwork(RANK, CHANNELS, generator) if convolution else None,
        torch.tensor([10.0, 3.0, 0.5]),
    )


@pytest.mark.parametrize("plane", [(4, 6), (5, 7), (1, 8), (8, 1), (1, 1), (3, 2)])
def test_planes_of_any_size_keep_it(plane):
    images = _images(2, RANK, *plane)
    refined = _network()(images)
    assert refined.shape == images.shape
    assert bool(refined.isfinite().all())
    assert not torch.equal(refined, images)


@pytest.mark.parametrize("plane", [(4, 6), (5, 7), (1, 9)])
def test_it_starts_as_the_coordinate_network_alone(plane):
    images = _images(2, RANK, *plane)
    assert torch.equal(_network(awake=False)(images), images)
    shape = (3, *plane)
    coordinates = grid_coordinates(shape)
    with_it, without = (_block(shape, convolution) for convolution in (True, False))
    u = with_it(with_it.field.samples(coordinates), shape)
    assert u.shape == (3, RANK, *plane)
    assert torch.equal(u, without(without.field.samples(coordinates), shape))
    # Features start near zero: the constants, in the size of each coefficient.
    expected = torch.tensor([10.0, 1.5j, -0.125])[:, None, None].expand_as(u)
    torch.testing.assert_close(u.detach(), expected, rtol=0, atol=1e-2)


def test_readout_positions_are_independent():
    network, images = _network(), _images(4, RANK, 5, 6)
    whole = network(images)
    parts = torch.cat([network(images[:1]), network(images[1:])])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)

    shape = (4, 3, 5)
    block, coordinates = _block(shape), grid_coordinates(shape)
    with torch.no_grad():
        block.refinement.last.weight.fill_(0.05)
    whole = block(block.field.samples(coordinates), shape)
    part = block(block.field.samples(coordinates[15:45]), (2, 3, 5))
    torch.testing.assert_close(part, whole[1:3], rtol=1e-5, atol=1e-5)


def test_the_generator_decides_alone():
    state = [_block((2, 4, 4), seed=seed).state_dict() for seed in (3, 3, 4)]
    torch.rand(5)  # the global source of chance has no part in it
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    assert any(not torch.equal(state[0][name], state[2][name]) for name in state[0])
    for name, value in state[0].items():
        if name.endswith("bias") or name == "refinement.last.weight":
            assert not value.any(), name


def test_features_keep_their_size_from_layer_to_layer():
    """Weights are drawn for the number of values that each output sees: no layer drowns or explodes."""
    network = SharedFeatureNetwork(8, 32, _generator())
    for layer, channels in ((network.first, 16), (network.down, 32), (network.up, 64)):
        values = layer(torch.randn(4, channels, 16, 16, generator=_generator(1)))
        assert 0.9 < float(values[..., 2:-2, 2:-2].detach().std()) < 1.1


def test_attention_weighs_places_and_features():
    attention = SharedFeatureAttention(CHANNELS)
    features = torch.randn(2, CHANNELS, 4, 5, generator=_generator())
    gain = attention(features) / features
    assert 1 < float(gain.detach().min()) < float(gain.detach().max()) < 2
    # One weight for each place, shared by all features, times one for each feature.
    factors = gain[0].double() - 1  # (c, z, y)
    torch.testing.assert_close(
        factors * factors[0, 0, 0], factors[:, :1, :1] * factors[:1], rtol=1e-3, atol=1e-5
    )


def test_attention_is_differentiable():
    attention = SharedFeatureAttention(3).double()
    features = torch.randn(2, 3, 3, 4, dtype=torch.float64, generator=_generator(), requires_grad=True)
    assert torch.autograd.gradcheck(attention, (features,))
    gradients = torch.autograd.grad(attention(features).square().sum(), attention.parameters())
    assert all(bool(gradient.any()) for gradient in gradients)


def test_all_parameters_learn():
    """Two steps: in the first only the last layer of the refinement moves, for it starts at zero."""
    shape = (2, 5, 6)
    block, coordinates = _block(shape), grid_coordinates(shape)
    samples, target = block.field.samples(coordinates), _images(2, RANK, 5, 6)
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        residual = block(samples, shape) / block.scale - target
        loss = torch.view_as_real(residual).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # What is behind a rectifier that is never open learns nothing; of a layer some part always does.
    assert all(bool(parameter.grad.any()) for parameter in block.parameters())
    assert losses[-1] < 0.3 * losses[0]
