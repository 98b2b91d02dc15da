"""Images of few components are fitted by what these hold of each signal; what they lack biases nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from scan_of_ellipses import PROTOCOLS as SCANS
from scan_of_ellipses import scan_of_ellipses
from test_match import PROTOCOLS

from quantitron.recon.coefficient_basis import coefficient_basis
from quantitron.recon.coefficient_fit import fit_coefficients
from quantitron.recon.match import fit
from quantitron.recon.signal.models import signal
from quantitron.recon.solvers import Subspace
from quantitron.recon.temporal_basis import dictionary_basis

SHORT = {
    "t1": torch.tensor([1.4, 0.9, 0.6, 0.4, 0.25]),
    "t2": torch.tensor([0.1, 0.06, 0.03, 0.02, 0.012]),
    "t2star": torch.tensor([0.05, 0.04, 0.02, 0.015, 0.008]),
    "inversion": torch.full((5,), 0.95),
    "b0": torch.zeros(5),
}
"""Tissue, and what is shorter than it: tendon, cartilage, iron."""


def quiet(doing: str, share: float) -> None:
    """Progress that nobody sees."""


def components(sequence: str, rank: int | float, copies: int = 1):
    """Signals of SHORT in the components of a small basis, with all that a fit of them takes."""
    protocol = PROTOCOLS[sequence]
    basis = dictionary_basis(protocol, 0.9999)
    few = coefficient_basis(basis, protocol, 3.0, rank)
    truth = {name: values.repeat(copies) for name, values in SHORT.items()}
    pd = torch.polar(torch.linspace(0.5, 2, len(truth["t1"])), torch.linspace(-3, 3, len(truth["t1"])))
    frames = pd[:, None] * signal(truth, protocol)
    v = torch.einsum(
        "vwe,wl->vel",
        frames.unflatten(1, (protocol.contrasts, protocol.echoes)),
        basis.contrast.to(frames.dtype),
    )
    u = torch.einsum("elk,vel->vk", few.mixing.conj(), v)
    return protocol, basis, few, truth, pd, u


def fits(sequence: str, rank: int | float, noise: float = 0.0, copies: int = 1, **settings: Any):
    """The fit of whole signals and the one in the components, and the truth."""
    protocol, basis, few, truth, pd, u = components(sequence, rank, copies)
    generator = torch.Generator().manual_seed(3)
    u = u + noise * torch.randn(u.shape, dtype=u.dtype, generator=generator)
    cut = torch.einsum("elk,vk->vel", few.mixing, u)
    known = {"inversion": truth["inversion"]} if sequence == "t2ir_gre" else None
    whole = fit(cut, basis, protocol, known=known)
    return whole, fit_coefficients(u, whole, basis.contrast, few.mixing, protocol, **settings), truth, pd


def names(sequence: str) -> list[str]:
    return ["t1", "t2", "t2star"] if sequence == "t2ir_gre" else ["t1", "t2star"]


def test_what_components_lack_biases_no_parameter() -> None:
    for sequence in ("t2ir_gre", "vfa_gre"):
        whole, found, truth, pd = fits(sequence, 0.9995)
        errors = {}
        for label, values in (("whole", whole.parameters), ("components", found.parameters)):
            errors[label] = max(float((values[n] / truth[n] - 1).abs().max()) for n in names(sequence))
        assert errors["whole"] > 0.05, "the case is one where fitting whole signals is wrong"
        assert errors["components"] < 2e-3
        torch.testing.assert_close(found.pd, pd, rtol=5e-3, atol=1e-4)
        assert float(found.parameters["b0"].abs().max()) < 0.02


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rank", [5, 12])
def test_noise_scatters_as_the_standard_deviations_say(rank: int, known: bool) -> None:
    """Its level known, or from what the fit of each voxel leaves: of 5 components 4 of 10 numbers."""
    level = 2e-4
    _, found, truth, _ = fits(
        "t2ir_gre", rank, noise=level, copies=400, noise_variance=level**2 if known else None
    )
    for name in ("t1", "t2", "t2star"):
        error = (found.parameters[name] - truth[name]).unflatten(0, (400, 5))[:, :3]
        said = found.standard_deviation[name].unflatten(0, (400, 5))[:, :3]
        ratio = error.square().mean(0).sqrt() / said.square().mean(0).sqrt()
        assert float(ratio.min()) > 0.88, (name, ratio)
        assert float(ratio.max()) < 1.12, (name, ratio)


def test_three_components_tell_no_noise() -> None:
    """As many numbers as unknowns: the fit leaves nothing, which is no certainty."""
    _, found, *_ = fits("t2ir_gre", 3)
    assert bool(found.standard_deviation["t1"].isnan().all())
    _, found, *_ = fits("t2ir_gre", 3, noise_variance=1e-6)
    assert bool((found.standard_deviation["t1"] > 0).all())


def test_chunks_change_nothing_and_a_voxel_without_a_start_harms_no_other() -> None:
    whole, found, *_ = fits("vfa_gre", 5)
    _, pieces, *_ = fits("vfa_gre", 5, chunk=2)
    for name in ("t1", "t2star"):
        torch.testing.assert_close(pieces.parameters[name], found.parameters[name], rtol=1e-5, atol=0)
    protocol, basis, few, _, _, u = components("vfa_gre", 5)
    whole.parameters["t1"][1] = torch.nan
    again = fit_coefficients(u, whole, basis.contrast, few.mixing, protocol)
    others = [0, 2, 3, 4]
    assert bool(again.parameters["t1"][1].isnan())
    torch.testing.assert_close(again.parameters["t1"][others], found.parameters["t1"][others])


@pytest.mark.parametrize("sequence", ["t2ir_gre", "vfa_gre"])
def test_the_maps_of_a_scan_end_in_its_components(sequence: str) -> None:
    """Through a solver: coefficient images that hold short tissue as far as the scan's basis does."""
    protocol = replace(SCANS[sequence], inversion_efficiency=0.95)
    problem, _, mask = scan_of_ellipses(protocol, (1, 24, 24), noise=0.3, coils=2)
    solver = Subspace(rank=9 if sequence == "t2ir_gre" else 5, standard_deviations=True)
    estimate = replace(solver.linear_estimate(problem, quiet), b0=torch.zeros(1, 24, 24))
    kind = torch.arange(mask.numel()).reshape(mask.shape) % 5
    truth = {name: values[kind] for name, values in SHORT.items()}
    frames = mask.flatten()[:, None] * signal({name: t.flatten() for name, t in truth.items()}, protocol)
    v = torch.einsum(
        "vwe,wl->vel",
        frames.unflatten(1, (protocol.contrasts, protocol.echoes)),
        problem.reduced.basis.contrast.to(frames.dtype),
    )
    u = torch.einsum("elk,vel->vk", estimate.basis.mixing.conj(), v)
    u = u.unflatten(0, (1, 24, 24)).permute(2, 3, 0, 1)  # (x, k, z, y)
    maps = solver.maps(estimate, u, problem, quiet)
    for name in names(sequence):
        error = maps.values[name][0][mask] / truth[name][mask] - 1
        assert float(error.abs().max()) < 3e-3, name
        # Images without noise agree with the model; those of this scan would not be free of it.
        assert float((maps.standard_deviation[name][0][mask] / truth[name][mask]).min()) > 1e-3, name
