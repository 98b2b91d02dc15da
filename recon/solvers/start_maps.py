"""The linear estimate's maps as what networks start from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantitron.recon.data import Maps, Problem
from quantitron.recon.signal.dictionary import PARAMETER_RANGE
from quantitron.recon.solvers.cartesian import LinearEstimate
from quantitron.recon.solvers.scan_networks import Points, ScanNetworks, ScanValues

_LEAST_AMPLITUDE = 0.01
"""Amplitude that air starts with at least, in units of the median amplitude."""
_LEAST_SPREAD = 0.05
"""Least standard deviation of a logarithm that the networks' outputs are scaled by."""
_INVERSION_SPREAD = 0.05
"""Differences of the inversion efficiency count in units of this."""


@dataclass(frozen=True)
class StartMaps:
    """The linear estimate's maps as the networks see them, (v,) over the flat (x, z, y) grid."""

    positive: Mapping[str, Tensor]
    """Amplitude, in air too, and relaxation times, any value where there is no estimate."""
    phasor: Tensor
    """(e, v) complex of modulus 1."""
    inversion: Tensor | None
    inside: Tensor
    """(v,) float: 1 where there is an estimate."""
    size: Mapping[str, float]
    """Medians inside."""
    spread: Mapping[str, float]
    """Standard deviations of the logarithms inside."""

    @classmethod
    def of(cls, maps: Maps, estimate: LinearEstimate, problem: Problem) -> StartMaps:
        """Maps (s = 1) of the linear estimate."""
        protocol, device = problem.protocol, estimate.coefficients.device
        names = {"amplitude": "pd"} | {name: name for name in ("t1", "t2", "t2star") if name in maps.values}
        flat = {name: values[0].permute(2, 0, 1).flatten().to(device) for name, values in maps.values.items()}
        inside = torch.stack([values.isfinite() for values in flat.values()]).all(0)
        if not inside.any():
            raise ValueError("the linear estimate has no voxel to start from")
        median = {name: float(flat[source][inside].median()) for name, source in names.items()}
        positive = {
            name: torch.where(inside, flat[source], median[name]).clamp_min(1e-6 * median[name])
            for name, source in names.items()
        }
        spread = {
            name: max(float(values[inside].log().std(correction=0)), _LEAST_SPREAD)
            for name, values in positive.items()
        }
        energy = estimate.coefficients.abs().square().sum(1).sqrt().flatten()
        ratio = (positive["amplitude"] / energy.clamp_min(1e-20))[inside].median()
        air = (ratio * energy).clamp_min(_LEAST_AMPLITUDE * median["amplitude"])
        positive["amplitude"] = torch.where(inside, positive["amplitude"], air)
        spread["amplitude"] = 1.0  # from tissue to air
        time = torch.tensor(protocol.echo_time, device=device)[:, None]
        phase = flat["phase"] + torch.zeros_like(time)
        if "b0" in flat:
            phase = phase + protocol.phase_sign * 2 * math.pi * time * flat["b0"]
        phasor = torch.polar(torch.ones_like(phase), torch.where(inside, phase, 0))
        inversion = None
        if "inversion" in flat and protocol.inversion_efficiency is None:
            low, high = PARAMETER_RANGE["inversion"]
            inversion = torch.where(inside, flat["inversion"], flat["inversion"][inside].median())
            inversion = inversion.clamp(low, high)
        return cls(positive, phasor, inversion, inside.float(), median, spread)

    def constants(self) -> ScanValues:
        """Medians, one voxel."""
        chosen = self.inside > 0
        mean = self.phasor[:, chosen].mean(1, keepdim=True)
        # Where phases average to nothing any of them will do.
        mean = torch.where(mean.abs() > 0.1, mean / mean.abs().clamp_min(1e-12), torch.ones_like(mean))
        return ScanValues(
            {name: self.inside.new_tensor([median]) for name, median in self.size.items()},
            mean,
            None if self.inversion is None else self.inversion[chosen].median()[None],
        )

    def distance(self, networks: ScanNetworks, points: Points, voxel: Tensor) -> Tensor:
        """Mean square distance of the networks' maps, in units of the spread of each."""
        inside = self.inside[voxel]
        maps = networks.positive(points)
        total: Tensor = torch.zeros((), device=inside.device)
        for name, values in maps.items():
            difference = (values.log() - self.positive[name][voxel].log()) / self.spread[name]
            weight = torch.ones_like(inside) if name == "amplitude" else inside
            total = total + (weight * difference.square()).mean()
        # Before they are brought to modulus 1, so that they come near it.
        phase: Tensor = networks.phase(points.phase)
        total = total + (inside * (phase - self.phasor[:, voxel]).abs().square()).mean()
        if networks.inversion is not None and self.inversion is not None:
            inversion: Tensor = networks.inversion(points.coarse)[0]
            change = inversion - self.inversion[voxel]
            total = total + (inside * (change / _INVERSION_SPREAD).square()).mean()
        return total
