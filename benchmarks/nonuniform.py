"""NUFFT, Toeplitz operators and matching beside those of other packages: same data, same run.

    python benchmarks/nonuniform.py [--matrix 192] [--points 500 1000] [--threads 2]

A scan of so many time points, one of 48 spirals each, 8 coils, 5 coefficient images. The peers do what they
offer: mri-nufft a subspace operator without Toeplitz, SigPy a Toeplitz operator without subspace (so K = 1 is
compared), BART both (``pics -t -B``; the time of an iteration is the slope between two runs, its set-up the
rest). None of these matches fingerprints; mrpro does, with every atom. Times on the clock and of processors,
which other programs disturb less. ``agrees`` is the relative difference from our result, after one fitted
factor: conventions differ. Peers that are not installed are left out with ``--without``.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--matrix", type=int, default=192)
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--rank", type=int, default=5)
    parser.add_argument("--interleaves", type=int, default=48)
    parser.add_argument("--samples", type=int, default=1166, help="of a readout")
    parser.add_argument("--points", type=int, nargs="+", default=[500, 1000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--without", nargs="*", default=[], choices=("mri-nufft", "sigpy", "bart", "mrpro"))
    arguments = parser.parse_args()
    # Libraries read these once, when they are loaded.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(arguments.threads)

import numpy as np
import torch
from match import MEMORY, fingerprint, tissue
from peers_bart import bart_available, read_cfl, write_cfl
from torch import Tensor

from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient
from quantitron.recon.atom_groups import AtomGroups
from quantitron.recon.data import Basis, TrajectoryKSpace
from quantitron.recon.fingerprint_match import dictionary_table
from quantitron.recon.match import best_atom
from quantitron.recon.operators.density_compensation import density_weights
from quantitron.recon.operators.nonuniform_fourier import NonuniformFourier
from quantitron.recon.operators.toeplitz import ToeplitzSense
from quantitron.recon.signal.fingerprint_dictionary import fingerprint_dictionary
from quantitron.recon.trajectory_gram import sum_readouts


def spirals(interleaves: int, samples: int) -> Tensor:
    """Spirals of variable density, turned against one another: (interleaf, sample, 2)."""
    time_ = torch.linspace(0, 1, samples, dtype=torch.float64)
    angle = 2 * math.pi * (8 * time_ + torch.arange(interleaves, dtype=torch.float64)[:, None] / interleaves)
    radius = 0.499 * time_**1.3
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).float()


def smooth(count: int, size: int, width: float, seed: int) -> Tensor:
    """Smooth random complex images (count, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.fft.fftfreq(size) * size
    window = torch.exp(-(frequency[:, None] ** 2 + frequency**2) / 2 / width**2)
    noise = torch.randn(count, size, size, dtype=torch.complex64, generator=generator)
    images = torch.fft.ifft2(noise * window)
    return images / images.abs().amax((1, 2), keepdim=True)


class Scan:
    """The scan that all work on."""

    def __init__(
        self, matrix: int, coils: int, rank: int, interleaves: int, samples: int, points: int
    ) -> None:
        self.grid = (1, matrix, matrix)
        distinct = spirals(interleaves, samples)
        self.distinct = distinct.flatten(0, 1)
        order = torch.arange(points) % interleaves
        time_ = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
        columns, _ = torch.linalg.qr(torch.cos(time_ * math.pi * torch.arange(rank)))
        self.phi = columns.float()
        coefficients = smooth(rank, matrix, 20, 1) / torch.arange(1, rank + 1)[:, None, None]
        csm = smooth(coils, matrix, 1.5, 2)
        self.csm = csm / csm.abs().square().sum(0).sqrt()  # (c, y, x)
        fourier = NonuniformFourier(self.distinct, self.grid)
        pure = fourier((coefficients[:, None] * self.csm)[:, :, None])  # (k, c, n)
        pure = pure.reshape(rank, coils, interleaves, samples)
        data = torch.empty(coils, points, samples, dtype=torch.complex64)
        for point in range(points):
            data[:, point] = torch.einsum("k,kcn->cn", self.phi[point].to(pure), pure[:, :, order[point]])
        generator = torch.Generator().manual_seed(3)
        data += 1e-3 * data.abs().mean() * torch.randn(data.shape, dtype=data.dtype, generator=generator)
        self.data = data
        self.frames = distinct[order]  # (t, n, 2)
        self.kspace = TrajectoryKSpace(
            samples=data.flatten(1),
            trajectory=self.frames.flatten(0, 1),
            readout_length=torch.full((points,), samples),
            time_point=torch.arange(points),
            slice=torch.zeros(points, dtype=torch.int64),
            density=None,
            energy=float(data.abs().double().square().sum()),
            time_points=points,
            grid=(1, *self.grid),
        )
        self.basis = Basis(self.phi, torch.ones(rank), 1.0, "dictionary")

    @property
    def maps(self) -> Tensor:
        """(x, c, z, y)."""
        return self.csm.permute(2, 0, 1)[:, :, None].contiguous()


Cost = tuple[float, float]
"""Seconds on the clock and seconds of processors, children included."""


def clocks() -> Cost:
    """Both now."""
    times = os.times()
    return time.perf_counter(), times.user + times.system + times.children_user + times.children_system


def cost(function: Callable[[], Any]) -> Cost:
    """Of one call."""
    start = clocks()
    function()
    end = clocks()
    return end[0] - start[0], end[1] - start[1]


def seconds(function: Callable[[], Any], repeats: int) -> Cost:
    """Least of several calls, the first one aside: other programs only ever add to it."""
    function()
    # The processors' clock counts in hundredths of a second.
    single = cost(function)[0]
    calls = max(1, int(0.3 / max(single, 1e-6)))

    def block() -> None:
        for _ in range(calls):
            function()

    taken = [cost(block) for _ in range(repeats)]
    return min(t[0] for t in taken) / calls, min(t[1] for t in taken) / calls


def agreement(found: Tensor, ours: Tensor) -> float:
    """Relative difference after one fitted complex factor."""
    found, ours = found.flatten().to(torch.complex128), ours.flatten().to(torch.complex128)
    factor = torch.vdot(found, ours) / torch.vdot(found, found)
    return float((factor * found - ours).norm() / ours.norm())


def row(what: str, who: str, taken: Cost, agrees: float | None = None) -> None:
    """One line of the table."""
    times = f"{1e3 * taken[0]:9.1f} ms {1e3 * taken[1]:9.1f} ms"
    print(f"{what:34s} {who:26s} {times}   {'' if agrees is None else f'{agrees:.1e}'}", flush=True)


def images_of(u: Tensor) -> Tensor:
    """(x, k, z, y) -> (k, y, x)."""
    return u[:, :, 0].permute(1, 2, 0).contiguous()


def coefficients_of(images: Tensor) -> Tensor:
    """(k, y, x) -> (x, k, z, y)."""
    return images.permute(2, 0, 1)[:, :, None].contiguous()


def transforms(scan: Scan, repeats: int, without: list[str]) -> None:
    """Forward and adjoint transform of all coil images onto all distinct spirals."""
    fourier = NonuniformFourier(scan.distinct, scan.grid)
    images = scan.csm[:, None]
    coils, matrix = len(scan.csm), scan.grid[1]
    samples = fourier(images)
    back = fourier.adjoint(samples)
    tasks = f"NUFFT, {coils} images"
    quick = NonuniformFourier(scan.distinct, scan.grid, 5e-5)
    for name, operator in (("quantitron 1e-5", fourier), ("quantitron 5e-5", quick)):
        forward, adjoint = operator(images), operator.adjoint(samples)
        row(
            f"{tasks}, forward",
            name,
            seconds(lambda o=operator: o(images), repeats),
            agreement(forward, samples),
        )
        row(
            f"{tasks}, adjoint",
            name,
            seconds(lambda o=operator: o.adjoint(samples), repeats),
            agreement(adjoint, back),
        )
    if "mri-nufft" not in without:
        import mrinufft

        peer = mrinufft.get_operator("finufft")(
            scan.distinct.flip(1).numpy(), (matrix, matrix), n_coils=coils, squeeze_dims=True
        )
        dense, data = scan.csm.numpy(), samples.numpy()
        row(f"{tasks}, forward", "mri-nufft", seconds(lambda: peer.op(dense), repeats),
            agreement(torch.from_numpy(peer.op(dense)), samples))  # fmt: skip
        row(f"{tasks}, adjoint", "mri-nufft", seconds(lambda: peer.adj_op(data), repeats),
            agreement(torch.from_numpy(peer.adj_op(data)), back))  # fmt: skip
    if "sigpy" not in without:
        import sigpy

        coord = scan.distinct.flip(1).numpy() * matrix
        dense, data = scan.csm.numpy(), samples.numpy()

        def forward_() -> Any:
            return sigpy.nufft(dense, coord)

        def adjoint_() -> Any:
            return sigpy.nufft_adjoint(data, coord, (coils, matrix, matrix))

        row(f"{tasks}, forward", "sigpy", seconds(forward_, repeats),
            agreement(torch.from_numpy(forward_()), samples))  # fmt: skip
        row(f"{tasks}, adjoint", "sigpy", seconds(adjoint_, repeats),
            agreement(torch.from_numpy(adjoint_()), back))  # fmt: skip
    for method in ("pipe", "voronoi"):
        row("density compensation", f"quantitron {method}",
            seconds(lambda m=method: density_weights(scan.distinct, scan.grid, m), 1))  # fmt: skip
    if "mri-nufft" not in without:
        from mrinufft.density import voronoi

        row("density compensation", "mri-nufft voronoi", seconds(lambda: voronoi(scan.distinct.numpy()), 1))
    if "sigpy" not in without:
        from sigpy.mri import pipe_menon_dcf

        # As many iterations as ours; its own default is 30.
        row("density compensation", "sigpy pipe-menon", seconds(
            lambda: pipe_menon_dcf(coord, (matrix, matrix), max_iter=10, show_pbar=False), 1))  # fmt: skip


def operators(scan: Scan, repeats: int, without: list[str], threads: int) -> None:
    """A^H A of the subspace."""
    points, rank, matrix = len(scan.phi), scan.phi.shape[1], scan.grid[1]
    task = f"T={points} K={rank}"
    sums = sum_readouts(scan.kspace, scan.basis)
    row(
        f"{task}: sum of readouts",
        "quantitron",
        seconds(lambda: sum_readouts(scan.kspace, scan.basis), repeats),
    )
    identity = torch.eye(rank)
    row(f"{task}: Toeplitz build", "quantitron",
        seconds(lambda: ToeplitzSense(sums, scan.maps, identity), repeats))  # fmt: skip
    operator = ToeplitzSense(sums, scan.maps, identity)
    data = operator.adjoint_data()
    row(f"{task}: A^H s", "quantitron", seconds(operator.adjoint_data, repeats))
    row(f"{task}: A^H A", "quantitron Toeplitz", seconds(lambda: operator(data), repeats))
    applied = operator(data)

    fourier = NonuniformFourier(scan.distinct, scan.grid, 5e-5)
    gram = sums.gram[sums.readout].to(torch.complex64)  # (n, k, k)
    images = images_of(data)[:, None] * scan.csm  # (k, c, y, x)

    def by_transforms() -> Tensor:
        samples = fourier(images[:, :, None])  # (k, c, n)
        mixed = torch.einsum("nij,jcn->icn", gram, samples)
        return (fourier.adjoint(mixed)[:, :, 0] * scan.csm.conj()).sum(1)

    row(f"{task}: A^H A", "quantitron NUFFT, summed", seconds(by_transforms, 1),
        agreement(by_transforms(), images_of(applied)))  # fmt: skip
    if "mri-nufft" not in without:
        import mrinufft
        from mrinufft.operators.subspace import MRISubspace

        everywhere = mrinufft.get_operator("finufft")(
            # All frames, also those of one trajectory: it knows no other form.
            scan.frames.flip(-1).reshape(-1, 2).numpy(),
            (matrix, matrix),
            n_coils=len(scan.csm),
            squeeze_dims=True,
        )
        peer = MRISubspace(everywhere, scan.phi.mT.contiguous().numpy())
        dense = images.numpy()

        def normal() -> Tensor:
            back = torch.from_numpy(peer.adj_op(peer.op(dense)))
            return (back * scan.csm.conj()).sum(1)

        row(
            f"{task}: A^H A",
            "mri-nufft subspace",
            seconds(normal, 1),
            agreement(normal(), images_of(applied)),
        )
    if "bart" in without or not bart_available():
        print("BART: not installed or not asked for, left out")
    else:
        bart(scan, operator, data, task, threads)


def single(scan: Scan, repeats: int) -> None:
    """One image of all coils through SigPy's Toeplitz operator and ours: no subspace there."""
    import sigpy

    matrix, coils = scan.grid[1], len(scan.csm)
    points = len(scan.phi)
    constant = Basis(torch.full((points, 1), points**-0.5), torch.ones(1), 1.0, "dictionary")
    sums = sum_readouts(scan.kspace, constant)
    row(
        "K=1: Toeplitz build",
        "quantitron",
        seconds(lambda: ToeplitzSense(sums, scan.maps, torch.eye(1)), repeats),
    )
    operator = ToeplitzSense(sums, scan.maps, torch.eye(1))
    # SigPy has no weights: each distinct spiral counts once.
    sums = sums.__class__(**{**sums.__dict__, "gram": torch.ones_like(sums.gram)})
    operator = ToeplitzSense(sums, scan.maps, torch.eye(1))
    u = coefficients_of(scan.csm[:1])
    ours = images_of(operator(u))
    row("K=1: A^H A", "quantitron Toeplitz", seconds(lambda: operator(u), repeats))
    coord = scan.distinct.flip(1).numpy() * matrix
    csm = scan.csm.numpy()
    # One kernel; for images of all coils SigPy makes as many equal ones.
    build = seconds(lambda: sigpy.toeplitz_psf(coord, (1, matrix, matrix)), 1)
    row("K=1: Toeplitz build", "sigpy", build)
    nufft = sigpy.linop.NUFFT((coils, matrix, matrix), coord, toeplitz=True)
    maps = sigpy.linop.Multiply((1, matrix, matrix), csm)
    normal = maps.H * nufft.N * maps
    image = scan.csm[:1].numpy()
    row("K=1: A^H A", "sigpy Toeplitz", seconds(lambda: normal(image), repeats),
        agreement(torch.from_numpy(normal(image)), ours))  # fmt: skip


def bart(scan: Scan, operator: ToeplitzSense, data: Tensor, task: str, threads: int) -> None:
    """``pics -t -B``: least squares with a small penalty by conjugate gradients."""
    penalty = 1e-2 * float(operator.mean_diagonal().mean())
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    points, samples = scan.frames.shape[:2]
    with tempfile.TemporaryDirectory(prefix="bart-") as name:
        folder = Path(name)
        matrix = scan.grid[1]
        trajectory = np.zeros((points, samples, 3), np.complex64)
        trajectory[..., :2] = scan.frames.numpy() * matrix
        write_cfl(folder / "trajectory", trajectory, (5, 1, 0))
        write_cfl(folder / "kspace", scan.data.numpy(), (3, 5, 1))
        write_cfl(folder / "csm", scan.csm.numpy(), (3, 1, 0))
        write_cfl(folder / "phi", scan.phi.numpy(), (5, 6))

        def run(iterations: int) -> Cost:
            command = ["bart", "pics", "-w", "1", "-l2", "-r", repr(penalty), "-i", str(iterations)]
            command += ["-t", "trajectory", "-B", "phi", "kspace", "csm", "result"]
            start = clocks()
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            end = clocks()
            if done.returncode:
                raise RuntimeError(done.stderr[-500:])
            return end[0] - start[0], end[1] - start[1]

        few, many = 2, 100
        short, long = run(few), run(many)
        iteration = (long[0] - short[0]) / (many - few), (long[1] - short[1]) / (many - few)
        setup = short[0] - few * iteration[0], short[1] - few * iteration[1]
        found = torch.from_numpy(read_cfl(folder / "result", (6, 1, 0)).copy())
    ours = conjugate_gradient(lambda u: operator(u) + penalty * u, data, iterations=many, tolerance=0.0)
    row(f"{task}: set-up", "bart pics -t -B", setup)
    row(f"{task}: iteration", "bart pics -t -B", iteration, agreement(found, images_of(ours)))


def matching(rank: int, repeats: int, without: list[str], voxels: int = 37000) -> None:
    """Fingerprints of as many voxels as a slice of 192 x 192 has to the atoms of a dictionary (match.py).

    ``agrees`` is the share of voxels whose atom is another one.
    """
    protocol = fingerprint()
    dictionary = fingerprint_dictionary(protocol)
    signals = tissue(protocol, dictionary, voxels, 0.05)[0][:, :rank].contiguous()
    table = dictionary_table(dictionary, dictionary.basis(rank))
    atoms = table.flatten(0, 2)[dictionary.plausible.flatten()].contiguous()
    task = f"match, {len(atoms)} atoms"
    groups = AtomGroups.similar(atoms, 256)
    nearest = best_atom(signals, atoms, MEMORY)[0]

    def in_groups() -> Tensor:
        return groups.best_of_near_groups(signals, MEMORY)[0]

    def differ(found: Tensor) -> float:
        return float((found != nearest).double().mean())

    row(task, "quantitron groups", seconds(in_groups, repeats), differ(in_groups()))
    row(task, "quantitron all atoms", seconds(lambda: best_atom(signals, atoms, MEMORY), 1))
    if "mrpro" in without:
        return
    try:
        from mrpro.operators import DictionaryMatchOp
    except ImportError:
        print("mrpro: not installed, left out")
        return
    # Its atoms come from a function of their parameters: here of their number.
    peer = DictionaryMatchOp(lambda number: (atoms.mT[:, number],), batch_size=MEMORY // (8 * len(atoms)))
    peer.append(torch.arange(len(atoms)))
    columns = signals.mT.contiguous()
    row(task, "mrpro", seconds(lambda: peer(columns), 1), differ(peer(columns)[0]))


def main() -> None:
    torch.set_num_threads(arguments.threads)
    a = arguments
    print(
        f"{a.matrix}x{a.matrix}, {a.coils} coils, {a.interleaves} spirals of {a.samples}, {a.threads} threads"
    )
    print(f"{'what':34s} {'who':26s} {'clock':>12s} {'processor':>12s}   agrees")
    for number, points in enumerate(a.points):
        scan = Scan(a.matrix, a.coils, a.rank, a.interleaves, a.samples, points)
        if not number:
            transforms(scan, a.repeats, a.without)
            if "sigpy" not in a.without:
                single(scan, a.repeats)
        operators(scan, a.repeats, a.without, a.threads)
    matching(a.rank, a.repeats, a.without)


if __name__ == "__main__":
    main()
