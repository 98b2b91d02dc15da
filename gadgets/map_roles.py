"""What each map is called and how it is stored: role, series, unit, scale, window, colours.

One table for everything that writes or reads map images (console, truth of simulated scans, comparison,
figures).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

STANDARD_DEVIATION_SERIES = 20
"""Added to the series index of a map for its standard deviation."""
PREVIEW_SERIES = -10
"""Added to the series index of a map for its preview."""
CODE_MAXIMUM = 4095
"""Largest stored value of ``uint16`` output: consoles keep 12 bits."""


@dataclass(frozen=True)
class Role:
    """How one kind of map is stored."""

    name: str
    """``GADGETRON_DataRole``."""
    series: int
    """``image_series_index``."""
    unit: str
    """``Quantitron_Unit``: ms, 1/s, Hz, rad, ppb or a.u."""
    per_si: float
    """Value in ``unit`` for 1 in the unit of ``recon`` (s, 1/s, Hz, rad, ppm, a.u.)."""
    ratio: float
    """Scale of ``uint16`` output: stored = value x ratio + offset."""
    offset: float
    """Offset of ``uint16`` output."""
    window_centre: int
    """Middle of the display window, in ``unit``; whole, because consoles cut windows to integers."""
    window_width: int
    """Width of the display window, in ``unit``."""
    colour_map: str = "gray"
    """lipari for T1, navia for T2, T2* (doi 10.1002/mrm.30290), else gray."""
    signed: bool = False
    """Whether values may be negative: image type real, not magnitude."""
    background: bool = False
    """Whether 0 stands for 'not in it' (masks, tissue fractions) rather than for a value."""

    @property
    def previewed(self) -> bool:
        """Whether a preview of this map has a series of its own (91..100; beyond lie the final maps)."""
        return not self.background and 101 <= self.series <= 110


MAP_ROLES: dict[str, Role] = {
    "t1": Role("T1", 101, "ms", 1e3, 1, 0, 1500, 3000, "lipari"),
    "t2": Role("T2", 102, "ms", 1e3, 10, 0, 75, 150, "navia"),
    "t2star": Role("T2STAR", 103, "ms", 1e3, 10, 0, 50, 100, "navia"),
    "pd": Role("PD", 104, "a.u.", 1, 1, 0, 600, 1200),
    "b0": Role("FREQMAP", 105, "Hz", 1, 4, 2048, 0, 200, signed=True),
    "phase": Role("PHASE", 106, "rad", 1, 600, 2048, 0, 7, signed=True),
    "chi": Role("CHI", 107, "ppb", 1e3, 2, 2048, 0, 300, signed=True),
    "chipos": Role("CHIPOS", 108, "ppb", 1e3, 2, 2048, 75, 150),
    "chineg": Role("CHINEG", 109, "ppb", 1e3, 2, 2048, -75, 150, signed=True),
    "r2star": Role("R2STAR", 110, "1/s", 1, 10, 0, 50, 100, "navia"),
    "inversion": Role("INVERSION", 111, "a.u.", 1, 4000, 0, 1, 2),
    "mask": Role("MASK", 112, "a.u.", 1, 1, 0, 1, 2, background=True),
    "wm": Role("WM", 113, "a.u.", 1, 4000, 0, 1, 2, background=True),
    "gm": Role("GM", 114, "a.u.", 1, 4000, 0, 1, 2, background=True),
    "csf": Role("CSF", 115, "a.u.", 1, 4000, 0, 1, 2, background=True),
    "spheres": Role("SPHERES", 116, "a.u.", 1, 1, 0, 25, 50, background=True),
}
"""Map name of ``recon`` (and of ground truth) -> role. ``wm``, ``gm``, ``csf`` are tissue fractions 0..1;
``spheres`` numbers the spheres of a phantom from 1."""

_SD_STORAGE = {  # ratio, window width: standard deviations are stored without offset
    "ms": (100.0, 40),
    "a.u.": (10.0, 100),
    "Hz": (100.0, 20),
    "rad": (1000.0, 2),
    "ppb": (10.0, 50),
    "1/s": (100.0, 20),
}


def standard_deviation_role(role: Role) -> Role:
    """The role of a map's standard deviation: ``T1SD`` in the map's unit, series +20."""
    ratio, width = _SD_STORAGE[role.unit]
    if role.name == "INVERSION":
        ratio, width = role.ratio, 2
    return replace(
        role,
        name=f"{role.name}SD",
        series=role.series + STANDARD_DEVIATION_SERIES,
        ratio=ratio,
        offset=0,
        window_centre=width // 2,
        window_width=width,
        colour_map="gray",
        signed=False,
    )


def role_named(name: str) -> Role | None:
    """The role that ``GADGETRON_DataRole`` names, standard deviations included; None where there is none."""
    for role in MAP_ROLES.values():
        if role.name == name:
            return role
        if f"{role.name}SD" == name:
            return standard_deviation_role(role)
    return None
