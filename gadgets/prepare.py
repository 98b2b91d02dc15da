"""From samples as they come off the receiver to whitened lines in image space along the readout.

Every gadget here works on blocks, and every acquisition's result depends on that acquisition and on what was
decided before it alone, so that the way in which a stream is cut into blocks does not change one bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from quantitron.gadgets.acquisition_block import AcquisitionBlock, blocks_of
from quantitron.gadgets.acquisition_kind import NOISE, flagged, is_image, of_scan, runs
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context, Gadget
from quantitron.gadgets.header import phase_encoding
from quantitron.gadgets.noise_whitening import check_noise, whitening_matrix
from quantitron.gadgets.readout_transform import ReadoutTransform, mix
from quantitron.recon.data import Encoding

logger = logging.getLogger("quantitron")


# ------------------------------------------------------------------------------------------ noise adjustment


@dataclass(frozen=True)
class NoiseAdjust(Gadget):
    """Whitens the channels with the noise scan: afterwards E|n|^2 = 1 for each complex sample (Roemer 1990).

    The product with the whitening matrix is left to ``remove_oversampling`` (``AcquisitionBlock.mixing``).

    Channels without noise, and those whose noise is a combination of that of others, are left out. Noise
    lines count from the start of the stream to the first line of the scan proper. Without any, lines pass as
    they are, unless their numbers are too large or small to compute with (``_CommonScale``), and
    ``context.noise_known`` stays False.
    """

    name: ClassVar[str] = "noise_adjust"
    receiver_bandwidth_ratio: float = field(default=0.793, metadata={"above": 0})
    """Noise bandwidth of a receiver over its sampling bandwidth, where the header does not give it."""

    def __call__(self, items: Iterable[AcquisitionBlock], context: Context) -> Iterator[AcquisitionBlock]:
        """Whiten blocks.

        Raises:
            ScanError: if noise samples are not finite or too large to be noise (``check_noise``), or the
                number of channels changes.
        """
        noise: list[AcquisitionBlock] = []
        whitening: _Whitening | None = None
        scale = _CommonScale()
        begun = False
        for block in blocks_of(items):
            is_noise = flagged(block, NOISE)
            chosen = of_scan(block, context)
            if not begun:
                begin = int(chosen.argmax()) if chosen.any() else len(block)
                early = is_noise & (np.arange(len(block)) < begin)
                noise.extend(runs(block, early) if early.any() else ())
                if not chosen.any():
                    continue
                begun = True
                whitening = self._whitening(noise, context)
                noise = []
                is_noise = is_noise & ~early
            if is_noise.any():
                context.note("noise lines that came after the first imaging line were not used")
            for run in runs(block, chosen):
                if whitening is None:
                    yield scale.apply(run)
                else:
                    yield from whitening.apply(run)

    def _whitening(self, noise: list[AcquisitionBlock], context: Context) -> _Whitening | None:
        if not noise:
            context.note(
                "the scan has no noise lines: channels are not whitened and the noise level is not known"
            )
            return None
        channels = noise[0].data.shape[1]
        for block in noise:
            if block.data.shape[1] != channels:
                raise ScanError(
                    f"noise acquisition {block.first} has {block.data.shape[1]} channels, the ones before "
                    f"have {channels}"
                )
            finite = (np.isfinite(block.data).all(axis=1) | ~_kept(block)).all(axis=1)
            if not finite.all():
                raise ScanError(
                    f"noise acquisition {block.first + int(finite.argmin())} has samples that are not finite "
                    "numbers"
                )
        dwells = np.concatenate([block.head["sample_time_us"] for block in noise])
        dwell = float(dwells[dwells > 0][0]) if (dwells > 0).any() else 0.0
        samples = np.concatenate(
            [
                (block.data.astype(np.complex128) * _to_dwell(block, dwell)).transpose(1, 0, 2)[:, kept]
                for block, kept in zip(noise, map(_kept, noise), strict=True)
            ],
            axis=1,
        )  # (c, noise sample)
        check_noise(samples, np.concatenate([_numbers(block)[_kept(block)] for block in noise]))
        matrix = whitening_matrix(samples, context.note)
        if matrix is None:
            return None
        system = context.header.acquisitionSystemInformation
        given = system.relativeReceiverNoiseBandwidth if system is not None else None
        ratio = float(given) if given and given > 0 else self.receiver_bandwidth_ratio
        if not dwell > 0:
            context.note("the noise lines have no sampling time: taken as that of the imaging lines")
        context.noise_known = True
        return _Whitening(matrix, dwell, ratio)


def _kept(block: AcquisitionBlock) -> NDArray[np.bool_]:
    """(n, sample) samples that ``discard_pre`` and ``discard_post`` leave."""
    samples = block.data.shape[2]
    sample = np.arange(samples)
    first = block.head["discard_pre"].astype(np.int64)[:, np.newaxis]
    last = samples - block.head["discard_post"].astype(np.int64)[:, np.newaxis]
    kept: NDArray[np.bool_] = (sample >= first) & (sample < last)
    return kept


def _numbers(block: AcquisitionBlock) -> NDArray[np.int64]:
    """(n, sample) number of the acquisition that each sample is from."""
    numbers = np.arange(block.first, block.first + len(block), dtype=np.int64)[:, np.newaxis]
    return np.broadcast_to(numbers, (len(block), block.data.shape[2]))


def _to_dwell(block: AcquisitionBlock, dwell: float) -> NDArray[np.float32]:
    """(n, 1, 1) factors that bring noise of any sampling time to ``dwell`` [us]: variance is 1 / time."""
    given = block.head["sample_time_us"]
    factor = np.where(given > 0, np.sqrt(given / dwell), 1.0) if dwell > 0 else np.ones(len(block))
    return factor.astype(np.float32)[:, np.newaxis, np.newaxis]


@dataclass(frozen=True)
class _Whitening:
    matrix: NDArray[np.complex128]
    """(k, c) inverse Cholesky factor of the noise covariance over the channels with noise of their own."""
    dwell: float
    """Sampling time of the noise lines [us]; 0 where not known."""
    ratio: float
    """Receiver noise bandwidth over sampling bandwidth."""

    def apply(self, block: AcquisitionBlock) -> Iterator[AcquisitionBlock]:
        """The block, cut where the sampling time changes, with the whitening as pending ``mixing``."""
        channels = self.matrix.shape[1]
        if block.data.shape[1] != channels:
            raise ScanError(
                f"acquisition {block.first} has {block.data.shape[1]} channels, the noise scan has {channels}"
            )
        dwells = block.head["sample_time_us"]
        edges = [0, *(np.flatnonzero(np.diff(dwells)) + 1).tolist(), len(block)]
        for start, end in pairwise(edges):
            part = np.zeros(len(block), dtype=bool)
            part[start:end] = True
            for run in runs(block, part):
                yield replace(run, mixing=self._scaled(float(dwells[start])))

    def _scaled(self, dwell: float) -> NDArray[np.complex64]:
        # Noise variance goes with bandwidth, so with one over the sampling time.
        known = dwell > 0 and self.dwell > 0
        factor = (dwell / self.dwell if known else 1.0) * self.ratio
        scaled: NDArray[np.complex64] = (self.matrix * np.sqrt(factor)).astype(np.complex64)
        return scaled


class _CommonScale:
    """Brings very large or small samples of no known noise to the order of 1.

    Receivers count in units of their own, and single precision holds samples of 1e20 and of 1e-24, but not
    their squares; of smaller numbers not the squares of energies. The factor is a power of two, which changes
    nothing but exponents, and the first line that holds anything sets it. Samples of usual size stay, so that
    the proton densities of two scans in the same unit compare.
    """

    USUAL = 30
    """Exponent of two up to which samples and their reciprocals are of usual size: 1e9."""

    def __init__(self) -> None:
        """Nothing has been seen."""
        self._factor: np.float32 | None = None

    def apply(self, block: AcquisitionBlock) -> AcquisitionBlock:
        """The block on the common scale. Samples that are not finite stay, and tell no scale."""
        if self._factor is None:
            self._factor = self._of_first(block)
        if self._factor is None or self._factor == 1:
            return block
        parts = np.ascontiguousarray(block.data).view(np.float32)  # a complex product turns infinity to NaN
        return replace(block, data=(parts * self._factor).view(np.complex64))

    @staticmethod
    def _of_first(block: AcquisitionBlock) -> np.float32 | None:
        """From the largest sample of the first line with one, 1 for a usual one; None where all are zero."""
        for line in block.data:
            parts = np.abs(np.ascontiguousarray(line).view(np.float32))
            largest = float(np.max(parts, where=np.isfinite(parts), initial=0.0))
            if largest > 0:
                exponent = math.frexp(largest)[1]
                if abs(exponent) <= _CommonScale.USUAL:
                    return np.float32(1)
                limit = np.finfo(np.float32).maxexp - 2  # of factors that single precision holds
                return np.float32(2.0 ** float(np.clip(-exponent, -limit, limit)))
        return None


# -------------------------------------------------------------------------------------- readout oversampling


@dataclass(frozen=True)
class RemoveOversampling(Gadget):
    """Places each readout on the encoded grid, Fourier transforms it and crops it to the delivered readout.

    Lines end in hybrid space (``AcquisitionBlock.hybrid``): unitary centred inverse transform, voxel n/2 at
    the centre. What was not sampled (asymmetric echo, discarded samples) is zero. Reversed lines are turned
    round first and ``center_sample`` then counts as for a forward line; writers that count it from the other
    end are recognised by the centre of the forward lines. Readouts on another trajectory stay as they are,
    but for the samples to discard, which go with their positions.

    Where the first line of the images is centred, whole, and as long as the delivered readout, an earlier
    step has cropped the scan already (Gadgetron's own leaves the header as it was): lines are transformed
    only, which is noted.
    """

    name: ClassVar[str] = "remove_oversampling"

    def __call__(self, items: Iterable[AcquisitionBlock], context: Context) -> Iterator[AcquisitionBlock]:
        """Transform blocks.

        Raises:
            ScanError: if a line has far more samples than the encoded matrix, or none, or if only some lines
                of the images are cropped already.
        """
        if context.encoding.trajectory != "cartesian":
            for block in blocks_of(items):
                for run in runs(block, of_scan(block, context)):
                    yield from _without_discarded(run)
            return
        waiting: list[AcquisitionBlock] = []
        readout: ReadoutTransform | None = None
        for block in blocks_of(items):
            for run in runs(block, of_scan(block, context)):
                waiting.append(run)
                # The first line of the images decides; lines for calibration may have a length of their own.
                if readout is None and (imaging := is_image(run)).any():
                    readout = ReadoutTransform.of_scan(run, int(imaging.argmax()), context)
                if readout is not None:
                    yield from map(readout.transform, waiting)
                    waiting = []
        if waiting:
            yield from map(ReadoutTransform.of_encoded(context).transform, waiting)


def _without_discarded(block: AcquisitionBlock) -> Iterator[AcquisitionBlock]:
    """Cut ``discard_pre`` and ``discard_post`` off readouts and trajectories and mix the channels.

    The block comes in parts of one length.
    """
    samples = block.data.shape[2]
    cuts = np.stack([block.head["discard_pre"], block.head["discard_post"]], axis=1).astype(np.int64)
    if block.mixing is None and not cuts.any():
        yield block
        return
    edges = [0, *(np.flatnonzero((cuts[1:] != cuts[:-1]).any(axis=1)) + 1).tolist(), len(block)]
    for start, end in pairwise(edges):
        pre, post = (int(cut) for cut in cuts[start])
        if samples - pre - post < 1:
            raise ScanError(
                f"acquisition {block.first + start} keeps none of its {samples} samples (discard_pre {pre}, "
                f"discard_post {post})"
            )
        kept = slice(pre, samples - post)
        head, data = block.head[start:end], block.data[start:end, :, kept]
        if pre or post:
            head = head.copy()
            head["number_of_samples"] = samples - pre - post
            head["center_sample"] = np.maximum(head["center_sample"].astype(np.int64) - pre, 0)
            head["discard_pre"] = head["discard_post"] = 0
        if block.mixing is not None:
            data = mix(block.mixing, np.ascontiguousarray(data))
        trajectory = block.trajectory[start:end, kept]
        yield replace(
            block, head=head, data=data, trajectory=trajectory, first=block.first + start, mixing=None
        )


# ------------------------------------------------------------------------------------------ coil compression


@dataclass(frozen=True)
class CompressCoils(Gadget):
    """Combines channels into fewer virtual ones by SVD (Buehrer 2007).

    Its rows are orthonormal: white noise stays white. The combination comes from the lines up to one near the
    k-space centre (lines at the edge are mostly noise), and from at least ``lines`` of them; they wait until
    then.
    """

    name: ClassVar[str] = "compress_coils"
    coils: int = field(default=0, metadata={"minimum": 0})
    """Virtual channels; 0 leaves the channels as they are."""
    lines: int = field(default=128, metadata={"minimum": 1})
    """Fewest lines that the combination is taken from."""
    longest_wait: int = field(default=4096, metadata={"minimum": 1})
    """Most lines that wait for one near the centre of k-space."""

    def __call__(self, items: Iterable[AcquisitionBlock], context: Context) -> Iterator[AcquisitionBlock]:
        """Compress blocks.

        Raises:
            ScanError: if the number of channels changes, or the first lines are not finite.
        """
        if self.coils == 0:
            yield from items
            return
        waiting: list[AcquisitionBlock] = []
        count, central = 0, False
        matrix: NDArray[np.complex64] | None = None
        for whole in blocks_of(items):
            for block in runs(whole, of_scan(whole, context)):
                if matrix is not None:
                    yield self._compress(block, matrix)
                    continue
                waiting.append(block)
                near = self._near_centre(block, context)
                # The line that completes the set decides, not the block that holds it.
                seen = np.arange(count + 1, count + len(block) + 1)
                ready = ((seen >= self.lines) & (np.maximum.accumulate(near) | central)) | (
                    seen >= self.longest_wait
                )
                count += len(block)
                central = central or bool(near.any())
                if ready.any():
                    matrix = self._matrix(waiting, int(seen[ready.argmax()]))
                    for held in waiting:
                        yield self._compress(held, matrix)
                    waiting = []
        if waiting:
            matrix = self._matrix(waiting, count)
            for held in waiting:
                yield self._compress(held, matrix)

    def _near_centre(self, block: AcquisitionBlock, context: Context) -> NDArray[np.bool_]:
        cartesian = context.encoding.trajectory == "cartesian"
        near = np.ones(len(block), dtype=bool) if cartesian else _through_centre(block, context.encoding)
        counted = not cartesian and context.encoding.matrix[0] > 1 and block.trajectory.shape[2] == 2
        for axis in (0, 1) if cartesian else (0,) if counted else ():
            lines = phase_encoding(context.header, context.encoding, axis, [])
            centre = lines.centre if lines.centre is not None else lines.points // 2
            distance = np.abs(block.head["idx"][lines.counter].astype(np.int64) - centre)
            near &= distance <= max(1, lines.points // 32)
        return near

    def _matrix(self, blocks: list[AcquisitionBlock], lines: int) -> NDArray[np.complex64]:
        """(k, c) with orthonormal rows, from the first ``lines`` lines."""
        channels = blocks[0].data.shape[1]
        moment = np.zeros((channels, channels), dtype=np.complex128)
        for block in blocks:
            self._check(block, channels)
            for number, line in enumerate(block.data[: max(0, lines)].astype(np.complex128), block.first):
                if not np.isfinite(line).all():
                    raise ScanError(f"acquisition {number} has samples that are not finite numbers")
                moment += line @ line.conj().T
            lines -= len(block)
        values, vectors = np.linalg.eigh(moment)
        kept = vectors[:, ::-1][:, : self.coils]
        # The phase of an eigenvector is arbitrary: its largest entry is made positive.
        largest = np.take_along_axis(kept, np.abs(kept).argmax(axis=0)[np.newaxis], axis=0)
        kept = kept * (largest.conj() / np.abs(largest))
        if values.sum() > 0:
            logger.info(
                "%d channels compressed to %d, which keep %.3f %% of the energy",
                channels,
                kept.shape[1],
                100 * values[::-1][: self.coils].sum() / values.sum(),
            )
        return np.ascontiguousarray(kept.conj().T.astype(np.complex64))

    def _check(self, block: AcquisitionBlock, channels: int) -> None:
        if block.data.shape[1] != channels:
            raise ScanError(
                f"acquisition {block.first} has {block.data.shape[1]} channels, the ones before have "
                f"{channels}"
            )

    def _compress(self, block: AcquisitionBlock, matrix: NDArray[np.complex64]) -> AcquisitionBlock:
        self._check(block, matrix.shape[1])
        return replace(block, data=mix(matrix, block.data))


def _through_centre(block: AcquisitionBlock, encoding: Encoding) -> NDArray[np.bool_]:
    """(n,) whether a readout on a trajectory comes near the k-space centre.

    One whose positions do not fit cycles per voxel is taken to be in cycles per field of view.
    """
    dimensions = min(block.trajectory.shape[2], 2 if encoding.matrix[0] == 1 else 3)
    if not dimensions or not block.trajectory.shape[1]:
        return np.zeros(len(block), dtype=bool)  # accumulate refuses it
    matrix = np.array(encoding.matrix[::-1][:dimensions])
    distance = np.abs(block.trajectory[..., :dimensions]).astype(np.float64)
    per_voxel = distance.max(axis=(1, 2)) <= 0.501
    lines = np.where(per_voxel[:, np.newaxis, np.newaxis], distance * matrix, distance)
    near: NDArray[np.bool_] = (lines <= np.maximum(1, matrix // 32)).all(axis=2).any(axis=1)
    return near
