"""The compressed dictionary holds the fingerprints that it says it holds."""

import math
from dataclasses import replace

import pytest
import torch

from quantitron.recon.data import Protocol
from quantitron.recon.signal import fingerprint_dictionary as module
from quantitron.recon.signal.fingerprint_dictionary import ERROR, fingerprint_dictionary
from quantitron.recon.signal.fisp_mrf import contrast_signal

POINTS = 90
PROTOCOL = Protocol(
    "fisp_mrf",
    (0.002,),
    (0.012,),
    tuple(0.1 + abs(math.sin(0.06 * pulse)) for pulse in range(POINTS)),
    inversion_time=(0.02,),
)
QUADRATIC = replace(PROTOCOL, rf_phase=tuple(0.02 * pulse**2 for pulse in range(POINTS)))
SMALL = {"t1_points": 24, "t2_points": 27}


def _worst(dictionary, protocol):
    """Largest error of a plausible atom over its norm, and where T2 is at most T1."""
    i, j = dictionary.plausible.nonzero(as_tuple=True)
    parameters = {"t1": dictionary.t1[i], "t2": dictionary.t2[j]}
    errors = []
    for b, factor in enumerate(dictionary.b1):
        expected = contrast_signal(parameters, protocol, factor.expand(len(i)))
        found = dictionary.coefficients[b, i, j] @ dictionary.axes.T
        error = torch.linalg.vector_norm(found - expected, dim=1)
        errors.append((error / torch.linalg.vector_norm(expected, dim=1)).max())
    return float(torch.stack(errors).max())


@pytest.mark.parametrize(
    ("protocol", "b1"),
    [
        (PROTOCOL, (1.0,)),
        (PROTOCOL, (0.8, 1.0, 1.2)),
        (PROTOCOL, (0.9,)),
        (QUADRATIC, (1.0,)),
        (replace(PROTOCOL, inversion_efficiency=0.9), (1.0,)),
        (replace(PROTOCOL, inversion_time=()), (1.0,)),
    ],
)
def test_every_plausible_fingerprint_comes_back(protocol, b1):
    dictionary = fingerprint_dictionary(protocol, b1=b1, **SMALL)
    assert _worst(dictionary, protocol) < ERROR
    columns = dictionary.axes.shape[1]
    assert 5 < columns < 40
    assert dictionary.coefficients.shape == (len(b1), 24, 27, columns)
    assert dictionary.axes.dtype == dictionary.coefficients.dtype
    assert dictionary.axes.dtype == (torch.complex64 if protocol.rf_phase else torch.float32)
    assert dictionary.b1.tolist() == pytest.approx(list(b1))
    torch.testing.assert_close(
        dictionary.axes.mH @ dictionary.axes, torch.eye(columns).to(dictionary.axes.dtype), atol=1e-5, rtol=0
    )


def test_columns_are_the_principal_axes_of_the_normalised_fingerprints():
    dictionary = fingerprint_dictionary(PROTOCOL, **SMALL)
    i, j = dictionary.plausible.nonzero(as_tuple=True)
    atoms = contrast_signal({"t1": dictionary.t1[i].double(), "t2": dictionary.t2[j].double()}, PROTOCOL)
    atoms = atoms / torch.linalg.vector_norm(atoms, dim=1, keepdim=True)
    _, values, columns = torch.linalg.svd(atoms, full_matrices=False)
    share = values.square() / values.square().sum()
    kept = dictionary.axes.shape[1]
    assert dictionary.variance.tolist() == pytest.approx(share[:kept].tolist(), rel=1e-3, abs=1e-9)
    overlap = (columns[:6].T * dictionary.axes[:, :6]).sum(0).abs()
    assert overlap.min() > 0.9999
    basis = dictionary.basis(0.9999)
    assert basis.retained_energy >= 0.9999
    assert basis.rank < kept
    # Largest entries are positive, so that coefficients compare between runs.
    largest = dictionary.axes.gather(0, dictionary.axes.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_grid_is_even_in_the_logarithm_and_holds_all_tissues_and_spheres():
    dictionary = fingerprint_dictionary(PROTOCOL, **SMALL)
    for axis, low, high in ((dictionary.t1, 0.02, 4.5), (dictionary.t2, 0.0055, 2.0)):
        steps = axis.double().log().diff()
        assert steps.max() - steps.min() < 1e-5
        assert axis[0] < low
        assert axis[-1] > high
    # The usual grid: about 60 000 atoms with T2 <= T1.
    t1 = torch.logspace(*(math.log10(bound) for bound in module.T1_RANGE), module.T1_POINTS)
    t2 = torch.logspace(*(math.log10(bound) for bound in module.T2_RANGE), module.T2_POINTS)
    assert 55_000 < int((t2 <= t1[:, None]).sum()) < 65_000


def test_a_few_steps_beyond_t2_equal_t1_are_simulated_and_the_rest_is_held():
    dictionary = fingerprint_dictionary(PROTOCOL, **SMALL)
    i = 10
    last = int((dictionary.t2 <= dictionary.t1[i]).sum()) - 1
    beyond = contrast_signal({"t1": dictionary.t1[i], "t2": dictionary.t2[last + 1]}, PROTOCOL)
    found = dictionary.axes @ dictionary.coefficients[0, i, last + 1]
    assert torch.linalg.vector_norm(found - beyond) < 0.002 * torch.linalg.vector_norm(beyond)
    held = dictionary.coefficients[0, i, last + module._MARGIN :]
    assert len(held) > 1
    assert (held == held[0]).all()
    # T1 below the shortest T2 leaves no hole either.
    short = fingerprint_dictionary(PROTOCOL, t1_range=(0.01, 3.0), t2_range=(0.05, 1.0), **SMALL)
    assert torch.isfinite(short.coefficients).all()
    assert short.coefficients.abs().sum(-1).min() > 0


def test_directions_that_the_coarse_grid_lacks_are_added(monkeypatch):
    """A first basis of far too few atoms changes no result."""
    usual = fingerprint_dictionary(PROTOCOL, **SMALL)
    monkeypatch.setattr(module, "_COARSE", 23)
    monkeypatch.setattr(module, "_TOGETHER", 50)
    poor = fingerprint_dictionary(PROTOCOL, **SMALL)
    assert _worst(poor, PROTOCOL) < ERROR
    i, j = usual.plausible.nonzero(as_tuple=True)
    expected = usual.coefficients[0, i, j] @ usual.axes.T
    error = torch.linalg.vector_norm(poor.coefficients[0, i, j] @ poor.axes.T - expected, dim=1)
    assert (error / torch.linalg.vector_norm(expected, dim=1)).max() < 2 * ERROR


def test_progress_rises_to_one():
    shares = []
    fingerprint_dictionary(PROTOCOL, progress=shares.append, **SMALL)
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"t1_range": (1.0, 1.0)}, "the T1 range of a dictionary is 1 to 1 s"),
        ({"t2_range": (0.0, 1.0)}, "the T2 range of a dictionary is 0 to 1 s"),
        ({"t1_points": 1}, "at least 2 points of T1, not 1"),
        ({"b1": ()}, "must be positive"),
        ({"b1": (0.0, 1.0)}, "must be positive"),
        ({"b1": (1.0, 0.9)}, "not ascending at even steps"),
        ({"b1": (0.8, 1.0, 1.3)}, "not ascending at even steps"),
        ({"t1_range": (0.01, 0.02), "t2_range": (0.03, 1.0)}, "is below a T1 of"),
    ],
)
def test_grids_that_are_none_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        fingerprint_dictionary(PROTOCOL, **{**SMALL, **settings})
