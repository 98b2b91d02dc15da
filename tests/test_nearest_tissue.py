"""Matching of whole images: layout, mask, basis, and that it is the matching of voxels."""

from types import SimpleNamespace

import pytest
import torch
from test_fingerprint_match import make_dictionary, measured, noise, tissue

from quantitron.recon.atom_groups import AtomGroups
from quantitron.recon.fingerprint_match import FingerprintAtoms, dictionary_table, match_fingerprints
from quantitron.recon.joint_match import JointMatcher
from quantitron.recon.signal.spin_echo import SpinEchoProtocol, spin_echo_images, spin_echo_signal
from quantitron.recon.solvers.nearest_fingerprint import NearestFingerprint
from quantitron.recon.solvers.nearest_tissue import NearestTissue

GRID = (3, 7, 5)  # z, y, x
WEIGHTS = torch.tensor([0.7, 0.2, 1.5], dtype=torch.float64)


def on_grid(values):
    """(v, ...) in the order (z, y, x) to (z, y, x, ...)."""
    return values.reshape(*GRID, *values.shape[1:])


@pytest.fixture(scope="module")
def scan():
    """Dictionary, its atoms, mask, signals (z, y, x, l) and contrasts (z, y, x, m) of tissue."""
    dictionary = make_dictionary()
    atoms = FingerprintAtoms(dictionary, dictionary.coefficients)
    t1, t2, pd = tissue(105)
    x = measured(dictionary, t1, t2, pd) + 0.03 * noise((105, 8))
    q = pd.abs()[:, None] * spin_echo_signal(t1, t2, SpinEchoProtocol())
    mask = torch.rand(GRID, generator=torch.Generator().manual_seed(2)) > 0.3
    return dictionary, atoms, mask, on_grid(x), on_grid(q)


def nearest(scan, groups=0, mixing=None):
    dictionary, _, mask, _, _ = scan
    atoms = FingerprintAtoms(dictionary, dictionary_table(dictionary, dictionary.basis(8), mixing))
    e = spin_echo_signal(atoms.t1, atoms.t2, SpinEchoProtocol())
    return NearestTissue(JointMatcher(atoms.table, e, groups), atoms.t1, atoms.t2, mask)


@pytest.mark.parametrize("groups", [0, 40])
def test_every_voxel_of_the_mask_is_matched_where_it_lies(scan, groups):
    dictionary, atoms, mask, x, q = scan
    found = nearest(scan, groups)(x.permute(2, 3, 0, 1), q.movedim(-1, 0), WEIGHTS)
    e = spin_echo_signal(atoms.t1, atoms.t2, SpinEchoProtocol())
    alone = JointMatcher(atoms.table, e)(x[mask], q[mask], WEIGHTS)
    assert torch.equal(found.atom[mask], alone.atom)
    assert torch.equal(found.t1[mask], atoms.t1[alone.atom])
    assert torch.equal(found.t2[mask], atoms.t2[alone.atom])
    assert torch.allclose(found.pd[mask], alone.pd)
    images = found.coefficients.permute(2, 3, 0, 1)  # (z, y, x, k)
    assert torch.allclose(
        images[mask], alone.pd[:, None] * dictionary.coefficients[0].flatten(0, 1)[atoms.place[alone.atom]]
    )
    wanted = spin_echo_images(found.t1, found.t2, found.pd, SpinEchoProtocol())
    assert torch.allclose(found.contrasts, wanted)


def test_where_no_signal_is_maps_are_zero_and_coefficients_stay(scan):
    _, _, mask, x, q = scan
    found = nearest(scan)(x.permute(2, 3, 0, 1), q.movedim(-1, 0), WEIGHTS)
    assert (found.atom[~mask] == -1).all()
    for values in (found.t1, found.t2, found.pd):
        assert (values[~mask] == 0).all()
        assert (values[mask] != 0).all()
    assert (found.contrasts[:, ~mask] == 0).all()
    assert torch.equal(found.coefficients.permute(2, 3, 0, 1)[~mask], x[~mask])


def test_images_of_the_tissue_match_themselves(scan):
    once = nearest(scan)(scan[3].permute(2, 3, 0, 1), scan[4].movedim(-1, 0), WEIGHTS)
    again = nearest(scan)(once.coefficients, once.contrasts, WEIGHTS)
    mask = scan[2]
    assert torch.equal(once.atom, again.atom)
    assert torch.allclose(once.pd[mask], again.pd[mask], rtol=1e-12)


def test_contrasts_come_without_taking_part(scan):
    dictionary, atoms, mask, x, _ = scan
    found = nearest(scan)(x.permute(2, 3, 0, 1))
    plain = match_fingerprints(x[mask], dictionary, dictionary.coefficients)
    assert torch.equal(atoms.place[found.atom[mask]], plain.atom)
    assert torch.allclose(found.contrasts, spin_echo_images(found.t1, found.t2, found.pd, SpinEchoProtocol()))
    without = NearestTissue(JointMatcher(atoms.table), atoms.t1, atoms.t2, mask)(x.permute(2, 3, 0, 1))
    assert without.contrasts.shape == (0, *GRID)
    assert torch.equal(without.atom, found.atom)


@pytest.mark.parametrize("complex_mixing", [True, False])
def test_coefficients_in_another_basis_give_the_same_tissue(scan, complex_mixing):
    _, _, mask, x, q = scan
    square = noise((8, 8), seed=4)
    mixing = torch.linalg.qr(square if complex_mixing else square.real).Q  # (l, k)
    turned = x @ mixing.conj().to(x)  # signals are mixing @ turned
    found = nearest(scan, mixing=mixing)(turned.permute(2, 3, 0, 1), q.movedim(-1, 0), WEIGHTS)
    wanted = nearest(scan)(x.permute(2, 3, 0, 1), q.movedim(-1, 0), WEIGHTS)
    assert torch.equal(found.atom, wanted.atom)
    back = torch.einsum("lk,xkzy->xlzy", mixing.to(x), found.coefficients)
    assert torch.allclose(back.permute(2, 3, 0, 1)[mask], wanted.coefficients.permute(2, 3, 0, 1)[mask])


def test_a_field_is_that_of_each_voxel():
    dictionary = make_dictionary((0.8, 1.0, 1.2), points=(40, 36), rank=10)
    atoms = FingerprintAtoms(dictionary, dictionary.coefficients)
    t1, t2, pd = tissue(105)
    field = torch.linspace(0.82, 1.18, 105, dtype=torch.float64)
    x = on_grid(measured(dictionary, t1, t2, pd, field))
    mask = torch.rand(GRID, generator=torch.Generator().manual_seed(2)) > 0.3
    matcher = JointMatcher(atoms.table)
    found = NearestTissue(matcher, atoms.t1, atoms.t2, mask, field=on_grid(field))(x.permute(2, 3, 0, 1))
    alone = matcher(x[mask], field=on_grid(field)[mask])
    assert torch.equal(found.atom[mask], alone.atom)
    fitted = matcher.signals(alone, on_grid(field)[mask])
    assert torch.allclose(found.coefficients.permute(2, 3, 0, 1)[mask], fitted)
    # Between the tables, not at the nearest of them: the fit is as good as the dictionary is fine.
    misfit = (fitted - x[mask]).norm(dim=1) / x[mask].norm(dim=1)
    assert misfit.median() < 0.03


def test_an_empty_mask_leaves_all_as_it_is(scan):
    _, atoms, _, x, q = scan
    e = spin_echo_signal(atoms.t1, atoms.t2, SpinEchoProtocol())
    for groups in (0, 20):
        matcher = JointMatcher(atoms.table, e, groups)
        nothing = NearestTissue(matcher, atoms.t1, atoms.t2, torch.zeros(GRID, dtype=torch.bool))
        found = nothing(x.permute(2, 3, 0, 1), q.movedim(-1, 0), WEIGHTS)
        assert torch.equal(found.coefficients, x.permute(2, 3, 0, 1))
        assert (found.atom == -1).all()
        assert found.contrasts.shape == (3, *GRID)


def test_a_scan_lays_its_dictionary_out_once(monkeypatch):
    """What ADMM asks round after round; each tissue is that of matching by itself, at the voxel's B1."""
    dictionary = make_dictionary((0.8, 1.0, 1.2), points=(30, 28))
    t1, t2, pd = tissue(105)
    field = on_grid(torch.linspace(0.97, 1.02, 105, dtype=torch.float64))
    x = on_grid(measured(dictionary, t1, t2, pd, field.flatten()))
    mixing = torch.linalg.qr(noise((8, 8), seed=4)).Q
    images = (x @ mixing.conj()).permute(2, 3, 0, 1)  # (x, k, z, y)
    mask = torch.rand(GRID, generator=torch.Generator().manual_seed(2)) > 0.3
    estimate = SimpleNamespace(
        problem=SimpleNamespace(dictionary=dictionary, basis=dictionary.basis(8), b1=field),
        coefficients=images,
        basis=SimpleNamespace(mixing=mixing[None]),
        mask=mask,
    )
    made = []
    original = AtomGroups.__init__

    def counted(self, *arguments, **named):
        made.append(self)
        original(self, *arguments, **named)

    nearest_fingerprint = NearestFingerprint(estimate, 20)
    nearest_tissue = NearestTissue.of_fingerprints(estimate, 20, SpinEchoProtocol())
    monkeypatch.setattr(AtomGroups, "__init__", counted)
    fitted = [nearest_fingerprint(factor * images) for factor in (1.0, 1.0, 2.0)]
    assert len(made) == 6  # steps of B1 from 0.97 to 1.02
    assert torch.equal(fitted[0], fitted[1])
    assert torch.allclose(2 * fitted[0], fitted[2], rtol=1e-12)
    found = nearest_tissue(images)
    plain = match_fingerprints(x[mask], dictionary, dictionary.coefficients, field[mask], 20)
    assert torch.equal(found.t1[mask], plain.t1)
    assert torch.equal(found.t2[mask], plain.t2)
    assert torch.allclose(found.pd[mask], plain.pd, rtol=1e-12)
    assert torch.allclose(found.coefficients, fitted[0], rtol=1e-12)
    assert torch.allclose(found.contrasts, spin_echo_images(found.t1, found.t2, found.pd, SpinEchoProtocol()))
