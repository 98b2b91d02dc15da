"""Matching and refinement recover the parameters that made the signal, and say how sure they are."""

import math

import pytest
import torch

from quantitron.recon.data import Protocol
from quantitron.recon.match import best_atom, fit
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


def test_no_voxels_and_empty_voxels():
    protocol = PROTOCOLS["vfa_gre"]
    basis = dictionary_basis(protocol, 3)
    assert len(fit(torch.zeros(0, 8, 3, dtype=torch.complex64), basis, protocol).pd) == 0
    result = fit(torch.zeros(2, 8, 3, dtype=torch.complex64), basis, protocol)
    assert not result.pd.any()
