"""What tissue is expected to show in a fingerprint's basis: principal axes and variances of its signals."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantitron.recon.coefficient_basis import CoefficientBasis, principal_axes
from quantitron.recon.data import Basis, FingerprintDictionary


def fingerprint_basis(
    basis: Basis,
    dictionary: FingerprintDictionary,
    tissue_range: Mapping[str, tuple[float, float]],
    b1: Tensor | None = None,
) -> CoefficientBasis:
    """All components of the basis, turned to the principal axes of tissue signals.

    Args:
        basis: leading columns of the dictionary's axes.
        dictionary: fingerprints over T1 x T2.
        tissue_range: (low, high) [s] of ``t1`` and ``t2`` over which variances are taken, logarithmically
            uniform and where T2 is not above T1; all of the dictionary where it has nothing in that range.
        b1: actual over nominal flip angle wherever it is known, of any shape; None: 1. What B1 does to the
            signals is expected as far as it varies.

    Returns:
        mixing (1, l, k) with k = l.
    """
    (t1_low, t1_high), (t2_low, t2_high) = tissue_range["t1"], tissue_range["t2"]
    t1, t2 = dictionary.t1[:, None], dictionary.t2
    tissue = dictionary.plausible & (t1 >= t1_low) & (t1 <= t1_high) & (t2 >= t2_low) & (t2 <= t2_high)
    if not tissue.any():
        tissue = dictionary.plausible
    atoms = dictionary.coefficients[_b1_values(dictionary, b1)][:, tissue]  # (b, a, r)
    atoms = atoms[..., : basis.rank].flatten(0, 1)  # (b a, l)
    atoms = atoms.to(torch.complex128 if atoms.is_complex() else torch.float64)
    variance, axes = principal_axes(atoms)
    # A component that the dictionary says is absent still gets a finite weight.
    variance = variance.clamp_min(float(variance[0]) * 1e-9)
    return CoefficientBasis(axes.to(torch.complex64)[None], variance.float(), basis.retained_energy)


def _b1_values(dictionary: FingerprintDictionary, b1: Tensor | None) -> slice:
    """Those of the dictionary's B1 between which B1 lies."""
    known = torch.ones(1) if b1 is None else b1[b1.isfinite()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (1.0, 1.0)
    first = int((dictionary.b1 <= low).sum()) - 1
    last = int((dictionary.b1 < high).sum())
    longest = len(dictionary.b1) - 1
    return slice(min(max(first, 0), longest), min(last, longest) + 1)
