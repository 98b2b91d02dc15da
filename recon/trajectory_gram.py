"""Sums readouts of equal trajectory, so that everything after costs as much as the distinct ones (METHODS 1).

A scan of 1000 time points that repeats 48 spirals needs Fourier transforms of 48 spirals only, exactly: the
transform is linear, and the temporal basis does not vary in space.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from quantitron.recon.data import Basis, TrajectoryKSpace
from quantitron.recon.trajectory_sums import ProjectedSamples, TrajectorySums

__all__ = ["TrajectorySums", "readout_groups", "sum_readouts"]


def sum_readouts(kspace: TrajectoryKSpace, basis: Basis) -> TrajectorySums:
    """Sums over the readouts of each distinct trajectory, in the order in which those first occur.

    Those that occur once come after all others: their samples are kept as they are, in the scan's own memory
    where nothing was to be summed.

    Where the scan brought density weights, a group takes those of its first readout.

    Args:
        kspace: the readouts of one slice; all, some or none may repeat, of any lengths.
        basis: temporal basis over the time points (w, l).

    Raises:
        ValueError: if there are several slices or no readouts, or the basis is of another schedule.
    """
    if kspace.grid[0] != 1:
        raise ValueError(f"readouts are summed for one slice, not for {kspace.grid[0]}")
    if not len(kspace.readout_length):
        raise ValueError("the slice has no readouts")
    if basis.contrast.shape[0] != kspace.time_points:
        raise ValueError(
            f"the temporal basis has {basis.contrast.shape[0]} time points, the scan {kspace.time_points}"
        )
    ends = kspace.readout_length.cumsum(0)
    starts = ends - kspace.readout_length  # (readout,)
    groups = readout_groups(kspace)
    firsts = torch.tensor([members[0] for members in groups])
    lengths = kspace.readout_length[firsts]  # (g,)
    points = _ranges(starts[firsts], lengths)  # (n,)
    readout = torch.arange(len(groups)).repeat_interleave(lengths)

    samples = kspace.samples
    psi = basis.contrast.to(samples.dtype if basis.contrast.is_complex() else samples.real.dtype)
    psi = psi[kspace.time_point.to(psi.device)].to(samples.device)  # (readout, l)
    coils, rank = samples.shape[0], psi.shape[1]
    summed = sum(len(members) > 1 for members in groups)
    place = int(lengths[:summed].sum())
    rows = psi[firsts[summed:]]  # (r, l)
    gram = torch.cat([psi.new_empty(summed, rank, rank), rows[:, :, None].conj() * rows[:, None]])
    projected = samples.new_empty(rank, coils, place)
    alone = samples if summed == 0 else samples[:, points[place:]]  # nothing summed: nothing copied
    place = 0
    for g, members in enumerate(groups[:summed]):
        length = int(lengths[g])
        rows_of_group = psi[members]  # (t, l)
        gram[g] = rows_of_group.mH @ rows_of_group
        readouts = torch.stack([samples[:, start : start + length] for start in starts[members].tolist()])
        if psi.is_complex():
            part = rows_of_group.mH @ readouts.flatten(1)
        else:
            # Real and imaginary parts alike: half the arithmetic of complex products.
            part = torch.view_as_complex(
                (rows_of_group.mT @ torch.view_as_real(readouts).flatten(1)).reshape(rank, coils * length, 2)
            )
        projected[:, :, place : place + length] = part.reshape(rank, coils, length)
        place += length
    return TrajectorySums(
        trajectory=kspace.trajectory[points],
        readout=readout,
        gram=gram,
        projected=ProjectedSamples(projected, alone, rows.conj().resolve_conj(), readout[place:] - summed),
        count=torch.tensor([len(members) for members in groups]),
        density=None if kspace.density is None else kspace.density[points],
        energy=kspace.energy,
        samples=kspace.acquired_samples,
        basis=basis,
        grid=(kspace.grid[1], kspace.grid[2], kspace.grid[3]),
    )


def readout_groups(kspace: TrajectoryKSpace) -> list[list[int]]:
    """Numbers of the readouts of each distinct trajectory: of those that repeat, then of all others."""
    found: dict[bytes, list[int]] = {}
    ends = kspace.readout_length.cumsum(0)
    starts = (ends - kspace.readout_length).tolist()
    points = kspace.trajectory.detach().cpu().contiguous().numpy()
    for number, (start, end) in enumerate(zip(starts, ends.tolist(), strict=True)):
        # 16 bytes of a cryptographic hash: two trajectories never share one.
        key = blake2b(points[start:end].tobytes(), digest_size=16).digest()
        found.setdefault(key, []).append(number)
    return sorted(found.values(), key=lambda members: len(members) == 1)


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... of each range, one range after the other."""
    skipped = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - skipped).repeat_interleave(lengths)
