"""The peers solve the very problem that our solvers solve: conventions of BART and SigPy; the grid search."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient
from quantitron.recon.data import Basis, KSpace
from quantitron.recon.gram import reduce_kspace
from quantitron.recon.operators.fourier import centred_fft
from quantitron.recon.operators.reduced_sense import ReducedSense

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from fair_comparison import best_weight, seconds_to_reach
from peers_bart import Pics, Shuffle, bart_available, bart_pics, llr_factor
from peers_sigpy import SigpyProblem

needs_bart = pytest.mark.skipif(not bart_available(), reason="the program bart is not installed")

SHAPES = [(4, 8, 12), (2, 10, 6), (3, 5, 7)]
"""(z, y, x): lengths that are multiples of 4, even ones that are not, odd ones."""


def problem(shape, fraction=0.6, repeats=True, low_rank=False):
    """Random lines of random coefficients: (lines, csm, phi, our operator)."""
    nz, ny, nx = shape
    contrasts, echoes, coils, rank = 5, 3, 3, 4
    generator = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(*size, dtype=torch.complex64, generator=generator)

    psi = torch.linalg.qr(torch.randn(contrasts, 3, generator=generator))[0]
    mixing = torch.linalg.qr(normal(echoes * 3, rank))[0].reshape(echoes, 3, rank)
    phi = torch.einsum("wl,elk->wek", psi.to(mixing), mixing).flatten(0, 1)
    csm = normal(nx, coils, nz, ny)
    csm = csm / torch.linalg.vector_norm(csm, dim=1, keepdim=True)
    coefficients = normal(nx, rank, nz, ny)
    if low_rank:
        coefficients[:] = (1 + coefficients[:, :1].real) * torch.tensor([1, 0.5, 0.2, 0.1])[:, None, None]
    frames = torch.einsum("tk,xkzy->txzy", phi, coefficients)
    hybrid = centred_fft(frames[:, :, None] * csm, (3, 4))  # (t, x, c, z, y)
    sampled = torch.rand(len(phi), nz, ny, generator=generator) < fraction
    sampled[:, 0, 0] = False  # see Shuffle
    t, kz, ky = sampled.nonzero(as_tuple=True)
    samples = hybrid[t, :, :, kz, ky].transpose(1, 2).contiguous()
    samples = samples + 0.3 * normal(*samples.shape)
    count = torch.randint(1, 3, (len(t),), generator=generator).float() if repeats else torch.ones(len(t))
    energy = float((samples.abs().square().sum((1, 2)) * count).sum())
    lines = KSpace(
        samples, t // echoes, t % echoes, t * 0, kz, ky, count, energy, (contrasts, 1, echoes), (1, *shape)
    )
    basis = Basis(psi, torch.ones(3) / 3, 1.0, "dictionary")
    return lines, csm, phi, ReducedSense(reduce_kspace(lines, basis), csm, mixing)


def ridge(operator, weight):
    return conjugate_gradient(
        lambda u: operator(u) + weight * u, operator.adjoint_data(), iterations=200, tolerance=1e-7
    )


def distance(image, reference):
    return float(torch.linalg.vector_norm(image - reference) / torch.linalg.vector_norm(reference))


def objective(operator, image, weight, kind):
    """1/2 ||s - A U||^2 without its constant, and total variation with periodic ends."""
    flat = image.flatten()
    data = 0.5 * torch.vdot(flat, operator(image).flatten()) - torch.vdot(
        flat, operator.adjoint_data().flatten()
    )
    differences = torch.stack([image - image.roll(1, axis) for axis in (0, 2, 3)]).abs()
    if kind == "anisotropic":
        variation = differences.sum()
    else:
        squared = differences.square().sum(0)
        variation = (squared.sum(1) if kind == "TJ" else squared).sqrt().sum()
    return float(data.real) + weight * float(variation)


@needs_bart
@pytest.mark.parametrize("shape", SHAPES)
def test_bart_solves_our_least_squares(shape):
    lines, csm, phi, operator = problem(shape)
    ours = ridge(operator, 0.05)
    with Pics(lines, csm, phi) as pics:
        assert distance(pics(None, 0.05, 150)[0], ours) < 1e-5
    with Shuffle(lines, csm, phi) as shuffle:
        assert distance(shuffle(None, 0.05, 200)[0], ours) < 1e-4


@needs_bart
def test_bart_returns_a_fully_sampled_object():
    lines, csm, phi, operator = problem((4, 16, 12), fraction=2.0, repeats=False)
    truth = ridge(operator, 0.0)
    assert distance(bart_pics(lines, csm, phi, None, 0.0, 30)[0], truth) < 1e-5


@needs_bart
@pytest.mark.parametrize("kind", ["T", "TJ"])
def test_bart_total_variation_is_the_one_we_state(kind):
    """Both programs end at the same image, and nothing near it is better: weights mean what we say."""
    lines, csm, phi, operator = problem((4, 12, 8))
    weight = 0.4
    with Pics(lines, csm, phi) as pics, Shuffle(lines, csm, phi) as shuffle:
        image = pics(kind, weight, 250)[0]
        other = shuffle(kind, weight, 250, rho=0.5)[0]
    assert distance(other, image) < 1e-3
    least = objective(operator, image, weight, kind)
    generator = torch.Generator().manual_seed(0)
    smooth = image.mean((0, 2, 3), keepdim=True) - image
    trials = [0.01 * image, -0.01 * image, 0.02 * smooth, -0.02 * smooth]
    trials += [0.05 * torch.randn(image.shape, dtype=image.dtype, generator=generator) for _ in range(2)]
    assert all(objective(operator, image + trial, weight, kind) > least for trial in trials)


@needs_bart
def test_bart_low_rank_is_the_threshold_we_state():
    """Where FISTA has converged, its image v = x - step * gradient(x) and x = threshold(v)."""
    lines, csm, phi, operator = problem((4, 16, 12), low_rank=True)
    weight, step, block = 0.3, 0.45, 4
    with Pics(lines, csm, phi) as pics:
        ended = pics("L", weight, 200, block=block, step=step, random_shifts=False)[0]
    nx, rank, nz, ny = ended.shape
    blocks = ended.reshape(nx // block, block, rank, nz // block, block, ny // block, block)
    blocks = blocks.permute(0, 3, 5, 1, 4, 6, 2).reshape(-1, block**3, rank)
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    values = (values - step * weight * llr_factor((nz, ny, nx), rank, block)).clamp_min(0)
    assert 0.05 < float((values == 0).float().mean()) < 0.95  # the threshold bites, and not everywhere
    image = (left * values[:, None]) @ right
    image = image.reshape(nx // block, nz // block, ny // block, block, block, block, rank)
    image = image.permute(0, 3, 6, 1, 4, 2, 5).reshape(nx, rank, nz, ny)
    assert distance(image - step * (operator(image) - operator.adjoint_data()), ended) < 1e-4


@needs_bart
def test_both_programs_of_bart_agree_on_low_rank():
    lines, csm, phi, _ = problem((8, 8, 8), repeats=False, low_rank=True)
    with Pics(lines, csm, phi) as pics, Shuffle(lines, csm, phi) as shuffle:
        one = pics("L", 0.05, 200, step=0.9)[0]  # a single block, which no shift changes
        other = shuffle("L", 0.05, 200, step=0.9)[0]
    assert distance(other, one) < 1e-4


@needs_bart
def test_failures_of_bart_are_told():
    lines, csm, phi, _ = problem((4, 8, 8))
    with Pics(lines, csm, phi) as pics, pytest.raises(RuntimeError, match="bart pics"):
        pics("L", 0.1, 2, rho="nonsense")


def test_shapes_that_do_not_fit_are_refused():
    lines, csm, phi, _ = problem((4, 8, 8))
    with pytest.raises(ValueError, match="csm is"):
        Pics(lines, csm[1:], phi)
    with pytest.raises(ValueError, match="phi has"):
        Shuffle(lines, csm, phi[1:])
    with pytest.raises(ValueError, match="slices"):
        SigpyProblem(replace(lines, grid=(2, *lines.grid[1:])), csm, phi)


@pytest.mark.parametrize("shape", SHAPES)
def test_sigpy_solves_our_least_squares(shape):
    lines, csm, phi, operator = problem(shape)
    image, seconds = SigpyProblem(lines, csm, phi)(None, 0.05, 100)
    assert seconds > 0
    assert distance(image, ridge(operator, 0.05)) < 1e-4


def test_sigpy_total_variation_is_the_one_we_state():
    lines, csm, phi, operator = problem((4, 8, 8))
    peer = SigpyProblem(lines, csm, phi)
    weight = 0.4
    image = peer("T", weight, 1500)[0]
    other = peer("T", weight, 150, solver="ADMM")[0]
    assert distance(other, image) < 1e-2
    least = objective(operator, image, weight, "anisotropic")
    for trial in (0.02 * image, -0.02 * image, 0.05 * image.roll(1, 0)):
        assert objective(operator, image + trial, weight, "anisotropic") > least


def test_grid_search_finds_the_minimum_also_beyond_its_grid():
    def run(weight):
        return weight, weight / 10

    for goal in (0.3, 30.0, 0.01):

        def score(weight, goal=goal):
            return abs(math.log(weight / goal))

        weight, error, seconds = best_weight(run, [0.1, 0.4, 1.6], score)
        assert error == score(weight) <= math.log(4) / 4 + 1e-9
        assert seconds == weight / 10
    with pytest.raises(ValueError, match="ascending"):
        best_weight(run, [1.0, 0.1], lambda weight: weight)
    with pytest.raises(ValueError, match="no weight"):
        best_weight(run, [0.1, 1.0], lambda weight: math.nan)


def test_time_at_equal_error():
    def run(iterations):
        return 1 / iterations, 0.5 * iterations

    assert seconds_to_reach(run, lambda error: error, 0.2, [1, 4, 8]) == (8, 4.0, 0.125)
    assert seconds_to_reach(run, lambda error: error, 0.01, [1, 4, 8]) is None
