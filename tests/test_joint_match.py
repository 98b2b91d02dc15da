"""Joint matching of signals and weighted images: the closed form, both searches, and what is kept."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from test_fingerprint_match import make_dictionary, measured, noise, tissue

from quantitron.recon.atom_groups import AtomGroups
from quantitron.recon.field_table import FIELD_STEP, FieldTable
from quantitron.recon.fingerprint_match import FingerprintAtoms, match_fingerprints
from quantitron.recon.joint_match import JointMatcher
from quantitron.recon.signal.spin_echo import SpinEchoProtocol, spin_echo_signal

WEIGHTS = torch.tensor([0.7, 0.2, 1.5], dtype=torch.float64)


def objective(x, q, d, e, weights, pd):
    """||x - PD d||^2 + sum w (q - |PD| e)^2, as it stands in the paper; broadcasts over all but the last."""
    misfit = (x - pd[..., None] * d).abs().square().sum(-1)
    return misfit + (weights * (q - pd.abs()[..., None] * e).square()).sum(-1)


def random_case(atoms=9, voxels=18, complex_atoms=True, seed=0):
    """Atoms and voxels of no structure, contrasts of either sign: the formula must hold for any."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=torch.complex128):
        return torch.randn(shape, generator=generator, dtype=dtype)

    d = normal(atoms, 4) if complex_atoms else normal(atoms, 4, dtype=torch.float64)
    e = torch.rand(atoms, 3, generator=generator, dtype=torch.float64)
    x, q = normal(voxels, 4), 1.5 * normal(voxels, 3, dtype=torch.float64)
    q[:6] = q[:6].abs()
    q[-5:] = -3 * q[-5:].abs()  # so much against them all that PD is 0
    x[-5:] *= 0.1
    return d, e, x, q


@pytest.fixture(scope="module")
def scan():
    """Atoms, contrasts and noisy voxels of tissue: what a scan brings."""
    dictionary = make_dictionary()
    atoms = FingerprintAtoms(dictionary, dictionary.coefficients)
    e = spin_echo_signal(atoms.t1, atoms.t2, SpinEchoProtocol())
    t1, t2, pd = tissue(500)
    x = measured(dictionary, t1, t2, pd) + 0.03 * noise((500, 8))
    generator = torch.Generator().manual_seed(3)
    q = pd.abs()[:, None] * spin_echo_signal(t1, t2, SpinEchoProtocol())
    q = q + 0.05 * torch.randn(q.shape, generator=generator, dtype=torch.float64)
    return dictionary, atoms, e, x, q


@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("complex_atoms", [True, False])
def test_nothing_on_a_dense_grid_is_below_the_closed_form(complex_atoms, groups):
    d, e, x, q = random_case(complex_atoms=complex_atoms)
    found = JointMatcher(d, e, groups)(x, q, WEIGHTS)
    least = objective(x, q, d[found.atom], e[found.atom], WEIGHTS, found.pd)
    size = torch.linspace(0, 4, 81, dtype=torch.float64)
    angle = torch.linspace(0, 2 * math.pi, 91, dtype=torch.float64)[:-1]
    pd = torch.polar(*torch.meshgrid(size, angle, indexing="ij")).flatten()  # (p,)
    tried = torch.stack(
        [objective(x[:, None], q[:, None], d[j], e[j], WEIGHTS, pd).amin(1) for j in range(len(d))], 1
    )
    best = tried.amin(1)
    assert (least <= best + 1e-12 * best).all()
    # Nor is the grid far above: within what half a step of it makes.
    curvature = (d.abs().square().sum(1) + (WEIGHTS * e.square()).sum(1)).max()
    step = (0.025**2 + (4 * math.pi / 90) ** 2) * curvature
    assert (best <= least + step).all()
    assert (found.pd.abs() > 0).sum() >= 10
    assert (found.pd[-5:] == 0).all()
    assert torch.allclose(least[-5:], objective(x, q, d[0], e[0], WEIGHTS, 0 * found.pd)[-5:])


def test_pd_is_the_minimiser_that_a_search_without_formula_finds():
    d, e, x, q = random_case(atoms=5, voxels=6)
    atom, image, signal, contrast, weight = (part.numpy() for part in (d, e, x, q, WEIGHTS))
    for voxel in range(6):
        lowest = []
        for j in range(len(d)):
            only = JointMatcher(d[j : j + 1], e[j : j + 1])(
                x[voxel : voxel + 1], q[voxel : voxel + 1], WEIGHTS
            )

            def cost(parts, voxel=voxel, j=j):
                pd = complex(*parts)
                misfit = np.abs(signal[voxel] - pd * atom[j]) ** 2
                return misfit.sum() + (weight * (contrast[voxel] - abs(pd) * image[j]) ** 2).sum()

            # |PD| bends at 0: from four sides.
            tries = [
                minimize(cost, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
                for start in ((0.5, 0.5), (-0.5, 0.5), (0.5, -0.5), (-0.5, -0.5))
            ]
            best = min(tries, key=lambda result: result.fun)
            pd = only.pd[0]
            mine = cost([pd.real, pd.imag])
            assert mine <= best.fun + 1e-12
            assert mine == pytest.approx(best.fun, rel=1e-9)
            assert abs(complex(*best.x) - complex(pd)) < 1e-5
            lowest.append(mine)
        found = JointMatcher(d, e)(x[voxel : voxel + 1], q[voxel : voxel + 1], WEIGHTS)
        assert lowest[int(found.atom)] <= min(lowest) + 1e-12  # several alike where PD is 0


@pytest.mark.parametrize("groups", [0, 40])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_without_weight_it_is_the_matching_of_fingerprints(scan, groups, dtype):
    dictionary, atoms, e, x, q = scan
    x, table = x.to(dtype), dictionary.coefficients.to(dtype.to_real())
    plain = match_fingerprints(x, dictionary, table, groups=groups)
    matcher = JointMatcher(FingerprintAtoms(dictionary, table).table, e, groups)
    for found in (matcher(x, 100 * q, torch.zeros(3)), matcher(x)):
        assert torch.equal(atoms.place[found.atom], plain.atom)
        assert torch.equal(found.pd, plain.pd)


def test_a_contrast_without_weight_does_not_count(scan):
    _, atoms, e, x, q = scan
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    found = JointMatcher(atoms.table, e)(x, q, weights)
    without = JointMatcher(atoms.table, e[:, ::2])(x, q[:, ::2], weights[::2])
    assert torch.equal(found.atom, without.atom)
    assert torch.allclose(found.pd, without.pd, rtol=1e-12)


def test_contrasts_of_great_weight_decide(scan):
    """What they tell of T1 and T2 is then all that is told; the phase still comes from the signal."""
    _, atoms, e, x, _ = scan
    clean = 0.8 * e[::37]
    signal = torch.polar(torch.tensor(1.0), torch.tensor(2.0)).to(x) * atoms.table.atoms[0, 40].expand(
        len(clean), -1
    )
    found = JointMatcher(atoms.table, e)(signal, clean, torch.full((3,), 1e9, dtype=torch.float64))
    assert torch.equal(found.atom, torch.arange(len(e))[::37])
    assert torch.allclose(found.pd.abs(), torch.full((len(clean),), 0.8, dtype=torch.float64), rtol=1e-4)
    inner = (signal * atoms.table.atoms[0, found.atom]).sum(1)
    assert torch.allclose(found.pd.sgn(), inner.sgn())


def test_contrasts_that_are_right_help_where_noise_is_strong(scan):
    dictionary, atoms, e, _, _ = scan
    t1, t2, pd = tissue(400, seed=8)
    x = measured(dictionary, t1, t2, pd) + 0.3 * noise((400, 8))
    q = pd.abs()[:, None] * spin_echo_signal(t1, t2, SpinEchoProtocol())
    matcher = JointMatcher(atoms.table, e, 40)
    error = [
        float((atoms.t2[found.atom] / t2).log().abs().median())
        for found in (matcher(x), matcher(x, q, torch.full((3,), 10.0, dtype=torch.float64)))
    ]
    assert error[1] < 0.3 * error[0]


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("level", [0.0, 0.3, 20.0])
def test_groups_find_the_best_atom_of_all(scan, level, scale):
    _, atoms, e, x, q = scan
    generator = torch.Generator().manual_seed(5)
    q = q + level * torch.randn(q.shape, generator=generator, dtype=torch.float64)
    exact = JointMatcher(atoms.table, e)(x, q, scale * WEIGHTS)
    fast = JointMatcher(atoms.table, e, 50)(x, q, scale * WEIGHTS)
    assert torch.equal(fast.atom, exact.atom)
    assert torch.allclose(fast.pd, exact.pd, rtol=1e-12)


@pytest.mark.parametrize("complex_atoms", [True, False])
@pytest.mark.parametrize("groups", [1, 7, 60, 400])
def test_groups_of_atoms_that_are_not_alike_are_searched_too(complex_atoms, groups):
    """Wide cones, and contrasts of either sign in voxels and atoms alike: angles up to 180 degrees."""
    d, e, x, q = random_case(400, 300, complex_atoms)
    e = e - 0.5
    for weight in (0.01, 1.0, 100.0):
        exact = JointMatcher(d, e)(x, q, weight * WEIGHTS)
        fast = JointMatcher(d, e, groups)(x, q, weight * WEIGHTS)
        assert torch.equal(fast.atom, exact.atom)


def test_a_group_without_a_centre_is_searched():
    """Atoms that cancel have no mean: nothing is known of where their group points."""
    d = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0.9, 0.3, 0.3], [0.9, 0.3, -0.3]], dtype=torch.float64)
    members = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    x = torch.tensor([[1.0, 0.05, 0.0]], dtype=torch.complex128)
    index, _, _ = AtomGroups(d, members).best_of_near_groups(x, 10**6)
    assert index.tolist() == AtomGroups(d, members).best(x, 10**6)[0].tolist() == [0]
    e = torch.tensor([[0.2], [-0.2], [0.1], [0.1]], dtype=torch.float64)
    q = torch.tensor([[0.2]], dtype=torch.float64)
    joint = AtomGroups(d, members, e)
    assert joint.best_of_near_groups(x, 10**6, q)[0].tolist() == joint.best(x, 10**6, q)[0].tolist() == [0]


def test_groups_compare_few_atoms():
    dictionary = make_dictionary(points=(120, 110))
    atoms = FingerprintAtoms(dictionary, dictionary.coefficients)
    e = spin_echo_signal(atoms.t1, atoms.t2, SpinEchoProtocol())
    t1, t2, pd = tissue(500)
    x = measured(dictionary, t1, t2, pd) + 0.02 * noise((500, 8))
    q = pd.abs()[:, None] * spin_echo_signal(t1, t2, SpinEchoProtocol())
    _, _, work = AtomGroups.similar(atoms.table.atoms[0], 128, e).best_of_near_groups(x, 10**7, q)
    assert work < 500 * len(e) / 15


@pytest.mark.parametrize("groups", [0, 40])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_working_set_changes_nothing(scan, groups, dtype):
    dictionary, _, e, x, q = scan
    table = FingerprintAtoms(dictionary, dictionary.coefficients.to(dtype.to_real())).table
    x, q = x.to(dtype), q.to(dtype.to_real())
    matcher = JointMatcher(table, e, groups)
    whole = matcher(x, q, WEIGHTS)
    pieces = matcher(x, q, WEIGHTS, working_set=200_000)
    assert torch.equal(whole.atom, pieces.atom)
    assert torch.allclose(whole.pd, pieces.pd)


def test_single_precision_agrees_but_for_ties(scan):
    dictionary, atoms, e, x, q = scan
    table = FingerprintAtoms(dictionary, dictionary.coefficients.float()).table
    exact = JointMatcher(table, e)(x.to(torch.complex64), q.float(), WEIGHTS)
    fast = JointMatcher(table, e, 64)(x.to(torch.complex64), q.float(), WEIGHTS)
    assert (exact.atom == fast.atom).double().mean() > 0.99
    double = JointMatcher(atoms.table, e)(x, q, WEIGHTS)
    least = objective(x, q, atoms.table.atoms[0, double.atom], e[double.atom], WEIGHTS, double.pd)
    for found in (exact, fast):
        reached = objective(x, q, atoms.table.atoms[0, found.atom], e[found.atom], WEIGHTS, found.pd.to(x))
        assert (reached >= least * (1 - 1e-9)).all()
        assert (reached <= least + 1e-5 * x.abs().square().sum(1)).all()


@pytest.mark.parametrize("groups", [0, 30])
def test_atoms_follow_b1(groups):
    dictionary = make_dictionary((0.8, 1.0, 1.2), points=(40, 36), rank=10)
    atoms = FingerprintAtoms(dictionary, dictionary.coefficients)
    e = spin_echo_signal(atoms.t1, atoms.t2, SpinEchoProtocol())
    t1, t2, pd = tissue(300)
    field = torch.linspace(0.82, 1.18, 300, dtype=torch.float64)
    x = measured(dictionary, t1, t2, pd, field)
    q = pd.abs()[:, None] * spin_echo_signal(t1, t2, SpinEchoProtocol())
    found = JointMatcher(atoms.table, e, groups)(x, q, WEIGHTS, field)
    for step in (0.9, 1.0, 1.1):  # voxels of one step, as if the dictionary held nothing else
        chosen = ((field / FIELD_STEP).round() * FIELD_STEP - step).abs() < FIELD_STEP / 4
        alone = JointMatcher(atoms.table.at(step), e)(x[chosen], q[chosen], WEIGHTS)
        assert torch.equal(found.atom[chosen], alone.atom)
        assert torch.allclose(found.pd[chosen], alone.pd)
    blind = JointMatcher(atoms.table, e, groups)(x, q, WEIGHTS)
    error, unaware = ((atoms.t2[m.atom] / t2).log().abs().median() for m in (found, blind))
    assert error < 0.75 * unaware


def test_fitted_signals_and_contrasts_are_those_of_the_tissue():
    d, e, x, q = random_case()
    matcher = JointMatcher(d, e)
    found = matcher(x, q, WEIGHTS)
    assert torch.equal(matcher.signals(found), found.pd[:, None] * d[found.atom])
    assert torch.equal(matcher.contrasts(found), found.pd.abs()[:, None] * e[found.atom])
    assert JointMatcher(d).contrasts(found).shape == (18, 0)


def test_a_signal_orthogonal_to_all_atoms_leaves_pd_to_the_contrasts():
    d = torch.eye(3, dtype=torch.float64)[:2]
    e = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
    x = torch.tensor([[0, 0, 2j]], dtype=torch.complex128)
    found = JointMatcher(d, e)(x, torch.tensor([[0.6]]), torch.tensor([2.0]))
    assert found.atom.tolist() == [0]
    assert found.pd.tolist() == [pytest.approx(2 * 0.6 / (1 + 2), rel=1e-6)]


def test_atoms_are_laid_out_once_for_all_calls_of_like_weights(monkeypatch):
    dictionary = make_dictionary((0.8, 1.0, 1.2), points=(30, 28))
    atoms = FingerprintAtoms(dictionary, dictionary.coefficients)
    e = spin_echo_signal(atoms.t1, atoms.t2, SpinEchoProtocol())
    t1, t2, pd = tissue(60)
    field = torch.linspace(0.95, 1.04, 60, dtype=torch.float64)
    x, q = measured(dictionary, t1, t2, pd, field), torch.rand(60, 3, dtype=torch.float64)
    made = []
    original = AtomGroups.__init__

    def counted(self, *arguments, **named):
        made.append(self)
        original(self, *arguments, **named)

    monkeypatch.setattr(AtomGroups, "__init__", counted)
    matcher = JointMatcher(atoms.table, e, 20)
    first = matcher(x, q, WEIGHTS, field)
    assert len(made) == 10  # steps of B1 from 0.95 to 1.04
    again = matcher(x, q, WEIGHTS.clone(), field)
    assert len(made) == 10
    assert torch.equal(first.atom, again.atom)
    other = matcher(x, q, 2 * WEIGHTS, field)
    assert len(made) == 20
    assert torch.equal(other.atom, JointMatcher(atoms.table, e, 20)(x, q, 2 * WEIGHTS, field).atom)
    # And back: nothing of the other weights is left over.
    assert torch.equal(matcher(x, q, WEIGHTS, field).atom, first.atom)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": torch.tensor([1.0, -1.0, 1.0])}, "not negative"),
        ({"weights": torch.tensor([1.0, math.nan, 1.0])}, "finite"),
        ({"weights": torch.ones(2)}, "atoms with 3"),
        ({"weights": None}, "both or neither"),
        ({"contrasts": None}, "both or neither"),
        ({"contrasts": torch.ones(18, 2)}, "2 contrasts"),
        ({"field": torch.ones(18)}, "single B1"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    d, e, x, q = random_case()
    with pytest.raises(ValueError, match=says):
        JointMatcher(d, e)(**{"signals": x, "contrasts": q, "weights": WEIGHTS, **change})


def test_tables_that_do_not_fit_are_refused():
    d, e, x, q = random_case()
    with pytest.raises(ValueError, match="9 atoms have contrasts of 8 tissues"):
        JointMatcher(d, e[1:])
    with pytest.raises(ValueError, match="2 field values"):
        FieldTable(d[None], torch.ones(2))
    with pytest.raises(ValueError, match="both atoms and voxels"):
        AtomGroups.consecutive(d, e).best(x, 10**6)
    with pytest.raises(ValueError, match="both atoms and voxels"):
        AtomGroups.consecutive(d).best_of_near_groups(x, 10**6, q)
