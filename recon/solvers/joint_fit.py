"""One coordinate network for all coefficient images of a scan, fitted in the image domain (Joint INR).

    min over theta, W, b:   sum_(r, k) |x_k(r) - w_k^T phi_theta(r) - b_k|^2 + decay_encoder ||encoder||^2
                                                                       + decay_network ||network||^2

phi are the features of the last hidden layer of a perceptron over a hash grid: they are shared, and each
component is a complex linear combination of them. Strong components form the features, weak ones, whose
aliasing is of their own size, can little but reuse them; what is incoherent is learnt last, and the fit ends
before. There is no Fourier transform in it: seconds.

As the objective is quadratic in (W, b), they need no gradient steps: in every step they are solved for, given
the features, and only the features follow the gradient, which is that of the objective with the heads left
out (variable projection, Golub and Pereyra 1973). A fit then takes a third of the steps. As published heads
follow the gradient as well (``heads: trained``).

The phase of a voxel is nearly that of its neighbours and, where the basis is real, that of all components. It
is taken out of the images before the fit, smoothed, and put back afterwards: features need not learn it. As
published it stays (``phase_width: 0``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantitron.recon.algorithms.adam import ParameterGroup
from quantitron.recon.networks.encoder import encoder
from quantitron.recon.networks.encoding import Samples
from quantitron.recon.networks.hash_layout import HashGridLayout, grid_coordinates
from quantitron.recon.networks.mlp import StackedMLP
from quantitron.recon.solvers.training import Schedule, TrainingDiverged, adam

BETAS = (0.9, 0.99)
"""Of Adam: a fit of some tens of steps has no time for the usual 0.999."""
_LEAST_RIDGE = 1e-6
"""Smallest penalty of exact heads, relative to the mean square of a feature: features may be alike, or 0."""


@dataclass(frozen=True)
class JointFitSettings:
    """What the network looks like and how it is fitted."""

    steps: int = 80
    """Of Adam, over all voxels each; many of them teach the network the aliasing."""
    learning_rate: float = 1e-2
    """Of Adam."""
    features: int = 64
    """Shared features phi, and neurons of each hidden layer."""
    hidden: int = 2
    """Hidden layers; phi is what the last one gives."""
    levels: int = 8
    """Resolutions of the hash grid."""
    grid_features: int = 4
    """Numbers in a row of the hash grid."""
    base_resolution: int = 8
    """Vertices an axis of the coarsest resolution."""
    cells_per_voxel: float = 1.0
    """Cells of the finest resolution, relative to the voxels of the longest axis."""
    log2_rows: int = 16
    """A resolution's table has at most 2^log2_rows rows."""
    decay_encoder: float = 0.0
    """Penalty of the hash grid's squared features, for images of mean square 1."""
    decay_network: float = 1e-3
    """Penalty of the squared weights of all layers, heads included, for images of mean square 1."""
    whitening: float = 0.0
    """Components count by their mean square to the power of minus this: 0, as published, lets the strong ones
    form the features; 1 makes all alike."""
    phase_width: float = 2.0
    """Standard deviation [voxels] over which the phase is averaged that is taken out; 0 leaves it in."""
    heads: str = "exact"
    """``exact``: solved for in every step; ``trained``: by gradient steps, as published."""
    fits: int = 1
    """Networks, from different starts, whose images are averaged."""


class JointNetwork(nn.Module):
    """Shared features of all voxels, and linear heads for the real and imaginary parts of K components."""

    def __init__(
        self,
        layout: HashGridLayout,
        components: int,
        settings: JointFitSettings,
        generator: torch.Generator,
        device: torch.device,
        coordinates: Tensor,
    ) -> None:
        """Draw the weights.

        Args:
            layout: of the hash grid.
            components: K.
            settings: features and hidden layers.
            generator: the source of chance, on the CPU.
            device: where it runs.
            coordinates: (v, d) in [0, 1], the voxels of the fit.
        """
        super().__init__()
        self.encoding = encoder(layout, 1, device, generator, coordinates)
        self.layers = StackedMLP(
            1,
            layout.width,
            settings.features,
            generator,
            settings.features,
            settings.hidden - 1,
            biases=True,
            device=device,
        )
        heads = torch.randn(settings.features + 1, 2 * components, generator=generator)
        heads *= settings.features**-0.5
        heads[-1] = 0
        self.heads = nn.Parameter(heads.to(device))
        """(features + 1, 2 k): weights of real and imaginary parts; the last row holds the constants b."""

    def features(self, samples: Samples) -> Tensor:
        """phi with a column of ones behind it, (v, features + 1)."""
        phi = torch.relu(self.layers(self.encoding(samples))[0])
        return torch.cat((phi, phi.new_ones(len(phi), 1)), dim=1)


def fit_joint_network(
    images: Tensor,
    mask: Tensor,
    voxel_size: tuple[float, float, float],
    settings: JointFitSettings,
    generator: torch.Generator,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Coefficient images as the network sees them.

    Args:
        images: (x, k, z, y) complex.
        mask: (x, z, y) bool: voxels that take part. The others keep their values.
        voxel_size: edges along (x, z, y), in any unit.
        settings: of network and fit.
        generator: the source of chance, on the CPU.
        progress: called with the share that is done.

    Returns:
        (x, k, z, y) complex.

    Raises:
        TrainingDiverged: if the images hold values inside the mask that are not finite, or the fit does.
    """
    inside = mask.to(images.device)
    if not bool(inside.any()):
        return images
    phase = _smooth_phase(images[:, 0], inside, settings.phase_width)  # (x, z, y)
    target = (images * phase.conj()[:, None]).permute(0, 2, 3, 1)[inside]  # (v, k)
    if not bool(target.isfinite().all()):
        raise TrainingDiverged("the images that the joint network is fitted to are not finite")
    fitted = torch.zeros_like(target)
    for number in range(settings.fits):

        def told(done: float, number: int = number) -> None:
            if progress is not None:
                progress((number + done) / settings.fits)

        fit = _Fit(target, inside, voxel_size, settings, generator)
        fitted += fit.run(told) / settings.fits
    values = images.permute(0, 2, 3, 1).clone()  # (x, z, y, k)
    values[inside] = fitted * phase[inside][:, None]
    return values.permute(0, 3, 1, 2).contiguous()


class _Fit:
    """One network and its target, real and imaginary parts side by side."""

    def __init__(
        self,
        target: Tensor,
        mask: Tensor,
        voxel_size: tuple[float, float, float],
        settings: JointFitSettings,
        generator: torch.Generator,
    ) -> None:
        self.settings = settings
        shape = tuple(mask.shape)
        # A single slice has no third coordinate: half of the corners.
        axes = [axis for axis in range(3) if shape[axis] > 1] or [0]
        matrix = tuple(shape[axis] for axis in axes)
        coordinates = grid_coordinates(matrix, tuple(voxel_size[axis] for axis in axes))
        coordinates = coordinates[mask.flatten().cpu()]
        layout = grid_layout(matrix, settings)
        self.network = JointNetwork(layout, target.shape[1], settings, generator, target.device, coordinates)
        self.samples = self.network.encoding.samples(coordinates.to(target.device))
        size = target.abs().square().mean(0).clamp_min(torch.finfo(target.real.dtype).tiny).sqrt()  # (k,)
        # Images are counted in units in which all their components together have a mean square of 1.
        scale = size**settings.whitening * size.square().sum().sqrt() ** (1 - settings.whitening)
        self.scale = torch.cat((scale, scale))
        self.target = torch.cat((target.real, target.imag), dim=1) / self.scale  # (v, 2 k)

    def run(self, progress: Callable[[float], None]) -> Tensor:
        """Fit; returns the images (v, k) complex."""
        settings, network = self.settings, self.network
        exact = settings.heads == "exact"
        network.heads.requires_grad_(not exact)
        groups = [
            ParameterGroup(list(network.encoding.parameters())),
            ParameterGroup(list(network.layers.parameters())),
        ]
        if not exact:
            groups.append(ParameterGroup([network.heads]))
        schedule = Schedule(settings.steps, settings.learning_rate)
        optimizer = adam(groups, schedule, BETAS)
        for step in range(settings.steps):
            features = network.features(self.samples)
            if exact:
                self._solve_heads(features.detach())
            loss = self._misfit(features) + self._penalty()
            if not bool(torch.isfinite(loss.detach())):
                raise TrainingDiverged(f"the fit of the joint network was not finite in step {step + 1}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress((step + 1) / settings.steps)
        with torch.no_grad():
            features = network.features(self.samples)
            if exact:
                self._solve_heads(features)
            values = features @ network.heads * self.scale
        if not bool(values.isfinite().all()):
            raise TrainingDiverged("the joint network was not finite after its fit")
        real, imaginary = values.chunk(2, dim=1)
        return torch.complex(real, imaginary)

    def _misfit(self, features: Tensor) -> Tensor:
        """Mean over the voxels of the squared distance, all components together."""
        square = (features @ self.network.heads - self.target).square()
        return square.sum() / len(square)

    def _penalty(self) -> Tensor:
        """Weight decay, of encoder and perceptron apart. A term without gradient only adds to the value."""
        settings, network = self.settings, self.network
        total = network.heads.new_zeros(())
        if settings.decay_encoder:
            for table in network.encoding.parameters():
                total = total + settings.decay_encoder * table.square().sum()
        if settings.decay_network:
            for weights in (*network.layers.weights, network.heads[:-1]):
                total = total + settings.decay_network * weights.square().sum()
        return total

    @torch.no_grad()
    def _solve_heads(self, features: Tensor) -> None:
        """The heads that are best for these features."""
        gram = (features.T @ features).double()
        # Weight decay leaves the constants out.
        ridge = gram.new_full((len(gram),), self.settings.decay_network * len(self.target))
        ridge += _LEAST_RIDGE * gram.diagonal().mean()
        ridge[-1] = 0
        solved = torch.linalg.solve(gram + ridge.diag(), (features.T @ self.target).double())
        self.network.heads.copy_(solved)


def grid_layout(matrix: tuple[int, ...], settings: JointFitSettings) -> HashGridLayout:
    """The hash grid of a matrix, as fine along each axis as along the longest one."""
    finest = max(settings.cells_per_voxel * max(matrix), settings.base_resolution)
    # Half a cell less, so that rounding in single precision never changes the finest resolution.
    ratio = max((finest - 0.5) / settings.base_resolution, 1.0)
    growth = ratio ** (1 / (settings.levels - 1)) if settings.levels > 1 else 1.0
    return HashGridLayout(
        settings.levels,
        settings.base_resolution,
        growth,
        settings.log2_rows,
        settings.grid_features,
        len(matrix),
    )


def _smooth_phase(image: Tensor, mask: Tensor, width: float) -> Tensor:
    """exp(i phase) of an image (x, z, y), averaged over some voxels; 1 outside the mask and for width 0."""
    if width <= 0:
        return torch.ones_like(image)
    smooth = torch.where(mask, image, 0)
    for axis, size in enumerate(image.shape):
        reach = min(int(3 * width + 0.5), size - 1)
        if reach < 1:
            continue
        steps = torch.arange(-reach, reach + 1, device=image.device, dtype=image.real.dtype)
        kernel = torch.exp(-0.5 * (steps / width).square())
        lines = smooth.movedim(axis, -1)
        padded = torch.nn.functional.pad(torch.view_as_real(lines).movedim(-1, 0), (reach, reach))
        windows = padded.unfold(-1, 2 * reach + 1, 1)  # (2, ..., size, window)
        both = windows @ kernel
        smooth = torch.complex(both[0].contiguous(), both[1].contiguous()).movedim(-1, axis)
    modulus = smooth.abs()
    ones = torch.ones_like(image)
    unit = smooth / modulus.clamp_min(torch.finfo(modulus.dtype).tiny)
    return torch.where(mask & (modulus > 0), unit, ones)
