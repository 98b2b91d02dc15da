"""The k-space centre of a scan on any trajectory, coil by coil: what coil maps and the energy map come from.

    minimise over U_c on a coarse grid:   sum_t ||s_(t,c) - F_t Psi_t U_c||^2 + noise ||U_c||_P^2

over the samples near the centre, P the mean squares expected of the components. No coil mixes with another,
and the coarse grid takes in only what these samples tell.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantitron.recon.algorithms.conjugate_gradient import conjugate_gradient
from quantitron.recon.coefficient_basis import CoefficientBasis
from quantitron.recon.coils import maps_of_block
from quantitron.recon.data import Basis, TrajectoryKSpace
from quantitron.recon.operators.fourier import centred_fft
from quantitron.recon.operators.nonuniform_fourier import SINGLE_PRECISION, NonuniformFourier
from quantitron.recon.operators.toeplitz import ToeplitzSense
from quantitron.recon.trajectory_gram import sum_readouts
from quantitron.recon.trajectory_sums import TrajectorySums

COARSE = 32
"""Voxels of the coarse grid along an axis, at most."""
KEPT = {2: 24, 3: 18}
"""Points of its k-space that are kept along an axis, for trajectories of so many dimensions: beyond a disc,
or a ball, there are no samples, and of the corners of a larger block they tell nothing."""
LEAST_ITERATIONS, ITERATIONS = 12, 100
"""Conjugate gradient steps. They end when the residual of the equations is what noise puts into their right
side. The least of them settle a disc; the edge of a ball, at whose centre the samples lie far denser, takes
more, until they take in noise (100: maps of a slab 3.9 % off in place of 3.0 %)."""
LEAST_TOLERANCE = 1e-4
"""Relative residual below which no more is asked of single precision."""
LEAST_ENERGY = 0.1
"""Of a component, over that of the strongest one, below which coil maps do without it: noise would count."""


def centre_block(sums: TrajectorySums, basis: CoefficientBasis, noise: float) -> Tensor:
    """Coefficient k-space about the centre, coil by coil.

    Args:
        sums: of one slice.
        basis: with mixing (1, l, k); those of its components that hold 1 % of the strongest one's energy are
            made, the others would be mostly noise.
        noise: variance of one sample.

    Returns:
        (k, c, z, y, x) complex64, centred, unitary on the scan's own grid; ``KEPT`` points along an axis of
        ``COARSE`` or more, all along shorter ones.

    Raises:
        ValueError: if no sample lies near the k-space centre.
    """
    significant = max(1, int((basis.variance > 0.01 * basis.variance[0]).sum()))
    mixing = basis.mixing[0, :, :significant]  # (l, k)
    grid = sums.grid
    coarse = (min(grid[0], COARSE), min(grid[1], COARSE), min(grid[2], COARSE))
    scale = torch.tensor([n / m for n, m in zip(grid, coarse, strict=True)][::-1])  # x, y, z
    places = sums.trajectory * scale[: sums.trajectory.shape[1]]  # cycles per coarse voxel
    near = (places.square().sum(1).sqrt() <= 0.5).nonzero()[:, 0]
    if not len(near):
        raise ValueError("no sample lies near the k-space centre: no coil maps can be estimated")
    centre = replace(sums, trajectory=places[near], readout=sums.readout[near], grid=coarse)
    nz, ny, nx = coarse
    one_coil = torch.ones(nx, 1, nz, ny, dtype=mixing.dtype)
    # A convolution: its steps do not depend on the number of samples, of which 3D scans have millions here.
    operator = ToeplitzSense(centre, one_coil, mixing)
    fourier = NonuniformFourier(centre.trajectory, coarse, SINGLE_PRECISION)
    gram = mixing.mH @ sums.gram.to(mixing) @ mixing  # (g, k, k)
    # Mean square signal of a sample, less noise, tells what to expect of the components.
    trace = gram.diagonal(dim1=1, dim2=2).real.sum(1).clamp_min(1e-12)[centre.readout]  # (n,)
    channels = sums.projected.channels
    right = mixing.new_empty(channels, nx, significant, nz, ny)
    power = 0.0
    for channel in range(channels):
        samples = sums.projected.mixed(mixing, slice(channel, channel + 1), near)[:, 0]  # (k, n)
        power += float((samples.abs().square().sum(0) / trace).mean()) / channels
        right[channel] = fourier.adjoint(samples).permute(3, 0, 1, 2)
    time_points = sums.basis.contrast.shape[0]
    shares = basis.variance[:significant]
    expected = time_points * max(power / max(float(sums.count.float().mean()), 1.0), noise) * shares
    penalty = (noise / expected).to(right)[:, None, None]

    def normal(images: Tensor) -> Tensor:
        return torch.stack([operator(image) for image in images]) + penalty * images

    norm = float(right.norm())
    noise_norm = float(noise * right[:, :, 0].numel() * operator.mean_diagonal().sum()) ** 0.5
    images = conjugate_gradient(
        normal,
        right,
        iterations=ITERATIONS,
        tolerance=max(LEAST_TOLERANCE, noise_norm / norm) if norm > 0 else LEAST_TOLERANCE,
        least=LEAST_ITERATIONS,
    ).permute(0, 2, 3, 4, 1)  # (c, k, z, y, x)
    block = centred_fft(images, (2, 3, 4)).transpose(0, 1)
    for axis, length in enumerate(coarse):
        kept = min(length, KEPT[sums.trajectory.shape[1]]) if length == COARSE else length
        block = block.narrow(2 + axis, length // 2 - kept // 2, kept)
    return block.contiguous()


def trajectory_coil_maps(
    sums: TrajectorySums,
    basis: CoefficientBasis,
    noise: float,
    calibration: TrajectoryKSpace | None,
    block: Tensor | None = None,
) -> Tensor:
    """Coil maps of a slice, from its calibration readouts or else from its own k-space centre.

    Args:
        sums: of the slice.
        basis: with mixing (1, l, k).
        noise: variance of one sample.
        calibration: calibration readouts, or None.
        block: ``centre_block`` of the slice, where it is at hand.

    Returns:
        csm (x, c, z, y) complex64 of unit root-sum-of-squares; ones for a single coil.

    Raises:
        ValueError: if no sample lies near the k-space centre.
    """
    nz, ny, nx = sums.grid
    if sums.projected.channels == 1:
        return torch.ones(nx, 1, nz, ny, dtype=torch.complex64)
    if calibration is not None and calibration.samples.numel():
        if bool((calibration.time_point == calibration.time_point[0]).all()):
            # Readouts outside the fingerprint show one contrast.
            one = torch.ones(1)
            constant = Basis(torch.ones(calibration.time_points, 1), one, 1.0, "calibration")
            basis = CoefficientBasis(torch.ones(1, 1, 1, dtype=torch.complex64), one, 1.0)
            sums = sum_readouts(calibration, constant)
        else:
            sums = sum_readouts(calibration, sums.basis)
        block = None
    if block is None:
        block = centre_block(sums, basis, noise)
    strong = basis.variance[: len(block)] > LEAST_ENERGY * basis.variance[0]
    return maps_of_block(block[strong], (nz, ny, nx))
