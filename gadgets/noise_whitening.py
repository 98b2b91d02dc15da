"""From the samples of a noise scan to the matrix that whitens the channels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.errors import ScanError

ENOUGH_NOISE = 4
"""Noise samples for each channel below which correlations between channels are not estimated."""
DEAD = 1e-12
"""Variance of a channel without noise, relative to the largest."""
DEPENDENT = 1e-6
"""Share of a channel's noise that channels before it do not explain, at and below which it follows from them.

Rounding of single-precision samples leaves some 1e-15, receive arrays stay above 1e-3.
"""
ABSURD = 1e6
"""Magnitude of a sample over the median of its channel, beyond which it is no noise.

Thermal noise stays below 10, spikes of interference below some thousands. What is allowed cannot make the
variance of a channel so large that others of the same gain pass for dead.
"""


def check_noise(noise: NDArray[np.complex128], acquisition: NDArray[np.int64]) -> None:
    """Refuse samples that are no noise by the other samples of their channel.

    Args:
        noise: (c, sample) samples, finite, in any unit.
        acquisition: (sample,) number of the acquisition that each is from.

    Raises:
        ScanError: names the acquisition of the first such sample.
    """
    for channel, samples in enumerate(noise):
        size = np.abs(samples)
        heard = size[size > 0]
        usual = float(np.median(heard)) if heard.size else 0.0
        absurd = size > ABSURD * usual
        if absurd.any():
            first = int(absurd.argmax())
            raise ScanError(
                f"noise acquisition {acquisition[first]} has samples too large to be noise: in channel "
                f"{channel} they reach {size[first]:.1g}, and half of the others stay below {usual:.1g}"
            )


def whitening_matrix(
    noise: NDArray[np.complex128], note: Callable[[str], None]
) -> NDArray[np.complex128] | None:
    """Inverse Cholesky factor of the noise covariance, over the channels that have noise of their own.

    A channel without noise would get infinite weight. So would what rounding leaves of one that is a
    combination of others; such a channel brings nothing that the others have not.

    Args:
        noise: (c, sample) samples, finite.
        note: takes sentences on channels that are left out and on what could not be estimated.

    Returns:
        (k, c) with k channels of noise of their own, or None where no channel has noise.
    """
    channels, samples = noise.shape
    covariance = noise @ noise.conj().T / max(samples, 1)  # E[n n^H]
    variance = covariance.diagonal().real
    kept = variance > DEAD * variance.max()
    if not kept.any():
        note("the noise lines hold no noise: channels are not whitened and the noise level is not known")
        return None
    if not kept.all():
        note(f"{int((~kept).sum())} of {channels} channels have no noise and are left out")
    if samples < ENOUGH_NOISE * channels:
        note(
            f"the noise scan has {samples} samples for {channels} channels: "
            "correlations between channels are not taken out"
        )
        covariance = np.diag(covariance.diagonal())
    alive = np.flatnonzero(kept)
    deviation = np.sqrt(variance[alive])
    own = _independent(covariance[np.ix_(alive, alive)] / np.outer(deviation, deviation))
    if not own.all():
        others = alive[~own]
        subject, rest = ("channel", "it is") if len(others) == 1 else ("channels", "they are")
        note(
            f"the noise of {subject} {', '.join(map(str, others))} (of 0 to {channels - 1}) is a combination "
            f"of that of other channels: {rest} left out"
        )
        kept[others] = False
    matrix = np.zeros((int(kept.sum()), channels), dtype=np.complex128)
    matrix[:, kept] = np.linalg.inv(np.linalg.cholesky(covariance[np.ix_(kept, kept)]))
    return matrix


def _independent(correlation: NDArray[np.complex128]) -> NDArray[np.bool_]:
    """(c,) whether a channel has noise that the kept ones before it do not explain, by Cholesky's recursion.

    Args:
        correlation: (c, c) covariance of channels of unit variance.
    """
    channels = len(correlation)
    own = np.zeros(channels, dtype=bool)
    factor = np.zeros((channels, channels), dtype=np.complex128)  # rows and columns of kept channels
    for row in range(channels):
        before = np.flatnonzero(own)
        if len(before):
            explained = np.linalg.solve(factor[np.ix_(before, before)], correlation[before, row])
            factor[row, before] = explained.conj()
        rest = float(correlation[row, row].real - np.sum(np.abs(factor[row]) ** 2))
        if rest > DEPENDENT:
            own[row] = True
            factor[row, row] = np.sqrt(rest)
    return own
