"""From the fine object to the k-space of the scan: separable discrete Fourier sums, no interpolation.

    s(k) = sum_r I(r) exp(-2 pi i k.r)

is summed over the fine voxels at their own places, for the k of the scan only. So truncation (Gibbs ringing),
partial volume and dephasing within a voxel are those of a real scan. Scaled so that a unitary inverse
transform on the scan grid returns the mean of the fine voxels of each scan voxel (blurred by the truncation).

Most published simulations average instead: every fine voxel counts at the centre of its scan voxel, so that
the image of a full scan is exactly that mean, with partial volume and without ringing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from quantitron.phantoms.scene import Scene, voxel_batches
from quantitron.recon.data import Protocol

PointSpread: TypeAlias = Literal["truncation", "average"]
"""How a point of the object shows: through the cut k-space, or as a share of its scan voxel's mean."""
POINT_SPREADS: tuple[PointSpread, ...] = get_args(PointSpread)


def fourier_matrix(
    points: int,
    matrix: int,
    supersampling: int,
    first: int,
    last: int,
    point_spread: PointSpread = "truncation",
) -> Tensor:
    """Fourier sum along one axis: (points, last - first) complex64.

    Args:
        points: samples of k-space; k = j - points // 2 in units of 1 / (points Delta).
        matrix: scan voxels of width Delta; ``points`` is a multiple of it where the axis is oversampled.
        supersampling: fine voxels in a scan voxel.
        first: first fine voxel and
        last: one past the last one that is summed over; all others are air.
        point_spread: ``truncation`` puts each fine voxel at its own place, ``average`` at the centre of its
            scan voxel.
    """
    q = supersampling
    fine = np.arange(first, last)
    if point_spread == "average":
        place = (fine // q - matrix // 2).astype(np.float64)  # in scan voxels
    else:
        place = (fine - q * (matrix // 2) - (q - 1) / 2) / q
    k = (np.arange(points) - points // 2) / points  # cycles per scan voxel
    kernel = np.exp(-2j * np.pi * k[:, None] * place[None, :]) / (q * np.sqrt(points))
    return torch.from_numpy(kernel.astype(np.complex64))


@dataclass(frozen=True)
class EncodedScene:
    """k-space of some contrasts, factored: line = readout @ (basis[w] . parts[e, kz, ky])."""

    basis: Tensor
    """(w, l) real: contrasts in terms of parts."""
    parts: Tensor
    """(e, kz, ky, l, c, x) complex64: k-space along z and y, fine voxels along x."""
    readout: Tensor
    """(kx, x) complex64 Fourier sum along the readout, oversampled."""

    def lines(self, contrast: Tensor, echo: Tensor, kz: Tensor, ky: Tensor) -> Tensor:
        """Samples (n, c, kx) of the given lines, each index (n,).

        ``contrast`` and ``echo`` count the contrasts and echoes that were encoded, from 0.
        """
        chosen = self.parts[echo, kz, ky]  # (n, l, c, x)
        weights = self.basis[contrast].to(chosen.dtype)  # (n, l)
        mixed = torch.einsum("nl,nlcx->ncx", weights, chosen)
        return mixed @ self.readout.T


def contrast_parts(
    scene: Scene, protocol: Protocol, contrasts: list[int], tolerance: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Factor the contrasts of the object: contrast(v, w) = sum_l parts[l, v] basis[w, l].

    The basis is that of the object itself, cut where what remains is below ``tolerance`` of the signal in
    the root mean square: a saving in time that single precision does not see.

    Returns:
        basis (w, l) float32 with orthonormal columns and parts (l, v) float32.
    """
    voxels = len(scene.index)
    gram = torch.zeros(len(contrasts), len(contrasts), dtype=torch.float64)
    for part in voxel_batches(voxels):
        signal = scene.contrast(protocol, part)[:, contrasts].double()
        gram += signal.T @ signal
    energy, vectors = torch.linalg.eigh(gram)
    energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
    beyond = energy.sum() - energy.cumsum(0)
    rank = int((beyond > tolerance**2 * energy.sum()).sum()) + 1
    basis = vectors[:, : min(rank, len(contrasts))].float()
    parts = torch.empty(basis.shape[1], voxels)
    for part in voxel_batches(voxels):
        parts[:, part] = (scene.contrast(protocol, part)[:, contrasts] @ basis).T
    return basis, parts


def encode(
    scene: Scene,
    protocol: Protocol,
    contrasts: list[int],
    echoes: list[int],
    readout_points: int,
    point_spread: PointSpread = "truncation",
) -> EncodedScene:
    """k-space of some contrasts and echoes in all coils.

    Args:
        scene: the object.
        protocol: the sequence.
        contrasts: w of the contrasts that are measured together.
        echoes: e of the echoes.
        readout_points: samples of a line, oversampling included.
        point_spread: see ``fourier_matrix``.

    Returns:
        The factored k-space; its memory is (e, kz, ky, l, c, x) complex64.
    """
    basis, parts = contrast_parts(scene, protocol, contrasts)
    nz, ny, nx = scene.matrix
    qz, qy, qx = scene.supersampling
    # Sums run over the box that holds all signal.
    places = np.unravel_index(scene.index, scene.fine_matrix)
    low = [int(place.min()) for place in places]
    high = [int(place.max()) + 1 for place in places]
    along_z = fourier_matrix(nz, nz, qz, low[0], high[0], point_spread)
    along_y = fourier_matrix(ny, ny, qy, low[1], high[1], point_spread)
    box = tuple(b - a for a, b in zip(low, high, strict=True))
    flat = torch.from_numpy(np.ravel_multi_index(tuple(p - a for p, a in zip(places, low, strict=True)), box))
    coils, rank = len(scene.coils), len(parts)
    result = torch.empty(len(echoes), nz, ny, rank, coils, box[2], dtype=torch.complex64)
    image = torch.zeros(rank, int(np.prod(box)), dtype=torch.complex64)  # (l, z y x), air stays zero
    for number, echo in enumerate(echoes):
        weighted = scene.echo(protocol, echo)
        for coil in range(coils):
            image[:, flat] = parts * (weighted * scene.coils[coil])
            planes = along_z @ image.view(rank, box[0], box[1] * box[2])  # (l, kz, y x)
            rows = along_y @ planes.view(rank, nz, box[1], box[2])  # (l, kz, ky, x)
            result[number, :, :, :, coil] = rows.permute(1, 2, 0, 3)
    along_x = fourier_matrix(readout_points, nx, qx, low[2], high[2], point_spread)
    return EncodedScene(basis, result, along_x)
