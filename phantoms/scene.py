"""The object as a scan finds it: on a grid finer than the scan's, with all fields filled in.

Each scan voxel is made of ``supersampling`` fine voxels along each axis. Fine voxel i lies at

    (i - q (n // 2) - (q - 1) / 2) Delta / q        q the supersampling, n the scan matrix, Delta its voxel

so that fine voxels q I .. q I + q - 1 fill scan voxel I, whose centre is at (I - n // 2) Delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantitron.gadgets.errors import ScanError
from quantitron.phantoms.anatomy import Anatomy
from quantitron.phantoms.coils import coil_sensitivities
from quantitron.phantoms.field import dipole_field, off_resonance, receive_phase, transmit_field
from quantitron.recon.data import SEQUENCE_MAPS, Protocol
from quantitron.recon.signal.models import CONTRAST_PARAMETERS, CONTRAST_SIGNALS
from quantitron.recon.signal.spoiled_gre import echo_signal, flash_steady_state


@dataclass(frozen=True)
class FieldSettings:
    """Strength of the smooth fields, used where the anatomy has no map of its own."""

    b0: float = 40.0
    """Largest off-resonance in a head, about [Hz]."""
    b1: float = 0.0
    """Variation of the flip angle: 0 is none, 0.2 about +-10 %."""
    receive_phase: float = 1.5
    """Smooth phase of a real ``pd``, about +- [rad]."""

    def __post_init__(self) -> None:
        """Refuse fields that no scan is in.

        Raises:
            ScanError: if a strength is not finite, or flip angles would be 0 or less somewhere.
        """
        for name in ("b0", "receive_phase"):
            if not math.isfinite(getattr(self, name)):
                raise ScanError(f"{name} is {getattr(self, name):g}; it must be a finite number")
        if not 0 <= self.b1 < 1:
            raise ScanError(f"b1 is {self.b1:g}; it must be at least 0 and below 1")


@dataclass(frozen=True)
class Scene:
    """One slab of the object. Only the voxels with signal are kept, (v,), ascending through (z, y, x)."""

    matrix: tuple[int, int, int]
    """Scan matrix (z, y, x), without readout oversampling."""
    supersampling: tuple[int, int, int]
    """Fine voxels along each edge (z, y, x) of a scan voxel."""
    fine: Anatomy
    """The anatomy on the fine grid."""
    index: NDArray[np.int64]
    """(v,) flat index on the fine grid."""
    pd: Tensor
    """(v,) complex64, receive phase included."""
    parameters: dict[str, Tensor]
    """(v,) float32 each: what the sequence needs of ``t1``, ``t2``, ``inversion``, ``t2star`` and ``b0``."""
    b1: Tensor | None
    """(v,) actual over nominal flip angle; None for 1 everywhere."""
    coils: Tensor
    """(c, v) complex64, unit root-sum-of-squares."""

    @property
    def fine_matrix(self) -> tuple[int, int, int]:
        """Voxels of the fine grid (z, y, x)."""
        return self.fine.shape

    def embed(self, values: NDArray[Any] | Tensor) -> NDArray[Any]:
        """Values (v,) on the fine grid (z, y, x), zero elsewhere."""
        values = values.numpy() if isinstance(values, Tensor) else values
        grid = np.zeros(int(np.prod(self.fine_matrix)), dtype=values.dtype)
        grid[self.index] = values
        return grid.reshape(self.fine_matrix)

    def block_mean(self, values: NDArray[Any]) -> NDArray[Any]:
        """Mean over the fine voxels of each scan voxel: fine (z, y, x) to scan (z, y, x)."""
        mean: NDArray[Any] = self.blocks(values).mean(axis=(1, 3, 5))
        return mean

    def blocks(self, values: NDArray[Any]) -> NDArray[Any]:
        """Fine (z, y, x) as (z, qz, y, qy, x, qx): the fine voxels of each scan voxel."""
        (nz, ny, nx), (qz, qy, qx) = self.matrix, self.supersampling
        return values.reshape(nz, qz, ny, qy, nx, qx)

    def contrast(self, protocol: Protocol, part: slice = slice(None)) -> Tensor:
        """Real contrast factor (v, w) of the voxels in ``part``."""
        parameters = {name: values[part] for name, values in self.parameters.items()}
        b1 = None if self.b1 is None else self.b1[part]
        return CONTRAST_SIGNALS[protocol.sequence](parameters, protocol, b1)

    def echo(self, protocol: Protocol, echo: int) -> Tensor:
        """Echo factor times proton density (v,) complex64 of one echo."""
        time = torch.tensor([protocol.echo_time[echo]])
        factor = echo_signal(self.parameters["t2star"], self.parameters["b0"], time, protocol.phase_sign)
        return self.pd * factor[:, 0]


def voxel_batches(voxels: int) -> list[slice]:
    """Ranges of voxels whose contrasts are computed together; they change memory, never the result."""
    return [slice(start, min(start + 65536, voxels)) for start in range(0, voxels, 65536)]


def required_maps(sequence: str) -> tuple[str, ...]:
    """Tissue maps that an anatomy must have for a sequence."""
    own = tuple(name for name in CONTRAST_PARAMETERS[sequence] if name != "inversion")
    return (*own, "t2star") if has_echoes(sequence) else own


def has_echoes(sequence: str) -> bool:
    """Whether the signal depends on T2* and off-resonance: all sequences but ``fisp_mrf``."""
    return "t2star" in SEQUENCE_MAPS[sequence]


def make_scene(
    anatomy: Anatomy,
    protocol: Protocol,
    matrix: tuple[int, int, int],
    field_of_view: tuple[float, float, float],
    *,
    coils: int,
    supersampling: tuple[int, int, int] = (2, 2, 2),
    height: float = 0.0,
    fields: FieldSettings | None = None,
    inversion_efficiency: float = 1.0,
    seed: int = 0,
) -> Scene:
    """Put an anatomy under the scanner.

    B0 is the anatomy's own; else, where it has a susceptibility, the dipole field of that; plus, where it
    has no B0 of its own, a smooth field that is left after shimming. PD gets a smooth receive phase unless
    it is complex. For ``megre`` the T1 weighting of the steady state is part of PD (where the anatomy has
    T1).

    Args:
        anatomy: the object.
        protocol: the sequence.
        matrix: scan matrix of one slab (z, y, x).
        field_of_view: of one slab [m] (z, y, x).
        coils: receive channels.
        supersampling: fine voxels along each edge (z, y, x) of a scan voxel.
        height: centre of the slab along z [m]; the anatomy's centre is 0.
        fields: strength of the fields that are made up.
        inversion_efficiency: 0..1, the same everywhere.
        seed: shape of the fields that are made up; the same for all slabs of a scan.

    Raises:
        ScanError: if the anatomy lacks a map that the sequence needs, or nothing of it lies in the slab.
    """
    fields = fields or FieldSettings()
    for name in required_maps(protocol.sequence):
        if getattr(anatomy, name) is None:
            raise ScanError(f"the phantom has no '{name}', which {protocol.sequence} needs")
    qz, qy, qx = supersampling
    shape = (matrix[0] * qz, matrix[1] * qy, matrix[2] * qx)
    voxel = (field_of_view[0] / shape[0], field_of_view[1] / shape[1], field_of_view[2] / shape[2])
    centre = (qz * (matrix[0] // 2), qy * (matrix[1] // 2), qx * (matrix[2] // 2))
    if has_echoes(protocol.sequence) and anatomy.b0 is None and anatomy.chi is not None:
        # The field of the whole object, not only of what lies in the slab.
        strength = protocol.field_strength if protocol.field_strength is not None else 3.0
        local = dipole_field(anatomy.chi, anatomy.voxel_size, strength)
    else:
        local = None
    fine = anatomy.on_grid(shape, voxel, centre, (height, 0.0, 0.0))
    index = np.flatnonzero(fine.pd)
    if index.size == 0:
        raise ScanError("nothing of the phantom lies inside the field of view")

    axes = [
        (np.arange(n) - c - (q - 1) / 2) * d
        for n, c, q, d in zip(shape, centre, supersampling, voxel, strict=True)
    ]
    axes[0] = axes[0] + height
    iz, iy, ix = np.unravel_index(index, shape)
    places = (axes[0][iz], axes[1][iy], axes[2][ix])
    random = [np.random.default_rng(child) for child in np.random.SeedSequence([seed, 1]).spawn(3)]

    def inside(values: NDArray[Any]) -> NDArray[Any]:
        return values.reshape(-1)[index]

    pd = inside(fine.pd).astype(np.complex64)
    if fine.pd.dtype.kind != "c" and fields.receive_phase:
        pd *= np.exp(1j * receive_phase(places, fields.receive_phase, random[1])).astype(np.complex64)
    b1 = None
    if fine.b1 is not None:
        b1 = inside(fine.b1)
    elif fields.b1:
        b1 = transmit_field(places, fields.b1, random[2])

    def tensor(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    parameters = {}
    if has_echoes(protocol.sequence):
        if fine.b0 is not None:
            b0 = inside(fine.b0)
        else:
            b0 = off_resonance(places, fields.b0, random[0])
            if local is not None:
                whole = Anatomy(
                    pd=local, voxel_size=anatomy.voxel_size, mask=anatomy.mask, labels=anatomy.labels
                )
                b0 = b0 + inside(whole.on_grid(shape, voxel, centre, (height, 0.0, 0.0)).pd)
        assert fine.t2star is not None  # ``required_maps``, above
        parameters = {"t2star": tensor(inside(fine.t2star)), "b0": tensor(b0)}
    for name in CONTRAST_PARAMETERS[protocol.sequence]:
        parameters[name] = (
            torch.full((len(index),), inversion_efficiency)
            if name == "inversion"
            else tensor(inside(getattr(fine, name)))
        )
    flip = None if b1 is None else tensor(b1)
    density = torch.from_numpy(pd)
    if protocol.sequence == "megre" and fine.t1 is not None and protocol.flip_angle:
        angle = torch.tensor(protocol.flip_angle[0]) * (1 if flip is None else flip)
        density = density * flash_steady_state(tensor(inside(fine.t1)), angle, protocol.repetition_time[0])
    sensitivities = coil_sensitivities(places, coils, max(field_of_view[1], field_of_view[2]))
    return Scene(
        matrix=matrix,
        supersampling=supersampling,
        fine=fine,
        index=index,
        pd=density,
        parameters=parameters,
        b1=flip,
        coils=torch.from_numpy(sensitivities),
    )


def brightest_frame(scenes: list[Scene], protocol: Protocol) -> tuple[int, int, float]:
    """The frame with the most signal: contrast w, echo e, and mean signal over the mask on the scan grid.

    The signal is |mean of the fine voxels' complex signal|: with coil maps of unit root-sum-of-squares that
    is the coil-combined signal. The echo is the shortest one.

    Args:
        scenes: all slabs of the scan.
        protocol: the sequence.
    """
    echo = int(np.argmin(protocol.echo_time))
    level = torch.zeros(protocol.contrasts, dtype=torch.float64)
    for scene in scenes:
        judged = torch.from_numpy(scene.fine.mask.reshape(-1)[scene.index])
        weight = scene.echo(protocol, echo).abs() * judged
        for part in voxel_batches(len(scene.index)):
            level += (scene.contrast(protocol, part).abs().T @ weight[part]).double()
    contrast = int(torch.argmax(level))
    total, voxels = 0.0, 0
    for scene in scenes:
        parts = [scene.contrast(protocol, part)[:, contrast] for part in voxel_batches(len(scene.index))]
        signal = scene.block_mean(scene.embed(scene.echo(protocol, echo) * torch.cat(parts)))
        mask = scan_mask(scene)
        total += float(np.abs(signal[mask]).sum())
        voxels += int(mask.sum())
    if voxels == 0:
        raise ScanError("no voxel of the scan lies in the phantom's mask")
    return contrast, echo, total / voxels


def scan_mask(scene: Scene) -> NDArray[np.bool_]:
    """(z, y, x) scan voxels of which at least half lies in the object's mask."""
    return scene.block_mean(scene.fine.mask.astype(np.float32)) >= 0.5
