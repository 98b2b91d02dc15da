"""How far the coil maps of slabs are off: those that a reconstruction finds, against those simulated.

    python benchmarks/coil_maps.py delics_vol00.npz [--scans vfa_gre t2ir_gre tilted stack]

The scans: ``vfa_gre`` 112x112x16, R 27, and ``t2ir_gre`` 96x96x12, R 160, as in inr.py; ``tilted``, one train
of 500 tilted spirals, 64x64x12, as in pnp.py; ``stack``, a stack of spirals 96x96x24 of 500 points, as in
mrf.py. The angle between found and true sensitivities, both whitened, as its sine: root mean square over the
first and the last plane, and over those between, voxels weighed by their signal energy.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from inr import SCANS
from mrf import COILS, SNR, objects
from numpy.typing import NDArray
from pnp import INTERLEAVES, SLAB_FIELD, SLAB_SUPERSAMPLING
from subspace import AVERAGE
from torch import Tensor

from quantitron.host.replay import replay
from quantitron.phantoms import simulate, simulate_fingerprint
from quantitron.phantoms.coils import noise_covariance
from quantitron.phantoms.scene import Scene
from quantitron.recon.solvers import cartesian, fingerprint

SEED = 1
MAKERS = {"cartesian": (cartesian, "coil_maps"), "spirals": (fingerprint, "trajectory_coil_maps")}
ACCELERATION = {"vfa_gre": 27.0, "t2ir_gre": 160.0}


@contextmanager
def kept(owner: Any, name: str) -> Iterator[list[Any]]:
    """The results of all calls of ``owner.name`` while the block runs."""
    results: list[Any] = []
    function: Callable[..., Any] = getattr(owner, name)

    def recorded(*arguments: Any, **named: Any) -> Any:
        results.append(function(*arguments, **named))
        return results[-1]

    with patch.object(owner, name, recorded):
        yield results


def scan(name: str, anatomy: str | Path, raw: Path) -> Scene:
    """Simulate one scan; its scene."""
    if name in SCANS:
        with kept(simulate, "make_scene") as scenes:
            simulate.simulate(
                **{**SCANS[name], **AVERAGE, "phantom": anatomy, "snr": 30.0, "seed": SEED},
                acceleration=ACCELERATION[name],
                output=raw,
                overwrite=True,
            )
        return scenes[0]
    tilted = {"matrix": (64, 64, 12), "volume": "tilted", "trains": 1}
    with kept(simulate_fingerprint, "make_scene") as scenes:
        simulate_fingerprint.simulate_fingerprint(
            output=raw,
            phantom=anatomy,
            schedule="jiang",
            points=500,
            interleaves=INTERLEAVES,
            order="shuffled",
            fov=SLAB_FIELD,
            coils=COILS,
            snr=SNR,
            seed=SEED,
            supersampling=SLAB_SUPERSAMPLING,
            overwrite=True,
            **(tilted if name == "tilted" else {"matrix": (96, 96, 24)}),
        )
    return scenes[0]


def truth(scene: Scene) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
    """Whitened sensitivities (c, z, y, x) of unit length, and the signal energy (z, y, x) of each voxel."""
    density = scene.pd.abs()
    seen = np.stack([scene.block_mean(scene.embed(coil * density)) for coil in scene.coils])
    covariance = noise_covariance(len(seen), np.random.default_rng([SEED, 3]))
    seen = np.einsum("dc,czyx->dzyx", np.linalg.inv(np.linalg.cholesky(covariance)), seen)
    energy = (np.abs(seen) ** 2).sum(0)
    inside = energy > 1e-6 * energy.max()
    length = np.sqrt(energy, where=inside, out=np.ones_like(energy))
    return (seen / length).astype(np.complex64), (energy * inside).astype(np.float32)


def off(found: Tensor, sensitivity: Tensor, weight: Tensor) -> float:
    """Root mean square sine of the angle of maps (c, z, y, x), weighed by (z, y, x)."""
    square = 1 - (found.conj() * sensitivity).sum(0).abs().square()
    return float((square.clamp_min(0) * weight).sum() / weight.sum()) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*SCANS, "tilted", "stack")
    parser.add_argument("sources", type=Path, nargs="+", help="delics_volXX.npz, or mni")
    parser.add_argument("--scans", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    sys.stdout.write("| object | scan | first and last plane | between | all |\n|---|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as folder:
        raw, maps = Path(folder) / "raw.h5", Path(folder) / "maps.h5"
        for name, anatomy in objects(arguments.sources, Path(folder)):
            for which in arguments.scans:
                scene = scan(which, anatomy, raw)
                owner, function = MAKERS["cartesian" if which in SCANS else "spirals"]
                with kept(owner, function) as csm:
                    replay(raw, "subspace", maps, overwrite=True)
                found = csm[0].permute(1, 2, 3, 0)  # (c, z, y, x)
                sensitivity, energy = map(torch.from_numpy, truth(scene))
                ends = torch.zeros_like(energy)
                ends[[0, -1]] = 1
                cells = [off(found, sensitivity, energy * part) for part in (ends, 1 - ends, 1 + 0 * ends)]
                text = " | ".join(f"{100 * cell:.1f}" for cell in cells)
                sys.stdout.write(f"| {name} | {which} | {text} |\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
