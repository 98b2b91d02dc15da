"""Coefficients to T1, T2 and PD: matching, its groups, and the refinement off the grid."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from quantitron.recon.atom_groups import AtomGroups, similar_atoms
from quantitron.recon.data import (
    Basis,
    Encoding,
    FingerprintDictionary,
    FingerprintProblem,
    Protocol,
    TrajectoryKSpace,
)
from quantitron.recon.field_table import FIELD_STEP
from quantitron.recon.fingerprint_maps import fingerprint_maps
from quantitron.recon.fingerprint_match import dictionary_table, match_fingerprints
from quantitron.recon.fingerprint_refine import FingerprintRefinement
from quantitron.recon.grid_spline import GridSpline
from quantitron.recon.match import best_atom
from quantitron.recon.signal.fingerprint_dictionary import fingerprint_dictionary
from quantitron.recon.signal.fisp_mrf import contrast_signal

POINTS = 80


def signal(t1, t2, b1):
    """(..., w): recovery from an inversion under a train of pulses, with echoes of varying weight of T2."""
    n = torch.arange(POINTS, dtype=torch.float64)
    time = 0.01 + 0.035 * n
    angle = b1[..., None] * (0.15 + 0.12 * torch.sin(0.3 * n))
    t1, t2 = t1[..., None], t2[..., None]
    recovery = 1 - 2 * torch.exp(-time / t1)
    return torch.sin(angle) * recovery * (0.3 + torch.exp(-((7 * time) % 0.4) / t2)) + 0.3 * torch.exp(
        -time * angle / t2
    )


def make_dictionary(b1=(1.0,), points=(48, 44), rank=8, dtype=torch.float64):
    t1 = torch.logspace(math.log10(0.1), math.log10(5), points[0], dtype=torch.float64)
    t2 = torch.logspace(math.log10(0.01), math.log10(3), points[1], dtype=torch.float64)
    field = torch.tensor(b1, dtype=torch.float64)
    atoms = signal(t1[None, :, None], t2[None, None], field[:, None, None])
    normalised = (atoms / atoms.norm(dim=-1, keepdim=True)).flatten(0, 2)
    _, values, rows = torch.linalg.svd(normalised, full_matrices=False)
    axes = rows[:rank].T.contiguous()
    share = values.square() / values.square().sum()
    parts = (t1, t2, field, axes, share[:rank], atoms @ axes)
    return FingerprintDictionary(*(part.to(dtype) for part in parts))


@pytest.fixture(scope="module")
def dictionary():
    return make_dictionary()


def tissue(voxels, seed=0, t1=(0.4, 3.0), t2=(0.03, 0.3)):
    """t1, t2 (v,) [s] and complex pd (v,)."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(4, voxels, generator=generator, dtype=torch.float64)
    span = [low * (high / low) ** part for (low, high), part in zip((t1, t2), draw[:2], strict=True)]
    return *span, (0.5 + draw[2]) * torch.exp(2j * math.pi * draw[3])


def noise(shape, seed=1):
    """Complex, E|n|^2 = 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.complex128)


def measured(dictionary, t1, t2, pd, b1=None):
    """(v, r) coefficients of tissue."""
    field = torch.ones_like(t1) if b1 is None else b1
    return pd[:, None] * (signal(t1, t2, field) @ dictionary.axes.double())


def test_matching_is_what_numpy_finds(dictionary):
    v = measured(dictionary, *tissue(300)) + 0.02 * noise((300, 8))
    found = match_fingerprints(v, dictionary, dictionary_table(dictionary, dictionary.basis(8)))
    atoms = dictionary.coefficients[0].numpy().copy()
    atoms[~dictionary.plausible.numpy()] = 0
    atoms = atoms.reshape(-1, 8)
    norm = np.linalg.norm(atoms, axis=1)
    norm[norm == 0] = np.inf
    inner = v.numpy() @ atoms.T  # real atoms
    best = (np.abs(inner) / norm).argmax(1)
    assert np.array_equal(found.atom.numpy(), best)
    t1, t2 = np.meshgrid(dictionary.t1.numpy(), dictionary.t2.numpy(), indexing="ij")
    assert np.array_equal(found.t1.numpy(), t1.ravel()[best])
    assert np.array_equal(found.t2.numpy(), t2.ravel()[best])
    pd = inner[np.arange(300), best] / norm[best] ** 2
    assert np.allclose(found.pd.numpy(), pd, rtol=1e-12)


def test_pd_of_an_atom_is_found_with_its_phase(dictionary):
    pd = 0.7 * torch.exp(1j * torch.linspace(-3, 3, 7, dtype=torch.float64))
    v = pd[:, None] * dictionary.coefficients[0, 30, 20]
    found = match_fingerprints(v, dictionary, dictionary.coefficients)
    assert torch.equal(found.atom, torch.full((7,), 30 * 44 + 20))
    assert torch.allclose(found.pd, pd, rtol=1e-12)


@pytest.mark.parametrize("groups", [0, 40])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_working_set_changes_nothing(dictionary, groups, dtype):
    table = dictionary.coefficients.to(dtype.to_real())
    v = (measured(dictionary, *tissue(600)) + 0.05 * noise((600, 8))).to(dtype)
    whole = match_fingerprints(v, dictionary, table, groups=groups)
    pieces = match_fingerprints(v, dictionary, table, groups=groups, working_set=200_000)
    assert torch.equal(whole.atom, pieces.atom)
    assert torch.allclose(whole.pd, pieces.pd)


@pytest.mark.parametrize("level", [0.0, 0.03, 0.5, 30.0])
@pytest.mark.parametrize("rank", [5, 8])
def test_groups_find_the_best_atom_of_all(dictionary, level, rank):
    v = (measured(dictionary, *tissue(500)) + level * noise((500, 8)))[:, :rank]
    table = dictionary_table(dictionary, dictionary.basis(rank))
    exact = match_fingerprints(v, dictionary, table)
    fast = match_fingerprints(v, dictionary, table, groups=50)
    assert torch.equal(fast.atom, exact.atom)
    assert torch.allclose(fast.pd, exact.pd)


def test_groups_of_single_precision_agree_but_for_ties(dictionary):
    v = (measured(dictionary, *tissue(4000)) + 0.03 * noise((4000, 8))).to(torch.complex64)
    table = dictionary.coefficients.float()
    exact = match_fingerprints(v, dictionary, table)
    fast = match_fingerprints(v, dictionary, table, groups=64)
    same = fast.atom == exact.atom
    assert same.double().mean() > 0.99
    atoms = table.flatten(0, 2)
    close = [
        (v[~same] * atoms[index[~same]]).sum(1).abs() / atoms[index[~same]].norm(dim=1)
        for index in (exact.atom, fast.atom)
    ]
    assert torch.allclose(*close, rtol=1e-6)


def test_groups_search_complex_atoms():
    atoms = noise((700, 4)) + 3
    v = noise((200, 4), seed=2) + 2
    groups = AtomGroups.similar(atoms, 30)
    index, pd, _ = groups.best_of_near_groups(v, 10**6)
    inner = v @ atoms.conj().T
    best = (inner.abs() / atoms.norm(dim=1)).argmax(1)
    assert torch.equal(index, best)
    assert torch.equal(best_atom(v, atoms)[0], best)
    assert torch.allclose(pd, inner.gather(1, best[:, None])[:, 0] / atoms[best].norm(dim=1) ** 2)


def test_groups_compare_few_atoms():
    dictionary = make_dictionary(points=(120, 110))
    atoms = dictionary.coefficients[0][dictionary.plausible]
    v = measured(dictionary, *tissue(500)) + 0.02 * noise((500, 8))
    _, _, work = AtomGroups.similar(atoms, 128).best_of_near_groups(v, 10**7)
    assert work < 500 * len(atoms) / 15


@pytest.mark.parametrize("groups", [1, 7, 64, 100, 5000])
def test_groups_hold_every_atom_once_and_are_of_one_size(dictionary, groups):
    atoms = dictionary.coefficients[0][dictionary.plausible]
    members = similar_atoms(atoms, groups)
    assert len(members) == min(groups, len(atoms))
    assert torch.equal(torch.cat(members).sort().values, torch.arange(len(atoms)))
    sizes = [len(group) for group in members]
    assert max(sizes) - min(sizes) <= 2
    assert all(torch.equal(a, b) for a, b in zip(members, similar_atoms(atoms, groups), strict=True))


def test_zero_signal_and_zero_atom_give_zero_pd():
    atoms = torch.cat([torch.zeros(1, 3), torch.eye(3)])
    signals = torch.zeros(2, 3, dtype=torch.complex64)
    signals[1, 2] = 2j
    for index, pd in (
        best_atom(signals, atoms),
        AtomGroups.similar(atoms, 2).best_of_near_groups(signals, 1000)[:2],
    ):
        assert torch.equal(pd, torch.tensor([0, 2j]))
        assert index[1] == 3


def test_spline_passes_through_the_table_and_is_exact_for_cubics():
    b, i, j = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (3, 6, 5)), indexing="ij")

    def cubic(b, i, j):
        return torch.stack([b**2 * i**3 - j**2 * i + 1, j**3 - 2 * i * j * b], -1)

    spline = GridSpline(cubic(b, i, j))
    place = torch.rand(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[2.0], [5.0], [4.0]]
    )
    place[:, 0], place[:, 1] = 0, torch.tensor([2.0, 5.0, 4.0])
    value, by_i, by_j = spline(*place)
    x, y, z = place
    assert torch.allclose(value, cubic(x, y, z).T)
    assert torch.allclose(by_i, torch.stack([3 * x**2 * y**2 - z**2, -2 * z * x]))
    assert torch.allclose(by_j, torch.stack([-2 * z * y, 3 * z**2 - 2 * y * x]))


def test_spline_of_a_complex_table_is_that_of_its_parts():
    table = noise((1, 7, 6, 3))
    i, j = torch.linspace(0, 6, 9, dtype=torch.float64), torch.linspace(0, 5, 9, dtype=torch.float64)
    parts = [GridSpline(part.contiguous())(None, i, j) for part in (table.real, table.imag)]
    for whole, real, imaginary in zip(GridSpline(table)(None, i, j), *parts, strict=True):
        assert torch.allclose(whole, torch.complex(real, imaginary))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_refinement_recovers_values_between_those_of_the_grid(dictionary, dtype):
    t1, t2, pd = tissue(400)
    v = measured(dictionary, t1, t2, pd).to(dtype)
    table = dictionary.coefficients.to(dtype.to_real())
    found = match_fingerprints(v, dictionary, table)
    assert (found.t1 / t1 - 1).abs().max() > 0.02
    refined = FingerprintRefinement(dictionary, table).run(v, found.t1, found.t2)
    assert (refined.t1 / t1 - 1).abs().max() < 1e-4
    assert (refined.t2 / t2 - 1).abs().max() < 2e-4
    assert (refined.pd / pd - 1).abs().max() < 1e-4


def test_refinement_recovers_extended_phase_graphs_between_those_of_the_dictionary():
    angle = tuple(0.15 + 0.9 * abs(math.sin(0.05 * n)) for n in range(120))
    protocol = Protocol("fisp_mrf", (0.001,), (0.012,), angle, inversion_time=(0.02,))
    # Steps of 3 %, coarser than those of a scan.
    dictionary = fingerprint_dictionary(protocol, (0.5, 1.7), (0.035, 0.14), 42, 48)
    t1, t2, pd = tissue(100, t1=(0.55, 1.6), t2=(0.04, 0.13))
    with torch.no_grad():
        signals = contrast_signal({"t1": t1, "t2": t2}, protocol)
    v = pd[:, None] * (signals @ dictionary.axes.double())
    table = dictionary.coefficients.double()
    found = match_fingerprints(v, dictionary, table)
    refined = FingerprintRefinement(dictionary, table).run(v, found.t1, found.t2)
    assert (found.t1 / t1 - 1).abs().max() > 0.01
    assert (refined.t1 / t1 - 1).abs().max() < 1e-3
    assert (refined.t2 / t2 - 1).abs().max() < 2e-3


def test_refinement_never_raises_the_residual_and_keeps_its_bounds(dictionary):
    # Half of the voxels lie beyond the grid or where T2 is above T1, and the noise is strong.
    t1, t2, pd = tissue(800, t1=(0.06, 8.0), t2=(0.006, 5.0))
    v = measured(dictionary, t1, t2, pd) + 0.2 * noise((800, 8))
    found = match_fingerprints(v, dictionary, dictionary.coefficients)
    before = (v - found.pd[:, None] * dictionary.coefficients.flatten(0, 2)[found.atom]).abs().square().sum(1)
    refined = FingerprintRefinement(dictionary, dictionary.coefficients).run(v, found.t1, found.t2)
    assert (refined.cost <= before * (1 + 1e-9)).all()
    assert (refined.cost < 0.999 * before).double().mean() > 0.3
    for values, axis in ((refined.t1, dictionary.t1), (refined.t2, dictionary.t2)):
        assert values.min() >= axis[0] * (1 - 1e-12)
        assert values.max() <= axis[-1] * (1 + 1e-12)
    assert (refined.t2 <= refined.t1 * (1 + 1e-12)).all()
    assert (refined.t2 > refined.t1 * (1 - 1e-9)).any()


def test_refinement_in_chunks_is_the_same(dictionary):
    t1, t2, pd = tissue(100)
    v = measured(dictionary, t1, t2, pd) + 0.02 * noise((100, 8))
    refinement = FingerprintRefinement(dictionary, dictionary.coefficients)
    variance = torch.linspace(1e-4, 1e-3, 100, dtype=torch.float64)
    whole = refinement.run(v, t1, t2, noise_variance=variance)
    pieces = refinement.run(v, t1, t2, noise_variance=variance, chunk=33)
    assert torch.allclose(whole.t1, pieces.t1, rtol=1e-4)
    assert torch.allclose(whole.t2, pieces.t2, rtol=1e-4)
    assert torch.allclose(whole.standard_deviation["t2"], pieces.standard_deviation["t2"], rtol=1e-3)


def test_refinement_along_equal_times_finds_the_lowest_cost_there(dictionary):
    # T2 above T1: the best of what is allowed lies on the line T1 = T2.
    t1, t2, pd = tissue(50, t1=(0.3, 1.0), t2=(1.2, 2.0))
    v = measured(dictionary, t1, t2, pd)
    found = match_fingerprints(v, dictionary, dictionary.coefficients)
    refined = FingerprintRefinement(dictionary, dictionary.coefficients).run(
        v, found.t1, found.t2, iterations=60
    )
    line = torch.logspace(math.log10(0.1), math.log10(3.0), 4000, dtype=torch.float64)
    p = signal(line, line, torch.ones_like(line)) @ dictionary.axes
    inner = v @ p.T.to(v.dtype)
    cost = v.abs().square().sum(1, keepdim=True) - inner.abs().square() / p.square().sum(1)
    assert torch.allclose(refined.cost, cost.min(1).values, rtol=1e-3, atol=1e-7)


def test_standard_deviations_are_those_of_repeated_noise(dictionary):
    repeats = 1500
    for t1, t2, size in ((1.3, 0.08, 1.0), (0.8, 0.06, 2.0)):
        one = torch.ones(repeats, dtype=torch.float64)
        clean = measured(dictionary, t1 * one, t2 * one, size * (0.6 + 0.8j) * one)
        level = 0.01 * clean[0].norm()
        v = clean + level * noise(clean.shape)
        refinement = FingerprintRefinement(dictionary, dictionary.coefficients)
        for known in (None, float(level**2)):
            refined = refinement.run(v, t1 * one, t2 * one, noise_variance=known)
            values = {"t1": refined.t1, "t2": refined.t2, "pd": refined.pd.abs()}
            for name, found in values.items():
                said = refined.standard_deviation[name].square().mean().sqrt()
                assert said == pytest.approx(float(found.std()), rel=0.1), name


@pytest.mark.parametrize("b1", [(0.8, 1.0, 1.2), tuple(0.7 + 0.1 * n for n in range(7))])
def test_b1_of_each_voxel_is_taken_into_account(b1):
    dictionary = make_dictionary(b1, points=(40, 36), rank=10)
    t1, t2, pd = tissue(300)
    field = torch.linspace(0.82, 1.18, 300, dtype=torch.float64)
    v = measured(dictionary, t1, t2, pd, field)
    exact = match_fingerprints(v, dictionary, dictionary.coefficients, field)
    fast = match_fingerprints(v, dictionary, dictionary.coefficients, field, groups=30)
    assert torch.equal(exact.atom, fast.atom)
    refinement = FingerprintRefinement(dictionary, dictionary.coefficients)
    refined = refinement.run(v, exact.t1, exact.t2, field)
    blind = refinement.run(v, exact.t1, exact.t2)
    error = (refined.t2 / t2 - 1).abs().max()
    assert error < (2e-2 if len(b1) == 3 else 1e-3)
    assert (blind.t2 / t2 - 1).abs().max() > 10 * error


def test_match_at_a_b1_of_the_dictionary_is_the_match_with_its_atoms():
    dictionary = make_dictionary((0.8, 1.0, 1.2), points=(30, 28))
    t1, t2, pd = tissue(100)
    field = torch.full((100,), 1.2, dtype=torch.float64)
    v = measured(dictionary, t1, t2, pd, field)
    alone = replace(dictionary, b1=dictionary.b1[2:], coefficients=dictionary.coefficients[2:])
    expected = match_fingerprints(v, alone, alone.coefficients)
    found = match_fingerprints(v, dictionary, dictionary.coefficients, field + FIELD_STEP / 4)
    assert torch.equal(found.atom, expected.atom)


def test_b1_map_without_its_dictionary_is_refused(dictionary):
    v = torch.ones(2, 8, dtype=torch.complex128)
    with pytest.raises(ValueError, match="single B1"):
        match_fingerprints(v, dictionary, dictionary.coefficients, torch.ones(2, dtype=torch.float64))


def test_table_in_a_measured_or_turned_basis_describes_the_same_signals(dictionary):
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    measured_basis = Basis(dictionary.axes @ turn, dictionary.variance, 1.0, "navigator")
    table = dictionary_table(dictionary, measured_basis)
    assert torch.allclose(table @ measured_basis.contrast.T, dictionary.coefficients @ dictionary.axes.T)
    mixing = torch.linalg.qr(noise((8, 8))).Q[:, :5]
    turned = dictionary_table(dictionary, dictionary.basis(8), mixing)
    expected = dictionary.coefficients.to(mixing) @ mixing.conj()
    assert torch.allclose(turned, expected)
    with pytest.raises(ValueError, match="9 columns"):
        dictionary_table(dictionary, replace(measured_basis, contrast=torch.ones(80, 9), source="dictionary"))
    with pytest.raises(ValueError, match="time points"):
        dictionary_table(dictionary, replace(measured_basis, contrast=torch.ones(79, 8)))


def problem_of(dictionary, rank, grid, b1=None):
    empty = torch.zeros(0)
    kspace = TrajectoryKSpace(
        empty, empty, empty.long(), empty.long(), empty.long(), None, 0.0, POINTS, (1, *grid)
    )
    protocol = Protocol("fisp_mrf", (0.001,), (0.012,), (0.2,) * POINTS)
    encoding = Encoding(grid, (0.005, 0.2, 0.2), grid, trajectory="spiral")
    return FingerprintProblem(encoding, protocol, kspace, dictionary.basis(rank), dictionary, b1=b1)


def images_of_two_tissues(dictionary, rank, grid=(1, 20, 24)):
    """Coefficients (x, k, z, y) complex64, the truth (z, y, x) and the inside."""
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[:, 4:16, 5:20] = True
    t1 = torch.where(torch.arange(grid[2]) < 12, 0.83, 1.37).double().expand(grid)
    t2 = torch.where(torch.arange(grid[2]) < 12, 0.061, 0.087).double().expand(grid)
    v = signal(t1, t2, torch.ones_like(t1)) @ dictionary.axes.double()[:, :rank] * inside[..., None]
    return (v * (0.6 - 0.8j)).permute(2, 3, 0, 1).to(torch.complex64), t1, t2, inside


SETTINGS = {
    "mask_threshold": 0.1,
    "rank": 6,
    "retained_energy": 0.99,
    "residual_to_noise": 1.0,
    "standard_deviations": True,
}


@pytest.mark.parametrize("groups", [0, 40])
@pytest.mark.parametrize("turned", [None, 8, 6])
def test_maps_of_images(groups, turned):
    dictionary = make_dictionary(dtype=torch.float32)
    coefficients, t1, t2, inside = images_of_two_tissues(dictionary, 8)
    mixing = None
    if turned is not None:
        mixing = torch.linalg.qr(noise((8, turned))).Q.to(torch.complex64)
        coefficients = torch.einsum("lk,xlzy->xkzy", mixing.conj(), coefficients)
    maps = fingerprint_maps(
        coefficients, mixing, problem_of(dictionary, 8, (1, 20, 24)), groups=groups, **SETTINGS
    )
    assert list(maps.values) == ["t1", "t2", "pd"]
    assert torch.equal(maps.mask[0], inside)
    assert maps.failed_voxels == 0
    for name, truth in (("t1", t1), ("t2", t2), ("pd", torch.ones_like(t1))):
        assert torch.isnan(maps.values[name][0][~inside]).all()
        assert (maps.values[name][0][inside] / truth[inside] - 1).abs().max() < 1e-3
        assert maps.standard_deviation[name].shape == (1, 1, 20, 24)
    grid = fingerprint_maps(
        coefficients, mixing, problem_of(dictionary, 8, (1, 20, 24)), groups=groups, refine=False, **SETTINGS
    )
    assert set(grid.values["t1"][grid.mask].tolist()) <= set(dictionary.t1.tolist())
    assert not grid.standard_deviation


def test_maps_say_which_voxels_failed():
    dictionary = make_dictionary(dtype=torch.float32)
    coefficients, t1, _, inside = images_of_two_tissues(dictionary, 8)
    coefficients[10, 3, 0, 8] = float("nan")
    maps = fingerprint_maps(coefficients, None, problem_of(dictionary, 8, (1, 20, 24)), **SETTINGS)
    assert maps.failed_voxels == 1
    assert torch.isnan(maps.values["t1"][0, 0, 8, 10])
    inside[0, 8, 10] = False
    assert (maps.values["t1"][0][inside] / t1[inside] - 1).abs().max() < 1e-3


def test_maps_without_signal_are_empty():
    dictionary = make_dictionary(dtype=torch.float32)
    coefficients = torch.zeros(24, 8, 1, 20, dtype=torch.complex64)
    maps = fingerprint_maps(coefficients, None, problem_of(dictionary, 8, (1, 20, 24)), groups=9, **SETTINGS)
    assert not maps.mask.any()
    assert torch.isnan(maps.values["t2"]).all()
    assert maps.failed_voxels == 0


def test_maps_follow_the_b1_map():
    dictionary = make_dictionary((0.8, 0.9, 1.0, 1.1, 1.2), rank=10, dtype=torch.float32)
    _, t1, t2, inside = images_of_two_tissues(dictionary, 10)
    b1 = torch.linspace(0.85, 1.15, 24).expand(1, 20, 24)
    v = signal(t1, t2, b1.double()) @ dictionary.axes.double() * inside[..., None]
    coefficients = v.permute(2, 3, 0, 1).to(torch.complex64)
    maps = fingerprint_maps(coefficients, None, problem_of(dictionary, 10, (1, 20, 24), b1), **SETTINGS)
    assert (maps.values["t2"][0][inside] / t2[inside] - 1).abs().max() < 5e-3
