"""From coefficients to tissue parameters: matching over the dictionaries, then bounded Gauss-Newton steps.

    minimise over theta and complex PD:   sum_{e,l} |V_{e,l} - PD p_l(theta) g_e(theta)|^2

with p = Psi^H f(T1, T2, inversion) and g = exp(-TE / T2*) exp(j 2 pi b0 TE) (METHODS 5). Because the signal
factorises, V of one voxel is a matrix of rank one: its echo side is matched first, its contrast side next,
each over a small dictionary of its own, instead of over all combinations at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.atom_groups import AtomGroups
from quantitron.recon.data import Basis, Protocol
from quantitron.recon.refine import Refinement
from quantitron.recon.signal.dictionary import contrast_dictionary, echo_dictionary
from quantitron.recon.signal.models import CONTRAST_PARAMETERS

START_POINTS = {"t1": 32, "t2": 20, "inversion": 4}
"""Grid of the contrast dictionary: as fine as the refinement needs to find the lowest minimum."""
START_T2STAR, START_B0 = 16, 21
"""Grid of the echo dictionary."""


@dataclass(frozen=True)
class Fit:
    """Parameters of each voxel."""

    parameters: Mapping[str, Tensor]
    """Name -> (voxel,): t1, t2, t2star [s], inversion [1], b0 [Hz], as far as the sequence has them."""
    pd: Tensor
    """(voxel,) complex: proton density times receive phase."""
    standard_deviation: Mapping[str, Tensor]
    """Name -> (voxel,): root of the Cramer-Rao bound at the residual of the fit, in the map's unit."""


def best_atom(signals: Tensor, atoms: Tensor, working_set: int = 64_000_000) -> tuple[Tensor, Tensor]:
    """Atom of largest normalised correlation, and the complex factor that fits it.

    Args:
        signals: (voxel, n) complex.
        atoms: (a, n).
        working_set: bytes for the correlations held at once; bounds memory, changes no result.

    Returns:
        index (voxel,) of the atom with the largest ``|<d, u>| / ||d||``; PD = ``<d, u> / ||d||^2`` (voxel,).
    """
    return AtomGroups.consecutive(atoms).best(signals, working_set)


def fit(
    coefficients: Tensor,
    basis: Basis,
    protocol: Protocol,
    b0_range: float = 25.0,
    iterations: int = 30,
    chunk: int = 16384,
    known: Mapping[str, Tensor] | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> Fit:
    """Match, then refine off the grid.

    Args:
        coefficients: V (voxel, e, l) complex, in the contrast basis.
        basis: the contrast basis.
        protocol: the sequence.
        b0_range: half-width [Hz] of the off-resonances searched by matching; the refinement may leave it.
        iterations: Levenberg-Marquardt steps, at most; a voxel that has arrived takes no more.
        chunk: voxels worked on together; bounds memory, changes no result.
        known: name -> (voxel,) parameters that are given and not fitted.
        start: name -> (voxel,) of all parameters, where the refinement begins in place of matching.
    """
    device = coefficients.device
    precision = coefficients.dtype if basis.contrast.is_complex() else coefficients.real.dtype
    psi = basis.contrast.to(device, precision)
    given = dict(known or {})
    names = (*CONTRAST_PARAMETERS[protocol.sequence], "t2star", "b0")
    matching = _Matching(psi, protocol, b0_range, coefficients.dtype) if start is None else None
    refinement = Refinement(protocol, psi, frozenset(given))
    parts = []
    for first in range(0, max(len(coefficients), 1), chunk):
        part = slice(first, first + chunk)
        measured = coefficients[part]  # (v, e, l)
        if matching is not None:
            begin = matching(measured)
        else:
            begin = {name: (start or {})[name][part] for name in names}
        begin.update({name: values[part] for name, values in given.items()})
        parts.append(refinement.run(measured, begin, iterations))
    return Fit(
        {name: torch.cat([part.parameters[name] for part in parts]) for name in names},
        torch.cat([part.pd for part in parts]),
        {name: torch.cat([part.standard_deviation[name] for part in parts]) for name in names},
    )


class _Matching:
    """Both sides of V against their dictionaries."""

    def __init__(self, psi: Tensor, protocol: Protocol, b0_range: float, dtype: torch.dtype) -> None:
        contrasts = contrast_dictionary(protocol, points=START_POINTS)
        echoes = echo_dictionary(
            protocol,
            b0_range if protocol.echoes > 1 else 0.0,
            t2star_points=START_T2STAR,
            b0_points=START_B0,
        )
        device, real = psi.device, psi.real.dtype
        self._contrast_atoms = contrasts.atoms.to(device, real).to(psi.dtype) @ psi.conj()  # (a, l)
        self._echo_atoms = echoes.atoms.to(device, dtype)  # (a, e)
        self._contrast = {name: values.to(device, real) for name, values in contrasts.parameters.items()}
        self._echo = {name: values.to(device, real) for name, values in echoes.parameters.items()}

    def __call__(self, measured: Tensor) -> dict[str, Tensor]:
        """Parameters (v,) of the best atoms for V (v, e, l)."""
        # Echo side: principal left vector of V, from the small Gram matrix over the echoes.
        _, vectors = torch.linalg.eigh(measured @ measured.mH)
        echo, _ = best_atom(vectors[:, :, -1], self._echo_atoms)
        side = (self._echo_atoms[echo].conj()[:, None] @ measured)[:, 0]  # (v, l)
        contrast, _ = best_atom(side, self._contrast_atoms)
        return {
            **{name: values[contrast] for name, values in self._contrast.items()},
            **{name: values[echo] for name, values in self._echo.items()},
        }
