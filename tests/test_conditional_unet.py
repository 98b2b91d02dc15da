"""The U-Net: slices and slabs by the same weights, conditions, what it refuses."""

import pytest
import torch

from quantitron.recon.networks.conditional_unet import ConditionalUNet, UNetShape
from quantitron.recon.networks.precision import autocast, fastest_dtype

SMALL = UNetShape(channels=(8, 12, 16), blocks=1, modalities=3, embedding=16)


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _network(shape=SMALL, seed=0):
    """With weights other than zero everywhere, as after training."""
    generator = torch.Generator().manual_seed(seed)
    network = ConditionalUNet(shape, generator)
    with torch.no_grad():
        for weights in network.parameters():
            if not weights.any():
                weights.normal_(0, 0.05, generator=generator)
    return network


def _conditions(count, level=0.1, modality=1):
    return torch.full((count,), level), torch.full((count,), modality)


@pytest.mark.parametrize("grid", [(1, 8, 12), (4, 8, 4), (8, 4, 20)])
@pytest.mark.parametrize("channels", [(1, 1), (6, 4)])
def test_any_size_and_number_of_channels(grid, channels):
    network = _network(UNetShape(*channels, channels=(8, 12, 16), blocks=1, noise=False))
    out = network(_random(2, channels[0], *grid))
    assert out.shape == (2, channels[1], *grid)
    assert out.isfinite().all()


@pytest.mark.parametrize("grid", [(1, 8, 10), (2, 8, 8), (6, 8, 8)])
def test_sizes_between_are_refused(grid):
    with pytest.raises(ValueError, match="each axis must be a multiple of 4"):
        _network()(_random(1, 1, *grid), *_conditions(1))


def test_a_slice_meets_the_middle_planes_only():
    """With all other planes zero, a slab of equal slices is denoised slice by slice."""
    network = _network()
    picture = _random(2, 1, 1, 16, 12)
    conditions = _conditions(2)
    single = network(picture, *conditions)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv3d) and module.kernel_size == (3, 3, 3):
                module.weight[:, :, [0, 2]] = 0
    torch.testing.assert_close(network(picture, *conditions), single)
    slab = network(picture.expand(-1, -1, 8, -1, -1), *conditions)
    torch.testing.assert_close(slab, single.expand_as(slab), rtol=1e-4, atol=1e-5)


def test_slices_of_a_slab_know_of_one_another():
    network = _network()
    slab = _random(1, 1, 4, 8, 8)
    changed = slab.clone()
    changed[:, :, 0] += 1
    difference = network(changed, *_conditions(1)) - network(slab, *_conditions(1))
    assert difference[:, :, 2].abs().max() > 1e-3 * difference.abs().max()


def test_every_weight_gets_a_gradient():
    network = _network(
        UNetShape(channels=(8, 16), blocks=2, modalities=2, embedding=16, attention=(1,), heads=2)
    )
    target = _random(2, 1, 4, 8, 8, seed=1)
    out = network(_random(2, 1, 4, 8, 8), torch.tensor([0.1, 0.3]), torch.tensor([0, 1]))
    (out - target).square().mean().backward()
    for name, weights in network.named_parameters():
        assert weights.grad is not None, name
        assert weights.grad.isfinite().all(), name
        assert weights.grad.any(), name


def test_a_new_network_predicts_nothing():
    network = ConditionalUNet(SMALL, torch.Generator().manual_seed(0))
    assert not network(_random(1, 1, 4, 8, 8), *_conditions(1)).any()


def test_the_same_generator_makes_the_same_network():
    first, second, other = (_network(seed=seed) for seed in (3, 3, 4))
    x = _random(1, 1, 4, 8, 8)
    assert torch.equal(first(x, *_conditions(1)), second(x, *_conditions(1)))
    assert not torch.equal(first(x, *_conditions(1)), other(x, *_conditions(1)))


def test_conditions_count_and_belong_to_their_volume():
    network = _network()
    x = _random(1, 1, 1, 8, 8).expand(3, -1, -1, -1, -1)
    out = network(x, torch.tensor([0.1, 0.1, 0.4]), torch.tensor([0, 2, 0]))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (out[one] - out[other]).abs().max() > 1e-3
    alone = network(x[:1], torch.tensor([0.4]), torch.tensor([0]))
    torch.testing.assert_close(alone[0], out[2], rtol=1e-4, atol=1e-6)


def test_missing_conditions_are_refused():
    network = _network()
    with pytest.raises(ValueError, match="conditioned on the noise level"):
        network(_random(1, 1, 1, 8, 8), None, torch.tensor([0]))
    with pytest.raises(ValueError, match="conditioned on the modality"):
        network(_random(1, 1, 1, 8, 8), torch.tensor([0.1]), None)


@pytest.mark.parametrize("attention", [(), (0,)])
def test_attention_sees_all_voxels(attention):
    """Convolutions see their surroundings: one level and one block reach 4 voxels."""
    shape = UNetShape(channels=(8,), blocks=1, noise=False, attention=attention, heads=2)
    network = _network(shape)
    picture = _random(1, 1, 1, 4, 32)
    changed = picture.clone()
    changed[..., 0] += 5
    far = (network(changed) - network(picture))[..., 16:]
    assert bool(far.abs().max() > 1e-6) == bool(attention)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"channels": ()}, "positive numbers of channels"),
        ({"blocks": 0}, "positive numbers of channels"),
        ({"embedding": 15}, "must be even"),
        ({"attention": (3,)}, "the levels are 0..2"),
        ({"attention": (0,), "heads": 5}, "cannot be shared out to 5 heads"),
    ],
)
def test_layers_that_cannot_be_built_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        UNetShape(**wrong)


def test_half_precision_is_near_enough():
    network = _network()
    x, conditions = _random(1, 1, 4, 16, 16), _conditions(1)
    exact = network(x, *conditions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(x, *conditions).float()
    assert (half - exact).norm() < 0.03 * exact.norm()


def test_precision_can_be_forced():
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    cpu = torch.device("cpu")
    with autocast(cpu, "float32"):
        assert layer(x).dtype == torch.float32
    with autocast(cpu):
        assert layer(x).dtype == fastest_dtype(cpu)
    with pytest.raises(ValueError, match="none of auto, float32"):
        autocast(cpu, "float64")
