"""G at the sampled points is G everywhere, and shared work is the work."""

import threading

import pytest
import torch
from scan_of_ellipses import PROTOCOLS, scan_of_ellipses

from quantitron.recon.operators.sampled_gram import SampledGram
from quantitron.recon.operators.shared_work import share_out
from quantitron.recon.solvers import Subspace

GRID = (3, 4, 5)  # (e, z, y)
CPU = torch.device("cpu")


def _gram(kind, share):
    """(e, r, r, z, y) of some lines: zero at the other points."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(GRID[0], GRID[1], GRID[2], 2, 2, dtype=kind, generator=generator)
    sampled = torch.rand(GRID, generator=generator) < share
    gram = (root @ root.mH) * sampled[..., None, None]
    return gram.permute(0, 3, 4, 1, 2)


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_matrices_are_applied_where_there_are_samples(kind, share):
    gram = _gram(kind, share)
    matrices = SampledGram(gram)
    assert (matrices.points is None) == (share == 1.0)
    spectrum = torch.randn(7, 2, *GRID, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    expected = torch.einsum("elmzy,nmezy->nlezy", gram.to(spectrum), spectrum)
    found = matrices.spread(matrices(matrices.sampled(spectrum)), spectrum.clone())
    torch.testing.assert_close(found, expected)


def test_spreading_is_the_adjoint_of_picking():
    matrices = SampledGram(_gram(torch.float64, 0.3))
    assert matrices.points is not None
    generator = torch.Generator().manual_seed(1)
    spectrum = torch.randn(2, 3, 2, *GRID, dtype=torch.complex128, generator=generator)
    values = torch.randn(2, 3, 2, len(matrices.points), dtype=torch.complex128, generator=generator)
    left = torch.vdot(values.flatten(), matrices.sampled(spectrum).flatten())
    right = torch.vdot(matrices.spread(values, torch.empty_like(spectrum)).flatten(), spectrum.flatten())
    torch.testing.assert_close(left, right)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_shared_work_is_done_once_and_by_single_threads(two_threads):
    done, lock = [], threading.Lock()

    def work(part):
        with lock:
            done.append((part, torch.get_num_threads()))

    share_out(work, range(20), CPU)
    assert sorted(done) == [(part, 1) for part in range(20)]
    assert torch.get_num_threads() == 2


def test_an_error_in_shared_work_is_raised_and_threads_are_given_back(two_threads):
    def work(part):
        if part == 3:
            raise RuntimeError("part three")

    with pytest.raises(RuntimeError, match="part three"):
        share_out(work, range(6), CPU)
    assert torch.get_num_threads() == 2


def test_threads_change_no_bit_of_the_operator():
    problem, *_ = scan_of_ellipses(PROTOCOLS["vfa_gre"], grid=(4, 24, 24), acceleration=6, noise=0.4)
    estimate = Subspace().linear_estimate(problem, lambda doing, share: None)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(estimate.operator(estimate.coefficients))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
