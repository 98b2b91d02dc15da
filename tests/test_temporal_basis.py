import pytest
import torch

from quantitron.recon.data import KSpace, Navigator, Protocol
from quantitron.recon.gram import GramSum, reduce_kspace
from quantitron.recon.signal.dictionary import contrast_dictionary
from quantitron.recon.temporal_basis import centre_basis, dictionary_basis, measured_basis

VFA = Protocol("vfa_gre", (0.002, 0.005, 0.008), (0.046,), (0.09, 0.17, 0.35, 0.52, 0.70))
T2IR = Protocol("t2ir_gre", (0.0045, 0.011), (0.03,), (0.17,), (0.025, 0.05, 0.09), (), 30)


@pytest.mark.parametrize("protocol", [VFA, T2IR])
@pytest.mark.parametrize("rank", [3, 0.9999])
def test_dictionary_basis_keeps_the_energy_that_it_reports(protocol, rank):
    basis = dictionary_basis(protocol, rank)
    atoms = contrast_dictionary(protocol).atoms
    atoms = atoms / atoms.norm(dim=1, keepdim=True)
    columns = basis.contrast.double()
    torch.testing.assert_close(columns.T @ columns, torch.eye(basis.rank).double(), atol=1e-5, rtol=0)
    kept = (atoms @ columns).square().sum() / len(atoms)
    assert float(kept) == pytest.approx(basis.retained_energy, abs=1e-6)
    if isinstance(rank, float):
        assert basis.retained_energy >= rank
        assert dictionary_basis(protocol, basis.rank - 1).retained_energy < rank


def test_rank_above_the_contrasts_is_refused():
    with pytest.raises(ValueError, match="rank 6 is above the 5 contrasts"):
        dictionary_basis(VFA, 6)
    with pytest.raises(ValueError, match="neither"):
        dictionary_basis(VFA, 1.5)


def _navigator(columns, generator):
    weights = torch.randn(columns.shape[1], 2 * 3 * 16, generator=generator, dtype=torch.complex64)
    casorati = (columns.to(torch.complex64) @ weights).reshape(-1, 2, 3, 16)  # (w, e, c, x)
    contrast, echo = torch.meshgrid(torch.arange(len(columns)), torch.arange(2), indexing="ij")
    return Navigator(casorati.flatten(0, 1), contrast.flatten(), echo.flatten())


def test_navigator_and_centre_recover_the_space_that_the_signal_lives_in():
    generator = torch.Generator().manual_seed(1)
    truth = torch.linalg.qr(torch.randn(12, 3, generator=generator))[0]
    navigator = _navigator(truth, generator)
    basis = measured_basis(navigator, 12, 0.99999)
    assert basis.rank == 3
    projector = basis.contrast @ basis.contrast.mH
    torch.testing.assert_close(projector @ truth.to(projector), truth.to(projector), atol=1e-5, rtol=0)
    zeros = torch.zeros(24, dtype=torch.int64)
    kspace = KSpace(
        navigator.samples,
        navigator.contrast,
        navigator.echo,
        zeros,
        zeros,
        zeros,
        torch.ones(24),
        0.0,
        (12, 1, 2),
        (1, 1, 1, 16),
    )
    centre = centre_basis(kspace, 3)
    torch.testing.assert_close(centre.contrast @ centre.contrast.mH, projector, atol=1e-5, rtol=0)


def test_a_contrast_without_navigator_is_named():
    generator = torch.Generator().manual_seed(1)
    navigator = _navigator(torch.eye(6)[:, :2], generator)
    kept = navigator.contrast != 4
    short = Navigator(navigator.samples[kept], navigator.contrast[kept], navigator.echo[kept])
    with pytest.raises(ValueError, match="1 of 6 contrasts"):
        measured_basis(short, 6, 2)


def test_sums_do_not_depend_on_how_lines_are_handed_over():
    generator = torch.Generator().manual_seed(0)
    n, coils, nx, grid = 300, 3, 8, (2, 2, 4, 8)
    samples = torch.randn(n, coils, nx, generator=generator, dtype=torch.complex64)
    index = [torch.randint(0, high, (n,), generator=generator) for high in (5, 3, 2, 2, 4)]
    basis = dictionary_basis(VFA, 3)
    whole = GramSum(basis, grid, 3, coils)
    whole.add(samples, *index)
    pieces = GramSum(basis, grid, 3, coils)
    for start in range(0, n, 7):
        pieces.add(samples[start : start + 7], *(values[start : start + 7] for values in index))
    assert torch.equal(whole.result().projected, pieces.result().projected)
    assert torch.equal(whole.result().gram, pieces.result().gram)
    kspace = KSpace(
        samples,
        index[0],
        index[1],
        index[2],
        index[3],
        index[4],
        torch.ones(n),
        float(samples.abs().square().sum()),
        (5, 1, 3),
        grid,
    )
    reduced = reduce_kspace(kspace, basis)
    torch.testing.assert_close(reduced.projected, whole.result().projected)
    assert reduced.samples == whole.result().samples == n * coils * nx
    assert reduced.energy == pytest.approx(whole.result().energy, rel=1e-5)
