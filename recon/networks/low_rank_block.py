"""LoREIN's LRR block: coordinates -> coarse coefficient images -> convolutional network -> refined ones.

The coordinate network gives every coefficient by itself; the convolutional one lets them share structure: it
goes down once by strided convolution and up again by transposed convolution, and between the two an
attention map that all coefficients share scales the features (LoREIN Fig. 3, whose layer sizes are not
given). Planes (z, y) of single readout positions are its images, so that batches of positions are
independent. Its last layer starts at zero: the block starts as the coordinate network alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantitron.recon.networks.encoding import Samples
from quantitron.recon.networks.fields import ComplexField
from quantitron.recon.networks.voxel_images import images_of, values_of


class SharedFeatureAttention(nn.Module):
    """Features times a weight for each place, from what is strong on the average over all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.places = nn.Conv2d(2, 1, 3, padding=1)
        self.features = nn.Linear(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """(n, c, z, y) -> the same."""
        summary = torch.cat([features.mean(1, keepdim=True), features.amax(1, keepdim=True)], 1)
        shared = torch.sigmoid(self.places(summary))  # (n, 1, z, y)
        channel = torch.sigmoid(self.features(features.mean((2, 3))))  # (n, c)
        return features + features * shared * channel[:, :, None, None]


class SharedFeatureNetwork(nn.Module):
    """Refines coefficient images (x, k, z, y): real and imaginary parts are channels."""

    def __init__(self, rank: int, channels: int, generator: torch.Generator) -> None:
        """Draw the weights.

        Args:
            rank: coefficient images.
            channels: features at full resolution; twice as many at half of it.
            generator: the source of chance, on the CPU.
        """
        super().__init__()
        self.first = nn.Conv2d(2 * rank, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.attention = SharedFeatureAttention(2 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1)
        self.last = nn.Conv2d(2 * channels, 2 * rank, 3, padding=1)
        for parameter in self.parameters():
            with torch.no_grad():
                if parameter.ndim > 1:
                    # Variance 1 / values that an output sees: of a transposed convolution, every second
                    # place of the kernel along each axis, and its first axis is the input's.
                    seen = (
                        parameter[:, 0].numel() / 4 if parameter is self.up.weight else parameter[0].numel()
                    )
                    bound = (3 / seen) ** 0.5
                    parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
                else:
                    parameter.zero_()
        nn.init.zeros_(self.last.weight)
        # Channels last in memory: a fifth less time on a CPU.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """(x, k, z, y) complex, of unit size -> the same."""
        z, y = images.shape[2:]
        channels = torch.cat([images.real, images.imag], 1)  # (x, 2k, z, y)
        channels = functional.pad(channels, (0, y % 2, 0, z % 2))  # halves need even sizes
        channels = channels.contiguous(memory_format=torch.channels_last)
        first = functional.relu(self.first(channels))
        coarse = self.attention(functional.relu(self.down(first)))
        joined = torch.cat([first, functional.relu(self.up(coarse))], 1)
        real, imaginary = self.last(joined)[..., :z, :y].contiguous().chunk(2, 1)
        return images + torch.complex(real, imaginary)


class LowRankBlock(nn.Module):
    """Coefficient images U of the whole grid, a batch of readout positions at a time."""

    scale: Tensor

    def __init__(self, field: ComplexField, refinement: SharedFeatureNetwork | None, scale: Tensor) -> None:
        """Put the parts together.

        Args:
            field: K coefficients of unit size at every point.
            refinement: the convolutional network; None leaves it out.
            scale: (k,) size of each coefficient, so that weak ones are learnt as fast as strong ones.
        """
        super().__init__()
        self.field, self.refinement = field, refinement
        self.register_buffer("scale", scale[:, None, None])

    def forward(self, samples: Samples, shape: tuple[int, int, int], places: Tensor | None = None) -> Tensor:
        """U (x, k, z, y) at the points of a block (x, z, y).

        Args:
            samples: the points.
            shape: of the block.
            places: (v,) the points' numbers in the flat block, where they are not all of it: U is zero at the
                others, and what the convolutional network sees there too.
        """
        refined = images_of(self.field(samples), shape, places)
        if self.refinement is not None:
            refined = self.refinement(refined)
            if places is not None:
                refined = images_of(values_of(refined, places), shape, places)
        return self.scale * refined
