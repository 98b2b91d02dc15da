"""Coil maps: against sigpy, against the truth, and from scans that offer less than calibration lines."""

import numpy as np
import pytest
import sigpy.mri.app
import torch
from coil_scan import ellipsoid, misalignment

from quantitron.phantoms.coils import coil_sensitivities
from quantitron.recon.calibration_room import with_room
from quantitron.recon.coefficient_basis import coefficient_basis
from quantitron.recon.coils import centred_box, coil_maps, maps_of_block
from quantitron.recon.data import Calibration, KSpace, Protocol
from quantitron.recon.espirit import espirit, refer_phase
from quantitron.recon.gram import reduce_kspace
from quantitron.recon.operators.fourier import centred_ifft
from quantitron.recon.temporal_basis import dictionary_basis

MEGRE = Protocol("megre", (0.003, 0.008), (0.4,), (0.5,))


def test_espirit_equals_sigpy():
    grid = (1, 48, 48)
    _, kspace, mask = ellipsoid(grid)
    centre = kspace[:, :, 12:36, 12:36]
    ours, _ = espirit(centre[None], grid, (1, 6, 6), threshold=0.02)
    zero_filled = torch.zeros_like(kspace)
    zero_filled[:, :, 12:36, 12:36] = centre
    theirs = sigpy.mri.app.EspiritCalib(
        zero_filled[:, 0].numpy(), calib_width=24, thresh=0.02, crop=0, max_iter=100, show_pbar=False
    ).run()
    # Both leave the phase free at each place.
    alignment = (ours[:, 0].conj() * torch.from_numpy(theirs)).sum(0).abs()
    torch.testing.assert_close(alignment[mask[0]], torch.ones(int(mask.sum())), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("grid", "box", "limit"), [((1, 48, 48), (1, 20), 0.03), ((12, 40, 36), (8, 20), 0.06)]
)
def test_maps_from_calibration_lines(grid, box, limit):
    csm, kspace, mask = ellipsoid(grid)
    nz, ny = grid[:2]
    hybrid = centred_ifft(kspace, (3,)).permute(1, 2, 0, 3)  # (z, y, c, x)
    count = torch.zeros(1, nz, ny)
    count[
        :,
        nz // 2 - box[0] // 2 : nz // 2 - box[0] // 2 + box[0],
        ny // 2 - box[1] // 2 : ny // 2 + box[1] // 2,
    ] = 1
    calibration = Calibration((hybrid * count[0, :, :, None, None])[None], count)
    reduced, wide = _reduced(kspace, torch.ones(nz, ny, dtype=torch.bool))
    maps = coil_maps(reduced, calibration, wide, 1e-4).permute(1, 2, 3, 0)
    assert maps.shape == csm.shape
    torch.testing.assert_close(torch.linalg.vector_norm(maps, dim=0), torch.ones(grid), atol=1e-4, rtol=0)
    assert misalignment(maps, csm, mask) < limit


@pytest.mark.parametrize(
    ("noise", "lines", "at_ends", "between"),
    [(0.01, 8, 0.05, 0.008), (0.01, 12, 0.012, 0.008), (0.5, 8, 0.125, 0.09), (0.5, 12, 0.12, 0.09)],
)
def test_maps_of_a_slab_hold_to_its_ends(noise, lines, at_ends, between):
    """Where the object ends with the field of view, its two ends are neighbours in a periodic image.

    With no room between them the ends are 0.072, 0.139, 0.180 and 0.168 off.
    """
    csm, kspace, mask = ellipsoid((12, 40, 36), noise=noise, slab=True)
    start = 6 - lines // 2
    block = kspace[None, :, start : start + lines, 8:32, 6:30]
    maps = maps_of_block(block, (12, 40, 36)).permute(1, 2, 3, 0)  # (c, z, y, x)
    ends = torch.zeros_like(mask)
    ends[[0, -1]] = True
    assert misalignment(maps, csm, mask & ends) < at_ends  # 0.040, 0.008, 0.116 and 0.113
    assert misalignment(maps, csm, mask & ~ends) < between  # 0.005, 0.006, 0.082 and 0.086


def test_an_object_that_ends_before_the_edges_gets_no_room():
    """And one that is given room is the same image, with emptiness above and below."""
    _, kspace, _ = ellipsoid((12, 40, 36))
    block = kspace[None, :, 2:10, 8:32, 6:30]
    same, grid = with_room(block, (12, 40, 36))
    assert same is block
    assert grid == (12, 40, 36)
    _, kspace, _ = ellipsoid((12, 40, 36), slab=True)
    wide, grid = with_room(kspace[None], (12, 40, 36))
    assert grid == (24, 40, 36)
    image, alone = centred_ifft(wide[0], (1, 2, 3)), centred_ifft(kspace, (1, 2, 3))
    torch.testing.assert_close(image[:, 6:18], alone, atol=1e-5, rtol=1e-5)
    assert image[:, :6].abs().max() < 1e-5
    assert image[:, 18:].abs().max() < 1e-5


def _reduced(kspace, sampled):
    """A two-echo scan of the same object, both echoes alike, with the sampled (z, y) lines."""
    _, nz, ny, nx = kspace.shape
    hybrid = centred_ifft(kspace, (3,)).permute(1, 2, 0, 3)  # (z, y, c, x)
    kz, ky = torch.nonzero(sampled, as_tuple=True)
    lines = hybrid[kz, ky].repeat(2, 1, 1)
    n = len(kz)
    echo = torch.arange(2).repeat_interleave(n)
    zero = torch.zeros(2 * n, dtype=torch.int64)
    energy = float(lines.abs().square().sum())
    scan = KSpace(
        lines,
        zero,
        echo,
        zero,
        kz.repeat(2),
        ky.repeat(2),
        torch.ones(2 * n),
        energy,
        (1, 1, 2),
        (1, nz, ny, nx),
    )
    basis = dictionary_basis(MEGRE, 1)
    return reduce_kspace(scan, basis), coefficient_basis(basis, MEGRE, 60.0, 0.999)


def test_maps_without_calibration_lines_come_from_the_densest_centre():
    grid = (8, 40, 36)
    csm, kspace, mask = ellipsoid(grid)
    sampled = torch.rand(8, 40, generator=torch.Generator().manual_seed(3)) < 0.3
    sampled[:, 10:30] = True
    reduced, wide = _reduced(kspace, sampled)
    maps = coil_maps(reduced, None, wide, 1e-4).permute(1, 2, 3, 0)
    assert misalignment(maps, csm, mask) < 0.08


def test_a_single_coil_needs_no_maps():
    _, kspace, _ = ellipsoid((1, 16, 16), coils=1)
    reduced, wide = _reduced(
        kspace, torch.zeros(1, 16, dtype=torch.bool).index_fill(1, torch.tensor([3]), True)
    )
    assert torch.equal(coil_maps(reduced, None, wide, 1.0), torch.ones(16, 1, 1, 16, dtype=torch.complex64))


def test_a_scan_with_no_centre_is_refused():
    _, kspace, _ = ellipsoid((1, 32, 32))
    sampled = torch.zeros(1, 32, dtype=torch.bool)
    sampled[:, :6] = True
    reduced, wide = _reduced(kspace, sampled)
    with pytest.raises(ValueError, match="centre is not sampled"):
        coil_maps(reduced, None, wide, 1.0)


def test_centred_box_is_the_largest_that_is_full():
    sampled = torch.zeros(6, 10, dtype=torch.bool)
    sampled[2:5, 1:9] = True
    assert centred_box(sampled) == (3, 8)
    sampled[3, 4] = False
    assert centred_box(sampled) == (3, 1)


def test_a_single_plane_of_calibration_lines_is_too_few_for_a_slab():
    _, kspace, _ = ellipsoid((8, 32, 32), slab=True)
    with pytest.raises(ValueError, match=r"block of \(1, 24, 24\) points .* is too small for coil maps"):
        maps_of_block(kspace[None, :, 4:5, 4:28, 4:28], (8, 32, 32))


@pytest.mark.parametrize("coils", [4, 8, 12])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("side", [-1, 1])
def test_the_phase_of_maps_does_not_turn_with_the_place_of_the_object(coils, axis, side):
    """LAPACK gives an eigenvector either sign: an object on the left had its phase turned by pi."""
    grid = np.meshgrid(*[(np.arange(48) - 24) / 48 * 0.2] * 2, indexing="ij")
    true = torch.from_numpy(coil_sensitivities((np.zeros_like(grid[0]), *grid), coils, 0.2))
    generator = torch.Generator().manual_seed(coils)
    turned = true * torch.exp(6j * torch.rand(48, 48, generator=generator))
    object_there = torch.from_numpy((side * grid[axis] > 0.02).astype(np.float32))
    maps = refer_phase(turned, object_there)
    torch.testing.assert_close(maps, refer_phase(true, object_there), rtol=0, atol=1e-3)
    phase = ((maps.conj() * true).sum(0) * object_there).sum().angle()
    assert abs(float(phase)) < 1.3  # of a loop's own field, over half of the field of view
