"""Reduced (Gram) normal operator against the one over all frames: time ratio and relative difference.

    python benchmarks/gram.py [--repeats 3] [--json FILE]

Random sampling of T frames of a multi-echo scan with a known off-resonance, 8 coils, 96 x 12 k-space points,
8 readout positions (positions are independent; times scale with their number). Both operators act on the same
coefficient images in one run, the fast one and the slow one in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

from quantitron.recon.coefficient_basis import coefficient_basis
from quantitron.recon.data import KSpace, Protocol
from quantitron.recon.gram import reduce_kspace
from quantitron.recon.operators.coils import CoilOperator
from quantitron.recon.operators.fourier import FourierOperator
from quantitron.recon.operators.reduced_sense import ReducedSense
from quantitron.recon.operators.sampling import SamplingOperator
from quantitron.recon.operators.subspace import OffResonanceOperator, SubspaceOperator
from quantitron.recon.temporal_basis import dictionary_basis

NX, COILS, NZ, NY = 8, 8, 12, 96
T2IR = {"flip_angle": (math.radians(10),), "repetition_time": (0.03,)}
PROTOCOLS = {
    60: Protocol(
        "vfa_gre",
        tuple(0.00215 + 0.00305 * e for e in range(12)),
        (0.046,),
        tuple(math.radians(a) for a in (5, 10, 20, 30, 40)),
    ),
    640: Protocol(
        "t2ir_gre",
        (0.0045, 0.0112, 0.0179, 0.0246),
        preparation_time=(0.025, 0.05, 0.07, 0.09),
        excitations=40,
        **T2IR,
    ),
    1280: Protocol(
        "t2ir_gre",
        (0.0045, 0.0112, 0.0179, 0.0246),
        preparation_time=(0.025, 0.05, 0.07, 0.09),
        excitations=80,
        **T2IR,
    ),
}


def seconds(operator, image: torch.Tensor, repeats: int) -> tuple[float, torch.Tensor]:
    """Best time of a few applications, and what came out."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        result = operator(image)
        best = min(best, time.perf_counter() - start)
    return best, result


def measure(frames: int, repeats: int) -> dict[str, float]:
    """Both operators for one protocol."""
    protocol = PROTOCOLS[frames]
    generator = torch.Generator().manual_seed(0)
    basis = dictionary_basis(protocol, 0.9999)
    coefficients = coefficient_basis(basis, protocol, 3.0, 0.9999)
    phi = torch.einsum("wl,elk->wek", basis.contrast.to(torch.complex64), coefficients.mixing).flatten(0, 1)
    csm = torch.randn(NX, COILS, NZ, NY, dtype=torch.complex64, generator=generator) / COILS**0.5
    b0 = 30 * torch.randn(NX, NZ, NY, generator=generator)
    echo_time = torch.tensor(protocol.echo_time)
    sampled = torch.rand(frames, NZ, NY, generator=generator) < 1 / 20
    t, kz, ky = torch.nonzero(sampled, as_tuple=True)
    lines = torch.randn(len(t), COILS, NX, dtype=torch.complex64, generator=generator)
    kspace = KSpace(
        lines,
        t // protocol.echoes,
        t % protocol.echoes,
        torch.zeros_like(t),
        kz,
        ky,
        torch.ones(len(t)),
        float(lines.abs().square().sum()),
        protocol.contrast_shape,
        (1, NZ, NY, NX),
    )
    reduced = ReducedSense(
        reduce_kspace(kspace, basis), csm, coefficients.mixing, b0, echo_time, protocol.phase_sign
    )
    by_frames = (
        SamplingOperator(sampled.float())
        @ FourierOperator((-2, -1))
        @ CoilOperator(csm)
        @ OffResonanceOperator(b0, echo_time, protocol.contrasts)
        @ SubspaceOperator(phi)
    ).gram
    image = torch.randn(reduced.shape, dtype=torch.complex64, generator=generator)
    fast, fast_result = seconds(reduced, image, repeats)
    slow, slow_result = seconds(by_frames, image, repeats)
    difference = torch.linalg.vector_norm(fast_result - slow_result) / torch.linalg.vector_norm(slow_result)
    return {
        "frames": frames,
        "contrast_rank": basis.rank,
        "coefficients": coefficients.rank,
        "frame_by_frame_seconds": slow,
        "reduced_seconds": fast,
        "ratio": slow / fast,
        "relative_difference": float(difference),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [measure(frames, arguments.repeats) for frames in PROTOCOLS]
    print("    T   l   K  frame by frame    reduced   ratio  relative difference")
    for row in rows:
        print(
            f"{row['frames']:5d} {row['contrast_rank']:3d} {row['coefficients']:3d}"
            f" {row['frame_by_frame_seconds']:13.3f} s {row['reduced_seconds']:8.3f} s"
            f" {row['ratio']:7.1f} {row['relative_difference']:12.1e}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
