"""Maps as unknowns: their coefficients, derivatives, and the share of the signal outside the basis."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from quantitron.recon.data import Protocol
from quantitron.recon.signal.dictionary import PARAMETER_RANGE
from quantitron.recon.signal.map_model import MapModel, normal_blocks, pull_back, push_forward
from quantitron.recon.signal.models import CONTRAST_PARAMETERS, SEQUENCES, signal
from quantitron.recon.signal.projected import projected_signal

ECHOES = (0.003, 0.009, 0.018)
PROTOCOLS = {
    "vfa_gre": Protocol("vfa_gre", ECHOES, (0.046,), tuple(math.radians(a) for a in (5, 15, 25, 40))),
    "t2ir_gre": Protocol("t2ir_gre", ECHOES, (0.03,), (math.radians(10),), (0.02, 0.07), (), 6),
    "megre": Protocol("megre", ECHOES, (0.4,), (0.5,)),
    "one echo": Protocol("vfa_gre", (0.003,), (0.046,), (0.1, 0.3, 0.6)),
    "fisp_mrf": Protocol("fisp_mrf", (0.002,), (0.012,), (0.2, 0.6, 0.9, 0.4, 0.7), inversion_time=(0.02,)),
    "conjugated": Protocol("t2ir_gre", ECHOES, (0.03,), (0.2,), (0.02, 0.07), (), 4, phase_sign=-1),
}
RANK, VOXELS = 4, 7


def _random(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _model(protocol: Protocol, rank: int = RANK, complex_basis: bool = False, **settings) -> MapModel:
    """Random orthonormal bases: all of the contrasts' space, and ``rank`` columns of their product's."""
    dtype = torch.complex128 if complex_basis else torch.float64
    contrasts, echoes = protocol.contrasts, protocol.echoes
    basis = torch.linalg.qr(_random(0, contrasts, contrasts, dtype=dtype)).Q  # (w, l)
    columns = min(rank, contrasts * echoes)
    mixing = torch.linalg.qr(_random(1, echoes * contrasts, columns, dtype=torch.complex128)).Q
    if "inversion" in CONTRAST_PARAMETERS[protocol.sequence] and "inversion" not in settings:
        settings["inversion"] = torch.linspace(0.8, 1.0, VOXELS, dtype=torch.float64)
    return MapModel(protocol, basis, mixing.reshape(echoes, contrasts, columns), **settings)


def _theta(model: MapModel, dtype=torch.float64):
    """Tissue of all kinds, (v, p)."""
    ramp = torch.linspace(0, 1, VOXELS, dtype=torch.float64)
    columns = {
        "amplitude": 0.5 + ramp,
        "phase": 7 * ramp - 3,
        "t1": (0.4 + 3 * ramp.flip(0)).log(),
        "t2": (0.03 + 0.3 * ramp.square()).log(),
        "t2star": (0.01 + 0.08 * ramp).log(),
        "b0": 6 * ramp - 2,
    }
    return torch.stack([columns[name] for name in model.names], 1).to(dtype)


def _frames(model: MapModel, theta):
    """I (v, t), all frames formed."""
    values = dict(zip(model.names, theta.T, strict=True))
    amplitude = torch.polar(values["amplitude"].exp(), values["phase"])
    parameters = {name: column.exp() for name, column in values.items() if name in ("t1", "t2", "t2star")}
    if model.inversion is not None:
        parameters["inversion"] = model.inversion
    if model.protocol.echoes == 1:  # T2* and b0 are part of the amplitude
        parameters["t2star"], parameters["b0"] = torch.full_like(theta[:, 0], math.inf), 0 * theta[:, 0]
    else:
        parameters["b0"] = values["b0"]
    return amplitude[:, None] * signal(parameters, model.protocol)


def _phi(model: MapModel):
    """Phi (t, k)."""
    return torch.einsum("wl,elk->wek", model.basis.to(torch.complex128), model.mixing).flatten(0, 1)


cases = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


def test_every_sequence_is_tested():
    assert {protocol.sequence for protocol in PROTOCOLS.values()} == set(SEQUENCES)


@cases
@pytest.mark.parametrize("complex_basis", [False, True])
def test_coefficients_are_the_frames_in_the_basis(protocol, complex_basis):
    model = _model(protocol, complex_basis=complex_basis)
    theta = _theta(model)
    torch.testing.assert_close(model.coefficients(theta), _frames(model, theta) @ _phi(model).conj())


@cases
@pytest.mark.parametrize("complex_basis", [False, True])
def test_jacobian_is_that_of_finite_differences(protocol, complex_basis):
    model = _model(protocol, complex_basis=complex_basis)
    theta, step = _theta(model), 1e-6
    u, jacobian = model.jacobian(theta)
    assert jacobian.shape == (VOXELS, len(model.names), u.shape[1])
    torch.testing.assert_close(u, model.coefficients(theta))
    for number in range(len(model.names)):
        shift = torch.zeros_like(theta)
        shift[:, number] = step
        slope = (model.coefficients(theta + shift) - model.coefficients(theta - shift)) / (2 * step)
        torch.testing.assert_close(jacobian[:, number], slope, rtol=1e-7, atol=1e-8)


@cases
def test_autograd_is_that_of_finite_differences(protocol):
    model = _model(protocol)
    theta = _theta(model).requires_grad_()
    assert torch.autograd.gradcheck(model.coefficients, (theta,))
    wanted = _random(3, VOXELS, model.mixing.shape[2], dtype=torch.complex128)
    model.coefficients(theta).sub(wanted).abs().square().sum().mul(0.5).backward()
    u, jacobian = model.jacobian(theta)
    torch.testing.assert_close(theta.grad, pull_back(jacobian, u - wanted))


@pytest.mark.parametrize("sequence", ["vfa_gre", "t2ir_gre"])
def test_slopes_are_those_of_the_projected_signal(sequence):
    """One echo and no mixing: U = A p, and a slope by log T is T times the slope by T."""
    protocol = replace(PROTOCOLS[sequence], echo_time=(0.003,))
    model = _model(protocol)
    eye = torch.eye(protocol.contrasts, dtype=torch.complex128)[None]
    model = replace(model, mixing=eye)
    theta = _theta(model)
    u, jacobian = model.jacobian(theta)
    values = dict(zip(model.names, theta.T, strict=True))
    parameters = {name: values[name].exp() for name in model.times}
    if model.inversion is not None:
        parameters["inversion"] = model.inversion
    p, slopes = projected_signal(parameters, protocol, model.basis)  # (l, v)
    amplitude = torch.polar(values["amplitude"].exp(), values["phase"])
    torch.testing.assert_close(u, (amplitude * p).T)
    for number, name in enumerate(model.names):
        if name in model.times:
            torch.testing.assert_close(jacobian[:, number], (amplitude * parameters[name] * slopes[name]).T)


@cases
def test_products_with_the_jacobian(protocol):
    model = _model(protocol)
    _, jacobian = model.jacobian(_theta(model))
    voxels, unknowns, rank = jacobian.shape
    step, outer = _random(4, voxels, unknowns), _random(5, voxels, rank, dtype=torch.complex128)
    weight = _random(6, rank).square()
    torch.testing.assert_close(push_forward(jacobian, step), torch.einsum("vpk,vp->vk", jacobian, step + 0j))
    torch.testing.assert_close(
        pull_back(jacobian, outer), torch.einsum("vpk,vk->vp", jacobian.conj(), outer).real
    )
    torch.testing.assert_close(
        normal_blocks(jacobian, weight),
        torch.einsum("vpk,k,vqk->vpq", jacobian.conj(), weight + 0j, jacobian).real,
    )


@cases
def test_times_stay_in_their_range_and_all_else_is_free(protocol):
    model = _model(protocol)
    low, high = model.limits(_theta(model))
    for name, least, most in zip(model.names, low.tolist(), high.tolist(), strict=True):
        if name in model.times:
            assert (math.exp(least), math.exp(most)) == pytest.approx(PARAMETER_RANGE[name])
        else:
            assert (least, most) == (-math.inf, math.inf)


def test_names_are_those_of_the_sequence():
    names = {key: _model(protocol).names for key, protocol in PROTOCOLS.items()}
    assert names["vfa_gre"] == ("amplitude", "phase", "t1", "t2star", "b0")
    assert names["t2ir_gre"] == ("amplitude", "phase", "t1", "t2", "t2star", "b0")
    assert names["megre"] == ("amplitude", "phase", "t2star", "b0")
    assert names["one echo"] == ("amplitude", "phase", "t1")


def test_a_unit_of_off_resonance_turns_the_last_echo_by_one_radian():
    model = _model(PROTOCOLS["megre"])
    units = model.units(_theta(model))
    assert units.tolist()[:3] == [1, 1, 1]
    assert 2 * math.pi * float(units[3]) * max(ECHOES) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------- limit cases


def test_long_times_give_an_echo_train_without_decay():
    model = _model(PROTOCOLS["megre"], rank=3)
    theta = _theta(model)
    theta[:, 2], theta[:, 3] = math.log(1e6), 0
    frames = model.coefficients(theta) @ _phi(model).T
    steady = torch.polar(theta[:, 0].exp(), theta[:, 1])[:, None].expand_as(frames)
    torch.testing.assert_close(frames, steady, rtol=1e-6, atol=0)


def test_off_resonance_turns_the_echoes_and_the_sign_is_the_protocols():
    for sign in (1, -1):
        model = _model(replace(PROTOCOLS["megre"], phase_sign=sign), rank=3)
        theta = torch.zeros(1, 4, dtype=torch.float64)
        theta[:, 3] = 20.0
        frames = (model.coefficients(theta) @ _phi(model).T)[0]
        turns = torch.tensor([sign * 2 * math.pi * 20 * time for time in ECHOES], dtype=torch.float64)
        torch.testing.assert_close(frames.angle(), turns.sin().atan2(turns.cos()))


def test_an_inversion_that_nobody_gives_is_the_protocols_or_perfect():
    protocol = PROTOCOLS["t2ir_gre"]
    theta = _theta(_model(protocol))

    def coefficients(known, inversion):
        return _model(replace(protocol, inversion_efficiency=known), inversion=inversion).coefficients(theta)

    def all_of(value):
        return torch.full((VOXELS,), value, dtype=torch.float64)

    torch.testing.assert_close(coefficients(None, None), coefficients(None, all_of(1.0)))
    torch.testing.assert_close(coefficients(0.9, None), coefficients(None, all_of(0.9)))
    assert not torch.allclose(coefficients(0.9, None), coefficients(None, None))


# ------------------------------------------------------------------------------- what the basis does not hold


@cases
@pytest.mark.parametrize("rank", [1, 3, 1000])
def test_share_out_of_the_subspace_is_that_of_all_frames(protocol, rank):
    model = _model(protocol, rank=rank)
    theta = _theta(model)
    frames, phi = _frames(model, theta), _phi(model)
    rest = frames - frames @ phi.conj() @ phi.T
    share = float(rest.abs().square().sum() / frames.abs().square().sum())
    assert model.out_of_subspace(theta) == pytest.approx(share, abs=1e-13)
    assert (share < 1e-13) == (phi.shape[0] == phi.shape[1])
    louder = theta.clone()
    louder[:, 0] += 3
    assert model.out_of_subspace(louder) == pytest.approx(share, abs=1e-13)


def test_share_out_of_the_subspace_of_nothing_is_nothing():
    model = _model(PROTOCOLS["vfa_gre"])
    assert model.out_of_subspace(_theta(model)[:0]) == 0.0


# ------------------------------------------------------------------------- batches, precision, other devices


@cases
def test_chunks_and_batches_change_nothing(protocol):
    model = _model(protocol)
    theta = _theta(model)
    whole = model.jacobian(theta)
    for part in zip(whole, replace(model, chunk=3).jacobian(theta), strict=True):
        torch.testing.assert_close(*part, rtol=1e-13, atol=0)
    assert replace(model, chunk=2).out_of_subspace(theta) == pytest.approx(
        model.out_of_subspace(theta), rel=1e-10
    )
    numbers = torch.tensor([5, 0, 2])
    mask = torch.zeros(VOXELS, dtype=torch.bool)
    mask[numbers] = True
    for voxels in (numbers, mask, slice(2, 5)):
        rows = theta[voxels].requires_grad_()
        u = model.of(voxels).coefficients(rows)
        torch.testing.assert_close(u, whole[0][voxels], rtol=1e-13, atol=0)
        u.real.sum().backward()
        torch.testing.assert_close(rows.grad, whole[1][voxels].real.sum(2), rtol=1e-12, atol=1e-12)


@cases
def test_single_precision_follows_the_unknowns(protocol):
    model = _model(protocol)
    u, jacobian = model.jacobian(_theta(model))
    u32, jacobian32 = model.jacobian(_theta(model, torch.float32))
    assert (u32.dtype, jacobian32.dtype) == (torch.complex64, torch.complex64)
    torch.testing.assert_close(u32.to(u), u, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(jacobian32.to(u), jacobian, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@cases
def test_the_device_is_that_of_the_unknowns(protocol):
    model = _model(protocol)
    theta = _theta(model)
    expected = model.jacobian(theta)
    for left, right in zip(model.jacobian(theta.cuda()), expected, strict=True):
        assert left.is_cuda
        torch.testing.assert_close(left.cpu(), right)
    assert model.out_of_subspace(theta.cuda()) == pytest.approx(model.out_of_subspace(theta), abs=1e-12)
