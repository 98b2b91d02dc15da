"""The data term of a Cartesian scan frame by frame, over readout positions, in L1 or L2 (METHODS 1).

    L1: sum |Re r| + |Im r|,    L2: sum |r|^2,    r = sqrt(n) (M_t F C I_t - s_t)

with n acquisitions behind each line. L1 is SUMMIT's data term and has no Gram form; L2 is what the reduced
form is tested against. Value and gradients are found in one sweep over frames, so that no coil image outlives
its chunk of frames: memory is that of the frames, however many coils there are.

Two ways from frames to samples, equal up to rounding: a fast Fourier transform of every coil image with the
acquired points picked out, or, where few points of a frame are acquired, the sums at just these points as one
matrix product over the voxels, ``s[p, c] = sum_r (exp(-2 pi i k_p r) I_{t(p)}(r)) C_c(r)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantitron.recon.data import KSpace

Norm: TypeAlias = Literal["l1", "l2"]
Transform: TypeAlias = Literal["fft", "direct"]
_DIRECT_BELOW = 0.9
"""Lines of a frame, per channel, below which sums at the points are quicker than transforms (measured)."""


def frame_images(contrast: Tensor, echo: Tensor) -> Tensor:
    """Images of all frames from the two factors of the signal.

    Args:
        contrast: (x, w, z, y), real or complex.
        echo: (x, e, z, y) complex.

    Returns:
        (x, t, z, y) with ``t = w * n_echoes + e``.
    """
    return (contrast[:, :, None] * echo[:, None]).flatten(1, 2)


class FrameDataTerm:
    """Distance between the acquired lines of one slice and images of all its frames."""

    def __init__(
        self,
        kspace: KSpace,
        device: torch.device | None = None,
        transform: Transform | None = None,
        working_set: int | None = None,
    ) -> None:
        """Sort the lines by frame.

        Args:
            kspace: lines of one slice; each point of a frame at most once.
            device: where to work; that of the lines by default.
            transform: ``fft`` or ``direct``; None takes the quicker one for this sampling.
            working_set: bytes that a chunk of frames may take, by default what suits the device. Changes no
                result beyond rounding.

        Raises:
            ValueError: if there are no lines, more than one slice, or a point twice in a frame.
        """
        slices, nz, ny, nx = kspace.grid
        if slices != 1 or len(kspace.echo) == 0:
            raise ValueError(
                f"the data term by frames is of one slice, not of {len(kspace.echo)} lines of {slices} slices"
            )
        device = kspace.samples.device if device is None else device
        echoes = kspace.contrast_shape[2]
        frame = kspace.contrast * echoes + kspace.echo
        key, order = torch.sort((frame * nz + kspace.kz) * ny + kspace.ky)
        if bool((key.diff() == 0).any()):
            raise ValueError("a point of k-space occurs twice in one frame; average repeated lines first")
        self.frames = math.prod(kspace.contrast_shape)
        """Number of frames T."""
        self._grid = (nz, ny)
        self._coils = kspace.samples.shape[1]
        self._frame = frame[order].to(device)
        # (x, line, c): the samples of a readout position together.
        self._samples = kspace.samples[order].permute(2, 0, 1).to(device).contiguous()
        self._root = kspace.count[order].to(self._samples).real.sqrt()[:, None]  # (line, 1)
        weighted = torch.view_as_real(self._samples * self._root).square().sum(dtype=torch.float64)
        # What averaging took from the energy is a constant of the L2 term, shared evenly by the positions.
        self._lost_energy = (kspace.energy - float(weighted)) / nx
        kz, ky = (kspace.kz[order] - nz // 2).to(device), (kspace.ky[order] - ny // 2).to(device)
        # An uncentred transform and a phase at each point give what a centred one does and move no image.
        self._point = (kz % nz) * ny + ky % ny  # (line,) flat index into the uncentred spectrum
        turns = kz.double() * (nz // 2) / nz + ky.double() * (ny // 2) / ny
        self._phase = _unit(turns, self._samples)[:, None]  # (line, 1)
        self._waves = _waves(kz, nz, self._samples), _waves(ky, ny, self._samples)  # (line, z), (line, y)
        if transform is None:
            direct = len(frame) < _DIRECT_BELOW * self.frames * self._coils
            transform = "direct" if direct else "fft"
        self.transform: Transform = transform
        """The way taken, ``fft`` or ``direct``."""
        if working_set is None:
            working_set = 2_000_000 if device.type == "cpu" else 500_000_000
        self._chunks = self._cut(working_set)

    @property
    def samples_per_position(self) -> int:
        """Complex samples at one readout position, lines times channels; a repeated line counts once."""
        return len(self._point) * self._coils

    def l1(self, frames: Tensor, csm: Tensor, position: Tensor) -> Tensor:
        """Sum of |Re r| + |Im r| over a batch of readout positions.

        Divided by ``2 * samples_per_position * len(position)`` it is the mean absolute error.

        Args:
            frames: (x, t, z, y) complex, images of all frames at these positions, ``t = w * n_echoes + e``.
            csm: (x, c, z, y) complex, coil maps at these positions.
            position: (x,) int64, which readout positions.

        Returns:
            A scalar, differentiable once by the frames and by the coil maps.

        Raises:
            ValueError: if the shapes do not fit the scan.
        """
        return self._distance(frames, csm, position, "l1")

    def l2(self, frames: Tensor, csm: Tensor, position: Tensor) -> Tensor:
        """Sum of |s - A I|^2 over a batch of readout positions, the scatter of averaged lines included.

        Over all positions it is ``ReducedSense.residual_energy``. Arguments, result and errors as ``l1``.
        """
        return self._distance(frames, csm, position, "l2") + len(position) * self._lost_energy

    def predict(self, frames: Tensor, csm: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """What the frames would give at the acquired points, and what was acquired. No gradient.

        Arguments and errors as ``l1``.

        Returns:
            Both (x, line, c), lines sorted by frame, kz, ky.
        """
        self._check(frames, csm, position)
        acquired = self._samples[position]
        predicted = torch.empty_like(acquired)
        with torch.no_grad():
            for chunk in self._transforms():
                for x in range(len(position)):
                    predicted[x, chunk.lines] = chunk.forward(frames[x, chunk.frames], csm[x])[0]
        return predicted, acquired

    def _distance(self, frames: Tensor, csm: Tensor, position: Tensor, norm: Norm) -> Tensor:
        self._check(frames, csm, position)
        value: Tensor = _Distance.apply(frames, csm, self, position, norm)  # type: ignore[no-untyped-call]
        return value

    def _check(self, frames: Tensor, csm: Tensor, position: Tensor) -> None:
        n = len(position)
        wanted = ((n, self.frames, *self._grid), (n, self._coils, *self._grid))
        if (tuple(frames.shape), tuple(csm.shape)) != wanted:
            raise ValueError(
                f"frames and coil maps at {n} readout positions are {wanted[0]} and {wanted[1]}, "
                f"not {tuple(frames.shape)} and {tuple(csm.shape)}"
            )

    def _cut(self, working_set: int) -> list[tuple[slice, slice]]:
        """Chunks of frames and their lines; frames without lines in no chunk of their own."""
        first = [0, *torch.bincount(self._frame, minlength=self.frames).cumsum(0).tolist()]
        image = math.prod(self._grid) * self._samples.element_size()

        def too_large(start: int, stop: int) -> bool:
            images = (
                first[stop] - first[start] if self.transform == "direct" else (stop - start) * self._coils
            )
            return images * image > working_set

        chunks, start = [], 0
        for stop in range(1, self.frames + 1):
            if stop == self.frames or too_large(start, stop + 1):
                if first[stop] > first[start]:
                    chunks.append((slice(start, stop), slice(first[start], first[stop])))
                start = stop
        return chunks

    def _transforms(self) -> Iterator[_Direct | _Fft]:
        """The operator of each chunk. What it sets up serves all readout positions."""
        for frames, lines in self._chunks:
            frame = self._frame[lines] - frames.start
            if self.transform == "direct":
                z, y = (wave[lines] for wave in self._waves)
                yield _Direct(frames, lines, frame, (z[:, :, None] * y[:, None]).flatten(1))
            else:
                yield _Fft(frames, lines, frame, self._point[lines], self._phase[lines])

    def _sweep(
        self, frames: Tensor, csm: Tensor, position: Tensor, norm: Norm, wanted: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Value, and gradients by frames and by coil maps where wanted."""
        value = torch.zeros((), dtype=torch.float64, device=frames.device)
        by_frames = torch.zeros_like(frames) if wanted[0] else None
        by_csm = torch.zeros_like(csm) if wanted[1] else None
        places = position.tolist()
        for chunk in self._transforms():
            root = self._root[chunk.lines]
            for x, place in enumerate(places):
                images = frames[x, chunk.frames]
                predicted, state = chunk.forward(images, csm[x])
                residual = predicted.sub_(self._samples[place, chunk.lines]).mul_(root)
                parts = torch.view_as_real(residual)
                if norm == "l1":
                    value += parts.abs().sum()
                    slope = torch.view_as_complex(parts.sign()).mul_(root)
                else:
                    value += parts.square().sum()
                    slope = residual.mul_(2 * root)
                chunk.pull_back(
                    slope,
                    state,
                    images,
                    csm[x],
                    None if by_frames is None else by_frames[x, chunk.frames],
                    None if by_csm is None else by_csm[x],
                )
        return value.to(frames.real.dtype), by_frames, by_csm


class _Distance(torch.autograd.Function):
    """The value; its gradients are found with it, as large as the inputs, and kept."""

    @staticmethod
    def forward(
        ctx: Any, frames: Tensor, csm: Tensor, term: FrameDataTerm, position: Tensor, norm: Norm
    ) -> Tensor:
        wanted = (bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[1]))
        value, by_frames, by_csm = term._sweep(frames.detach(), csm.detach(), position, norm, wanted)
        ctx.save_for_backward(by_frames, by_csm)
        return value

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        by_frames, by_csm = (None if part is None else part * outer[0] for part in ctx.saved_tensors)
        return by_frames, by_csm, None, None, None


@dataclass(frozen=True)
class _Fft:
    """Frames of a chunk (t, z, y) to their lines (line, c) by transforms of all coil images."""

    frames: slice
    lines: slice
    frame: Tensor
    """(line,) frame of each line, counted within the chunk."""
    point: Tensor
    """(line,) place in the flat uncentred spectrum."""
    phase: Tensor
    """(line, 1) from uncentred to centred."""

    def forward(self, images: Tensor, csm: Tensor) -> tuple[Tensor, Tensor]:
        """Samples, and a spectrum (t, c, z * y) to work in."""
        spectrum = torch.fft.fft2(images[:, None] * csm, norm="ortho").flatten(2)
        return spectrum[self.frame, :, self.point].mul_(self.phase), spectrum

    def pull_back(
        self,
        slope: Tensor,
        spectrum: Tensor,
        images: Tensor,
        csm: Tensor,
        by_images: Tensor | None,
        by_csm: Tensor | None,
    ) -> None:
        """Write the gradient by the images (t, z, y), add that by the coil maps (c, z, y)."""
        if by_images is None and by_csm is None:
            return
        spectrum.zero_()[self.frame, :, self.point] = slope * self.phase.conj()
        shape = (len(images), *csm.shape)
        coil_images = torch.fft.ifft2(spectrum.reshape(shape), norm="ortho")  # (t, c, z, y)
        if by_images is not None:
            torch.sum(coil_images * csm.conj(), 1, out=by_images)
        if by_csm is not None:
            by_csm += (coil_images * images[:, None].conj()).sum(0)


@dataclass(frozen=True)
class _Direct:
    """Frames of a chunk (t, z, y) to their lines (line, c) by sums at the acquired points alone."""

    frames: slice
    lines: slice
    frame: Tensor
    """(line,) frame of each line, counted within the chunk."""
    waves: Tensor
    """(line, z * y) centred plane wave of each point."""

    def forward(self, images: Tensor, csm: Tensor) -> tuple[Tensor, Tensor]:
        """Samples, and each line's image times its wave (line, z * y)."""
        modulated = images.flatten(1)[self.frame].mul_(self.waves)
        return modulated @ csm.flatten(1).T, modulated

    def pull_back(
        self,
        slope: Tensor,
        modulated: Tensor,
        images: Tensor,
        csm: Tensor,
        by_images: Tensor | None,
        by_csm: Tensor | None,
    ) -> None:
        """Write the gradient by the images (t, z, y), add that by the coil maps (c, z, y)."""
        if by_csm is not None:
            by_csm += (slope.T @ modulated.conj()).reshape(csm.shape)
        if by_images is not None:
            by_line = (slope @ csm.flatten(1).conj()).mul_(self.waves.conj())
            total = torch.zeros_like(images).flatten(1)
            by_images.copy_(total.index_add_(0, self.frame, by_line).reshape(images.shape))


def _unit(turns: Tensor, like: Tensor) -> Tensor:
    """exp(2 pi i turns), computed in double precision, of ``like``'s type."""
    return torch.polar(torch.ones_like(turns), 2 * math.pi * turns).to(like)


def _waves(k: Tensor, length: int, like: Tensor) -> Tensor:
    """exp(-2 pi i k (r - length // 2) / length) / sqrt(length): (line,) -> (line, r)."""
    r = torch.arange(length, device=k.device, dtype=torch.float64) - length // 2
    return _unit(-k.double()[:, None] * r / length, like) / math.sqrt(length)
