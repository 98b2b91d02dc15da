"""Fourier transform onto any trajectory (NUFFT), unitary by the voxel count, centred at voxel n // 2.

    s(k) = sum_r I(r) exp(-2 pi i k.r) / sqrt(z y x)

finufft does the work on the CPU and cufinufft on a GPU (Barnett, Magland, af Klinteberg 2019). They are
called directly: plans are kept, so that a trajectory is sorted once for all transforms on it.

In single precision finufft rounds positions k to 2e-8, an error of that times 2 pi n / 2 in the phase: 1e-5
at the edge of 192 voxels. Where less is allowed, single-precision data go through double precision on the
CPU, which takes no longer than a single-precision transform on a grid oversampled by 2. A GPU stays in single
precision: there that error is the least, whatever is asked for.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantitron.recon.operators.linear_operator import LinearOperator

ROUNDING = 1e-3
"""Excess over 0.5 cycles per voxel that is taken for rounding; the transform is periodic there anyway."""
MOST_AT_ONCE = 64
"""Images that one call transforms; bounds memory, changes no result."""
SINGLE_PRECISION = 5e-5
"""Least error that single precision meets for sure on grids of some hundred voxels an axis."""


class NonuniformFourier(LinearOperator):
    """Images (..., z, y, x) -> samples (..., n) along a trajectory; the adjoint is exact to ``tolerance``.

    A trajectory of two columns needs z = 1, or transforms each z-plane alike: (..., z, y, x) -> (..., z, n),
    with z counted in the unitary factor in neither case.
    """

    def __init__(
        self, trajectory: Tensor, grid: tuple[int, int, int], tolerance: float | None = None
    ) -> None:
        """Keep the trajectory; plans are made when they are first needed.

        Args:
            trajectory: (n, d) in cycles per voxel, columns x, y[, z], within +-0.5.
            grid: (z, y, x) of the images.
            tolerance: relative error; None: 1e-5 for complex64, 1e-12 for complex128. On the CPU transforms
                of complex64 take a third less time from 5e-5 on. On a GPU complex64 adds an error of some
                6e-8 a voxel of the longest axis, 1e-5 at 192, that no tolerance takes away.

        Raises:
            ValueError: if the trajectory has neither 2 nor 3 columns, no points, values that are not finite
                or values outside +-0.5.
        """
        if trajectory.ndim != 2 or trajectory.shape[1] not in (2, 3) or not len(trajectory):
            raise ValueError(f"the trajectory must be (points, 2 or 3), not {tuple(trajectory.shape)}")
        if not bool(torch.isfinite(trajectory).all()):
            raise ValueError("the trajectory holds values that are not finite")
        largest = float(trajectory.abs().max())
        if largest > 0.5 + ROUNDING:
            raise ValueError(f"the trajectory reaches {largest:g} cycles per voxel, beyond +-0.5")
        self._trajectory = trajectory
        self._grid = grid
        self._tolerance = tolerance
        dimensions = trajectory.shape[1]
        self._modes = grid[3 - dimensions :]  # ([z, ]y, x)
        self._scale = 1 / math.sqrt(math.prod(self._modes))
        self._plans: dict[tuple[int, int, str], Any] = {}

    @property
    def trajectory(self) -> Tensor:
        """(n, d) in cycles per voxel."""
        return self._trajectory

    @property
    def grid(self) -> tuple[int, int, int]:
        """(z, y, x) of the images."""
        return self._grid

    def forward(self, x: Tensor) -> Tensor:
        """Images (..., z, y, x) -> samples (..., n), or (..., z, n) for several z-planes in 2D."""
        return _Transform.apply(x, self, 2)  # type: ignore[no-any-return, no-untyped-call]

    def adjoint(self, y: Tensor) -> Tensor:
        """Samples (..., n), or (..., z, n) for several z-planes in 2D -> images (..., z, y, x)."""
        return _Transform.apply(y, self, 1)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def _planes(self) -> tuple[int, ...]:
        """Axis (z,) that a 2D trajectory leaves alone, where there is one."""
        return self._grid[:1] if len(self._modes) == 2 and self._grid[0] > 1 else ()

    def transform(self, values: Tensor, kind: int) -> Tensor:
        """Type 1 (adjoint) or 2 (forward), no gradients."""
        points = len(self._trajectory)
        if kind == 2:
            expected: tuple[int, ...] = self._grid
            length = math.prod(self._modes)
            lead = values.shape[:-3] + self._planes
        else:
            expected, length = (*self._planes, points), points
            lead = values.shape[:-1]
        if tuple(values.shape[values.ndim - len(expected) :]) != expected:
            raise ValueError(f"the transform expects (..., {expected}), not {tuple(values.shape)}")
        if not values.is_complex():
            values = values.to(torch.complex128 if values.dtype == torch.float64 else torch.complex64)
        flat = values.reshape(-1, length).contiguous()
        shape = (points,) if kind == 2 else self._modes
        result = flat.new_empty(len(flat), *shape)
        for start in range(0, len(flat), MOST_AT_ONCE):
            part = flat[start : start + MOST_AT_ONCE]
            data = part.reshape(len(part), *self._modes) if kind == 2 else part
            self._execute(kind, data, result[start : start + MOST_AT_ONCE])
        result *= self._scale
        return (
            result.reshape(*lead, points)
            if kind == 2
            else result.reshape(*(lead[:-1] if self._planes else lead), *self._grid)
        )

    def _execute(self, kind: int, data: Tensor, out: Tensor) -> None:
        """Transform (b, ...) into ``out``, by the library of the device."""
        double = data.dtype == torch.complex128
        tolerance = self._tolerance or (1e-12 if double else 1e-5)
        if not double and not data.is_cuda and tolerance < SINGLE_PRECISION:
            data, target = data.to(torch.complex128), out.new_empty(out.shape, dtype=torch.complex128)
        else:
            target = out
        if data.is_cuda:
            # The library wants no axis for one transform.
            source, place = (data[0], target[0]) if len(data) == 1 else (data, target)
            self._cuda_plan(kind, len(data), data.dtype, tolerance, data.device).execute(source, place)
        else:
            self._on_threads(kind, data.numpy(), target.numpy(), tolerance)
        if target is not out:
            out.copy_(target)

    def _on_threads(
        self, kind: int, data: NDArray[np.complexfloating], out: NDArray[np.complexfloating], tolerance: float
    ) -> None:
        """Each thread makes whole transforms by itself, one at a time.

        Threads that share one transform add up its samples in the order in which they happen to finish: the
        same scan would not give the same maps to the last bit.
        """
        threads = max(1, min(torch.get_num_threads(), len(data)))

        def work(number: int) -> None:
            plan = self._plan(kind, number, data.dtype, tolerance)
            for row in range(number, len(data), threads):
                plan.execute(data[row], out[row])

        if threads == 1:
            work(0)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))

    def _angles(self) -> Tensor:
        """(d, n) positions in radians; both libraries name the first axis of an image x, here ([z, ]y, x)."""
        return (2 * math.pi * self._trajectory.double()).flip(1).T

    def _plan(self, kind: int, number: int, dtype: np.dtype[Any], tolerance: float) -> Any:
        """The plan of one thread; only that thread may ask for it at a time."""
        key = (kind, number, str(dtype))
        if key not in self._plans:
            from finufft import Plan

            double = dtype == np.complex128
            # The smaller oversampling of the grid is the quicker one in single precision.
            plan = Plan(
                kind,
                self._modes,
                1,
                tolerance / 2,
                1 if kind == 1 else -1,
                str(dtype),
                nthreads=1,
                upsampfac=0 if double else 1.25,
            )
            kept = np.float64 if double else np.float32
            plan.setpts(*(np.ascontiguousarray(column.cpu().numpy(), kept) for column in self._angles()))
            self._plans[key] = plan
        return self._plans[key]

    def _cuda_plan(
        self, kind: int, transforms: int, dtype: torch.dtype, tolerance: float, device: torch.device
    ) -> Any:
        double = dtype == torch.complex128
        name = "complex128" if double else "complex64"
        key = (kind, transforms, name)
        if key not in self._plans:
            try:
                from cufinufft import Plan
            except ImportError as error:
                raise ValueError(
                    "scans on a trajectory need the package cufinufft on a GPU, or the device cpu"
                ) from error

            sign = 1 if kind == 1 else -1
            plan = Plan(kind, self._modes, transforms, tolerance, sign, name, gpu_device_id=device.index or 0)
            real = torch.float64 if double else torch.float32
            plan.setpts(*(column.to(device, real).contiguous() for column in self._angles()))
            self._plans[key] = plan
        return self._plans[key]


class _Transform(torch.autograd.Function):
    """Forward and adjoint with their gradients: each is the other's."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, operator: NonuniformFourier, kind: int) -> Tensor:
        ctx.operator, ctx.kind = operator, kind
        return operator.transform(values.detach(), kind)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.operator.transform(slope, 3 - ctx.kind), None, None
