"""The joint network: what it learns, what it leaves out, and that its settings do what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantitron.recon.networks import hash_grid, mlp
from quantitron.recon.solvers.joint_fit import (
    JointFitSettings,
    JointNetwork,
    fit_joint_network,
    grid_layout,
)
from quantitron.recon.solvers.training import TrainingDiverged

N = 48
VOXEL = (1.0, 1.0, 1.0)
QUICK = JointFitSettings(steps=40, features=32, levels=6, log2_rows=13)


def _places() -> tuple[Tensor, Tensor]:
    axis = (torch.arange(N) - N // 2) / (N / 2)
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _mask() -> Tensor:
    """(x, z, y): a disc."""
    x, y = _places()
    return (x.square() + y.square() < 0.85)[:, None]


def _pieces(components: int = 4) -> Tensor:
    """(x, k, z, y): three tissues with edges, one smooth phase, components weaker and weaker."""
    x, y = _places()
    tissue = (x.square() + y.square() < 0.4).long() + ((x - 0.2).abs() + (y + 0.1).abs() < 0.35).long()
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(3, components, generator=generator) * 0.5 ** torch.arange(components)
    values[:, 0] = torch.tensor([1.0, 0.7, 1.3])
    phase = torch.polar(torch.ones(N, N), 0.8 * x - 1.1 * y)
    return (values[tissue].permute(0, 2, 1) * phase[:, None])[:, :, None]


def _smooth() -> Tensor:
    x, y = _places()
    parts = [torch.exp(-2 * (x.square() + y.square())), 0.5 * torch.cos(2 * x + y), 0.3 * x * y]
    return (torch.stack(parts, 1) * torch.polar(torch.ones(N, N), x)[:, None])[:, :, None]


def _noise(like: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed))


def _fit(images: Tensor, settings: JointFitSettings = QUICK, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return fit_joint_network(images, _mask(), VOXEL, settings, generator)


def _error(images: Tensor, truth: Tensor) -> float:
    inside = _mask()[:, None].expand_as(truth)
    return float((images - truth)[inside].norm() / truth[inside].norm())


def test_smooth_images_are_learnt() -> None:
    assert _error(_fit(_smooth(), replace(QUICK, decay_network=1e-5)), _smooth()) < 0.02  # seen: 0.009


@pytest.mark.parametrize("heads", ["exact", "trained"])
def test_incoherent_noise_is_left_out_and_edges_stay(heads: str) -> None:
    truth = _pieces()
    noisy = truth + 0.3 * _noise(truth)
    steps = 20 if heads == "exact" else 60
    found = _fit(noisy, replace(QUICK, heads=heads, steps=steps, decay_network=1e-2))
    assert _error(found, truth) < 0.45 * _error(noisy, truth)
    weak = slice(2, 4)  # components below the noise are where shared features matter
    assert _error(found[:, weak], truth[:, weak]) < 0.3 * _error(noisy[:, weak], truth[:, weak])


def test_same_seed_same_images_other_seed_others() -> None:
    settings = replace(QUICK, steps=5)
    images = _pieces() + 0.1 * _noise(_pieces())
    first = _fit(images, settings)
    assert torch.equal(first, _fit(images, settings))
    assert not torch.equal(first, _fit(images, settings, seed=1))


def test_several_fits_are_averaged() -> None:
    images = _pieces() + 0.1 * _noise(_pieces())
    settings = replace(QUICK, steps=5)
    generator = torch.Generator().manual_seed(0)
    single = [fit_joint_network(images, _mask(), VOXEL, settings, generator) for _ in range(2)]
    both = _fit(images, replace(settings, fits=2))
    assert _error(both, (single[0] + single[1]) / 2) < 1e-5


def test_outside_the_mask_images_stay_as_they_are() -> None:
    images = _pieces() + 0.1 * _noise(_pieces())
    found = _fit(images, replace(QUICK, steps=2))
    outside = ~_mask()[:, None].expand_as(images)
    assert torch.equal(found[outside], images[outside])
    assert not torch.equal(found, images)
    spoilt = torch.where(outside, complex("nan"), images)
    inside = ~outside
    assert torch.equal(_fit(spoilt, replace(QUICK, steps=2))[inside], found[inside])


def test_empty_mask_changes_nothing() -> None:
    images = _pieces()
    nothing = torch.zeros(N, 1, N, dtype=torch.bool)
    assert torch.equal(fit_joint_network(images, nothing, VOXEL, QUICK, torch.Generator()), images)


def test_all_heads_form_the_features() -> None:
    settings = QUICK
    coordinates = torch.rand(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layout = grid_layout((N, N), settings)
    network = JointNetwork(
        layout, 3, settings, torch.Generator().manual_seed(0), torch.device("cpu"), coordinates
    )
    samples = network.encoding.samples(coordinates)
    for column in range(6):
        network.zero_grad()
        (network.features(samples) @ network.heads)[:, column].square().sum().backward()
        assert all(float(weight.grad.norm()) > 0 for weight in network.layers.weights)
        assert all(float(table.grad.norm()) > 0 for table in network.encoding.parameters())


def test_weight_decay_of_encoder_and_network_apart() -> None:
    images = _pieces() + 0.1 * _noise(_pieces())
    inside = _mask()[:, None].expand_as(images)
    base, encoder, network = (
        _fit(images, replace(QUICK, decay_network=network, decay_encoder=encoder))
        for network, encoder in ((1e-4, 0.0), (1e-4, 1e-1), (1e-2, 0.0))
    )
    size = [float((part - images)[inside].norm()) for part in (base, encoder, network)]
    assert size[1] > 1.2 * size[0]
    assert size[2] > 1.2 * size[0]
    assert _error(encoder, network) > 1e-2


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = _pieces() + 0.1 * _noise(_pieces())
    settings = replace(QUICK, steps=3)
    whole = _fit(images, settings)
    monkeypatch.setattr(hash_grid, "_BLOCK", 97)
    monkeypatch.setattr(mlp, "_CHUNK", 211)
    assert _error(_fit(images, settings), whole) < 1e-4


def test_a_slab_has_a_third_coordinate() -> None:
    flat = _smooth()
    slab = torch.cat((flat, 0.5 * flat, flat), dim=2)  # (x, k, z, y)
    mask = _mask().expand(-1, 3, -1)
    found = fit_joint_network(
        slab, mask, VOXEL, replace(QUICK, decay_network=1e-5), torch.Generator().manual_seed(0)
    )
    assert float((found - slab).abs().square().mean()) < 0.05**2 * float(slab.abs().square().mean())


def test_progress_ends_at_one() -> None:
    told: list[float] = []
    fit_joint_network(
        _pieces(), _mask(), VOXEL, replace(QUICK, steps=3, fits=2), torch.Generator(), told.append
    )
    assert told == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])


def test_images_that_are_not_finite_are_refused() -> None:
    images = _pieces()
    images[N // 2, 1, 0, N // 2] = complex("nan")
    with pytest.raises(TrainingDiverged, match="not finite"):
        _fit(images)
