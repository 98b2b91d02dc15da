"""Maps whose images do not explain the data: said, where the noise is known, and only there."""

from dataclasses import replace

import pytest
from scan_of_ellipses import PROTOCOLS, scan_of_ellipses

from quantitron.gadgets import reconstruct
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.reconstruct import Reconstruct


def said(scan, solver="subspace", **settings):
    """Residual, and what was said of it."""
    context = Context(header=None, encoding=scan.encoding, protocol=scan.protocol, axes={})
    gadget = Reconstruct.build({"solver": solver, "device": "cpu", **settings}, "test")
    gadget.prepare(context)
    *_, maps = gadget(iter([scan]), context)
    return maps.residual_to_noise, context.notes


@pytest.mark.parametrize("solver", ["subspace", "llr"])
def test_off_resonance_beyond_the_expected_range_is_said(solver, monkeypatch):
    """The object's field runs to 50 Hz only, and the field map saves most of it: 3.4 times the noise."""
    monkeypatch.setattr(reconstruct, "UNEXPLAINED", 1e-4)
    problem, *_ = scan_of_ellipses(PROTOCOLS["vfa_gre"], (2, 24, 24), noise=0.03)
    residual, notes = said(problem, solver)
    assert residual < 2
    assert not notes
    narrow = {"field_range": 1.0, "residual_field": 0.5}
    residual, notes = said(problem, solver, **narrow)
    assert residual > 3
    assert len(notes) == 1
    assert f"% of the signal's energy unexplained ({residual:.1f} times the noise)" in notes[0]
    assert "reconstruct.field_range" in notes[0]
    assert not said(replace(problem, noise_known=False), solver, **narrow)[1]


@pytest.mark.parametrize("noise", [0.05, 0.3])
@pytest.mark.parametrize("sequence", ["t2ir_gre", "megre"])
def test_off_resonance_beyond_what_uneven_echoes_tell_is_said(sequence, noise):
    """Two echoes 4.4 ms apart tell 114 Hz at most; the third one does not agree with what is taken."""
    echoes = {"echo_time": (3.7e-3, 8.1e-3, 15.1e-3)}
    protocol = replace(PROTOCOLS[sequence], **echoes)
    for offset, wrong in ((0.0, False), (60.0, False), (160.0, True), (-200.0, True)):
        problem, *_ = scan_of_ellipses(protocol, (2, 24, 24), noise=noise, offset=offset)
        residual, notes = said(problem)
        assert bool([note for note in notes if "energy unexplained" in note]) == wrong, (offset, residual)


def test_a_sound_scan_of_hardly_any_noise_goes_without_a_note():
    """What models leave of it, 1e-4 of its energy, is many times its noise."""
    problem, *_ = scan_of_ellipses(PROTOCOLS["vfa_gre"], (2, 24, 24), noise=1e-3)
    residual, notes = said(problem)
    assert residual > 10
    assert not notes


def test_networks_that_were_trained_too_little_are_no_fault_of_the_scan():
    """The linear estimate, which is the preview, explains what they do not."""
    problem, *_ = scan_of_ellipses(PROTOCOLS["vfa_gre"], (2, 16, 14), noise=0.03)
    short = {"epochs": 1, "start": "constant", "coil_start": "network", "log2_rows": 8, "phase_log2_rows": 8}
    residual, notes = said(problem, "summit", **short)
    assert residual > 10
    (note,) = [note for note in notes if "energy unexplained" in note]
    assert "which the linear estimate explains: networks that were trained too little" in note
    assert "off-resonance" not in note
