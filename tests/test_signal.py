"""Signal models at their limits, and their derivatives."""

import math
from dataclasses import replace

import pytest
import torch

from quantitron.recon.data import Protocol
from quantitron.recon.signal.dictionary import contrast_dictionary, echo_dictionary
from quantitron.recon.signal.models import CONTRAST_PARAMETERS, CONTRAST_SIGNALS, SEQUENCES, signal
from quantitron.recon.signal.spoiled_gre import echo_signal, flash_steady_state

ECHO_TIME = (0.0045, 0.0112, 0.0179)
ALPHA = math.radians(10)
T2IR = Protocol("t2ir_gre", ECHO_TIME, (0.030,), (ALPHA,), (0.0, 0.050), (), 400)
VFA = Protocol("vfa_gre", ECHO_TIME, (0.046,), tuple(math.radians(a) for a in (5, 20, 90)))
MEGRE = Protocol("megre", ECHO_TIME, (0.4,), (ALPHA,))
FISP = Protocol("fisp_mrf", (0.002,), (0.012,), (0.2, 0.6, 0.9, 0.4, 0.7), inversion_time=(0.02,))
PROTOCOLS = {"t2ir_gre": replace(T2IR, excitations=5), "vfa_gre": VFA, "megre": MEGRE, "fisp_mrf": FISP}


def _tissue(n=3, dtype=torch.float64):
    ramp = torch.linspace(0, 1, n, dtype=dtype)
    return {
        "t1": 0.8 + ramp,
        "t2": 0.06 + 0.1 * ramp,
        "inversion": 1.0 - 0.2 * ramp,
        "t2star": 0.04 + 0.03 * ramp,
        "b0": 30 * ramp - 10,
    }


def test_every_sequence_is_tested():
    assert set(PROTOCOLS) == set(SEQUENCES)


def test_t2ir_approaches_the_flash_steady_state():
    tissue = _tissue()
    contrast = CONTRAST_SIGNALS["t2ir_gre"](tissue, T2IR).unflatten(-1, (400, 2))  # (v, n, tau)
    steady = flash_steady_state(tissue["t1"], torch.tensor(ALPHA, dtype=torch.float64), 0.030)
    torch.testing.assert_close(contrast[:, -1, 0], steady, rtol=1e-3, atol=0)


def test_t2ir_starts_at_minus_the_steady_state_after_a_perfect_inversion_without_preparation():
    tissue = _tissue() | {"inversion": torch.ones(3, dtype=torch.float64)}
    contrast = CONTRAST_SIGNALS["t2ir_gre"](tissue, T2IR).unflatten(-1, (400, 2))
    steady = flash_steady_state(tissue["t1"], torch.tensor(ALPHA, dtype=torch.float64), 0.030)
    torch.testing.assert_close(contrast[:, 0, 0], -steady)
    # With preparation the inverted magnetisation has decayed by exp(-tau / T2).
    torch.testing.assert_close(contrast[:, 0, 1], -steady * torch.exp(-0.050 / tissue["t2"]))


def test_t2ir_without_t2_weighting_does_not_depend_on_t2():
    tissue = _tissue()
    longer = tissue | {"t2": 10 * tissue["t2"]}
    protocol = replace(T2IR, preparation_time=(0.0,), excitations=20)
    torch.testing.assert_close(
        CONTRAST_SIGNALS["t2ir_gre"](tissue, protocol), CONTRAST_SIGNALS["t2ir_gre"](longer, protocol)
    )


def test_flash_is_saturation_recovery_at_90_degrees_and_peaks_at_the_ernst_angle():
    t1 = torch.tensor([0.5, 1.2], dtype=torch.float64)
    right_angle = torch.tensor(math.pi / 2, dtype=torch.float64)
    torch.testing.assert_close(flash_steady_state(t1, right_angle, 0.05), 1 - torch.exp(-0.05 / t1))
    ernst = torch.acos(torch.exp(-0.05 / t1)).requires_grad_()
    (slope,) = torch.autograd.grad(flash_steady_state(t1, ernst, 0.05).sum(), ernst)
    torch.testing.assert_close(slope, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    # TR far beyond T1: the full sin(a), whatever T1.
    torch.testing.assert_close(
        flash_steady_state(t1, torch.tensor(0.3, dtype=torch.float64), 1e3),
        math.sin(0.3) * torch.ones_like(t1),
    )


def test_vfa_small_flip_angle_is_proton_density_weighted():
    """For a much below the Ernst angle S = sin(a), independent of T1."""
    protocol = replace(VFA, flip_angle=(1e-4,))
    contrast = CONTRAST_SIGNALS["vfa_gre"](_tissue(), protocol)[:, 0]
    torch.testing.assert_close(contrast, torch.full_like(contrast, math.sin(1e-4)), rtol=1e-5, atol=0)


def test_vfa_b1_scales_the_flip_angle():
    tissue, b1 = _tissue(), torch.tensor([0.8, 1.0, 1.1], dtype=torch.float64)
    scaled = CONTRAST_SIGNALS["vfa_gre"](tissue, VFA, b1)
    for voxel, factor in enumerate(b1.tolist()):
        protocol = replace(VFA, flip_angle=tuple(factor * a for a in VFA.flip_angle))
        torch.testing.assert_close(scaled[voxel], CONTRAST_SIGNALS["vfa_gre"](tissue, protocol)[voxel])


def test_echoes_decay_with_t2star_and_turn_with_b0():
    t2star = torch.tensor([0.05], dtype=torch.float64)
    b0 = torch.tensor([25.0], dtype=torch.float64)
    time = torch.tensor([0.0, 0.01, 0.04], dtype=torch.float64)
    train = echo_signal(t2star, b0, time)[0]
    torch.testing.assert_close(train.abs(), torch.exp(-time / 0.05))
    torch.testing.assert_close(train[1] / train[1].abs(), torch.tensor(1j, dtype=torch.complex128))
    torch.testing.assert_close(train[2] / train[2].abs(), torch.tensor(1 + 0j, dtype=torch.complex128))
    torch.testing.assert_close(echo_signal(t2star, b0, time, -1)[0], train.conj().resolve_conj())
    assert echo_signal(
        torch.tensor([1e9]), torch.zeros(1), torch.tensor([0.03])
    ).abs().item() == pytest.approx(1)


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_full_signal_is_the_product_of_its_factors(sequence):
    protocol, tissue = PROTOCOLS[sequence], _tissue()
    frames = signal(tissue, protocol)
    assert frames.shape == (3, protocol.frames)
    contrast = CONTRAST_SIGNALS[sequence](tissue, protocol)
    # A fingerprint holds its decay already, of T2.
    t2star = tissue["t2star"] * (math.inf if sequence == "fisp_mrf" else 1)
    echo = echo_signal(t2star, tissue["b0"], torch.tensor(protocol.echo_time, dtype=torch.float64))
    e = protocol.echoes - 1
    t = e if protocol.contrasts == 1 else protocol.echoes + e  # (w, e) = (0, e) or (1, e)
    torch.testing.assert_close(frames[:, t], contrast[:, t // protocol.echoes] * echo[:, e])


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_gradients_equal_finite_differences(sequence):
    tissue = _tissue()
    names = [*CONTRAST_PARAMETERS[sequence], "b0", *(["t2star"] if sequence != "fisp_mrf" else [])]
    inputs = [tissue[name].clone().requires_grad_() for name in names]

    def frames(*values):
        return torch.view_as_real(
            signal({**tissue, **dict(zip(names, values, strict=True))}, PROTOCOLS[sequence])
        )

    assert torch.autograd.gradcheck(frames, inputs, eps=1e-7, atol=1e-5)


def test_unknown_sequence_is_named():
    with pytest.raises(ValueError, match="no signal model for sequence 'epi'"):
        signal(_tissue(), replace(MEGRE, sequence="epi"))


def test_dictionaries_hold_the_signals_of_their_parameters():
    dictionary = contrast_dictionary(PROTOCOLS["t2ir_gre"], {"t1": (0.5, 2.0)})
    atom = 1234
    values = {name: column[atom : atom + 1] for name, column in dictionary.parameters.items()}
    torch.testing.assert_close(
        CONTRAST_SIGNALS["t2ir_gre"](values, PROTOCOLS["t2ir_gre"])[0], dictionary.atoms[atom]
    )
    assert dictionary.parameters["t1"].min() == pytest.approx(0.5)
    known = contrast_dictionary(replace(PROTOCOLS["t2ir_gre"], inversion_efficiency=0.93))
    assert known.parameters["inversion"].unique().tolist() == [0.93]
    echoes = echo_dictionary(MEGRE, 20.0)
    assert echoes.parameters["b0"].abs().max() == 20
    assert not echo_dictionary(MEGRE, 0.0).parameters["b0"].any()
