"""The data term that networks are trained through: value, gradients, and sums of some of the lines."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scan_of_ellipses import PROTOCOLS

from quantitron.recon.data import Basis, KSpace, Protocol
from quantitron.recon.gram import reduce_kspace
from quantitron.recon.operators.frame_data_term import FrameDataTerm
from quantitron.recon.operators.reduced_data_term import ReducedDataTerm
from quantitron.recon.operators.reduced_sense import ReducedSense
from quantitron.recon.operators.subspace import off_resonance_phase
from quantitron.recon.signal.map_model import MapModel
from quantitron.recon.solvers.held_out import split_lines

NX, COILS, CONTRASTS, RANK, COEFFICIENTS = 4, 3, 4, 2, 5
ECHO_TIME = torch.tensor([0.002, 0.005, 0.009], dtype=torch.float64)
ECHOES = len(ECHO_TIME)
WHOLE = slice(0, NX)


def _random(*shape, seed=0, dtype=torch.complex128):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _lines(grid=(4, 6), contrasts=CONTRASTS, echoes=ECHOES, share=0.4) -> KSpace:
    """Random lines, some of them the mean of several acquisitions whose scatter counts in the energy."""
    generator = torch.Generator().manual_seed(1)
    count = torch.randint(1, 4, (contrasts, echoes, *grid), generator=generator).double()
    count *= torch.rand(contrasts, echoes, *grid, generator=generator) < share
    w, e, kz, ky = torch.nonzero(count, as_tuple=True)
    samples, count = _random(len(w), COILS, NX, seed=2), count[w, e, kz, ky]
    energy = float((samples.abs().square() * count[:, None, None]).sum()) + 11.0
    return KSpace(
        samples, w, e, torch.zeros_like(w), kz, ky, count, energy, (contrasts, 1, echoes), (1, *grid, NX)
    )


def _basis(complex_basis=False) -> Basis:
    contrast = _random(CONTRASTS, RANK, seed=3)
    contrast = torch.linalg.qr(contrast if complex_basis else contrast.real)[0]
    return Basis(contrast, torch.ones(RANK), 1.0, "dictionary")


def _operator(grid=(4, 6), basis=None, lines=None):
    """The operator, and the coefficients and coil maps to ask it about: not those that it was made with."""
    kspace = _lines(grid) if lines is None else lines
    operator = ReducedSense(
        reduce_kspace(kspace, basis or _basis()),
        _random(NX, COILS, *grid, seed=4),
        _random(ECHOES, RANK, COEFFICIENTS, seed=5),
        30 * _random(NX, *grid, seed=6).real,
        ECHO_TIME,
    )
    return operator, _random(*operator.shape, seed=7), _random(NX, COILS, *grid, seed=8)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 8), (3, 1)])
@pytest.mark.parametrize("complex_basis", [False, True])
def test_value_is_half_the_residual_less_its_constant(grid, complex_basis):
    operator, u, _ = _operator(grid, _basis(complex_basis))
    value = ReducedDataTerm(operator)(WHOLE, u, operator.csm)
    assert float(value) == pytest.approx(
        0.5 * (operator.residual_energy(u) - operator.energy), rel=1e-12, abs=1e-9
    )
    assert float(ReducedDataTerm(operator)(WHOLE, 0 * u, operator.csm)) == 0
    assert operator.energy == _lines(grid).energy


def test_coil_maps_are_the_given_ones():
    """Other coil maps: the value of an operator that was made with them."""
    operator, u, csm = _operator()
    other = ReducedSense(
        reduce_kspace(_lines(), _basis()),
        csm,
        _random(ECHOES, RANK, COEFFICIENTS, seed=5),
        30 * _random(NX, 4, 6, seed=6).real,
        ECHO_TIME,
    )
    torch.testing.assert_close(other.csm, csm)
    expected = 0.5 * (other.residual_energy(u) - other.energy)
    assert float(ReducedDataTerm(operator)(WHOLE, u, csm)) == pytest.approx(expected, rel=1e-12)
    _, by_coefficients, _ = ReducedDataTerm(operator).value_and_gradients(WHOLE, u, csm)
    torch.testing.assert_close(by_coefficients, other(u) - other.adjoint_data())


@pytest.mark.parametrize("grid", [(4, 6), (3, 7)])
@pytest.mark.parametrize("complex_basis", [False, True])
def test_gradients_are_those_of_differences(grid, complex_basis):
    operator, u, csm = _operator(grid, _basis(complex_basis))
    part = slice(1, 3)
    unknown = [images[part].clone().requires_grad_() for images in (u, csm)]
    gradients = torch.autograd.grad(3.0 * ReducedDataTerm(operator)(part, *unknown), unknown)
    for number, gradient in enumerate(gradients):
        direction = _random(*gradient.shape, seed=9 + number)
        steps = [torch.zeros_like(images) for images in unknown]
        steps[number] = 1e-6 * direction
        with torch.no_grad():
            ahead, behind = (
                float(
                    ReducedDataTerm(operator)(
                        part, unknown[0] + sign * steps[0], unknown[1] + sign * steps[1]
                    )
                )
                for sign in (1, -1)
            )
        slope = float((gradient * direction.conj()).real.sum())
        assert slope == pytest.approx(3.0 * (ahead - behind) / 2e-6, rel=1e-6), number


def test_batches_of_readout_positions_add_up():
    operator, u, csm = _operator()
    value, by_coefficients, by_csm = ReducedDataTerm(operator).value_and_gradients(WHOLE, u, csm)
    parts = [slice(0, 1), slice(1, 3), slice(3, 4)]
    found = [ReducedDataTerm(operator).value_and_gradients(part, u[part], csm[part]) for part in parts]
    assert sum(part[0] for part in found) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(torch.cat([part[1] for part in found]), by_coefficients)
    torch.testing.assert_close(torch.cat([part[2] for part in found]), by_csm)


@pytest.mark.parametrize("complex_basis", [False, True])
def test_coils_worked_on_together_change_nothing(complex_basis):
    operator, u, csm = _operator(basis=_basis(complex_basis))
    part = slice(1, 3)
    one_by_one, all_at_once = (
        ReducedDataTerm(operator, working_set).value_and_gradients(part, u[part], csm[part])
        for working_set in (1, 1_000_000_000)
    )
    assert one_by_one[0] == pytest.approx(all_at_once[0], rel=1e-12)
    for one, other in zip(one_by_one[1:], all_at_once[1:], strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_that_nobody_wants_are_left_out():
    operator, u, csm = _operator()
    term = ReducedDataTerm(operator)
    value, by_coefficients, by_csm = term.value_and_gradients(WHOLE, u, csm)
    for wanted in ((False, False), (True, False), (False, True)):
        found = term.value_and_gradients(WHOLE, u, csm, wanted)
        assert found[0] == pytest.approx(value, rel=1e-12)
        for gradient, expected, asked in zip(found[1:], (by_coefficients, by_csm), wanted, strict=True):
            if asked:
                torch.testing.assert_close(gradient, expected)
            else:
                assert gradient is None


def test_single_precision_is_as_good_as_its_rounding():
    operator, u, csm = _operator()
    kspace = _lines()
    single = ReducedSense(
        reduce_kspace(
            replace(kspace, samples=kspace.samples.to(torch.complex64), count=kspace.count.float()),
            replace(_basis(), contrast=_basis().contrast.float()),
        ),
        operator.csm.to(torch.complex64),
        _random(ECHOES, RANK, COEFFICIENTS, seed=5).to(torch.complex64),
        30 * _random(NX, 4, 6, seed=6).real.float(),
        ECHO_TIME.float(),
    )
    expected = float(ReducedDataTerm(operator)(WHOLE, u, csm))
    found = ReducedDataTerm(single)(WHOLE, u.to(torch.complex64), csm.to(torch.complex64))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------- sums of some of the lines


def test_two_halves_of_the_lines_add_up_to_all():
    kspace, basis = _lines(), _basis()
    operator, u, csm = _operator()
    halves = [
        operator.with_sums(reduce_kspace(part, basis))
        for part in split_lines(kspace, 0.5, torch.Generator().manual_seed(0))
    ]
    value, by_coefficients, by_csm = ReducedDataTerm(operator).value_and_gradients(WHOLE, u, csm)
    found = [ReducedDataTerm(half).value_and_gradients(WHOLE, u, csm) for half in halves]
    assert sum(part[0] for part in found) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(found[0][1] + found[1][1], by_coefficients)
    torch.testing.assert_close(found[0][2] + found[1][2], by_csm)
    assert sum(half.samples for half in halves) == operator.samples
    # Only the scatter of repeated lines about their mean is in no half.
    assert sum(half.energy for half in halves) == pytest.approx(operator.energy - 11.0, rel=1e-12)
    torch.testing.assert_close(halves[0](u) + halves[1](u), operator(u))
    torch.testing.assert_close(sum(half.mean_diagonal() for half in halves), operator.mean_diagonal())


def test_other_sums_leave_the_operator_and_its_basis_as_they_are():
    kspace, basis = _lines(), _basis()
    operator, u, _ = _operator()
    before = operator(u)
    kept, aside = split_lines(kspace, 0.3, torch.Generator().manual_seed(0))
    turned = torch.linalg.qr(_random(COEFFICIENTS, COEFFICIENTS, seed=12))[0]
    mixing = _random(ECHOES, RANK, COEFFICIENTS, seed=5) @ turned
    other = operator.in_basis(mixing).with_sums(reduce_kspace(aside, basis))
    torch.testing.assert_close(operator(u), before, rtol=0, atol=0)
    v = torch.einsum("jk,xkzy->xjzy", turned.mH, u)
    residual = operator.with_sums(reduce_kspace(aside, basis)).residual_energy(u)
    assert other.residual_energy(v) == pytest.approx(residual, rel=1e-10)
    assert len(kept.echo) + len(aside.echo) == len(kspace.echo)


def test_sums_of_another_shape_are_refused():
    operator, *_ = _operator()
    with pytest.raises(ValueError, match=r"sums of shape .* cannot take the place of"):
        operator.with_sums(reduce_kspace(_lines((4, 5)), _basis()))


# --------------------------------------------------------------------------------------------- frame by frame


@pytest.mark.parametrize("sequence", ["vfa_gre", "t2ir_gre", "megre"])
@pytest.mark.parametrize("phase_sign", [1, -1])
def test_frames_of_maps_agree_with_the_reduced_form(sequence, phase_sign):
    """A basis that holds every signal: ||s - M F C I||^2 of the frames is the residual of Phi^H I."""
    protocol: Protocol = replace(PROTOCOLS[sequence], phase_sign=phase_sign)
    if sequence == "t2ir_gre":
        protocol = replace(protocol, excitations=4)
    grid = (3, 4)
    kspace = _lines(grid, protocol.contrasts, protocol.echoes, 0.3)
    kspace = replace(kspace, contrast_shape=protocol.contrast_shape)
    w, e = protocol.contrasts, protocol.echoes
    # Everything: the identity over the contrasts, and over the echoes as well.
    basis = Basis(torch.eye(w, dtype=torch.float64), torch.ones(w), 1.0, "dictionary")
    mixing = torch.eye(w * e, dtype=torch.complex128).reshape(w, e, w * e).transpose(0, 1)  # (e, l, k)
    csm = _random(NX, COILS, *grid, seed=4)
    b0 = 30 * _random(NX, *grid, seed=6).real
    time = torch.tensor(protocol.echo_time, dtype=torch.float64)
    operator = ReducedSense(reduce_kspace(kspace, basis), csm, mixing, b0, time, phase_sign)

    voxels = NX * grid[0] * grid[1]
    model = MapModel(protocol, basis.contrast, mixing, torch.linspace(0.8, 1.0, voxels).double())
    typical = {"amplitude": 0.0, "phase": 0.0, "b0": 0.0, "t1": math.log(1.0)}
    start = [typical.get(name, math.log(0.06)) for name in model.names]
    spread = [{"phase": 2.0, "b0": 10.0}.get(name, 0.4) for name in model.names]
    theta = torch.tensor(start, dtype=torch.float64) + torch.tensor(spread, dtype=torch.float64) * _random(
        voxels, len(start), seed=10, dtype=torch.float64
    )
    theta.requires_grad_()
    signal = model.frames(theta)  # (v, w, e)
    assert signal.shape == (voxels, w, e)
    assert model.out_of_subspace(theta) < 1e-12
    frames = signal.reshape(NX, *grid, w, e).permute(0, 3, 4, 1, 2)
    phase = off_resonance_phase(b0, time, phase_sign).to(frames)
    frames = (frames * phase[:, None]).flatten(1, 2)
    by_frames = FrameDataTerm(kspace).l2(frames, csm, torch.arange(NX))
    u = model.coefficients(theta).reshape(NX, *grid, -1).permute(0, 3, 1, 2)
    reduced = ReducedDataTerm(operator)(WHOLE, u, csm)
    assert float(by_frames.detach()) == pytest.approx(
        2 * float(reduced.detach()) + operator.energy, rel=1e-12
    )
    slopes = [torch.autograd.grad(term, theta)[0] for term in (0.5 * by_frames, reduced)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-9 * float(slopes[1].abs().max()))
