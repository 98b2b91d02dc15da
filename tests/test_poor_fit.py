"""Maps whose images do not explain the data: said, where the noise is known."""

from dataclasses import replace

import pytest
from scan_of_ellipses import PROTOCOLS, scan_of_ellipses

from quantitron.gadgets import reconstruct
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.reconstruct import Reconstruct


@pytest.mark.parametrize("solver", ["subspace", "llr"])
def test_off_resonance_beyond_the_expected_range_is_said(solver, monkeypatch):
    """The object's field runs to 50 Hz only, and the field map saves most of it: 3.4 times the noise."""
    monkeypatch.setattr(reconstruct, "UNEXPLAINED", 3.0)
    problem, *_ = scan_of_ellipses(PROTOCOLS["vfa_gre"], (2, 24, 24), noise=0.03)

    def said(scan, **settings):
        context = Context(header=None, encoding=scan.encoding, protocol=scan.protocol, axes={})
        gadget = Reconstruct.build({"solver": solver, "device": "cpu", **settings}, "test")
        gadget.prepare(context)
        (maps,) = gadget(iter([scan]), context)
        return maps.residual_to_noise, context.notes

    residual, notes = said(problem)
    assert residual < 2
    assert not notes
    narrow = {"field_range": 1.0, "residual_field": 0.5}
    residual, notes = said(problem, **narrow)
    assert residual > 3
    assert len(notes) == 1
    assert f"the images of the scan leave {residual:.0f} times the noise unexplained" in notes[0]
    assert "reconstruct.field_range" in notes[0]
    assert not said(replace(problem, noise_known=False), **narrow)[1]
