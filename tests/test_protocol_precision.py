"""What noise makes of relaxation times: closed forms, scatter of fits, notes on what is hardly told."""

import math
import re
from dataclasses import replace

import pytest
import torch
from line_factory import encoding
from scan_of_ellipses import PROTOCOLS

from quantitron.gadgets.basis import BasisGadget
from quantitron.gadgets.header import make_context, make_header
from quantitron.gadgets.protocol_precision import NOISE, TISSUE, precision_notes, relative_deviations
from quantitron.recon.data import Protocol
from quantitron.recon.match import fit
from quantitron.recon.signal.models import signal
from quantitron.recon.temporal_basis import dictionary_basis

FISP = Protocol(
    "fisp_mrf",
    (0.002,),
    (0.012,) * 200,
    tuple(math.radians(10 + 50 * abs(math.sin(n * math.pi / 100))) for n in range(200)),
    inversion_time=(0.02,),
)


def degrees(*angles: float) -> tuple[float, ...]:
    return tuple(math.radians(angle) for angle in angles)


def test_two_echoes_have_the_closed_form() -> None:
    """T2* = dTE / log(s0 / s1): both amplitudes bring their relative noise."""
    times = (0.004, 0.02)
    protocol = Protocol("megre", times, (0.4,), (0.5,))
    s = [math.exp(-time / TISSUE["t2star"]) for time in times]
    size = math.hypot(*s)
    relative = math.hypot(NOISE * size / s[0], NOISE * size / s[1]) * TISSUE["t2star"] / (times[1] - times[0])
    assert relative_deviations(protocol)["t2star"] == pytest.approx(relative, rel=1e-5)


@pytest.mark.parametrize("sequence", ["vfa_gre", "t2ir_gre"])
def test_fits_scatter_as_it_says(sequence: str) -> None:
    protocol = replace(PROTOCOLS[sequence], inversion_efficiency=0.95 if sequence == "t2ir_gre" else None)
    said = relative_deviations(protocol)
    basis = dictionary_basis(protocol, 0.999999)
    voxels = 2000
    tissue = {name: torch.full((voxels,), TISSUE.get(name, 0.95)) for name in (*TISSUE, "inversion")}
    tissue["b0"] = torch.zeros(voxels)
    frames = signal(tissue, protocol)  # (v, t)
    level = 0.1 * NOISE * float(frames[0].abs().square().sum().sqrt())  # where fits are linear
    generator = torch.Generator().manual_seed(1)
    noise = torch.view_as_complex(torch.randn(*frames.shape, 2, generator=generator))
    shape = (protocol.contrasts, protocol.echoes)
    images = torch.einsum(
        "vwe,wl->vel", (frames + level * noise).unflatten(1, shape), basis.contrast.to(frames.dtype)
    )
    found = fit(images, basis, protocol).parameters
    for name, deviation in said.items():
        scatter = float(found[name].std() / TISSUE[name])
        assert scatter == pytest.approx(0.1 * deviation, rel=0.1), name


@pytest.mark.parametrize("protocol", [*PROTOCOLS.values(), FISP], ids=lambda protocol: protocol.sequence)
def test_usual_protocols_go_without_a_note(protocol: Protocol) -> None:
    assert not precision_notes(protocol)
    assert max(relative_deviations(protocol).values()) < 0.3


@pytest.mark.parametrize(
    ("protocol", "label", "much"),
    [
        (replace(PROTOCOLS["t2ir_gre"], flip_angle=degrees(90)), "T1", "more than tenfold"),
        (replace(PROTOCOLS["vfa_gre"], repetition_time=(5.0,)), "T1", "by 4"),
        (replace(PROTOCOLS["megre"], echo_time=(0.002, 0.0021)), r"T2\*", "tenfold|by"),
        (replace(FISP, flip_angle=(1e-4,) * 200, inversion_time=()), "T1", "more than tenfold"),
    ],
)
def test_protocols_that_hardly_tell_are_named(protocol: Protocol, label: str, much: str) -> None:
    notes = precision_notes(protocol)
    assert any(re.search(f"hardly tells {label}: .*({much})", note) for note in notes), notes


def test_the_scan_says_so() -> None:
    protocol = replace(PROTOCOLS["vfa_gre"], repetition_time=(5.0,))
    context = make_context(make_header(encoding((1, 8, 16)), protocol))
    BasisGadget().prepare(context)
    assert any("hardly tells T1" in note for note in context.notes)
