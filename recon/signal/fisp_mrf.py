"""Fingerprinting with unbalanced gradients (FISP-MRF; Jiang 2015; METHODS 2.3): inversion, TI, then a train
of pulses of varying flip angle and repetition time, simulated as an extended phase graph.

A voxel holds every phase of the gradient's dephasing equally. Samples are taken at TE, before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quantitron.recon.data import Protocol
from quantitron.recon.signal.extended_phase_graph import (
    PulseTrain,
    differentiable_signal,
    states_needed,
)
from quantitron.recon.signal.phase_graph_in_place import signal_in_place

PARAMETERS = ("t1", "t2")
"""Tissue parameters that the signal depends on."""


def pulse_train(protocol: Protocol) -> PulseTrain:
    """The pulses of a fingerprint.

    Raises:
        ValueError: if the lists of the protocol do not fit together, or a time is not positive.
    """
    pulses = len(protocol.flip_angle)
    repetition_time, phase = protocol.repetition_time, protocol.rf_phase
    if not pulses:
        raise ValueError("the fingerprint has no flip angle")
    if len(repetition_time) == 1:
        repetition_time = repetition_time * pulses
    if len(repetition_time) != pulses:
        raise ValueError(
            f"the fingerprint has {pulses} flip angles but {len(repetition_time)} repetition times"
        )
    if len(phase) not in (0, pulses):
        raise ValueError(f"the fingerprint has {pulses} flip angles but {len(phase)} RF phases")
    if len(protocol.echo_time) != 1:
        raise ValueError(f"a fingerprint has one echo time, not {len(protocol.echo_time)}")
    if len(protocol.inversion_time) > 1:
        raise ValueError(f"a fingerprint has one inversion time, not {len(protocol.inversion_time)}")
    for time in repetition_time:
        if not 0 < time < math.inf:
            raise ValueError(f"a repetition time of the fingerprint is {time:g} s")
    if not 0 <= protocol.echo_time[0] <= min(repetition_time):
        raise ValueError(
            f"the echo time of the fingerprint, {protocol.echo_time[0]:g} s, does not lie within its "
            f"shortest repetition time, {min(repetition_time):g} s"
        )
    if protocol.inversion_time and not 0 <= protocol.inversion_time[0] < math.inf:
        raise ValueError(f"the inversion time of the fingerprint is {protocol.inversion_time[0]:g} s")
    if not all(map(math.isfinite, (*protocol.flip_angle, *phase))):
        raise ValueError("a flip angle or RF phase of the fingerprint is not a number")
    steps = tuple(after - before for before, after in zip((0.0, *phase), phase, strict=False))
    return PulseTrain(
        protocol.flip_angle,
        repetition_time,
        protocol.echo_time[0],
        steps,
        protocol.inversion_time[0] if protocol.inversion_time else None,
    )


def contrast_signal(parameters: Mapping[str, Tensor], protocol: Protocol, b1: Tensor | None = None) -> Tensor:
    """Signal of each time point at TE, per unit A, in the phase of its pulse. It holds exp(-TE / T2).

    Args:
        parameters: ``t1``, ``t2`` [s], shape (...); optionally ``inversion`` (efficiency, 0..1), otherwise
            the protocol's, else 1.
        protocol: flip angles, TR, TE, TI and RF phases.
        b1: actual over nominal flip angle, shape (...); 1 where absent.

    Returns:
        shape (..., w); real if all RF phases are 0 or pi apart, else complex.

    Raises:
        ValueError: if the lists of the protocol do not fit together.
    """
    train = pulse_train(protocol)
    known = protocol.inversion_efficiency
    inversion = parameters.get("inversion")
    if inversion is None:
        inversion = parameters["t1"].new_tensor(1.0 if known is None else known)
    given = [parameters["t1"], parameters["t2"], inversion, *(() if b1 is None else (b1,))]
    t1, t2, inversion, *rest = torch.broadcast_tensors(*given)  # type: ignore[no-untyped-call]
    shape = t1.shape
    t1, t2, inversion = (values.reshape(-1) for values in (t1, t2, inversion))
    b1 = rest[0].reshape(-1) if rest else None
    if not _derivative_wanted(given):
        signal = signal_in_place(t1, t2, b1, inversion, train)
    else:
        states = states_needed(train, float(t2.detach().max())) if len(t2) else 1
        signal = differentiable_signal(t1, t2, b1, inversion, train, states)
    return signal.reshape(*shape, train.pulses)


def _derivative_wanted(tensors: list[Tensor]) -> bool:
    """Whether anybody will differentiate by one of the tensors, backwards or forwards."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(unpack(tensor).tangent is not None for tensor in tensors)  # type: ignore[no-untyped-call]
