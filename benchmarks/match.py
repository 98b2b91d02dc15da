"""Matching of fingerprints: seconds of every search, side by side in one run, and how often the atoms agree.

    python benchmarks/match.py [--voxels 37000] [--rank 5 9] [--groups 256] [--noise 0.05] [--json FILE]

A dictionary of 60 000 atoms of a 500-point fingerprint; voxels of tissue between its atoms, with a random
phase and complex noise that is ``--noise`` of the length of the signal. The searches run in turn:

    one_liner   (coefficients @ normalised.T).abs().argmax(1), in chunks, as one would write it
    blas        the same in numpy, real and imaginary part by themselves
    exact       best_atom: every atom, by blocks that stay in the cache
    groups      fast group matching with safe bounds; the sorting into groups is timed by itself
    joint       every atom with its three spin-echo images, and voxels with noisy ones that count as much
    joint_groups  the same in groups
    grid        a coarser grid first, then all atoms of the cells about the best: what was tried and not kept
    refinement  off the grid, from the atoms of the search
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from quantitron.recon.atom_groups import AtomGroups
from quantitron.recon.data import FingerprintDictionary, Protocol
from quantitron.recon.fingerprint_match import dictionary_table
from quantitron.recon.fingerprint_refine import FingerprintRefinement
from quantitron.recon.joint_match import JointMatcher
from quantitron.recon.match import best_atom
from quantitron.recon.signal.fingerprint_dictionary import fingerprint_dictionary
from quantitron.recon.signal.fisp_mrf import contrast_signal
from quantitron.recon.signal.spin_echo import SpinEchoProtocol, spin_echo_dictionary, spin_echo_signal

MEMORY = 64_000_000
"""Bytes of correlations held at once, by all."""


def fingerprint(points: int = 500) -> Protocol:
    """Half sines of rising and falling peaks, as in Jiang 2015."""
    n = np.arange(points)
    peak = np.array([35, 60, 20, 70, 45])[n * 5 // points]
    angle = 4 + peak * np.abs(np.sin(np.pi * (n % (points / 5)) / (points / 5)))
    return Protocol("fisp_mrf", (0.0007,), (0.012,), tuple(np.radians(angle)), inversion_time=(0.02,))


def tissue(
    protocol: Protocol, dictionary: FingerprintDictionary, voxels: int, noise: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coefficients (v, r) complex64 and the truth t1, t2 (v,)."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(3, voxels, generator=generator)
    t1 = 0.5 * (4.3 / 0.5) ** draw[0]
    t2 = torch.minimum(0.03 * (1.8 / 0.03) ** draw[1], 0.6 * t1)
    with torch.no_grad():
        parts = [
            contrast_signal({"t1": a, "t2": b}, protocol) @ dictionary.axes
            for a, b in zip(t1.split(4096), t2.split(4096), strict=True)
        ]
    clean = torch.cat(parts)
    clean = clean / torch.linalg.vector_norm(clean, dim=1, keepdim=True)
    complex_noise = torch.randn(clean.shape, generator=generator, dtype=torch.complex64)
    v = clean * torch.exp(2j * math.pi * draw[2])[:, None]
    return v + noise / math.sqrt(clean.shape[1]) * complex_noise, t1, t2


def weighted(
    v: torch.Tensor, t1: torch.Tensor, t2: torch.Tensor, groups: AtomGroups, noise: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy spin-echo images (v, m) of the tissue, and weights (m,) at which all count as the signal does."""
    size = groups.best_of_near_groups(v, MEMORY)[1].abs()[:, None]
    images = size * spin_echo_signal(t1, t2, SpinEchoProtocol())
    weights = v.abs().square().sum(1).mean() / (images.shape[1] * images.square().mean(0))
    generator = torch.Generator().manual_seed(1)
    return images * (1 + noise * torch.randn(images.shape, generator=generator)), weights


def one_liner(v: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """As one would write it."""
    normalised = (atoms / atoms.norm(dim=1, keepdim=True)).to(v.dtype)
    chunk = MEMORY // (8 * len(atoms))
    return torch.cat([(part @ normalised.T).abs().argmax(1) for part in v.split(chunk)])


def blas(v: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """numpy on real and imaginary part."""
    normalised = (atoms / atoms.norm(dim=1, keepdim=True)).numpy().T.copy()
    found = []
    for part in v.split(MEMORY // (8 * len(atoms))):
        size = np.square(part.real.numpy() @ normalised)
        size += np.square(part.imag.numpy() @ normalised)
        found.append(size.argmax(1))
    return torch.from_numpy(np.concatenate(found))


class CoarseGrid:
    """Every ``step``-th atom of the grid first, then all within one step of the best of those."""

    def __init__(self, dictionary: FingerprintDictionary, table: torch.Tensor, step: int) -> None:
        plausible = dictionary.plausible
        self._number = torch.full(plausible.shape, -1)
        self._number[plausible] = torch.arange(int(plausible.sum()))
        self._atoms = table[0][plausible]
        coarse = torch.zeros_like(plausible)
        coarse[::step, ::step] = True
        # The diagonal and the edges stay within reach of a coarse atom.
        coarse &= plausible
        self._coarse = coarse.nonzero()
        self._coarse_atoms = table[0][coarse]
        self._step = step

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        """Index (v,) of the atoms."""
        nearest, _ = best_atom(v, self._coarse_atoms, MEMORY)
        result = torch.empty(len(v), dtype=torch.int64)
        order = nearest.argsort()
        cells, counts = torch.unique(nearest, return_counts=True)
        for cell, voxels in zip(cells.tolist(), order.split(counts.tolist()), strict=True):
            i, j = self._coarse[cell].tolist()
            window = self._number[
                max(i - self._step, 0) : i + self._step + 1, max(j - self._step, 0) : j + self._step + 1
            ].flatten()
            window = window[window >= 0]
            result[voxels] = window[best_atom(v[voxels], self._atoms[window], MEMORY)[0]]
        return result


def compare(
    rank: int, arguments: argparse.Namespace, protocol: Protocol, dictionary: FingerprintDictionary
) -> dict:
    """Seconds (best of the repeats, all searches in turn) and agreement at one rank."""
    v, t1, t2 = tissue(protocol, dictionary, arguments.voxels, arguments.noise)
    v = v[:, :rank].contiguous()
    table = dictionary_table(dictionary, dictionary.basis(rank))
    plausible = dictionary.plausible.flatten().nonzero()[:, 0]
    atoms = table.flatten(0, 2)[plausible].contiguous()
    groups = AtomGroups.similar(atoms, arguments.groups)
    images = spin_echo_dictionary(dictionary.t1, dictionary.t2, SpinEchoProtocol()).flatten(0, 1)[plausible]
    contrasts, weights = weighted(v, t1, t2, groups, arguments.noise)
    joint, joint_groups = (JointMatcher(atoms, images, number) for number in (0, arguments.groups))
    grid = CoarseGrid(dictionary, table, 8)
    columns = len(dictionary.t2)

    def refine(found: torch.Tensor):
        place = plausible[found]
        refinement = FingerprintRefinement(dictionary, table)
        return refinement.run(v, dictionary.t1[place // columns], dictionary.t2[place % columns])

    searches = {
        "one_liner": lambda: one_liner(v, atoms),
        "blas": lambda: blas(v, atoms),
        "exact": lambda: best_atom(v, atoms, MEMORY)[0],
        "sorting": lambda: AtomGroups.similar(atoms, arguments.groups),
        "groups": lambda: groups.best_of_near_groups(v, MEMORY)[0],
        "joint": lambda: joint(v, contrasts, weights, working_set=MEMORY).atom,
        "joint_groups": lambda: joint_groups(v, contrasts, weights, working_set=MEMORY).atom,
        "grid": lambda: grid(v),
        "refinement": lambda: refine(found["groups"]),
    }
    seconds, busy, found = dict.fromkeys(searches, math.inf), dict.fromkeys(searches, math.inf), {}
    for repeat in range(arguments.repeats):
        for name, search in searches.items():
            if repeat and seconds[name] > 20:
                continue
            start, processor = time.perf_counter(), time.process_time()
            found[name] = search()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
            busy[name] = min(busy[name], time.process_time() - processor)
    _, _, work = groups.best_of_near_groups(v, MEMORY)
    refined = found["refinement"]
    return {
        "rank": rank,
        "atoms": len(atoms),
        "voxels": len(v),
        "seconds": seconds,
        "processor_seconds": busy,
        "same_atom": {
            name: float((found[name] == found["exact"]).double().mean())
            for name in ("one_liner", "blas", "groups", "grid")
        }
        | {"joint_groups": float((found["joint_groups"] == found["joint"]).double().mean())},
        "fewer_correlations": len(v) * len(atoms) / work,
        "median_error_percent": {
            "t1": 100 * float((refined.t1 / t1 - 1).abs().median()),
            "t2": 100 * float((refined.t2 / t2 - 1).abs().median()),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--voxels", type=int, default=37000)
    parser.add_argument("--rank", type=int, nargs="+", default=[5, 9])
    parser.add_argument("--groups", type=int, default=256)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    protocol = fingerprint()
    dictionary = fingerprint_dictionary(protocol)
    results = []
    for rank in arguments.rank:
        result = compare(rank, arguments, protocol, dictionary)
        results.append(result)
        print(
            f"rank {rank}: {result['voxels']} voxels, {result['atoms']} atoms, "
            f"{torch.get_num_threads()} threads"
        )
        for name, value in result["seconds"].items():
            same = result["same_atom"].get(name)
            agreement = "" if same is None else f"   same atom {100 * same:.2f} %"
            print(
                f"  {name:13s}{value:9.2f} s, processor {result['processor_seconds'][name]:8.2f} s{agreement}"
            )
        print(f"  groups compute {result['fewer_correlations']:.0f} times fewer correlations", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
