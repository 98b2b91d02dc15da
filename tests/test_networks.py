"""Stacked perceptrons and fields."""

from __future__ import annotations

import math

import pytest
import torch

from quantitron.recon.networks import mlp as mlp_module
from quantitron.recon.networks.fields import ComplexField, CoordinateNetwork, RealField
from quantitron.recon.networks.hash_layout import HashGridLayout, grid_coordinates
from quantitron.recon.networks.mlp import StackedMLP

LAYOUT = HashGridLayout(levels=4, base_resolution=3, growth=1.7, log2_rows=9)
CPU = torch.device("cpu")
COORDINATES = grid_coordinates((5, 3, 4), (2.0, 4.0, 2.0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def perceptron(networks=3, outputs=2, **settings):
    return StackedMLP(networks, 6, outputs, seeded(), width=8, dtype=torch.float64, **settings)


def layer_by_layer(mlp, inputs):
    """The definition."""
    results = []
    for network in range(mlp.networks):
        state = inputs[min(network, len(inputs) - 1)]
        for layer, weight in enumerate(mlp.weights):
            state = state @ weight[network]
            if len(mlp.biases):
                state = state + mlp.biases[layer][network]
            if layer < len(mlp.weights) - 1:
                state = state.clamp(min=0)
        results.append(state)
    return torch.stack(results)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize("kept", [12, 13])
def test_chunks_are_the_definition(biases, shared, hidden, kept, monkeypatch):
    monkeypatch.setattr(mlp_module, "_CHUNK", 5)
    monkeypatch.setattr(mlp_module, "_KEPT", kept)  # 13 points: hidden layers worked out anew, or kept
    mlp = perceptron(biases=biases, hidden=hidden)
    for bias in mlp.biases:
        bias.data.normal_(generator=seeded(1))
    inputs = torch.randn(1 if shared else 3, 13, 6, generator=seeded(2), dtype=torch.float64)
    inputs.requires_grad_()
    ours, expected = mlp(inputs), layer_by_layer(mlp, inputs)
    assert ours.shape == (3, 13, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mlp.layer_by_layer(inputs), expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(ours.shape, generator=seeded(3), dtype=torch.float64)
    wanted = [inputs, *mlp.parameters()]
    assert len(wanted) == 1 + (hidden + 1) * (1 + biases)
    for slope, reference in zip(
        torch.autograd.grad((ours * direction).sum(), wanted),
        torch.autograd.grad((expected * direction).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(slope, reference, rtol=1e-11, atol=1e-12)


def test_gradient_of_the_perceptron_by_finite_differences():
    mlp = perceptron(networks=2, hidden=2, biases=True)
    inputs = torch.randn(2, 4, 6, generator=seeded(4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mlp(x), (inputs, *mlp.parameters()), atol=1e-7)


def test_inputs_that_need_no_gradient():
    mlp = perceptron()
    mlp(torch.randn(3, 4, 6, dtype=torch.float64, generator=seeded(5))).sum().backward()
    assert all(weight.grad is not None for weight in mlp.weights)


def test_weights_start_as_published_and_repeat():
    mlp, again = (StackedMLP(2, 32, 1, seeded(3)) for _ in range(2))
    assert [tuple(weight.shape) for weight in mlp.weights] == [
        (2, 32, 64),
        (2, 64, 64),
        (2, 64, 64),
        (2, 64, 1),
    ]
    assert len(mlp.biases) == 0
    for weight, same in zip(mlp.weights, again.weights, strict=True):
        bound = math.sqrt(6 / sum(weight.shape[1:]))
        assert torch.equal(weight, same)
        assert 0.9 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("values", [{"networks": 0}, {"outputs": 0}, {"hidden": -1}])
def test_perceptrons_without_shape_are_refused(values):
    with pytest.raises(ValueError, match="no perceptrons"):
        perceptron(**values)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("networks", [1, 2, 6])
def test_outputs_come_in_the_order_of_the_networks(networks, shared):
    network = CoordinateNetwork(LAYOUT, 6, seeded(), CPU, networks=networks, shared_encoder=shared, width=8)
    samples = network.encoding.samples(COORDINATES)
    values = network(samples)
    assert values.shape == (6, 60)
    assert network.encoding.networks == (1 if shared else networks)
    each = network.perceptrons(network.encoding(samples))
    for output in range(6):
        assert torch.equal(values[output], each[output // (6 // networks), :, output % (6 // networks)])


def test_networks_that_cannot_share_outputs_are_refused():
    with pytest.raises(ValueError, match="4 networks cannot share 6 outputs"):
        CoordinateNetwork(LAYOUT, 6, seeded(), CPU, networks=4)


def test_real_fields_start_at_their_constants():
    start = torch.tensor([1.2, 0.08, -0.3])
    positive = torch.tensor([True, True, False])
    field = RealField(CoordinateNetwork(LAYOUT, 3, seeded(), CPU, networks=3), start, positive=positive)
    maps = field(field.samples(COORDINATES))
    assert maps.shape == (3, 60)
    torch.testing.assert_close(maps, start[:, None].expand(3, 60), rtol=1e-3, atol=1e-3)


def test_real_fields_are_what_they_say():
    network = CoordinateNetwork(LAYOUT, 2, seeded(), CPU, networks=2)
    network.encoding.table.data.normal_(generator=seeded(6))
    start, scale = torch.tensor([2.0, 3.0]), torch.tensor([0.5, 40.0])
    field = RealField(network, start, scale, torch.tensor([True, False]))
    samples = field.samples(COORDINATES)
    outputs, maps = network(samples), field(samples)
    torch.testing.assert_close(maps[0], 2 * torch.exp(0.5 * outputs[0]))
    torch.testing.assert_close(maps[1], 3 + 40 * outputs[1])
    assert (maps[0] > 0).all()
    assert maps[1].min() < 0 < maps[1].max()


def test_large_signed_maps_have_finite_slopes():
    """The exponential of a signed map's output overflows, unless it is kept out."""
    network = CoordinateNetwork(LAYOUT, 2, seeded(), CPU, networks=2)
    field = RealField(network, torch.ones(2), torch.tensor([1.0, 1e8]), torch.tensor([True, False]))
    network.encoding.table.data.normal_(generator=seeded(6))
    maps = field(field.samples(COORDINATES))
    assert maps[1].abs().max() > 1e4
    maps.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in field.parameters())


def test_complex_fields_are_what_they_say():
    network = CoordinateNetwork(LAYOUT, 6, seeded(), CPU, networks=2)
    network.encoding.table.data.normal_(generator=seeded(6))
    start = torch.tensor([1 + 2j, 0j, -3j])
    scale = torch.tensor([1.0, 10.0, 0.1])
    field = ComplexField(network, start, scale)
    samples = field.samples(COORDINATES)
    outputs, maps = network(samples), field(samples)
    assert maps.dtype == torch.complex64
    torch.testing.assert_close(maps.real, start.real[:, None] + scale[:, None] * outputs[:3])
    torch.testing.assert_close(maps.imag, start.imag[:, None] + scale[:, None] * outputs[3:])


def test_maps_at_any_points_are_the_field(monkeypatch):
    """In several parts, on a finer grid too; every voxel centre of a grid of thrice the voxels stays one."""
    monkeypatch.setattr("quantitron.recon.networks.fields._POINTS_AT_ONCE", 501)
    network = CoordinateNetwork(LAYOUT, 4, seeded(), CPU, networks=2, coordinates=COORDINATES)
    network.encoding.table.data.normal_(generator=seeded(6))
    field = ComplexField(network, torch.ones(2, dtype=torch.complex64))
    maps = field(field.samples(COORDINATES))
    assert maps.requires_grad
    anywhere = field.at(COORDINATES)
    assert not anywhere.requires_grad
    torch.testing.assert_close(anywhere, maps.detach())
    finer = field.at(grid_coordinates((15, 9, 12), (2 / 3, 4 / 3, 2 / 3))).view(2, 15, 9, 12)
    torch.testing.assert_close(finer[:, 1::3, 1::3, 1::3].flatten(1), maps.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_a_field_learns_an_image(shared):
    """Two maps with an edge each, fitted by Adam from their means."""
    matrix = (10, 4, 10)
    coordinates = grid_coordinates(matrix, (2.0, 5.0, 2.0))
    inside = ((coordinates - 0.5).norm(dim=1) < 0.3).float()
    truth = torch.stack((1.0 + inside, 0.08 - 0.05 * inside))
    layout = HashGridLayout.for_matrix(matrix, levels=8, base_resolution=4, log2_rows=10)
    network = CoordinateNetwork(
        layout, 2, seeded(), CPU, networks=2, shared_encoder=shared, coordinates=coordinates
    )
    field = RealField(network, truth.mean(dim=1))
    samples = field.samples(coordinates)
    optimiser = torch.optim.Adam(field.parameters(), lr=1e-2, eps=1e-15)
    for _ in range(150):
        optimiser.zero_grad()
        loss = ((field(samples) / truth - 1) ** 2).mean()
        loss.backward()
        optimiser.step()
    error = (field(samples).detach() - truth).norm(dim=1) / truth.norm(dim=1)
    assert error.max() < 0.02


def test_gradient_of_a_field_by_finite_differences():
    """Encoding, perceptrons and start values in double precision; both parts of complex maps."""
    network = CoordinateNetwork(LAYOUT, 4, seeded(), CPU, networks=2, width=8)
    field = ComplexField(network, torch.ones(2, dtype=torch.complex64)).double()
    network.encoding.table.data.normal_(generator=seeded(6))
    samples = field.samples(COORDINATES[:10])

    def cost():
        return (field(samples).abs() ** 3).sum()

    slopes = torch.autograd.grad(cost(), list(field.parameters()))
    for parameter, slope in zip(field.parameters(), slopes, strict=True):
        step = torch.randn(parameter.shape, generator=seeded(8), dtype=torch.float64)
        base, ends = parameter.detach().clone(), []
        for sign in (1, -1):
            parameter.data = base + sign * 1e-6 * step
            ends.append(cost().item())
        parameter.data = base
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((slope * step).sum().item(), rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_fields_on_a_gpu_are_those_on_the_cpu():
    slopes, maps = [], []
    for device in (CPU, torch.device("cuda")):
        network = CoordinateNetwork(LAYOUT, 2, seeded(), device, networks=2)
        field = RealField(network, torch.ones(2, device=device))
        values = field(field.samples(COORDINATES.to(device)))
        weights = torch.linspace(-1, 1, values.numel(), device=device).view_as(values)
        slopes.append(torch.autograd.grad((values * weights).sum(), list(network.perceptrons.weights)))
        maps.append(values.detach().cpu())
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-4, atol=1e-7)
    for there, here in zip(slopes[1], slopes[0], strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-6)


def test_equal_seeds_give_equal_fields_whatever_is_stored():
    fields = [
        RealField(CoordinateNetwork(LAYOUT, 2, seeded(9), CPU, networks=2, coordinates=c), torch.ones(2))
        for c in (None, COORDINATES)
    ]
    maps = [field(field.samples(COORDINATES)) for field in fields]
    assert torch.equal(maps[0], maps[1])


def test_fields_that_do_not_match_their_network_are_refused():
    network = CoordinateNetwork(LAYOUT, 2, seeded(), CPU)
    with pytest.raises(ValueError, match="2 outputs do not make 3 maps"):
        RealField(network, torch.ones(3))
    with pytest.raises(ValueError, match="2 outputs do not make 2 complex maps"):
        ComplexField(network, torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="start above 0"):
        RealField(network, torch.tensor([1.0, 0.0]))
