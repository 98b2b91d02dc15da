"""Batches of noisy patches of weighted volumes, and volumes that are held out for validation."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from quantitron.gadgets.errors import ScanError
from quantitron.training.augmentation import UNCHANGED, Augmentation
from quantitron.training.batch import Batch, step_generator
from quantitron.training.volumes import Volume, VolumeCollection

logger = logging.getLogger("quantitron")

_SUBJECTS = 5
"""Subjects from which on whole subjects are held out, and below which slices are."""
_GAP = 2
"""Slices between those that are learned from and those that are held out."""


@dataclass(frozen=True)
class PatchPlan:
    """How many patches of which size make up a step."""

    slice_size: tuple[int, int, int] = (1, 96, 96)
    """Voxels (z, y, x) of single slices."""
    slices: int = 12
    """Of a batch."""
    slab_size: tuple[int, int, int] = (16, 48, 48)
    """Voxels of patches in three dimensions."""
    slabs: int = 3
    """Of a batch."""
    slab_share: float = 0.3
    """Share of the steps that learn from slabs."""

    def is_slab(self, step: int) -> bool:
        """Whether a step learns from slabs: they are spread evenly over the steps."""
        return math.floor((step + 1) * self.slab_share) > math.floor(step * self.slab_share)


class NoiseSampler:
    """Draws patches, modalities evenly, and adds noise of a random level."""

    def __init__(
        self,
        volumes: Sequence[Volume],
        modalities: Sequence[str],
        levels: Sequence[float],
        plan: PatchPlan,
        augmentation: Augmentation,
    ) -> None:
        """Sort the volumes by modality.

        Args:
            volumes: to draw from.
            modalities: in the order of their numbers.
            levels: of the noise.
            plan: of the steps.
            augmentation: of the patches.

        Raises:
            ScanError: if a modality has no volume of enough slices.
        """
        self.plan, self.augmentation = plan, augmentation
        self.levels = torch.tensor(levels, dtype=torch.float32)
        self.drawn = {False: _Draw(volumes, modalities, plan.slice_size)}
        if plan.slab_share > 0:
            self.drawn[True] = _Draw(volumes, modalities, plan.slab_size)

    def __call__(self, step: int, generator: Generator) -> Batch:
        """The batch of a step: input = target's image + level * noise, target = the noise, of unit variance.

        Args:
            step: decides whether slices or slabs, and which modality comes first.
            generator: the source of chance.
        """
        plan = self.plan
        slab = plan.is_slab(step)
        size, count = (plan.slab_size, plan.slabs) if slab else (plan.slice_size, plan.slices)
        draw = self.drawn[slab]
        classes = len(draw.volumes)
        modality = (torch.arange(count) + int(torch.randint(classes, (), generator=generator))) % classes
        patches = [
            self.augmentation.patch(draw.volume(number, generator), size, generator)
            for number in modality.tolist()
        ]
        level = self.levels[torch.randint(len(self.levels), (count,), generator=generator)]
        return noisy(torch.stack(patches)[:, None], level, modality, generator)


def noisy(clean: Tensor, level: Tensor, modality: Tensor, generator: Generator) -> Batch:
    """A batch that adds noise to images.

    Args:
        clean: (n, 1, z, y, x).
        level: (n,) its standard deviation.
        modality: (n,).
        generator: the source of chance.
    """
    noise = torch.randn(clean.shape, generator=generator)
    return Batch(clean + level[:, None, None, None, None] * noise, noise, level, modality)


class _Draw:
    """Volumes of enough slices, by modality."""

    def __init__(
        self, volumes: Sequence[Volume], modalities: Sequence[str], size: tuple[int, int, int]
    ) -> None:
        self.volumes: list[list[Tensor]] = []
        self.weights: list[Tensor] = []
        for name in modalities:
            of_name = [volume for volume in volumes if volume.modality == name]
            fit = [volume for volume in of_name if volume.values.shape[0] >= size[0]]
            if not fit:
                most = max((volume.values.shape[0] for volume in of_name), default=0)
                raise ScanError(
                    f"no {name} volume has the {size[0]} slices that a patch needs: the most is "
                    f"{most}; take thinner slabs, or none"
                )
            self.volumes.append([volume.values for volume in fit])
            self.weights.append(torch.tensor([volume.weight for volume in fit], dtype=torch.float64))

    def volume(self, modality: int, generator: Generator) -> Tensor:
        """One at random."""
        return self.volumes[modality][int(torch.multinomial(self.weights[modality], 1, generator=generator))]


def hold_out(
    collection: VolumeCollection, share: float, seed: int
) -> tuple[tuple[Volume, ...], tuple[Volume, ...], str]:
    """Part volumes into those that are learned from and those that tell how well.

    Args:
        collection: all volumes.
        share: to hold out.
        seed: of the choice.

    Returns:
        To learn from, held out, and how: ``subjects`` where every modality has several subjects beyond the
        held out ones, else ``slices`` in the middle of every volume.

    Raises:
        ScanError: if a volume has too few slices to part.
    """
    if not 0 < share <= 0.5:
        raise ScanError(f"a share of {share:g} to hold out for validation is not within 0..0.5")
    generator = step_generator(seed, 0, "hold out")
    subjects = sorted({volume.subject for volume in collection.volumes})
    if len(subjects) >= _SUBJECTS:
        order = torch.randperm(len(subjects), generator=generator).tolist()
        chosen = {subjects[number] for number in order[: max(1, round(share * len(subjects)))]}
        learned = tuple(v for v in collection.volumes if v.subject not in chosen)
        held = tuple(v for v in collection.volumes if v.subject in chosen)
        everything = set(collection.modalities)
        if {v.modality for v in learned} == everything == {v.modality for v in held}:
            return learned, held, "subjects"
    # the same place in all images of a subject: they show the same anatomy
    places = dict(zip(subjects, torch.rand(len(subjects), generator=generator).tolist(), strict=True))
    parts: list[Volume] = []
    held_parts: list[Volume] = []
    for volume in collection.volumes:
        slices = volume.values.shape[0]
        count = max(1, round(share * slices))
        if slices < count + _GAP + 1:
            raise ScanError(
                f"a {volume.modality} volume of {slices} slices and only {len(subjects)} subjects: nothing "
                "can be held out for validation"
            )
        # around the middle, where the brain is
        low, high = slices // 4, max(slices // 4, 3 * slices // 4 - count)
        first = low + int(places[volume.subject] * (high - low + 1))
        held_parts.append(replace(volume, values=volume.values[first : first + count]))
        for begin, end in ((0, first - _GAP), (first + count + _GAP, slices)):
            if end > begin:
                parts.append(
                    replace(
                        volume,
                        values=volume.values[begin:end],
                        weight=volume.weight * (end - begin) / slices,
                    )
                )
    return tuple(parts), tuple(held_parts), "slices"


def validation_batches(
    volumes: Sequence[Volume],
    modalities: Sequence[str],
    size: tuple[int, int, int],
    patches: int,
    seed: int,
) -> dict[str, Tensor]:
    """Patches that stay the same all through the training.

    Args:
        volumes: held out.
        modalities: all.
        size: of a patch.
        patches: of each modality.
        seed: of their places.

    Returns:
        modality -> (n, 1, z, y, x) clean; modalities without a volume of enough slices are missing.
    """
    found = {}
    for number, name in enumerate(modalities):
        fit = [v.values for v in volumes if v.modality == name and v.values.shape[0] >= size[0]]
        if fit:
            generator = step_generator(seed, number, "validate")
            cut = [UNCHANGED.patch(fit[i % len(fit)], size, generator) for i in range(patches)]
            found[name] = torch.stack(cut)[:, None]
    return found
