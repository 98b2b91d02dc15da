"""BART on the same k-space, coil maps and basis as our solvers (https://mrirecon.github.io/bart).

Two of its programs solve our problem. ``pics -B`` (class ``Pics``) works on the dense buffer of all frames;
its time and memory grow with T. ``wshfl`` (class ``Shuffle``), made for T2 shuffling, takes a list of lines
and sums them into a K x K kernel first, as our solvers do: BART's quickest form of the problem.

Conventions of BART 0.8 that this file rests on (tests/test_peers.py checks them):

- A ``.cfl`` file holds complex64 in column-major order, 16 dimensions: 0-2 space, 3 coil, 4 map, 5 frame
  (TE), 6 coefficient. The basis is (frame, coefficient) and U comes back along dimension 6;
  I_t = sum_k Phi[t,k] U_k, no conjugate.
- pics transforms dimensions 0 to 2, centred at n // 2 and unitary, so the readout is transformed back. It
  could stay in image space in dimension 13, but that was not quicker (the basis takes the time, not the
  transforms), and low-rank blocks come out wrong there: their rows must all come before the coefficients.
- Each program leaves a phase on k-space that a centred transform should have taken off, where a length is
  not a multiple of 4 (pics) or 8 (wshfl): a sign for even lengths, a shift for odd ones. Lines are written
  with the opposite phase.
- pics: ``-p`` is a weight on |residual|^2, the number of averages of each line; all dimensions but the coils
  must be spelled out. ``-w 1`` turns the scaling of the data off. The default step of FISTA is 0.95, right
  for coil maps of unit root-sum-of-squares.
- wshfl: transforms are not unitary (the point-spread function of the wave takes the factor here) and data
  are divided by their norm (weights are divided by it here). It knows no averages: a line of n acquisitions
  is written as sqrt(n) times itself with a row sqrt(n) Phi_t of its own. One penalty means FISTA, whatever it
  is; total variation needs a second one for ADMM, for which a vanishing l2 penalty serves. Step of FISTA:
  0.5 / eigenvalue. It stops FISTA at 1e-3 unless told otherwise. Three mistakes of the program: the kernel of
  the point ky = kz = 0, the corner of k-space, is made of memory that was never set, so lines there are left
  out; threads that sum lines of one point count some of them twice, so lines are sorted and padded to keep
  points whole; and after FISTA it aborts, when all is done and saved.
- Under ADMM ``-i`` counts steps of the conjugate gradients within it, looked at after each outer iteration.
- FISTA returns what follows the last gradient step, before its threshold, in both programs.
- A block of low-rank thresholding is set to zero when a bound says that it would be; the bound lacks a
  complex conjugate and is too small where the phase varies strongly within a block.
- L (locally low rank) thresholds the singular values of each block by ``weight * llr_factor(...)``; T is
  isotropic total variation with periodic ends of each coefficient, TJ jointly of all, both by ADMM.

Weights are in units of our whitened noise: all programs minimise 1/2 ||s - A U||^2 + weight R(U).
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantitron.recon.data import KSpace
from quantitron.recon.operators.fourier import centred_fft

Regularisation = Literal["L", "T", "TJ"]
"""Locally low rank, total variation of each coefficient image, total variation joint over coefficients."""

Self = TypeVar("Self", bound="BartFiles")

DIMENSIONS = 16
READ, PHASE1, PHASE2, COIL, FRAME, COEFFICIENT = 0, 1, 2, 3, 5, 6


def bart_available() -> bool:
    """Whether the program ``bart`` is on the path."""
    return shutil.which("bart") is not None


def bart_version() -> str:
    """What ``bart version`` says."""
    return subprocess.run(["bart", "version"], check=True, capture_output=True, text=True).stdout.strip()


def llr_factor(grid: tuple[int, int, int], rank: int, block: int) -> float:
    """Threshold on the singular values of a block over BART's weight for ``-R L:...``, at step 1.

    Args:
        grid: (z, y, x).
        rank: coefficient images k.
        block: edge length of the blocks.
    """
    edges = [min(block, n) for n in grid]
    rows = math.prod(edges)
    blocks = math.prod(-(-n // edge) for n, edge in zip(grid, edges, strict=True))
    return math.sqrt(rows) + math.sqrt(rank) + math.sqrt(math.log(blocks * min(rows, rank)))


def centring_phase(length: int) -> NDArray[np.complex128]:
    """(n,) factor between a centred unitary transform and the plain one of an image times the same factor."""
    centre = length // 2
    phase: NDArray[np.complex128] = np.exp(2j * np.pi * centre * (np.arange(length) - centre / 2) / length)
    return phase


def write_cfl(path: Path, array: NDArray[np.generic], where: tuple[int, ...]) -> None:
    """Write an array whose axes go to the dimensions ``where``; no copy if these descend."""
    shape = [1] * DIMENSIONS
    for length, dimension in zip(array.shape, where, strict=True):
        shape[dimension] = length
    order = sorted(range(array.ndim), key=lambda axis: -where[axis])
    np.ascontiguousarray(array.transpose(order), dtype=np.complex64).tofile(path.with_suffix(".cfl"))
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, shape)) + "\n")


def read_cfl(path: Path, where: tuple[int, ...]) -> NDArray[np.complex64]:
    """Read an array; its axes are the dimensions ``where``, the others must be of length 1."""
    shape = [int(n) for n in path.with_suffix(".hdr").read_text().splitlines()[1].split()]
    shape += [1] * (DIMENSIONS - len(shape))
    flat = np.fromfile(path.with_suffix(".cfl"), dtype=np.complex64).reshape(shape[::-1])
    others = tuple(axis for axis in range(DIMENSIONS) if DIMENSIONS - 1 - axis not in where)
    kept = sorted(where, reverse=True)
    squeezed = flat.squeeze(others)
    return squeezed.transpose([kept.index(dimension) for dimension in where])


class BartFiles:
    """A scan written once in BART's files, to be reconstructed many times. A context manager."""

    def __init__(
        self, kspace: KSpace, csm: Tensor, phi: Tensor, folder: str | os.PathLike[str] | None = None
    ) -> None:
        """Check shapes and make a folder.

        Args:
            kspace: lines of one slice.
            csm: (x, c, z, y) coil sensitivity maps.
            phi: (t, k) complex basis over the frames t = w * echoes + e.
            folder: where the files go; the system's temporary folder where absent.

        Raises:
            ValueError: if the lines are of more than one slice, or shapes do not fit.
        """
        slices, nz, ny, nx = kspace.grid
        coils = kspace.samples.shape[1]
        frames = math.prod(kspace.contrast_shape)
        if slices != 1:
            raise ValueError(f"the lines are of {slices} slices; one at a time")
        if tuple(csm.shape) != (nx, coils, nz, ny):
            raise ValueError(f"csm is {tuple(csm.shape)}, the lines need {(nx, coils, nz, ny)}")
        if phi.shape[0] != frames:
            raise ValueError(f"phi has {phi.shape[0]} rows, the scan {frames} frames")
        self._grid = (nz, ny, nx)
        self._temporary = tempfile.TemporaryDirectory(dir=folder, prefix="bart-")
        self._folder = Path(self._temporary.name)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._temporary.cleanup()

    def _run(self, command: list[str], threads: int) -> float:
        """Seconds that the process took."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        start = time.perf_counter()
        done = subprocess.run(command, cwd=self._folder, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode and "Reconstruction time" not in done.stdout:  # that of wshfl, see above
            raise RuntimeError(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-500:]}")
        return seconds

    def _result(self) -> Tensor:
        return torch.from_numpy(read_cfl(self._folder / "result", (READ, COEFFICIENT, PHASE2, PHASE1)).copy())


def _penalty(regularisation: Regularisation, weight: float, block: int) -> tuple[list[str], bool]:
    """Options of the penalty, and whether it needs ADMM."""
    if regularisation == "L":
        return ["-b", str(block), "-R", f"L:7:7:{weight:.9g}"], False
    joint = 1 << COEFFICIENT if regularisation == "TJ" else 0
    return ["-R", f"T:7:{joint}:{weight:.9g}"], True


class Pics(BartFiles):
    """``bart pics -B``: the dense buffer of all frames."""

    def __init__(
        self,
        kspace: KSpace,
        csm: Tensor,
        phi: Tensor,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write the files: t*c*z*y*x complex64 and as much again over c; see ``BartFiles``."""
        super().__init__(kspace, csm, phi, folder)
        nz, ny, nx = self._grid
        coils, frames = kspace.samples.shape[1], math.prod(kspace.contrast_shape)
        frame = (kspace.contrast * kspace.contrast_shape[2] + kspace.echo).numpy()
        kz, ky = kspace.kz.numpy(), kspace.ky.numpy()
        pattern = np.zeros((frames, nz, ny), dtype=np.complex64)
        pattern[frame, kz, ky] = kspace.count.numpy()
        pattern = np.broadcast_to(pattern[..., None], (frames, nz, ny, nx))
        write_cfl(self._folder / "pattern", pattern, (FRAME, PHASE2, PHASE1, READ))
        write_cfl(self._folder / "csm", _numpy(csm), (READ, COIL, PHASE2, PHASE1))
        write_cfl(self._folder / "phi", _numpy(phi), (FRAME, COEFFICIENT))
        phase = (centring_phase(nz)[kz] * centring_phase(ny)[ky]).conj() ** 2
        # In place in the file: what was never sampled stays a hole, and no dense copy is held in memory.
        where, shape = (FRAME, COIL, PHASE2, PHASE1, READ), (frames, coils, nz, ny, nx)
        dense = _create_cfl(self._folder / "kspace", shape, where)
        lines = _numpy(centred_fft(kspace.samples, (-1,))) * phase[:, None, None]  # (n, c, x)
        dense[frame, :, kz, ky] = lines * centring_phase(nx).conj() ** 2
        del dense

    def __call__(
        self,
        regularisation: Regularisation | None,
        weight: float,
        iterations: int,
        block: int = 8,
        rho: float | None = None,
        inner_iterations: int | None = None,
        step: float | None = None,
        random_shifts: bool = True,
        threads: int = 2,
    ) -> tuple[Tensor, float]:
        """Reconstruct.

        Args:
            regularisation: None is least squares with the penalty weight / 2 ||U||^2.
            weight: factor of the penalty.
            iterations: of conjugate gradients (None), of FISTA (L), of all conjugate gradients within ADMM
                (T, TJ): in each case about so many times A^H A.
            block: edge length of the low-rank blocks.
            rho: penalty parameter of ADMM; BART's own (0.5) where absent.
            inner_iterations: of conjugate gradients within ADMM; BART's own (10) where absent.
            step: of FISTA, at most 1 / largest eigenvalue of A^H A; BART's own (0.95) where absent.
            random_shifts: whether blocks are shifted in every iteration.
            threads: OMP_NUM_THREADS of the process.

        Returns:
            U (x, k, z, y) and the seconds that the process took, reading its files (cached) included.

        Raises:
            RuntimeError: if ``bart`` fails, with the end of what it said.
        """
        command = ["bart", "pics", "-w", "1", "-i", str(iterations), "-p", "pattern", "-B", "phi"]
        if regularisation is None:
            command += ["-l2", "-r", repr(float(weight))]
        else:
            options, admm = _penalty(regularisation, weight, block)
            command += [*options, "-m"] if admm else options
        command += ["-u", repr(rho)] if rho is not None else []
        command += ["-C", str(inner_iterations)] if inner_iterations is not None else []
        command += ["-s", repr(step)] if step is not None else []
        command += [] if random_shifts else ["-n"]
        seconds = self._run([*command, "kspace", "csm", "result"], threads)
        return self._result(), seconds


class Shuffle(BartFiles):
    """``bart wshfl``: lines summed into a K x K kernel; time does not grow with the number of frames."""

    def __init__(
        self,
        kspace: KSpace,
        csm: Tensor,
        phi: Tensor,
        folder: str | os.PathLike[str] | None = None,
        threads: int = 2,
    ) -> None:
        """Write the files for processes of so many threads; see ``BartFiles``."""
        super().__init__(kspace, csm, phi, folder)
        self._threads = threads
        nz, ny, nx = self._grid
        used = (kspace.kz > 0) | (kspace.ky > 0)
        frame = (kspace.contrast * kspace.contrast_shape[2] + kspace.echo)[used].numpy()
        kz, ky, count = (part[used].numpy() for part in (kspace.kz, kspace.ky, kspace.count))
        rows, row = np.unique(np.stack([frame, count]), axis=1, return_inverse=True)
        weighted = _numpy(phi)[rows[0].astype(int)] * np.sqrt(rows[1])[:, None]
        weighted = np.concatenate([weighted, np.zeros_like(weighted[:1])])  # a frame of nothing, for padding
        phase = np.sqrt(count) * (-1.0) ** (ky + kz) / (centring_phase(nz)[kz] * centring_phase(ny)[ky])
        table = _numpy(centred_fft(kspace.samples[used], (-1,))) * phase[:, None, None]
        table = (table * centring_phase(nx).conj() ** 2).astype(np.complex64)  # (n, c, x)
        self._norm = float(np.linalg.norm(table))
        order, padding = _chunks(kz * ny + ky, threads)
        index = np.stack([ky[order], kz[order], np.where(padding, len(rows[0]), row.ravel()[order])])
        table = table[order]
        table[padding] = 0
        write_cfl(self._folder / "table", table, (2, 1, 0))
        write_cfl(self._folder / "reorder", index, (1, 0))
        write_cfl(self._folder / "phi", weighted, (FRAME, COEFFICIENT))
        unitary = np.full((nz, ny, nx), 1 / math.sqrt(nz * ny * nx))
        write_cfl(self._folder / "wave", unitary, (PHASE2, PHASE1, READ))
        write_cfl(self._folder / "csm", _numpy(csm), (READ, COIL, PHASE2, PHASE1))

    def __call__(
        self,
        regularisation: Regularisation | None,
        weight: float,
        iterations: int,
        block: int = 8,
        rho: float | None = None,
        inner_iterations: int | None = None,
        step: float | None = None,
    ) -> tuple[Tensor, float]:
        """Reconstruct; as ``Pics``, but least squares runs by ADMM, BART's own rho is 1 and its own step
        is 0.5 / largest eigenvalue, found by power iteration."""
        command = ["bart", "wshfl", "-i", str(iterations), "-t", "0"]
        if regularisation is None:
            command += ["-R", f"Q:{weight:.9g}", "-R", "Q:1e-12"]
        else:
            options, admm = _penalty(regularisation, weight / self._norm, block)
            command += [*options, "-R", "Q:1e-12"] if admm else options
        command += ["-s", repr(rho)] if rho is not None else []
        command += ["-j", str(inner_iterations)] if inner_iterations is not None else []
        # wshfl halves the step that belongs to the eigenvalue it is given.
        command += ["-e", repr(0.5 / step)] if step is not None else []
        seconds = self._run([*command, "csm", "wave", "phi", "reorder", "table", "result"], self._threads)
        return self._result(), seconds


def bart_pics(
    kspace: KSpace,
    csm: Tensor,
    phi: Tensor,
    regularisation: Regularisation | None,
    weight: float,
    iterations: int,
    block: int = 8,
    threads: int = 2,
) -> tuple[Tensor, float]:
    """One reconstruction by ``pics`` from lines to U (x, k, z, y) and seconds; use ``Pics`` for many."""
    with Pics(kspace, csm, phi) as problem:
        return problem(regularisation, weight, iterations, block, threads=threads)


def _chunks(place: NDArray[np.int64], chunks: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Lines in an order that keeps those of one place together, cut nowhere by equal chunks.

    Args:
        place: (n,) k-space point of each line.
        chunks: number of chunks.

    Returns:
        Order of the lines (m,), some repeated to fill chunks up, and which of them are such repeats.
    """
    groups = np.split(np.argsort(place, kind="stable"), np.cumsum(np.bincount(place))[:-1])
    bins: list[list[int]] = [[] for _ in range(chunks)]
    for group in groups:
        min(bins, key=len).extend(group.tolist())
    length = max(map(len, bins))
    order = [line for chunk in bins for line in chunk + chunk[-1:] * (length - len(chunk))]
    padding = [at >= len(chunk) for chunk in bins for at in range(length)]
    return np.array(order), np.array(padding)


def _create_cfl(path: Path, shape: tuple[int, ...], where: tuple[int, ...]) -> NDArray[np.complex64]:
    """An empty file of an array whose axes go to the dimensions ``where``, descending, mapped for writing."""
    dims = [1] * DIMENSIONS
    for length, dimension in zip(shape, where, strict=True):
        dims[dimension] = length
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, dims)) + "\n")
    return np.memmap(path.with_suffix(".cfl"), dtype=np.complex64, mode="w+", shape=shape)


def _numpy(tensor: Tensor) -> NDArray[np.complex64]:
    return tensor.to(torch.complex64).resolve_conj().numpy()
