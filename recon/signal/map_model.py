"""Parameter maps as unknowns: their coefficients in the basis, derivatives, and what the basis does not hold.

    I_(w,e) = A f_w(T1, T2, inversion) g_e(T2*, b0),      g_e = exp(-TE_e / T2*) exp(j 2 pi b0 TE_e)
    U_k     = (Phi^H I)_k = A sum_(e,l) conj(mixing[e,l,k]) g_e p_l,      p = Psi^H f

The unknowns of a voxel are log |A|, the phase of A [rad], the logarithms of the sequence's times and of T2*,
and what is left of the off-resonance b0 [Hz] once the field map is taken out of the basis: times stay
positive, and a step of 0.1 is a tenth for each of them. A scan with one echo has neither T2* nor b0: they are
part of A.

The frames are never formed: signals are products over contrasts (``projected.py``) and echoes. Arrays lie in
memory with the voxels last, whatever the order of their shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantitron.recon.data import Protocol
from quantitron.recon.signal.dictionary import PARAMETER_RANGE
from quantitron.recon.signal.models import CONTRAST_PARAMETERS, CONTRAST_SIGNALS
from quantitron.recon.signal.projected import projected_signal
from quantitron.recon.signal.spoiled_gre import echo_signal

TIMES = ("t1", "t2", "t2star")
"""Unknowns whose logarithm is taken, besides the amplitude."""


@dataclass(frozen=True)
class MapModel:
    """From the unknowns theta (v, p) of voxels to their coefficients U (v, k)."""

    protocol: Protocol
    basis: Tensor
    """Psi (w, l), the contrast basis, orthonormal columns."""
    mixing: Tensor
    """(e, l, k): coefficients of echo e in the contrast basis are ``mixing[e] @ U``."""
    inversion: Tensor | None = None
    """(v,) inversion efficiency of each voxel; where absent, the protocol's for all, else 1."""
    chunk: int = 16384
    """Voxels worked on together; bounds memory, changes no result."""

    @property
    def times(self) -> tuple[str, ...]:
        """Names of the relaxation times among the unknowns, in their order."""
        contrast = tuple(name for name in CONTRAST_PARAMETERS[self.protocol.sequence] if name in TIMES)
        return (*contrast, "t2star") if self.protocol.echoes > 1 else contrast

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the unknowns: ``amplitude`` (log), ``phase`` [rad], times (log s), ``b0`` [Hz]."""
        return ("amplitude", "phase", *self.times, *(("b0",) if self.protocol.echoes > 1 else ()))

    def of(self, voxels: Tensor | slice) -> MapModel:
        """The model of some of the voxels, by their numbers, by a mask (v,) or by a slice."""
        return self if self.inversion is None else replace(self, inversion=self.inversion[voxels])

    def limits(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest value of each unknown, (p,) both: times are those of ``PARAMETER_RANGE``."""
        rows = [
            [math.log(bound) for bound in PARAMETER_RANGE[name]] if name in TIMES else [-math.inf, math.inf]
            for name in self.names
        ]
        low, high = like.new_tensor(rows).T
        return low, high

    def units(self, like: Tensor) -> Tensor:
        """(p,): change of each unknown that changes the signal of some echo by its own size."""
        turn = 2 * math.pi * max(self.protocol.echo_time)
        return like.new_tensor([1 / turn if name == "b0" else 1.0 for name in self.names])

    def unknowns(self, parameters: Mapping[str, Tensor], pd: Tensor) -> Tensor:
        """theta (v, p) of times [s], ``b0`` [Hz] and the complex amplitude ``pd``, (v,) each."""
        columns = [parameters[name].log() if name in TIMES else parameters[name] for name in self.names[2:]]
        return torch.stack([pd.abs().log(), pd.angle(), *columns], 1)

    def coefficients(self, theta: Tensor) -> Tensor:
        """U (v, k) complex of theta (v, p); differentiable once by theta, on any device."""
        result: Tensor = _Coefficients.apply(theta, self)  # type: ignore[no-untyped-call]
        return result

    def frames(self, theta: Tensor) -> Tensor:
        """The signals themselves, in no basis: (v, w, e) complex, the field map's part left out.

        Differentiable by theta. For the data term by frames; all frames of all voxels are held at once.
        """
        values = self._values(theta)
        signal = CONTRAST_SIGNALS[self.protocol.sequence]
        contrast = signal(self._contrast_parameters(values), self.protocol, None)  # (v, w)
        echo = torch.polar(values["amplitude"], values["phase"])[:, None] * self._echo(values).T  # (v, e)
        return contrast[:, :, None] * echo[:, None]

    def jacobian(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """U (v, k) and its derivatives J (v, p, k) by each unknown; no gradient goes through them."""
        with torch.no_grad():
            u, slopes = self._evaluate(theta.detach(), True)
        return u.T, slopes.permute(2, 0, 1)

    def out_of_subspace(self, theta: Tensor) -> float:
        """Share of the signal energy, sum over voxels of ||I||^2, which the basis does not hold.

        ``(||I||^2 - ||Phi^H I||^2) / ||I||^2``; 0 where there is no signal at all. The sum over the frames of
        a product is the product of two sums: frames are never formed, contrasts in chunks of voxels.
        """
        signal = CONTRAST_SIGNALS[self.protocol.sequence]
        total = inside = 0.0
        with torch.no_grad():
            for part in self._parts(len(theta)):
                model, rows = self.of(part), theta[part].detach().double()
                values = model._values(rows)
                contrast = signal(model._contrast_parameters(values), self.protocol, None)  # (v, w)
                echo = model._echo(values)  # (e, v)
                power = contrast.square().sum(1) * echo.abs().square().sum(0)
                total += float((values["amplitude"].square() * power).sum())
                u, _ = model._evaluate(rows, False)
                inside += float(u.abs().square().sum())
        return (total - inside) / total if total > 0 else 0.0

    def _parts(self, voxels: int) -> list[slice]:
        return [slice(start, start + self.chunk) for start in range(0, voxels, self.chunk)]

    def _values(self, theta: Tensor) -> dict[str, Tensor]:
        """Name -> (v,), logarithms undone."""
        columns = zip(self.names, theta.T.contiguous(), strict=True)
        return {name: column if name in ("phase", "b0") else column.exp() for name, column in columns}

    def _contrast_parameters(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the contrast factor asks for; at least one entry of any name."""
        names = CONTRAST_PARAMETERS[self.protocol.sequence]
        found = {name: values[name] for name in names if name in values}
        if "inversion" in names:
            like = values["amplitude"]
            known = self.protocol.inversion_efficiency
            efficiency = like.new_tensor(1.0 if known is None else known).expand_as(like)
            found["inversion"] = efficiency if self.inversion is None else self.inversion.to(like)
        return found or {"amplitude": values["amplitude"]}

    def _echo(self, values: dict[str, Tensor]) -> Tensor:
        """g (e, v) complex."""
        time = values["amplitude"].new_tensor(self.protocol.echo_time)
        if self.protocol.echoes == 1:
            ones = torch.ones_like(values["amplitude"])[None]
            return torch.complex(ones, torch.zeros_like(ones))
        return echo_signal(values["t2star"], values["b0"], time, self.protocol.phase_sign).T.contiguous()

    def _evaluate(self, theta: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
        """U (k, v) of theta (v, p), and J (p, k, v) where asked for, else nothing (0, k, v)."""
        voxels, columns = len(theta), self.mixing.shape[2]
        u = torch.empty(columns, voxels, dtype=theta.dtype.to_complex(), device=theta.device)
        found = u.new_empty(len(self.names) if slopes else 0, columns, voxels)
        for part in self._parts(voxels):
            self.of(part)._evaluate_part(theta[part], u[:, part], found[:, :, part] if slopes else None)
        return u, found

    def _evaluate_part(self, theta: Tensor, u: Tensor, slopes: Tensor | None) -> None:
        values = self._values(theta)
        dtype = u.dtype if self.basis.is_complex() else theta.dtype
        basis = self.basis.to(theta.device, dtype)
        p, by_contrast = projected_signal(self._contrast_parameters(values), self.protocol, basis)  # (l, v)
        g = self._echo(values)
        # The echoes are summed first: what remains is over the few components of the contrast basis.
        conjugate = self.mixing.to(u).conj().permute(1, 2, 0)  # (l, k, e)
        amplitude = torch.polar(values["amplitude"], values["phase"])

        def over_echoes(echo: Tensor) -> Tensor:
            return conjugate @ (amplitude * echo)  # (l, k, v)

        def over_components(echoes: Tensor, contrast: Tensor, out: Tensor) -> None:
            torch.mul(echoes[0], contrast[0], out=out)
            for number in range(1, len(echoes)):
                out.addcmul_(echoes[number], contrast[number].to(out.dtype))

        echoes = over_echoes(g)
        over_components(echoes, p, u)
        if slopes is None:
            return
        for name, out in zip(self.names, slopes, strict=True):
            if name == "amplitude":
                out.copy_(u)
            elif name == "phase":
                torch.mul(u, 1j, out=out)
            elif name in by_contrast:
                over_components(echoes, by_contrast[name] * values[name], out)
            else:
                time = values["amplitude"].new_tensor(self.protocol.echo_time)[:, None]
                turn = 2j * math.pi * self.protocol.phase_sign
                by_echo = g * (time / values["t2star"]) if name == "t2star" else g * (turn * time)
                over_components(over_echoes(by_echo), p, out)


class _Coefficients(torch.autograd.Function):
    """U, with J kept for the way back where a gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, model: MapModel) -> Tensor:
        u, slopes = model._evaluate(theta, bool(ctx.needs_input_grad[0]))
        ctx.save_for_backward(slopes)
        return u.T

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return pull_back(slopes.permute(2, 0, 1), outer[0]), None


def push_forward(jacobian: Tensor, step: Tensor) -> Tensor:
    """J step: the change of the coefficients (v, k) with a change of the unknowns.

    Args:
        jacobian: J (v, p, k) complex.
        step: (v, p) real.
    """
    columns = step.T.to(jacobian.dtype)  # (p, v)
    slopes = jacobian.permute(1, 2, 0)  # (p, k, v), contiguous as it comes from a model
    total = slopes[0] * columns[0]
    for slope, column in zip(slopes[1:], columns[1:], strict=True):
        total.addcmul_(slope, column)
    return total.T


def pull_back(jacobian: Tensor, gradient: Tensor) -> Tensor:
    """Re(J^H gradient): the gradient (v, p) by the unknowns of what has this one by the coefficients.

    Args:
        jacobian: J (v, p, k) complex.
        gradient: (v, k) complex, slope by the real part plus j times slope by the imaginary part.
    """
    slopes, outer = jacobian.permute(1, 2, 0), gradient.T.resolve_conj()  # (p, k, v), (k, v)
    return torch.stack([_real_inner(slope, outer) for slope in slopes]).T


def normal_blocks(jacobian: Tensor, weight: Tensor) -> Tensor:
    """Re(J^H diag(weight) J), one block a voxel: (v, p, p).

    Args:
        jacobian: J (v, p, k) complex.
        weight: (k,) real.
    """
    slopes = jacobian.permute(1, 2, 0)  # (p, k, v)
    weighted = slopes * weight[:, None]
    count = len(slopes)
    blocks = slopes.real.new_empty(count, count, slopes.shape[2])
    for i in range(count):
        for j in range(i, count):
            blocks[i, j] = blocks[j, i] = _real_inner(slopes[i], weighted[j])
    return blocks.permute(2, 0, 1)


def _real_inner(left: Tensor, right: Tensor) -> Tensor:
    """Re sum_k conj(left) right of (k, v): (v,)."""
    products = torch.view_as_real(left) * torch.view_as_real(right)
    return products.sum((0, 2))
