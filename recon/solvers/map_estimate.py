"""Parameter maps as the unknowns of a solver: where they start, what they give, how they are delivered."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantitron.recon.coefficient_basis import echo_images
from quantitron.recon.data import Maps, Problem
from quantitron.recon.signal.map_model import TIMES, MapModel, normal_blocks
from quantitron.recon.solvers.cartesian import LinearEstimate


@dataclass(frozen=True)
class MapEstimate:
    """Unknowns of the voxels inside a mask, and coefficients of those outside, on the device of the data."""

    theta: Tensor
    """(v, p) the unknowns, in the order and the units of ``model.names``."""
    mask: Tensor
    """(x, z, y) bool: the voxels of theta, in the order in which ``nonzero`` lists them."""
    model: MapModel
    """From theta to coefficients."""
    background: Tensor
    """(x, k, z, y) complex coefficients of the voxels outside the mask, zero inside."""

    def images(self, values: Tensor) -> Tensor:
        """Values (v, n) of the voxels as images (x, n, z, y), zero outside the mask."""
        x, z, y = self.mask.shape
        flat = values.new_zeros(values.shape[1], x * z * y)
        flat[:, self._places()] = values.T
        return flat.reshape(-1, x, z, y).transpose(0, 1).contiguous()

    def values(self, images: Tensor) -> Tensor:
        """Values (v, n) of images (x, n, z, y) inside the mask."""
        return images.transpose(0, 1).flatten(1)[:, self._places()].T

    def coefficients(self, theta: Tensor | None = None) -> Tensor:
        """Coefficient images (x, k, z, y), background included; of other unknowns (v, p) where given."""
        with torch.no_grad():
            inside = self.images(self.model.coefficients(self.theta if theta is None else theta))
        return self.background + inside

    def delivered(
        self, estimate: LinearEstimate, maps: Maps, *, residual_to_noise: float, standard_deviations: bool
    ) -> Maps:
        """The maps of the unknowns, in the place of those that they started from.

        Args:
            estimate: with the field map that the off-resonance adds to.
            maps: that the unknowns started from; what they do not hold stays.
            residual_to_noise: of the unknowns.
            standard_deviations: whether those of the unknowns are delivered.
        """
        names, theta = self.model.names, self.theta.detach()
        values, deviations = dict(maps.values), dict(maps.standard_deviation) if standard_deviations else {}
        for name, column in zip(names, theta.T, strict=True):
            if name == "phase":
                values[name] = self._onto(
                    maps.values[name], torch.remainder(column + math.pi, 2 * math.pi) - math.pi
                )
            elif name == "b0":
                values[name] = self._onto(maps.values[name], column, estimate.b0)
            else:
                delivered = "pd" if name == "amplitude" else name
                values[delivered] = self._onto(maps.values[delivered], column.exp())
        if standard_deviations:
            for name, column in self.standard_deviations(estimate).items():
                deviations[name] = self._onto(values[name], column)
        magnitude = maps.magnitude
        if magnitude is not None:
            magnitude = echo_images(self.coefficients().cpu(), estimate.basis)[:, 0].abs()[:, None]
        failed = ~torch.stack([image.isfinite() for image in values.values()]).all(0) & maps.mask
        return replace(
            maps,
            values=values,
            standard_deviation=deviations,
            magnitude=magnitude,
            failed_voxels=int(failed.sum()),
            residual_to_noise=residual_to_noise,
        )

    def standard_deviations(self, estimate: LinearEstimate) -> dict[str, Tensor]:
        """Name -> (v,) Cramer-Rao bound of the times [s] and the off-resonance [Hz], each voxel by itself.

        Every voxel counts as sampled as densely as k-space is on the average, its neighbours as known, and
        no prior as given.
        """
        _, jacobian = self.model.jacobian(self.theta)
        blocks = normal_blocks(jacobian, estimate.operator.mean_diagonal())  # (v, p, p)
        # Scaled to a diagonal of 1; what leaves no trace in the signal has a large deviation, not none.
        size = blocks.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(blocks.dtype).tiny).rsqrt()
        scaled = size[:, :, None] * blocks * size[:, None]
        inverse = torch.linalg.inv(scaled + 1e-6 * torch.eye(scaled.shape[1]).to(scaled))
        # The noise is that of a complex sample; half of it lies in each part.
        variance = 0.5 * estimate.noise * inverse.diagonal(dim1=1, dim2=2).clamp_min(0)
        deviation = variance.sqrt() * size
        return {
            name: deviation[:, number] * self.theta[:, number].exp()
            if name in TIMES
            else deviation[:, number]
            for number, name in enumerate(self.model.names)
            if name in TIMES or name == "b0"
        }

    def _places(self) -> Tensor:
        return self.mask.flatten().nonzero()[:, 0]

    def _onto(self, old: Tensor, column: Tensor, offset: Tensor | None = None) -> Tensor:
        """A map (s, z, y, x) with the values (v,) inside the mask, to which ``offset`` (z, y, x) is added."""
        image = self.images(column[:, None])[:, 0].permute(1, 2, 0).to(old)  # (z, y, x)
        if offset is not None:
            image = image + offset
        return torch.where(self.mask.permute(1, 2, 0).to(old.device), image, old[0])[None]


def start_from(estimate: LinearEstimate, maps: Maps, problem: Problem) -> MapEstimate:
    """Unknowns at the maps that were fitted to coefficients, for solvers that go on from there.

    Amplitude and phase are those that fit the linear estimate best, given the other maps. The inversion
    efficiency is held. Voxels without signal or without an estimate are left out: they keep the linear
    estimate's coefficients.

    Args:
        estimate: the linear estimate.
        maps: of the same slice (s = 1), on the encoded grid.
        problem: the slice.
    """
    u, names = estimate.coefficients, ("b0",) if problem.protocol.echoes > 1 else ()
    model = MapModel(
        problem.protocol, problem.reduced.basis.contrast.to(u.device), estimate.basis.mixing.to(u.device)
    )
    grid = {name: values[0].permute(2, 0, 1) for name, values in maps.values.items()}  # (x, z, y)
    mask = maps.mask[0].permute(2, 0, 1)
    mask = torch.stack([mask, *(grid[name].isfinite() for name in (*model.times, *names))]).all(0)
    if "inversion" in grid:
        model = replace(model, inversion=grid["inversion"][mask].to(u.real))
    columns = [torch.zeros(int(mask.sum()))] * 2 + [grid[name][mask].log() for name in model.times]
    columns += [(grid[name] - estimate.b0.permute(2, 0, 1))[mask] for name in names]
    theta = torch.stack(columns).to(u.real).T  # (v, p), amplitude 1 and phase 0
    theta = theta.clamp(*model.limits(theta))
    mask = mask.to(u.device)

    with torch.no_grad():
        image, measured = model.coefficients(theta), u.permute(0, 2, 3, 1)[mask]  # (v, k)
    amplitude = (image.conj() * measured).sum(1) / image.abs().square().sum(1)
    theta[:, 0], theta[:, 1] = amplitude.abs().log(), amplitude.angle()
    good = theta.isfinite().all(1)
    mask = mask.masked_scatter(mask, good)
    return MapEstimate(theta[good], mask, model.of(good), u * ~mask[:, None])
