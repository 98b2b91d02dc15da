"""The ISMRM/NIST system phantom: three plates of 14 spheres in water; reference values at 3 T, version 1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantitron.phantoms.anatomy import SPHERES, Anatomy

T1_PLATE_T1 = (
    1989,
    1454,
    984.1,
    706.0,
    496.7,
    351.5,
    247.13,
    175.3,
    125.9,
    89.00,
    62.70,
    44.53,
    30.84,
    21.719,
)
"""T1 [ms] of spheres 1 to 14 of the T1 plate (NiCl2)."""
T1_PLATE_T2 = (1465, 1077, 717.9, 510.1, 359.6, 255.5, 180.8, 127.3, 90.30, 64.30, 45.70, 31.86, 22.38, 15.83)
"""T2 [ms] of spheres 1 to 14 of the T1 plate."""
T2_PLATE_T1 = (2480, 2173, 1907, 1604, 1332, 1044, 801.7, 608.6, 458.4, 336.5, 244.2, 176.9, 126.9, 90.90)
"""T1 [ms] of spheres 1 to 14 of the T2 plate (MnCl2)."""
T2_PLATE_T2 = (
    581.3,
    403.5,
    278.1,
    190.94,
    133.27,
    96.89,
    64.07,
    46.42,
    31.97,
    22.56,
    15.81,
    11.24,
    7.91,
    5.59,
)
"""T2 [ms] of spheres 1 to 14 of the T2 plate."""
PD_PLATE = (5, 10, 15, 20, 25, 30, 35, 40, 50, 60, 70, 80, 90, 100)
"""Proton density [%] of spheres 1 to 14 of the PD plate (water in heavy water)."""

WATER = {"t1": 2750.0, "t2": 2000.0, "pd": 1.0}
"""T1, T2 [ms] of the water around the spheres; the liquid of the PD plate is taken to be the same."""
FIELD_RELAXATION = 2.0
"""R2' = R2* - R2 [1/s] throughout: a well-shimmed phantom."""

PLATES = ("t1", "t2", "pd")
PLATE_HEIGHT = {"t1": 0.020, "t2": 0.0, "pd": -0.020}
"""Height of each plate [m]: closer together than in the real phantom, so that one slab holds all three."""
SPHERE_RADIUS = 7.5e-3
PHANTOM_RADIUS = 0.095


def sphere_number(plate: str, sphere: int) -> int:
    """Number of a sphere: 1-14 on the T1 plate, 15-28 on the T2 plate, 29-42 on the PD plate."""
    return 14 * PLATES.index(plate) + sphere


def sphere_centres() -> NDArray[np.float64]:
    """(14, 2) places (y, x) [m] of spheres 1 to 14 on a plate: ten on a ring, four inside it."""
    ring = 2 * np.pi * np.arange(10) / 10
    inner = 2 * np.pi * (np.arange(4) + 0.5) / 4
    angle, radius = np.concatenate([ring, inner]), np.repeat([0.055, 0.024], [10, 4])
    return np.stack([-radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def reference_values(plate: str) -> dict[str, NDArray[np.float64]]:
    """Reference ``t1``, ``t2``, ``t2star`` [s] and ``pd`` of the 14 spheres of a plate, each (14,)."""
    water = np.ones(14)
    if plate == "t1":
        t1, t2, pd = np.array(T1_PLATE_T1), np.array(T1_PLATE_T2), water
    elif plate == "t2":
        t1, t2, pd = np.array(T2_PLATE_T1), np.array(T2_PLATE_T2), water
    else:
        t1, t2, pd = WATER["t1"] * water, WATER["t2"] * water, np.array(PD_PLATE) / 100
    t1, t2 = t1 / 1e3, t2 / 1e3
    return {"t1": t1, "t2": t2, "t2star": 1 / (1 / t2 + FIELD_RELAXATION), "pd": pd}


def nist_phantom() -> Anatomy:
    """The phantom at 1 mm, (64, 200, 200) voxels; ``mask`` is the spheres, ``labels`` 100 + their numbers.

    Values: NIST system phantom version 1 at 3 T and 20 degrees Celsius, as listed above.
    """
    voxel = 1e-3
    shape = (64, 200, 200)
    z, y, x = ((np.arange(n) - n // 2) * voxel for n in shape)
    water_t2star = 1 / (1e3 / WATER["t2"] + FIELD_RELAXATION)
    values = {"t1": WATER["t1"] / 1e3, "t2": WATER["t2"] / 1e3, "t2star": water_t2star, "pd": WATER["pd"]}
    inside = y[:, None] ** 2 + x[None, :] ** 2 <= PHANTOM_RADIUS**2  # (y, x); a cylinder through the slab
    maps = {
        name: np.broadcast_to(np.where(inside, value, 0), shape).astype(np.float32)
        for name, value in values.items()
    }
    labels = np.zeros(shape, dtype=np.uint16)
    for plate in PLATES:
        reference = reference_values(plate)
        for sphere, (cy, cx) in enumerate(sphere_centres()):
            ball = (
                (z[:, None, None] - PLATE_HEIGHT[plate]) ** 2
                + (y[None, :, None] - cy) ** 2
                + (x[None, None, :] - cx) ** 2
            ) <= SPHERE_RADIUS**2
            labels[ball] = SPHERES + sphere_number(plate, sphere + 1)
            for name, values_of_plate in reference.items():
                maps[name][ball] = values_of_plate[sphere]
    return Anatomy(**maps, labels=labels, mask=labels > 0, voxel_size=(voxel, voxel, voxel))
