"""Batches of coefficient images for the networks that restore series: pairs, or clean images and noise.

Patches are cut where there is signal, mirrored along either axis, scaled by a random factor and turned by a
small random phase: what is left of the phase in the canonical form differs from scan to scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from quantitron.gadgets.errors import ScanError
from quantitron.recon.networks.conditional_unet import ConditionalUNet
from quantitron.recon.priors.network_denoiser import predicted_noise
from quantitron.recon.priors.series_denoiser import series_intensity
from quantitron.training.batch import Batch, step_generator
from quantitron.training.series_pairs import SeriesPair

_TRIES = 4
"""Places that are drawn for a patch until one holds signal."""
_SIGNAL = 0.15
"""Mean of the strongest component in a patch that holds signal."""


@dataclass(frozen=True)
class SeriesPatches:
    """How patches of single slices are drawn."""

    size: tuple[int, int] = (96, 96)
    """Voxels (y, x) at most."""
    batch: int = 12
    """Patches of a step."""
    intensity: float = 0.3
    """Factors on the intensity are drawn from 1 minus to 1 plus this."""
    phase: float = 0.3
    """Standard deviation of the phase [rad] that patches are turned by."""

    def draw(self, series: Sequence[Tensor], generator: Generator) -> list[Tensor]:
        """The same patch of images (2K, z, y, x) of one slice; the last one is asked for signal."""
        height, width = series[-1].shape[2:]
        rows, columns = (min(most, n) for most, n in zip(self.size, (height, width), strict=True))
        for _ in range(_TRIES):
            top, left = (
                int(torch.randint(n - size + 1, (), generator=generator))
                for n, size in ((height, rows), (width, columns))
            )
            place = (..., slice(top, top + rows), slice(left, left + columns))
            if float(series[-1][0][place].abs().mean()) >= _SIGNAL:
                break
        mirrored = [axis for axis in (-2, -1) if bool(torch.rand((), generator=generator) < 0.5)]
        factor = 1 + self.intensity * (2 * float(torch.rand((), generator=generator)) - 1)
        angle = self.phase * float(torch.randn((), generator=generator))
        return [_turned(images[place], factor, angle).flip(mirrored).contiguous() for images in series]


class PairSampler:
    """Draws patches of pairs: input the reconstructed, target the perfect images."""

    def __init__(self, pairs: Sequence[SeriesPair], patches: SeriesPatches) -> None:
        """Normalise the pairs as the solver does.

        Raises:
            ScanError: if there are none.
        """
        if not pairs:
            raise ScanError("no slices to learn from")
        self.pairs = [normalised(pair) for pair in pairs]
        self.patches = patches

    def __call__(self, step: int, generator: Generator) -> Batch:
        """The batch of a step."""
        del step
        drawn = [
            self.patches.draw(self.pairs[number], generator)
            for number in torch.randint(len(self.pairs), (self.patches.batch,), generator=generator).tolist()
        ]
        return Batch(torch.stack([one[0] for one in drawn]), torch.stack([one[1] for one in drawn]))


class CleanSampler:
    """Draws patches of perfect images, and adds noise: target is the noise, of unit variance."""

    def __init__(self, series: Sequence[Tensor], levels: Sequence[float], patches: SeriesPatches) -> None:
        """Normalise the images.

        Args:
            series: (2K, z, y, x) each.
            levels: of the noise, relative to the intensity.
            patches: how they are drawn.

        Raises:
            ScanError: if there are none.
        """
        if not series:
            raise ScanError("no slices to learn from")
        self.series = [images / series_intensity(images) for images in series]
        self.levels = torch.tensor(levels, dtype=torch.float32)
        self.patches = patches

    def __call__(self, step: int, generator: Generator) -> Batch:
        """The batch of a step."""
        del step
        count = self.patches.batch
        numbers = torch.randint(len(self.series), (count,), generator=generator).tolist()
        clean = torch.stack([self.patches.draw([self.series[n]], generator)[0] for n in numbers])
        level = self.levels[torch.randint(len(self.levels), (count,), generator=generator)]
        return noisy_series(clean, level, generator)


def noisy_series(clean: Tensor, level: Tensor, generator: Generator) -> Batch:
    """A batch that adds noise of levels (n,) to images (n, 2K, z, y, x)."""
    noise = torch.randn(clean.shape, generator=generator)
    return Batch(clean + level[:, None, None, None, None] * noise, noise, level)


def normalised(pair: SeriesPair) -> tuple[Tensor, Tensor]:
    """Reconstructed and perfect images over the intensity of the reconstructed ones."""
    scale = series_intensity(pair.reconstructed)
    return pair.reconstructed / scale, pair.perfect / scale


def restoration_loss(weights: Tensor) -> Callable[[ConditionalUNet, Batch], Tensor]:
    """Mean square of what is left of the artifacts, each channel in units of ``weights`` (2K,)."""

    def loss(network: ConditionalUNet, batch: Batch) -> Tensor:
        restored = batch.input + network(batch.input).float()
        error = (restored - batch.target).square().mean((0, 2, 3, 4))  # (2K,)
        total: Tensor = (error / weights.to(error)).mean()
        return total

    return loss


def artifact_energy(pairs: Sequence[SeriesPair]) -> Tensor:
    """Mean square (2K,) of the artifacts of all pairs: the loss is then 1 where nothing is removed."""
    total = [(one - other).square().mean((1, 2, 3)) for one, other in map(normalised, pairs)]
    energy = torch.stack(total).mean(0)
    return energy.clamp_min(1e-9 * float(energy.max()) or 1.0)


def equalise(network: ConditionalUNet, series: Sequence[Tensor]) -> None:
    """Scale the first layer so that it begins with channels of like size.

    The components of a series differ a hundredfold in strength, and what is to be learned of the weak ones
    would come last.

    Args:
        network: to be trained.
        series: (2K, z, y, x) normalised, as it will see them.
    """
    size = torch.stack([images.square().mean((1, 2, 3)) for images in series]).mean(0).sqrt()  # (2K,)
    gain = (float(size.max()) / size.clamp_min(1e-6)).clamp(max=30.0)
    with torch.no_grad():
        network.entry.weight.mul_(gain[None, :, None, None, None])


class Restoration:
    """Validation of artifact removal on whole slices that were held out."""

    def __init__(self, pairs: Sequence[SeriesPair], energy: Tensor, multiple: int) -> None:
        """Keep normalised pairs, cut to what the network takes."""
        self.pairs = [tuple(_whole(images, multiple) for images in normalised(pair)) for pair in pairs]
        self.energy = energy

    def __call__(self, network: ConditionalUNet, last: bool) -> dict[str, object]:
        """``slices`` -> ``series`` -> ``all`` -> error before and after in dB, and ``score``, the gain."""
        del last
        device = next(network.parameters()).device
        before = after = 0.0
        for reconstructed, perfect in self.pairs:
            restored = reconstructed + network(reconstructed[None].to(device))[0].float().cpu()
            before += float(((reconstructed - perfect).square().mean((1, 2, 3)) / self.energy).mean())
            after += float(((restored - perfect).square().mean((1, 2, 3)) / self.energy).mean())
        levels = [-10 * math.log10(max(error / len(self.pairs), 1e-12)) for error in (before, after)]
        rows = {"artifacts": [round(level, 2) for level in levels]}
        return {"score": round(levels[1] - levels[0], 3), "slices": {"series": rows}}


class Denoising:
    """Validation of a denoiser of series on whole slices that were held out."""

    def __init__(self, series: Sequence[Tensor], levels: Sequence[float], multiple: int, seed: int) -> None:
        """Keep normalised images, cut to what the network takes."""
        self.series = [_whole(images / series_intensity(images), multiple) for images in series]
        self.levels, self.seed = levels, seed

    def __call__(self, network: ConditionalUNet, last: bool) -> dict[str, object]:
        """``slices`` -> ``series`` -> level -> PSNR before and after, and ``score``, the mean gain [dB]."""
        device = next(network.parameters()).device
        count = len(self.levels)
        numbers = sorted({round(float(n)) for n in torch.linspace(0, count - 1, count if last else 4)})
        rows: dict[str, list[float]] = {}
        for number in numbers:
            sigma, errors = self.levels[number], [0.0, 0.0]
            for place, clean in enumerate(self.series):
                generator = step_generator(self.seed, number, f"validate {place}")
                batch = noisy_series(clean[None], torch.tensor([sigma]), generator).to(device)
                assert batch.level is not None
                denoised = batch.input - sigma * predicted_noise(network, batch.input, batch.level)
                for which, images in enumerate((batch.input, denoised)):
                    errors[which] += float((images[0].cpu() - clean).square().mean()) / len(self.series)
            rows[f"{sigma:.4g}"] = [round(-10 * math.log10(max(error, 1e-12)), 2) for error in errors]
        gain = sum(after - before for before, after in rows.values()) / len(rows)
        return {"score": round(gain, 3), "slices": {"series": rows}}


def _turned(images: Tensor, factor: float, angle: float) -> Tensor:
    """Real parts then imaginary parts (2K, ...), times a complex factor."""
    real, imaginary = images.chunk(2)
    cosine, sine = factor * math.cos(angle), factor * math.sin(angle)
    return torch.cat([cosine * real - sine * imaginary, sine * real + cosine * imaginary])


def _whole(images: Tensor, multiple: int) -> Tensor:
    """(2K, 1, y, x) cut to multiples along y and x."""
    height, width = (n // multiple * multiple for n in images.shape[2:])
    return images[:, :, :height, :width].contiguous()
