"""How well a protocol tells the relaxation times: what noise would make of them in typical tissue.

    sigma_i / theta_i = (sigma / ||I||) / ||(1 - P) d I / d log theta_i||,     I normalised to ||I|| = 1

P projects onto the derivatives by all other unknowns, amplitude and phase among them: the Cramer-Rao bound.
Usual protocols have factors of 3 to 13 between the noise of the whole signal and that of a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantitron.recon.data import Protocol
from quantitron.recon.signal.models import CONTRAST_PARAMETERS, signal

TISSUE = {"t1": 1.0, "t2": 0.08, "t2star": 0.05}
"""Grey and white matter at 3 T [s]."""
NOISE = 0.01
"""Of the whole signal, of all frames of a voxel together."""
HARDLY = 1.0
"""Relative standard deviation at that noise from which on a note is made."""
_MOST_CONTRASTS = 4096
"""Longer fingerprints are not looked at: their one voxel would take seconds, and they tell enough."""
_STEP = 1e-4
"""Of the logarithms, for the derivatives."""


def relative_deviations(protocol: Protocol) -> dict[str, float]:
    """Standard deviation over value of each time that the sequence maps, at ``NOISE``, in ``TISSUE``.

    The inversion efficiency counts as known: all voxels tell it together. So does off-resonance: it turns
    phases, and the times are told by magnitudes.

    Args:
        protocol: of any sequence.

    Returns:
        Name -> relative standard deviation, infinite for one that the signal does not depend on.
    """
    names = [name for name in CONTRAST_PARAMETERS[protocol.sequence] if name in TISSUE]
    if protocol.sequence != "fisp_mrf" and protocol.echoes > 1:
        names.append("t2star")
    if not names or protocol.contrasts > _MOST_CONTRASTS:
        return {}
    steps = torch.cat([torch.zeros(1, len(names)), torch.eye(len(names)), -torch.eye(len(names))]).double()
    typical = torch.tensor([TISSUE[name] for name in names], dtype=torch.float64)
    known = protocol.inversion_efficiency
    ones = torch.ones(len(steps), dtype=torch.float64)
    tissue = {
        **{name: TISSUE[name] * ones for name in TISSUE},
        "inversion": (1.0 if known is None else known) * ones,
        "b0": 0 * ones,
        **dict(zip(names, (typical * (_STEP * steps).exp()).T, strict=True)),
    }
    frames = signal(tissue, protocol)  # (1 + 2 p, t)
    size = torch.linalg.vector_norm(frames[0])
    count = len(names)
    slopes = (frames[1 : count + 1] - frames[count + 1 :]) / (2 * _STEP)  # (p, t)
    columns = [_pairs(column) / size for column in (frames[0], 1j * frames[0], *slopes)]
    found = {}
    for number, name in enumerate(names, start=2):
        own = columns[number]
        others = torch.stack([column for place, column in enumerate(columns) if place != number], 1)
        left = own - others @ torch.linalg.lstsq(others, own[:, None], driver="gelsd").solution[:, 0]
        told = float(torch.linalg.vector_norm(left))
        found[name] = NOISE / told if told > 0 else math.inf
    return found


def typical_tissue() -> str:
    """``TISSUE`` in words."""
    return ", ".join(
        f"{title} {1e3 * TISSUE[key]:g} ms" for key, title in (("t1", "T1"), ("t2", "T2"), ("t2star", "T2*"))
    )


def precision_notes(protocol: Protocol) -> list[str]:
    """A sentence for each relaxation time that the protocol hardly tells."""
    notes = []
    for name, deviation in relative_deviations(protocol).items():
        if deviation < HARDLY:
            continue
        label = {"t1": "T1", "t2": "T2", "t2star": "T2*"}[name]
        scatter = "more than tenfold" if deviation > 10 else f"by {100 * deviation:.0f} %"
        notes.append(
            f"this protocol hardly tells {label}: noise of {100 * NOISE:g} % of the signal scatters it "
            f"{scatter} in tissue of {typical_tissue()}"
        )
    return notes


def _pairs(frames: Tensor) -> Tensor:
    """Real and imaginary parts, (2 t,)."""
    return torch.view_as_real(frames.resolve_conj()).flatten()
