"""The errors of a fingerprint scan that lacks resolution alone: no noise, all of k-space that spirals reach.

Where several tissues meet in a voxel their signals add, and the maps that fit the sum are not the mean of
theirs; what spirals leave out beyond their reach adds ringing and blur. A reconstruction that knows no more
than the scan cannot be expected to fall below.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantitron.phantoms.scene import FieldSettings, Scene, make_scene
from quantitron.phantoms.signal_table import signal_basis, tabulate
from quantitron.phantoms.simulate import load_anatomy
from quantitron.phantoms.truth import truth_maps
from quantitron.recon.data import FingerprintDictionary, Protocol
from quantitron.recon.fingerprint_maps import fingerprint_maps
from quantitron.recon.metrics import mape

RANK = 0.9999


def floor(
    anatomy: Any,
    protocol: Protocol,
    dictionary: FingerprintDictionary,
    matrix: tuple[int, int, int],
    fov: tuple[float, float, float],
    supersampling: tuple[int, int, int],
    height: float,
    seed: int,
) -> dict[str, float]:
    """Role -> mean of the mean absolute relative errors in white and in grey matter.

    Args:
        anatomy: file of the object.
        protocol: of the scan.
        dictionary: of the protocol.
        matrix: (x, y, z).
        fov: [mm] (x, y, z).
        supersampling: fine voxels along the edges (x, y, z) of a scan voxel.
        height: centre of the scan along z [mm].
        seed: of the object's fields.
    """
    scene = make_scene(
        load_anatomy(anatomy),
        protocol,
        matrix[::-1],
        tuple(1e-3 * length for length in fov[::-1]),
        coils=1,
        supersampling=supersampling[::-1],
        height=1e-3 * height,
        fields=FieldSettings(),
        seed=seed,
    )
    signals = signal_basis(tabulate([scene], protocol), [scene.pd])
    basis = dictionary.basis(RANK)
    turn = (basis.contrast.mH @ signals.axes.to(basis.contrast)).numpy()
    parts = [seen(scene, scene.pd.numpy() * part) for part in signals.coefficients[0].numpy()]
    images = np.einsum("lm,mzyx->xlzy", turn, np.stack(parts)).astype(np.complex64)
    maps = fingerprint_maps(
        torch.from_numpy(images),
        None,
        SimpleNamespace(b1=None, basis=basis, dictionary=dictionary, protocol=protocol),
        mask_threshold=0.05,
        groups=256,
        rank=basis.rank,
        retained_energy=basis.retained_energy,
        residual_to_noise=math.nan,
        standard_deviations=False,
    )
    truth = truth_maps(scene, "fisp_mrf")
    tissues = [(truth[name] > 0.5) & (truth["mask"] > 0) for name in ("wm", "gm")]
    found = {name: np.nan_to_num(maps.values[name][0].numpy()) for name in ("t1", "t2")}
    return {
        name.upper(): sum(mape(values, truth[name], tissue) for tissue in tissues) / 2
        for name, values in found.items()
    }


def seen(scene: Scene, values: NDArray[np.complex64]) -> NDArray[np.complex64]:
    """Fine values (v,) as an image (z, y, x) of the disc, or the ball, of k-space that spirals reach."""
    spectrum = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(scene.embed(values))))
    radius = np.zeros(())
    for axis, (size, factor) in enumerate(zip(scene.matrix, scene.supersampling, strict=True)):
        fine = size * factor
        start = fine // 2 - size // 2
        spectrum = spectrum.take(np.arange(start, start + size), axis) / factor
        frequency = (np.arange(size) - size // 2) / size  # cycles per scan voxel
        # The transform counts fine voxels from n // 2; the scan's origin is the centre of its voxel n // 2.
        shift = (fine // 2 - factor * (size // 2) - (factor - 1) / 2) / factor
        shape = [-1 if axis == other else 1 for other in range(3)]
        spectrum = spectrum * np.exp(-2j * np.pi * shift * frequency).reshape(shape)
        radius = radius + frequency.reshape(shape) ** 2
    image = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(spectrum * (radius <= 0.25))))
    return image.astype(np.complex64)
