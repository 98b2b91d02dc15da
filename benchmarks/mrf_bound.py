"""What the neighbours of a voxel can tell of its T1 and T2, at the noise of a fingerprint scan.

    python benchmarks/mrf_bound.py delics_vol00.npz [--scan jiang:500] [--order shuffled] [--snr 10]

A network is trained on the truth of the very slice that it then judges, three quarters of its rows at a time,
and judges the others: more than any prior can know. Per voxel it is shown

    maps        T1, T2 and PD of ``llr`` and ``subspace`` in 5x5 voxels around it
    neighbours  the same, and what the 24 voxels around it truly are

and corrects the logarithm of ``llr``'s value. The scan is that of ``mrf.py accuracy``; MAPE is the mean of
that in white and in grey matter. A bar below the first row asks for more than 5x5 voxels of these maps tell.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from measured_replay import measured_replay
from mrf import ROLES, SAMPLES, objects, say, scans, slice_of
from numpy.typing import NDArray
from torch import Tensor, nn

from quantitron.gadgets.image_file import read_images
from quantitron.gadgets.map_volume import map_volumes
from quantitron.recon.metrics import mape

REACH, STRIPE, PARTS, EPOCHS, BATCH = 2, 12, 4, 25, 256
MAPS = ("T1", "T2", "PD")
Image = NDArray[np.float32]


def logarithm(values: Image) -> Image:
    """log of a map (1, y, x) as (y, x); background lies far below."""
    return np.log(np.clip(np.nan_to_num(np.abs(values[0])), 1e-3, None)).astype(np.float32)


def windows(images: list[Image], reach: int, at: tuple[NDArray[np.int64], ...], own: bool = True) -> Image:
    """(v, values) the images in the voxels around each of ``at``, and in itself if ``own``."""
    steps = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    columns = [
        np.roll(image, step, (0, 1))[at] for step in steps if own or step != (0, 0) for image in images
    ]
    return np.stack(columns, 1)


def corrected(shown: Image, first: Image, truth: Image, weight: Image, part: NDArray[np.int64]) -> Image:
    """(v,) ``first`` as networks correct it that did not see the truth of the voxel's part."""
    x = torch.from_numpy((shown - shown.mean(0)) / (shown.std(0) + 1e-6))
    wanted, counts = torch.from_numpy(truth - first), torch.from_numpy(weight)
    scale = float(wanted.std())
    result = torch.zeros_like(wanted)
    for number in range(PARTS):
        known = torch.from_numpy((part != number).nonzero()[0])
        judged = torch.from_numpy(part == number)
        for seed in range(2):
            network = trained(x[known], wanted[known] / scale, counts[known], seed)
            with torch.no_grad():
                result[judged] += scale / 2 * network(x[judged])[:, 0]
    return first + result.numpy()


def trained(x: Tensor, wanted: Tensor, counts: Tensor, seed: int) -> nn.Module:
    """A perceptron of least weighted absolute error."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(x.shape[1], 64),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(64, 64),
        nn.GELU(),
        nn.Linear(64, 1),
    )
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=3e-2)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            loss = (counts[batch] * (network(x[batch])[:, 0] - wanted[batch]).abs()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="delics_volXX.npz, or mni")
    parser.add_argument("--scan", default="jiang:500")
    parser.add_argument("--order", default="shuffled")
    parser.add_argument("--snr", type=float, default=10.0)
    arguments = parser.parse_args()
    ((schedule, points),) = scans([arguments.scan])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["QUANTITRON_CACHE"] = os.fspath(folder)
        ((_, anatomy),) = objects([arguments.source], folder)
        raw = folder / "raw.h5"
        slice_of(anatomy, schedule, points, arguments.order, arguments.snr, SAMPLES, 1, raw)
        found = []
        for pipeline in ("llr", "subspace"):
            measured_replay(raw, pipeline, folder / "maps.h5", [])
            found.append(map_volumes(read_images(folder / "maps.h5")))
        truth = map_volumes(read_images(raw, "truth"))
    inside = truth["MASK"].values > 0
    tissues = [inside & (truth[tissue].values > 0.5) for tissue in ("WM", "GM")]
    at = (tissues[0] | tissues[1])[0].nonzero()
    # White and grey matter count alike, as in the mean of their MAPE.
    weight = sum(tissue[0][at] / tissue.sum() for tissue in tissues).astype(np.float32) * (len(at[0]) / 2)
    maps = [logarithm(each[name].values) for each in found for name in MAPS]
    shown = {"maps": windows(maps, REACH, at)}
    true = [logarithm(truth[name].values) for name in MAPS]
    shown["neighbours"] = np.concatenate([shown["maps"], windows(true, REACH, at, own=False)], 1)
    say("| shown | T1 | T2 |")
    say("|---|---|---|")
    for label, values in {"nothing": None, **shown}.items():
        errors = []
        for role in ROLES:
            estimate = found[0][role].values.copy()
            if values is not None:
                first, wanted = (logarithm(each[role].values)[at] for each in (found[0], truth))
                estimate[0][at] = np.exp(corrected(values, first, wanted, weight, at[0] // STRIPE % PARTS))
            errors.append(50 * sum(mape(estimate, truth[role].values, tissue) for tissue in tissues))
        say(f"| {label} | {errors[0]:.2f} | {errors[1]:.2f} |")


if __name__ == "__main__":
    main()
