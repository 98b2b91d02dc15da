"""Every operator against its adjoint, and the reduced data term against the one over frames."""

import pytest
import torch

from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient
from quantitron.recon.data import Basis, KSpace
from quantitron.recon.gram import reduce_kspace
from quantitron.recon.operators.coils import CoilOperator
from quantitron.recon.operators.fourier import FourierOperator, centred_fft
from quantitron.recon.operators.reduced_sense import ReducedSense
from quantitron.recon.operators.sampling import SamplingOperator
from quantitron.recon.operators.subspace import OffResonanceOperator, SubspaceOperator

NX, COILS, NZ, NY = 5, 3, 4, 6
CONTRASTS, ECHOES, RANK, COEFFICIENTS = 7, 3, 2, 4
FRAMES = CONTRASTS * ECHOES
ECHO_TIME = torch.tensor([0.002, 0.005, 0.009], dtype=torch.float64)


def _random(*shape, seed=0, dtype=torch.complex128):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _b0():
    return 40 * _random(NX, NZ, NY, seed=5, dtype=torch.float64)


OPERATORS = {
    "fourier": (FourierOperator((-2, -1)), (2, 4, 6), (2, 4, 6)),
    "fourier_odd": (FourierOperator((-1,)), (3, 5), (3, 5)),
    "coils": (CoilOperator(_random(NX, COILS, NZ, NY)), (NX, 2, NZ, NY), (NX, COILS, 2, NZ, NY)),
    "sampling": (SamplingOperator(torch.rand(2, NZ, NY)), (3, 2, NZ, NY), (3, 2, NZ, NY)),
    "subspace": (SubspaceOperator(_random(FRAMES, 4)), (NX, 4, NZ, NY), (NX, FRAMES, NZ, NY)),
    "off_resonance": (
        OffResonanceOperator(_b0(), ECHO_TIME, CONTRASTS),
        (NX, FRAMES, NZ, NY),
        (NX, FRAMES, NZ, NY),
    ),
}
_A, _B = SubspaceOperator(_random(6, 4, seed=1)), SubspaceOperator(_random(6, 4, seed=2))
_F = FourierOperator((-2, -1))
OPERATORS |= {
    "composition": (_F @ _A, (2, 4, NZ, NY), (2, 6, NZ, NY)),
    "sum": (_A + _B, (2, 4, NZ, NY), (2, 6, NZ, NY)),
    "difference_scaled": ((2 - 1j) * _A - _B, (2, 4, NZ, NY), (2, 6, NZ, NY)),
    "adjoint": ((_F @ _A).H, (2, 6, NZ, NY), (2, 4, NZ, NY)),
    "gram": ((_F @ _A).gram, (2, 4, NZ, NY), (2, 4, NZ, NY)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint_and_normal(name):
    operator, domain, codomain = OPERATORS[name]
    x, y = _random(*domain, seed=3), _random(*codomain, seed=4)
    left = torch.vdot(operator.H(y).flatten(), x.flatten())
    right = torch.vdot(y.flatten(), operator(x).flatten())
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.gram(x), operator.H(operator(x)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.H.H(x), operator(x))


def test_algebra_is_what_it_says():
    x = _random(2, 4, NZ, NY)
    torch.testing.assert_close((_A + _B)(x), _A(x) + _B(x))
    torch.testing.assert_close((_A - 3j * _B)(x), _A(x) - 3j * _B(x))
    torch.testing.assert_close((_F @ _A)(x), _F(_A(x)))


def test_fourier_convention():
    """A point at voxel i, i - n/2 voxels from the centre, has the phase exp(-2 pi i k (i - n/2) / n)."""
    n, i = 6, 5
    image = torch.zeros(n, dtype=torch.complex128)
    image[i] = 1
    k = torch.arange(n) - n // 2
    expected = torch.exp(-2j * torch.pi * k * (i - n // 2) / n) / n**0.5
    torch.testing.assert_close(centred_fft(image, (0,)), expected.to(torch.complex128))


def _scan(dtype, complex_basis=False):
    """Lines of random frames, some repeated, with the frame-by-frame operator that measures them."""
    real = torch.float64 if dtype == torch.complex128 else torch.float32
    contrast = torch.linalg.qr(_random(CONTRASTS, RANK, seed=6))[0]
    contrast = contrast.to(dtype) if complex_basis else torch.linalg.qr(contrast.real)[0].to(real)
    basis = Basis(contrast, torch.ones(RANK), 1.0, "dictionary")
    mixing = _random(ECHOES, RANK, COEFFICIENTS, seed=7).to(dtype)
    phi = torch.einsum("wl,elk->wek", contrast.to(dtype), mixing).flatten(0, 1)  # (t, k)
    csm = _random(NX, COILS, NZ, NY, seed=8).to(dtype)
    b0 = _b0().to(real)
    count = torch.randint(0, 3, (FRAMES, NZ, NY), generator=torch.Generator().manual_seed(9)).to(real)
    count *= torch.rand(FRAMES, NZ, NY, generator=torch.Generator().manual_seed(10)) < 0.4
    frames = (
        FourierOperator((-2, -1))
        @ CoilOperator(csm)
        @ OffResonanceOperator(b0, ECHO_TIME, CONTRASTS)
        @ SubspaceOperator(phi)
    )
    operator = SamplingOperator(count.sqrt()) @ frames
    data = _random(NX, COILS, FRAMES, NZ, NY, seed=11).to(dtype) * (count > 0)  # (x, c, t, z, y) means
    t, kz, ky = torch.nonzero(count, as_tuple=True)
    kspace = KSpace(
        samples=data[:, :, t, kz, ky].permute(2, 1, 0).contiguous(),  # (line, c, x)
        contrast=t // ECHOES,
        echo=t % ECHOES,
        slice=torch.zeros_like(t),
        kz=kz,
        ky=ky,
        count=count[t, kz, ky],
        energy=float((data.abs().square() * count).sum(dtype=torch.float64)),
        contrast_shape=(CONTRASTS, 1, ECHOES),
        grid=(1, NZ, NY, NX),
    )
    return kspace, basis, mixing, csm, b0, operator, data * count.sqrt()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.complex64, 1e-5), (torch.complex128, 1e-12)])
@pytest.mark.parametrize("complex_basis", [False, True])
def test_reduced_form_equals_the_frames(dtype, tolerance, complex_basis):
    kspace, basis, mixing, csm, b0, operator, data = _scan(dtype, complex_basis)
    reduced = reduce_kspace(kspace, basis, lines_at_once=13)
    term = ReducedSense(reduced, csm, mixing, b0, ECHO_TIME)
    u = _random(*term.shape, seed=12).to(dtype)

    def relative(value, reference):
        return float(torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference))

    assert relative(term(u), operator.gram(u)) < tolerance
    assert relative(term.adjoint_data(), operator.H(data)) < tolerance
    residual = float((data - operator(u)).abs().square().sum(dtype=torch.float64))
    assert term.residual_energy(u) == pytest.approx(residual, rel=tolerance)
    assert reduced.samples == int(kspace.count.sum()) * COILS * NX
    assert kspace.acquired_samples == reduced.samples


def test_batches_of_readout_positions_change_nothing():
    kspace, basis, mixing, csm, b0, *_ = _scan(torch.complex128)
    reduced = reduce_kspace(kspace, basis)
    u = _random(NX, COEFFICIENTS, NZ, NY)
    one = ReducedSense(reduced, csm, mixing, b0, ECHO_TIME, working_set=1)
    whole = ReducedSense(reduced, csm, mixing, b0, ECHO_TIME)
    torch.testing.assert_close(one(u), whole(u), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(one.adjoint_data(), whole.adjoint_data(), rtol=1e-13, atol=1e-13)


def test_dense_view_holds_each_line_in_its_frame():
    kspace, *_ = _scan(torch.complex64)
    dense = kspace.dense()
    assert dense.shape == (COILS, NX, NY, NZ, CONTRASTS, 1, ECHOES)
    line = 17
    found = dense[:, :, kspace.ky[line], kspace.kz[line], kspace.contrast[line], 0, kspace.echo[line]]
    torch.testing.assert_close(found, centred_fft(kspace.samples[line], (-1,)))
    torch.testing.assert_close(
        dense.abs().square().sum(), kspace.samples.abs().square().sum(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradient_solves_in_as_many_steps_as_unknowns(preconditioned):
    n = 12
    matrix = _random(n, n)
    matrix = matrix.mH @ matrix + torch.diag(torch.logspace(0, 2, n)).to(matrix)
    truth = _random(n, seed=1)
    diagonal = matrix.diagonal().real
    solution = conjugate_gradient(
        lambda x: matrix @ x,
        matrix @ truth,
        start=_random(n, seed=2),
        preconditioner=(lambda r: r / diagonal) if preconditioned else None,
        iterations=3 * n,
        tolerance=1e-12,
    )
    torch.testing.assert_close(solution, truth, rtol=1e-8, atol=1e-8)


def test_conjugate_gradient_stops_at_its_tolerance_and_at_zero():
    residuals = []
    identity_and_a_bit = torch.linspace(1, 2, 50, dtype=torch.float64)
    conjugate_gradient(
        lambda x: identity_and_a_bit * x,
        torch.ones(50, dtype=torch.float64),
        tolerance=1e-3,
        callback=lambda _, residual: residuals.append(residual),
    )
    assert residuals[-1] <= 1e-3 < residuals[-2]
    assert not conjugate_gradient(lambda x: x, torch.zeros(4)).any()
