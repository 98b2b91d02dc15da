"""SigPy on the same k-space, coil maps and basis as our solvers (https://sigpy.readthedocs.io).

SigPy's MRI apps (``SenseRecon``, ``TotalVariationRecon``, ``L1WaveletRecon``) reconstruct one frame. What
they are made of, ``LinearLeastSquares`` on a composition of its linear operators, expresses the subspace
problem, plain and with the total variation of ``TotalVariationRecon``: anisotropic (sum of absolute
differences), with periodic ends. SigPy has no proximal operator of a low-rank block: no LLR here.

The coefficients are Fourier transformed coil by coil before the basis mixes them into frames (K transforms a
coil instead of T), on data in hybrid space (two transformed axes instead of three): the same numbers, and the
quickest order that its operators allow. All frames are dense: memory and time grow with T.
"""

from __future__ import annotations

import math
import time
from typing import Literal

import numpy as np
import sigpy
import torch
from numpy.typing import NDArray
from sigpy.app import LinearLeastSquares
from torch import Tensor

from quantitron.recon.data import KSpace


class SigpyProblem:
    """A scan as SigPy's operators and dense samples, to be reconstructed many times."""

    def __init__(self, kspace: KSpace, csm: Tensor, phi: Tensor) -> None:
        """Fill the dense samples, t*c*x*z*y complex64, of which an app needs several times as much.

        Args:
            kspace: lines of one slice.
            csm: (x, c, z, y) coil sensitivity maps.
            phi: (t, k) complex basis over the frames t = w * echoes + e.

        Raises:
            ValueError: if the lines are of more than one slice.
        """
        slices, nz, ny, nx = kspace.grid
        if slices != 1:
            raise ValueError(f"the lines are of {slices} slices; one at a time")
        coils, frames, rank = kspace.samples.shape[1], math.prod(kspace.contrast_shape), phi.shape[1]
        frame = (kspace.contrast * kspace.contrast_shape[2] + kspace.echo).numpy()
        kz, ky = kspace.kz.numpy(), kspace.ky.numpy()
        root = np.sqrt(kspace.count.numpy())
        weights: NDArray[np.float32] = np.zeros((frames, 1, 1, nz, ny), np.float32)
        weights[frame, 0, 0, kz, ky] = root
        self._samples: NDArray[np.complex64] = np.zeros((frames, coils, nx, nz, ny), np.complex64)
        self._samples[frame, :, :, kz, ky] = kspace.samples.numpy() * root[:, None, None]
        maps = np.ascontiguousarray(csm.numpy().swapaxes(0, 1))  # (c, x, z, y)
        images = (rank, coils, nx, nz, ny)
        linop = sigpy.linop
        single = linop.Reshape((rank, 1, nx, nz, ny), (rank, nx, nz, ny))
        coil = linop.Multiply(single.oshape, maps)
        fourier = linop.FFT(images, axes=(-2, -1))
        flat = linop.Reshape((rank, math.prod(images[1:])), images)
        mix = linop.MatMul(flat.oshape, phi.to(torch.complex64).resolve_conj().numpy())
        dense = linop.Reshape((frames, *images[1:]), mix.oshape)
        self.operator = linop.Multiply(dense.oshape, weights) * dense * mix * flat * fourier * coil * single

    def __call__(
        self,
        regularisation: Literal["T"] | None,
        weight: float,
        iterations: int,
        solver: Literal["PrimalDualHybridGradient", "ADMM"] = "PrimalDualHybridGradient",
        **settings: float,
    ) -> tuple[Tensor, float]:
        """Reconstruct by ``LinearLeastSquares``: 1/2 ||s - A U||^2 + weight R(U).

        Args:
            regularisation: None is least squares with the penalty weight / 2 ||U||^2, by conjugate gradients.
            weight: factor of the penalty, whitened data.
            iterations: of the solver.
            solver: for T; SigPy's own choice, or ADMM.
            **settings: further ones of ``LinearLeastSquares``, as sigma, rho or max_cg_iter.

        Returns:
            U (x, k, z, y) and the seconds that the app took, with its search for a step.
        """
        start = time.perf_counter()
        if regularisation is None:
            app = LinearLeastSquares(
                self.operator, self._samples, lamda=weight, max_iter=iterations, show_pbar=False, **settings
            )
        else:
            difference = sigpy.linop.FiniteDifference(self.operator.ishape, axes=(-3, -2, -1))
            app = LinearLeastSquares(
                self.operator,
                self._samples,
                proxg=sigpy.prox.L1Reg(difference.oshape, weight),
                G=difference,
                solver=solver,
                max_iter=iterations,
                show_pbar=False,
                **settings,
            )
        image = app.run()  # (k, x, z, y)
        seconds = time.perf_counter() - start
        return torch.from_numpy(np.ascontiguousarray(image.swapaxes(0, 1))), seconds
