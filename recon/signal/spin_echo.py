"""Weighted images of a spin echo, synthesised from T1, T2 and PD.

    |PD| (1 - exp(-TR / T1)) exp(-TE / T2)

eq. (5) of MRI2Qmap. Short TR and TE weigh by T1, long ones by T2, long TR and short TE by PD alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpinEchoProtocol:
    """The images to be synthesised, one entry of every field for each of them."""

    modalities: tuple[str, ...] = ("T1w", "T2w", "PDw")
    """Name of each."""
    repetition_time: tuple[float, ...] = (0.5, 5.0, 5.0)
    """TR [s]."""
    echo_time: tuple[float, ...] = (0.01, 0.1, 0.01)
    """TE [s]."""

    def __post_init__(self) -> None:
        """Refuse what no scanner could play.

        Raises:
            ValueError: if there is no image, the fields differ in length, a name stands there twice, or an
                echo does not lie between its excitation and the next.
        """
        names = ", ".join(self.modalities)
        if not self.modalities:
            raise ValueError("a spin-echo protocol needs at least one modality")
        if not len(self.modalities) == len(self.repetition_time) == len(self.echo_time):
            raise ValueError(
                f"{len(self.modalities)} modalities ({names}) need as many repetition and echo times, "
                f"not {len(self.repetition_time)} and {len(self.echo_time)}"
            )
        if len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"a modality is named twice in {names}")
        for name, tr, te in zip(self.modalities, self.repetition_time, self.echo_time, strict=True):
            if not 0 <= te < tr < math.inf:
                raise ValueError(
                    f"{name}: a spin echo {te:g} s after the excitation does not fit a TR of {tr:g} s"
                )

    def only(self, modalities: tuple[str, ...]) -> SpinEchoProtocol:
        """Some of the images.

        Raises:
            ValueError: if there is none of such a name.
        """
        for name in modalities:
            if name not in self.modalities:
                raise ValueError(f"there is no modality '{name}'; there are {', '.join(self.modalities)}")
        places = [self.modalities.index(name) for name in modalities]
        return SpinEchoProtocol(
            modalities,
            tuple(self.repetition_time[place] for place in places),
            tuple(self.echo_time[place] for place in places),
        )


def spin_echo_signal(t1: Tensor, t2: Tensor, protocol: SpinEchoProtocol) -> Tensor:
    """Signals of unit proton density.

    Args:
        t1: (...) [s].
        t2: (...) [s], broadcast against ``t1``.
        protocol: TR and TE of each modality.

    Returns:
        (..., m), 0 where T1 or T2 is not above zero.
    """
    repetition_time = torch.tensor(protocol.repetition_time, dtype=t1.dtype, device=t1.device)
    echo_time = torch.tensor(protocol.echo_time, dtype=t1.dtype, device=t1.device)
    # expm1 keeps the digits that are lost in 1 - exp where TR << T1.
    recovery = -torch.expm1(-repetition_time / t1[..., None])
    signal = recovery * torch.exp(-echo_time / t2[..., None])
    return torch.where(((t1 > 0) & (t2 > 0))[..., None], signal, 0.0)


def spin_echo_images(t1: Tensor, t2: Tensor, pd: Tensor, protocol: SpinEchoProtocol) -> Tensor:
    """Weighted images of maps.

    Args:
        t1: (z, y, x) [s].
        t2: (z, y, x) [s].
        pd: (z, y, x) real or complex; its phase does not matter.
        protocol: the images wanted.

    Returns:
        (m, z, y, x) real; 0 where a time is 0 or NaN, which stand for no estimate, or PD is 0.
    """
    images = pd.abs()[..., None] * spin_echo_signal(t1, t2, protocol)
    return torch.where(((t1 > 0) & (t2 > 0))[..., None], images, 0.0).movedim(-1, 0).contiguous()


def spin_echo_dictionary(t1: Tensor, t2: Tensor, protocol: SpinEchoProtocol) -> Tensor:
    """Signals of unit proton density over a grid.

    Args:
        t1: (i,) [s].
        t2: (j,) [s].
        protocol: TR and TE of each modality.

    Returns:
        (i, j, m).
    """
    return spin_echo_signal(t1[:, None].expand(-1, len(t2)), t2.expand(len(t1), -1), protocol)
