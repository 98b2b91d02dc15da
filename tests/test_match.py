"""Matching and refinement recover the parameters that made the signal, and say how sure they are."""

import math

import pytest
import torch

from quantitron.recon.data import Protocol
from quantitron.recon.match import best_atom, fit
from quantitron.recon.refine import Refinement
from quantitron.recon.signal import projected
from quantitron.recon.signal.models import CONTRAST_PARAMETERS, signal
from quantitron.recon.temporal_basis import dictionary_basis

PROTOCOLS = {
    "vfa_gre": Protocol(
        "vfa_gre", tuple(0.002 + 0.003 * e for e in range(8)), (0.046,),
        tuple(math.radians(a) for a in (5, 10, 20, 40)),
    ),
    "t2ir_gre": Protocol(
        "t2ir_gre", (0.0045, 0.0112, 0.0179, 0.0246), (0.03,), (0.1745,), (0.025, 0.05, 0.09), (), 25
    ),
    "megre": Protocol("megre", (0.0049, 0.0074), (0.4,), (1.0,)),
}  # fmt: skip


def _voxels(protocol, n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    truth = {
        "t1": uniform(0.4, 4),
        "t2": uniform(0.03, 0.4),
        "inversion": uniform(0.7, 0.98),
        "t2star": uniform(0.01, 0.12),
        "b0": uniform(-15, 15),
    }
    pd = torch.randn(n, dtype=torch.complex64, generator=generator)
    frames = pd[:, None] * signal(truth, protocol)
    return truth, pd, frames.unflatten(1, (protocol.contrasts, protocol.echoes))  # (v, w, e)


def _project(frames, basis):
    return torch.einsum("vwe,wl->vel", frames, basis.contrast.to(frames.dtype))


@pytest.mark.parametrize("sequence", PROTOCOLS)
@pytest.mark.parametrize("rank", [0.9999, 1.0])
def test_noise_free_signals_give_their_parameters_off_the_grid(sequence, rank):
    protocol = PROTOCOLS[sequence]
    basis = dictionary_basis(protocol, rank if rank < 1 else protocol.contrasts)
    truth, pd, frames = _voxels(protocol)
    result = fit(_project(frames, basis), basis, protocol)
    for name in (*CONTRAST_PARAMETERS[sequence], "t2star"):
        torch.testing.assert_close(result.parameters[name], truth[name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(result.parameters["b0"], truth["b0"], rtol=0, atol=0.02)
    torch.testing.assert_close(result.pd, pd, rtol=3e-3, atol=1e-4)


def test_memory_options_change_nothing():
    protocol = PROTOCOLS["vfa_gre"]
    basis = dictionary_basis(protocol, 3)
    _, _, frames = _voxels(protocol, 100)
    frames = frames + 0.02 * torch.randn(
        frames.shape, dtype=frames.dtype, generator=torch.Generator().manual_seed(1)
    )
    whole, pieces = (fit(_project(frames, basis), basis, protocol, chunk=chunk) for chunk in (16384, 17))
    for name, values in whole.parameters.items():
        torch.testing.assert_close(pieces.parameters[name], values, rtol=1e-4, atol=1e-4)
    signals, atoms = torch.randn(50, 4, dtype=torch.complex64), torch.randn(30, 4)
    assert torch.equal(best_atom(signals, atoms)[0], best_atom(signals, atoms, working_set=1)[0])


def test_best_atom_is_the_least_squares_choice():
    generator = torch.Generator().manual_seed(2)
    signals = torch.randn(20, 5, dtype=torch.complex128, generator=generator)
    atoms = torch.randn(15, 5, dtype=torch.complex128, generator=generator)
    index, pd = best_atom(signals, atoms)
    factors = (signals @ atoms.mH) / atoms.abs().square().sum(1)  # the best PD of every pair
    errors = (signals[:, None] - factors[:, :, None] * atoms).abs().square().sum(2)
    assert torch.equal(index, errors.argmin(1))
    torch.testing.assert_close(pd, factors.gather(1, index[:, None])[:, 0])


@pytest.mark.parametrize("sequence", ["vfa_gre", "t2ir_gre"])
def test_standard_deviations_are_those_of_repeated_noise(sequence):
    """Monte Carlo: many noisy copies of one voxel scatter as the Cramer-Rao bound says."""
    protocol = PROTOCOLS[sequence]
    basis = dictionary_basis(protocol, protocol.contrasts)
    truth = {"t1": 1.1, "t2": 0.07, "inversion": 0.85, "t2star": 0.05, "b0": 3.0}
    frames = signal({name: torch.full((3000,), value) for name, value in truth.items()}, protocol)
    noise = torch.randn(frames.shape, dtype=frames.dtype, generator=torch.Generator().manual_seed(3))
    frames = frames + frames.abs().max() / 60 * noise
    result = fit(
        _project(frames.unflatten(1, (protocol.contrasts, protocol.echoes)), basis),
        basis,
        protocol,
        iterations=20,
    )
    for name in (*CONTRAST_PARAMETERS[sequence], "t2star"):
        if name == "inversion":
            continue  # its upper bound of 1 cuts the scatter
        scatter = result.parameters[name].std()
        predicted = result.standard_deviation[name].median()
        assert float(predicted / scatter) == pytest.approx(1, abs=0.12), name


@pytest.mark.parametrize("complex_basis", [False, True])
@pytest.mark.parametrize("sequence", PROTOCOLS)
def test_closed_forms_are_the_derivatives_of_the_signal(sequence, complex_basis):
    protocol = PROTOCOLS[sequence]
    truth, _, _ = _voxels(protocol, 30)
    truth = {name: values.double() for name, values in truth.items()}
    basis = dictionary_basis(protocol, min(3, protocol.contrasts)).contrast.double()
    if complex_basis:
        basis = basis * torch.exp(0.7j * torch.arange(basis.numel(), dtype=torch.float64)).view_as(basis)
    expected, slopes = projected.differentiated(truth, protocol, basis)
    found, found_slopes = projected.projected_signal(truth, protocol, basis)
    torch.testing.assert_close(found, expected)
    assert set(found_slopes) == set(slopes) == set(CONTRAST_PARAMETERS[sequence])
    for name, slope in slopes.items():
        torch.testing.assert_close(found_slopes[name], slope, msg=name)


@pytest.mark.parametrize("sequence", PROTOCOLS)
def test_a_sequence_without_a_closed_form_is_fitted_alike(sequence, monkeypatch):
    protocol = PROTOCOLS[sequence]
    basis = dictionary_basis(protocol, min(4, protocol.contrasts))
    _, _, frames = _voxels(protocol, 60)
    coefficients = _project(frames, basis).to(torch.complex128)
    with_closed_form = fit(coefficients, basis, protocol)
    monkeypatch.setattr(projected, "CLOSED_FORMS", {})
    without = fit(coefficients, basis, protocol)
    for name, values in without.parameters.items():
        torch.testing.assert_close(with_closed_form.parameters[name], values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sequence", PROTOCOLS)
def test_normal_equations_are_those_of_the_residual_with_pd_refitted(sequence):
    """The factored products against automatic differentiation of the whole residual."""
    protocol = PROTOCOLS[sequence]
    basis = dictionary_basis(protocol, min(4, protocol.contrasts))
    psi = basis.contrast.double()
    truth, _, frames = _voxels(protocol, 3)
    measured = torch.einsum("vwe,wl->elv", frames.to(torch.complex128), psi.to(torch.complex128))
    measured = measured + 0.1 * torch.randn(
        measured.shape, dtype=measured.dtype, generator=torch.Generator().manual_seed(4)
    )
    names = [*CONTRAST_PARAMETERS[sequence], "t2star", "b0"]
    logarithmic = [name in ("t1", "t2", "t2star") for name in names]
    theta = torch.stack(
        [
            truth[n].double().log() if log else truth[n].double()
            for n, log in zip(names, logarithmic, strict=True)
        ]
    )
    state = Refinement(protocol, psi, frozenset())._evaluate(theta, {"signal": measured})

    def model(theta):
        values = {n: row.exp() if log else row for n, row, log in zip(names, theta, logarithmic, strict=True)}
        frames = signal(values, protocol).unflatten(1, (protocol.contrasts, protocol.echoes))
        return torch.einsum("vwe,wl->elv", frames, psi.to(torch.complex128))

    def residual(theta):
        m = model(theta)
        pd = (m.conj() * measured).sum((0, 1)) / m.abs().square().sum((0, 1))
        return measured - pd * m

    torch.testing.assert_close(state.cost, residual(theta).abs().square().sum((0, 1)))
    inner = theta.clone().requires_grad_()
    (slope,) = torch.autograd.grad(residual(inner).abs().square().sum(), inner)
    torch.testing.assert_close(state.gradient, -slope / 2)
    # Kaufman's Jacobian: PD m' with its part along m taken out.
    jacobian = torch.autograd.functional.jacobian(lambda theta: torch.view_as_real(model(theta)), theta)
    for voxel in range(3):
        columns = jacobian[:, :, voxel, :, :, voxel].movedim(2, -1).contiguous()
        columns = torch.view_as_complex(columns).flatten(0, 1)  # (e l, p)
        m = model(theta)[:, :, voxel].flatten()
        columns = state.pd[voxel] * (columns - m[:, None] * (m.conj() @ columns) / m.abs().square().sum())
        normal = (columns.mH @ columns).real
        count = len(names) - 2
        torch.testing.assert_close(normal[:count, :count], state.contrast_normal[:, :, voxel])
        torch.testing.assert_close(normal[count:, count:], torch.diag(state.echo_normal[:, voxel]))
        torch.testing.assert_close(
            normal[:count, count:],
            torch.zeros(count, 2).double(),
            rtol=0,
            atol=1e-9 * float(normal.abs().max()),
        )


def test_steps_may_begin_at_given_parameters_and_keep_what_is_known():
    protocol = PROTOCOLS["t2ir_gre"]
    basis = dictionary_basis(protocol, 6)
    truth, _, frames = _voxels(protocol, 50)
    coefficients = _project(frames, basis)
    start = {name: values * 1.1 for name, values in truth.items()}
    result = fit(coefficients, basis, protocol, start=start, known={"inversion": truth["inversion"]})
    assert torch.equal(result.parameters["inversion"], truth["inversion"])
    assert not result.standard_deviation["inversion"].any()
    for name in ("t1", "t2", "t2star"):
        torch.testing.assert_close(result.parameters[name], truth[name], rtol=1e-3, atol=1e-5)
    untouched = fit(coefficients, basis, protocol, start=start, iterations=0)
    torch.testing.assert_close(untouched.parameters["t1"], start["t1"])


def test_no_voxels_and_empty_voxels():
    protocol = PROTOCOLS["vfa_gre"]
    basis = dictionary_basis(protocol, 3)
    assert len(fit(torch.zeros(0, 8, 3, dtype=torch.complex64), basis, protocol).pd) == 0
    result = fit(torch.zeros(2, 8, 3, dtype=torch.complex64), basis, protocol)
    assert not result.pd.any()
