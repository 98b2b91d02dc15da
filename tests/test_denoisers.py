"""Denoisers: limits, scale, what they gain, what they refuse; patches; stacks of blocks."""

import math

import pytest
import torch
from skimage.restoration import denoise_nl_means

from quantitron.recon.networks.conditional_unet import ConditionalUNet, UNetShape
from quantitron.recon.networks.trained_network import NetworkDescription, TrainedNetwork
from quantitron.recon.priors.block_matching_denoiser import BlockMatchingDenoiser
from quantitron.recon.priors.block_stacks import BlockGrid
from quantitron.recon.priors.denoiser import intensity
from quantitron.recon.priors.network_denoiser import (
    INPUT_SCALE,
    NetworkDenoiser,
    PatchwiseNetwork,
    nearest_level,
)
from quantitron.recon.priors.patchwise import Tiling, patchwise
from quantitron.recon.priors.variation_denoiser import VariationDenoiser, best_strength

CLASSICAL = [VariationDenoiser(), BlockMatchingDenoiser()]
MODALITIES = ("T1w", "T2w", "PDw")
LEVELS = (0.01, 0.03, 0.1, 0.3)
GRIDS = [(1, 20, 17), (2, 9, 16), (7, 12, 13)]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _random(*shape, seed=0):
    return torch.rand(shape, generator=_generator(seed))


def phantom(grid):
    """(z, y, x): a head of nested ellipsoids with folds, of values 0 to 1."""
    z, y, x = torch.meshgrid(
        *(torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in grid), indexing="ij"
    )
    radius = (0.6 * z**2 + y**2 + (1.2 * x) ** 2).sqrt()
    folds = 0.06 * torch.sin(9 * torch.atan2(y, x) + 3 * z)
    image = torch.zeros(grid)
    image[radius < 0.95] = 0.15
    image[radius < 0.85] = 0.4
    image[radius + folds < 0.68] = 0.7
    image[radius + folds < 0.45] = 1.0
    image[((x - 0.1) ** 2 * 4 + y**2 + z**2) < 0.03] = 0.25
    return image


def psnr(image, truth):
    return -10 * math.log10(float((image - truth).square().mean()))


def trained(kind="contrast_denoiser", zero=False, seed=0, **shape):
    """A network that was not trained, but has weights and a description."""
    modalities = MODALITIES if kind == "contrast_denoiser" else ()
    layers = UNetShape(
        channels=(6, 8),
        blocks=1,
        modalities=len(modalities),
        noise=kind != "artifact_removal",
        embedding=8,
        **shape,
    )
    network = ConditionalUNet(layers, _generator(seed))
    if not zero:
        with torch.no_grad():
            for weights in network.parameters():
                if not weights.any():
                    weights.normal_(0, 0.1, generator=_generator(seed + 1))
    levels = LEVELS if layers.noise else ()
    description = NetworkDescription(kind, layers, modalities, levels, (8, 8, 8), (1, 8, 8))
    return TrainedNetwork(description, network)


# What all denoisers have in common


@pytest.mark.parametrize("denoiser", CLASSICAL)
@pytest.mark.parametrize("grid", GRIDS)
def test_without_noise_images_stay(denoiser, grid):
    images = _random(2, *grid)
    assert torch.equal(denoiser(images, 0.0, MODALITIES[:2], _generator()), images)
    torch.testing.assert_close(
        denoiser(images, 1e-6, MODALITIES[:2], _generator()), images, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("denoiser", CLASSICAL)
@pytest.mark.parametrize("grid", [*GRIDS, (1, 5, 3)])
def test_constants_stay(denoiser, grid):
    images = torch.full((1, *grid), 37.0)
    torch.testing.assert_close(denoiser(images, 0.1, MODALITIES[:1], _generator()), images, rtol=1e-3, atol=0)
    nothing = torch.zeros(1, *grid)
    assert torch.equal(denoiser(nothing, 0.1, MODALITIES[:1], _generator()), nothing)


@pytest.mark.parametrize("denoiser", [*CLASSICAL, NetworkDenoiser(trained(), precision="float32")])
@pytest.mark.parametrize("grid", GRIDS)
def test_results_scale_with_the_images_and_images_are_apart(denoiser, grid):
    """Each image in a unit of its own."""
    images = _random(3, *grid)
    factors = torch.tensor([1e-3, 1.0, 4096.0])[:, None, None, None]
    denoised = denoiser(images, 0.1, MODALITIES, _generator())
    scaled = denoiser(images * factors, 0.1, MODALITIES, _generator())
    assert denoised.shape == images.shape
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(scaled / factors, denoised, rtol=1e-4, atol=5e-4)
    alone = denoiser(images[1:2], 0.1, MODALITIES[1:2], _generator())
    torch.testing.assert_close(alone[0], denoised[1], rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("denoiser", [*CLASSICAL, NetworkDenoiser(trained(), (8, 8, 8))])
def test_the_same_seed_gives_the_same_bits(denoiser):
    images = _random(2, 7, 20, 18)
    runs = [denoiser(images, 0.1, MODALITIES[:2], _generator(5)) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("denoiser", [*CLASSICAL, NetworkDenoiser(trained())])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_refused(denoiser, wrong):
    images = _random(1, 1, 16, 16)
    images[0, 0, 3, 3] = wrong
    with pytest.raises(ValueError, match="values that are not finite"):
        denoiser(images, 0.1, ("T1w",), _generator())


@pytest.mark.parametrize("denoiser", [*CLASSICAL, NetworkDenoiser(trained())])
def test_levels_below_zero_are_refused(denoiser):
    with pytest.raises(ValueError, match="noise level must be"):
        denoiser(_random(1, 1, 16, 16), -0.1, ("T1w",), _generator())


@pytest.mark.parametrize(
    ("denoiser", "grid", "level", "gain"),
    [
        (VariationDenoiser(), (1, 64, 64), 0.05, 5.5),
        (VariationDenoiser(), (1, 64, 64), 0.2, 9.0),
        (VariationDenoiser(), (16, 40, 40), 0.1, 7.0),
        (BlockMatchingDenoiser(), (1, 64, 64), 0.05, 6.0),
        (BlockMatchingDenoiser(), (1, 64, 64), 0.2, 9.0),
        (BlockMatchingDenoiser(), (16, 40, 40), 0.1, 7.0),
    ],
)
def test_denoising_gains(denoiser, grid, level, gain):
    truth = phantom(grid)
    noisy = truth + level * torch.randn(grid, generator=_generator())
    relative = level / float(intensity(noisy[None]))
    denoised = denoiser(noisy[None], relative, ("T1w",), _generator())[0]
    assert psnr(denoised, truth) > psnr(noisy, truth) + gain


# Total variation


def test_total_variation_is_weighed_by_the_noise():
    """Twice the level smooths more; a strength of one's own is taken as it is."""
    images = phantom((1, 32, 32))[None] + 0.1 * torch.randn(1, 1, 32, 32, generator=_generator())

    def variation(denoiser, level):
        return float(denoiser(images, level, ("T1w",), _generator()).diff().abs().sum())

    assert variation(VariationDenoiser(), 0.2) < 0.9 * variation(VariationDenoiser(), 0.1)
    same = VariationDenoiser(strength=best_strength(0.1, flat=True))
    assert variation(same, 0.1) == variation(VariationDenoiser(), 0.1)


def test_thick_slices_share_less():
    images = _random(1, 4, 12, 12)
    thin = VariationDenoiser()(images, 0.2, ("T1w",), _generator())
    thick = VariationDenoiser(voxel_size=(50.0, 1.0, 1.0))(images, 0.2, ("T1w",), _generator())
    assert thick.diff(dim=1).abs().mean() > 1.5 * thin.diff(dim=1).abs().mean()


# Block matching


def test_matches_are_the_nearest_blocks():
    volume = _random(5, 7, 6).double()
    grid = BlockGrid((5, 7, 6), (2, 3, 2), (3, 2, 2), (1, 2, 2))
    assert grid.references == (2, 3, 3)
    found = grid.match(volume, 4)
    within = grid.voxels(volume.device)
    flat = volume.flatten()
    number = 0
    for z in (0, 3):
        for y in (0, 2, 4):
            for x in (0, 2, 4):
                here = volume[z : z + 2, y : y + 3, x : x + 2]
                assert torch.equal(flat[found[number, 0] + within], here.flatten())
                distances = sorted(
                    float((volume[a : a + 2, b : b + 3, c : c + 2] - here).square().sum())
                    for a in range(max(0, z - 1), min(3, z + 1) + 1)
                    for b in range(max(0, y - 2), min(4, y + 2) + 1)
                    for c in range(max(0, x - 2), min(4, x + 2) + 1)
                )
                stack = flat[found[number][:, None] + within]
                mine = (stack - here.flatten()).square().sum(1)
                torch.testing.assert_close(mine, torch.tensor(distances[:4], dtype=torch.double))
                number += 1
    assert number == len(found)


def test_matches_do_not_depend_on_portions(monkeypatch):
    volume = _random(13, 10, 10)
    grid = BlockGrid((13, 10, 10), (4, 4, 4), (3, 3, 3), (2, 2, 2))
    at_once = grid.match(volume, 8)
    monkeypatch.setattr("quantitron.recon.priors.block_stacks._DISTANCES", 1)
    assert torch.equal(grid.match(volume, 8), at_once)


def test_stacks_do_not_depend_on_portions(monkeypatch):
    images = _random(1, 8, 12, 12)
    at_once = BlockMatchingDenoiser()(images, 0.1, ("T1w",), _generator())
    monkeypatch.setattr("quantitron.recon.priors.block_matching_denoiser._ENTRIES", 1 << 14)
    in_portions = BlockMatchingDenoiser()(images, 0.1, ("T1w",), _generator())
    torch.testing.assert_close(in_portions, at_once)


@pytest.mark.parametrize("level", [0.05, 0.15])
def test_block_matching_is_at_least_as_good_as_nonlocal_means(level):
    truth = phantom((1, 64, 64))
    noisy = truth + level * torch.randn(truth.shape, generator=_generator())
    other = denoise_nl_means(noisy[0].numpy(), 5, 8, h=0.8 * level, sigma=level, fast_mode=False)
    relative = level / float(intensity(noisy[None]))
    mine = BlockMatchingDenoiser()(noisy[None], relative, ("T1w",), _generator())[0]
    assert psnr(mine, truth) > psnr(torch.from_numpy(other)[None], truth)


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"stride": 5}, {"reach": 0}, {"members": (12, 32)}])
def test_settings_of_block_matching_that_are_none(wrong):
    with pytest.raises(ValueError, match=r"block matching needs|power of two"):
        BlockMatchingDenoiser(**wrong)


# Patches


@pytest.mark.parametrize("grid", [(1, 30, 19), (5, 17, 24), (9, 8, 8)])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("batch_voxels", [1, 1 << 20])
def test_patches_are_put_together_again(grid, overlap, batch_voxels):
    volumes = _random(2, 3, *grid)
    tiling = Tiling.of(grid, (4, 8, 8), 4, overlap)
    seen = []

    def double(patches, number):
        seen.append(patches.shape[2:])
        return 2 * patches[:, :2] + number[:, None, None, None, None]

    shift = (0, 0, 0) if overlap else (0, 3, 5)
    out = patchwise(double, volumes, tiling, shift, batch_voxels)
    expected = 2 * volumes[:, :2] + torch.arange(2)[:, None, None, None, None]
    torch.testing.assert_close(out, expected)
    for length, size in zip(seen[0], grid, strict=True):
        assert length % 4 == 0 or length == size == 1
        assert length <= 8
    assert len(set(seen)) == 1


def test_patches_are_equal_and_pad_little():
    tiling = Tiling.of((1, 220, 70), (32, 64, 64), 4)
    assert tiling.length == (1, 56, 36)
    assert tiling.padded == (1, 224, 72)
    assert tiling.shiftable == (False, True, True)


def test_overlapping_patches_hide_their_seams():
    """Patches that each have a level of their own: side by side they make steps, overlapping they do not."""

    def own_level(patches, _):
        return patches + torch.arange(len(patches))[:, None, None, None, None]

    volumes = torch.zeros(1, 1, 1, 1, 64)
    step = {}
    for overlap in (False, True):
        out = patchwise(own_level, volumes, Tiling.of((1, 1, 64), (1, 1, 16), 4, overlap))
        step[overlap] = float(out.diff(dim=-1).abs().max())
    assert step[False] == 1
    assert step[True] < 0.2


# Networks


def test_a_network_that_predicts_nothing_changes_nothing():
    images = _random(3, 6, 16, 12)
    denoised = NetworkDenoiser(trained(zero=True))(images, 0.1, MODALITIES, _generator())
    torch.testing.assert_close(denoised, images, rtol=1e-6, atol=1e-7)


def test_the_network_gets_what_it_was_trained_on():
    """One patch: D(x) = x - sigma net(x / sqrt(sigma^2 + s^2), sigma, modality), x of unit intensity."""
    network = trained()
    images = 50 * _random(2, 4, 16, 12)
    denoised = NetworkDenoiser(network, precision="float32")(images, 0.09, ("PDw", "T1w"), _generator())
    scale = intensity(images)[:, None, None, None]
    x = (images / scale)[:, None]
    with torch.no_grad():
        noise = network.network(
            x / math.sqrt(0.1**2 + INPUT_SCALE**2), torch.tensor([0.1, 0.1]), torch.tensor([2, 0])
        )
    torch.testing.assert_close(denoised, (x - 0.1 * noise)[:, 0] * scale, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_batches_of_patches_change_nothing_but_rounding(monkeypatch, precision):
    images = _random(2, 5, 30, 19)
    denoised = []
    for voxels in (1, 1 << 20):
        monkeypatch.setattr("quantitron.recon.priors.network_denoiser._BATCH_VOXELS", voxels)
        denoiser = NetworkDenoiser(trained(), (8, 8, 8), precision=precision)
        denoised.append(denoiser(images, 0.1, MODALITIES[:2], _generator()))
    one, many = denoised
    share = (one - many).norm() / (many - images).norm()
    assert share < (0.01 if precision == "auto" else 1e-5)


def test_patches_move_at_random():
    images = _random(1, 1, 40, 40)
    denoiser = NetworkDenoiser(trained(), (1, 8, 8))
    first, second = (denoiser(images, 0.3, ("T1w",), _generator(seed)) for seed in (1, 2))
    assert (first - second).abs().max() > 1e-4
    whole = NetworkDenoiser(trained())
    assert torch.equal(*(whole(images, 0.3, ("T1w",), _generator(seed)) for seed in (1, 2)))


def test_chance_is_spent_alike_whatever_the_size():
    """So that what comes after does not depend on how the volume was cut up."""
    after = []
    for patch in ((1, 8, 8), None):
        generator = _generator()
        NetworkDenoiser(trained(), patch)(_random(1, 1, 40, 40), 0.3, ("T1w",), generator)
        after.append(torch.rand(1, generator=generator))
    assert torch.equal(*after)


def test_precisions_agree():
    images = _random(1, 4, 16, 16)
    half, full = (
        NetworkDenoiser(trained(), precision=precision)(images, 0.1, ("T1w",), _generator())
        for precision in ("auto", "float32")
    )
    assert (half - full).norm() < 0.03 * (full - images).norm()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_network_that_fails_is_refused(wrong):
    network = trained()
    with torch.no_grad():
        network.network.exit.bias.fill_(wrong)
    with pytest.raises(ValueError, match="'contrast_denoiser' returned values that are not finite"):
        NetworkDenoiser(network)(_random(1, 1, 16, 16), 0.1, ("T1w",), _generator())


def test_unknown_modalities_are_refused():
    with pytest.raises(
        ValueError, match="does not know the modality 'FLAIR'; it was trained on T1w, T2w, PDw"
    ):
        NetworkDenoiser(trained())(_random(2, 1, 16, 16), 0.1, ("T1w", "FLAIR"), _generator())


def test_small_volumes_are_refused():
    with pytest.raises(ValueError, match=r"1 x 16 x 7 voxels .* smaller than 1 x 8 x 8"):
        NetworkDenoiser(trained())(_random(1, 1, 16, 7), 0.1, ("T1w",), _generator())


def test_networks_for_something_else_are_refused():
    with pytest.raises(
        ValueError, match="contrast denoiser of one channel, not a network 'series_denoiser' of 4"
    ):
        NetworkDenoiser(trained("series_denoiser", in_channels=4, out_channels=4))


def test_levels_are_rounded_in_ratio_and_far_ones_refused():
    assert nearest_level(LEVELS, 0.05) == 0.03
    assert nearest_level(LEVELS, 0.06) == 0.1
    assert nearest_level(LEVELS, 0.44) == 0.3
    assert nearest_level(LEVELS, 0.007) == 0.01
    with pytest.raises(ValueError, match=r"0.6 lies a factor of 2 outside 0.01..0.3"):
        nearest_level(LEVELS, 0.6)
    with pytest.raises(ValueError, match=r"0.005 lies a factor of 2 outside"):
        nearest_level(LEVELS, 0.005)


def test_series_go_through_as_one_volume():
    volumes = _random(1, 4, 5, 20, 18)
    series = PatchwiseNetwork(trained("series_denoiser", in_channels=4, out_channels=4), patch=(8, 8, 8))
    denoised = series.denoise(volumes, 0.1, None, _generator())
    assert denoised.shape == volumes.shape
    assert denoised.dtype == torch.float32
    assert not denoised.is_inference()
    artifacts = PatchwiseNetwork(trained("artifact_removal", in_channels=4, out_channels=4), patch=(8, 8, 8))
    assert artifacts.map(volumes).shape == volumes.shape


def test_patches_of_a_network_with_attention_are_those_of_its_training():
    convolutions, attention = (PatchwiseNetwork(trained(attention=levels, heads=2)) for levels in ((), (1,)))
    assert convolutions.tiling((1, 100, 100)).length == (1, 100, 100)
    assert attention.tiling((1, 100, 100)).length == (1, 8, 8)
