"""What is scanned: tissue parameters on a grid of their own, and their look-up on the grid of a simulation.

Arrays run (z, y, x) towards head, back and left of the patient (ISMRMRD's patient axes), so that an axial
scan has the identity as its read, phase and slice directions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

CSF, GREY_MATTER, WHITE_MATTER = 1, 2, 3
"""Tissue labels of a brain."""
SPHERES = 100
"""Labels of a phantom's spheres: this plus the number of the sphere, from 1."""


@dataclass(frozen=True)
class Anatomy:
    """Tissue parameters (z, y, x). Maps that are None do not exist for this object."""

    pd: NDArray[np.complexfloating] | NDArray[np.floating]
    """(z, y, x) proton density, real or complex [a.u.]; air is 0."""
    voxel_size: tuple[float, float, float]
    """Voxel edge lengths [m], (z, y, x)."""
    mask: NDArray[np.bool_]
    """(z, y, x) where maps are judged: the brain, or the spheres."""
    labels: NDArray[np.integer]
    """(z, y, x) 1 CSF, 2 grey matter, 3 white matter, 0 anything else; or ``SPHERES`` + sphere number."""
    t1: NDArray[np.floating] | None = None
    """(z, y, x) T1 [s]."""
    t2: NDArray[np.floating] | None = None
    """(z, y, x) T2 [s]."""
    t2star: NDArray[np.floating] | None = None
    """(z, y, x) T2* [s]."""
    b0: NDArray[np.floating] | None = None
    """(z, y, x) off-resonance [Hz]; None where the simulation makes one."""
    b1: NDArray[np.floating] | None = None
    """(z, y, x) actual over nominal flip angle; None is 1 unless the simulation makes one."""
    chi: NDArray[np.floating] | None = None
    """(z, y, x) magnetic susceptibility [ppm]."""

    def __post_init__(self) -> None:
        if self.pd.ndim != 3:
            raise ValueError(f"pd must be (z, y, x), not of shape {self.pd.shape}")
        for name, values in self.maps().items():
            if values.shape != self.pd.shape:
                raise ValueError(f"{name} is {values.shape} but pd is {self.pd.shape}")

    def maps(self) -> dict[str, NDArray[np.generic]]:
        """The maps that exist, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "voxel_size"}
        return {name: values for name, values in found.items() if values is not None}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (z, y, x)."""
        nz, ny, nx = self.pd.shape
        return nz, ny, nx

    def on_grid(
        self,
        shape: tuple[int, int, int],
        voxel_size: tuple[float, float, float],
        centre: tuple[int, int, int],
        offset: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> Anatomy:
        """Look the object up on another grid, by nearest neighbour: no tissue appears that the object lacks.

        Voxel ``centre`` of the new grid is put on voxel n // 2 of the anatomy, moved by ``offset``. What lies
        outside the anatomy is air; what lies outside the new grid is cut off, as by an ideal slab selection.
        Where the voxel sizes agree this only crops and pads.

        Args:
            shape: voxels of the new grid (z, y, x).
            voxel_size: of the new grid [m], (z, y, x).
            centre: index (z, y, x) on the new grid that meets the centre of the anatomy.
            offset: displacement of the new grid [m], (z, y, x).

        Returns:
            The same object on the new grid.
        """
        indices, inside = [], []
        for n_new, d_new, c_new, shift, n_old, d_old in zip(
            shape, voxel_size, centre, offset, self.shape, self.voxel_size, strict=True
        ):
            # Rounded to a nanometre-scale fraction first, so that equal voxel sizes stay an exact crop.
            place = np.round(((np.arange(n_new) - c_new) * d_new + shift) / d_old, 6)
            index = np.floor(place + 0.5).astype(np.int64) + n_old // 2
            inside.append((index >= 0) & (index < n_old))
            indices.append(np.clip(index, 0, n_old - 1))
        lookup = np.ix_(*indices)
        outside = ~(inside[0][:, None, None] & inside[1][None, :, None] & inside[2][None, None, :])

        def look_up(values: NDArray[np.generic]) -> NDArray[np.generic]:
            found = values[lookup]
            found[outside] = 0
            return found

        found = {name: look_up(values) for name, values in self.maps().items()}
        return replace(self, voxel_size=voxel_size, **found)  # type: ignore[arg-type]
