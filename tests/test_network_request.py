"""A trained network on its way from a file to a pipeline: the same maps by every way into the program, the
network's checksum on each image, and one sentence where the file will not do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header import make_context, parse_header
from quantitron.gadgets.image_file import read_images
from quantitron.gadgets.network_weights import FOLDER_VARIABLE, read_network, write_network
from quantitron.host.raw_file import read_header
from quantitron.host.replay import replay
from quantitron.phantoms.simulate_fingerprint import simulate_fingerprint
from quantitron.recon.canonical_series import protocol_checksum
from quantitron.recon.networks.conditional_unet import ConditionalUNet, UNetShape
from quantitron.recon.networks.trained_network import NetworkDescription

pytestmark = pytest.mark.timeout(240)

SMALL = ("basis.t1_points=30", "basis.t2_points=30", "basis.rank=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def raw(folder: Path) -> Path:
    """Two slices of a disc."""
    z, y, x = np.meshgrid(*[(np.arange(n) - n // 2) / (n / 2) for n in (2, 32, 32)], indexing="ij")
    disc = x**2 + y**2 < 0.6
    np.savez(
        folder / "disc.npz",
        t1=1.0 + 0.3 * x + 0.1 * z,
        t2=0.08 + 0.02 * y,
        pd=np.where(disc, 1.0, 0.0),
        voxel_size=np.array([0.004, 0.004, 0.004]),
    )
    path = folder / "raw.h5"
    simulate_fingerprint(
        output=path,
        phantom=folder / "disc.npz",
        matrix=(32, 32, 1),
        fov=(128.0, 128.0, 4.0),
        slices=2,
        points=72,
        interleaves=12,
        coils=3,
        supersampling=1,
    )
    return path


def _write(path: Path, raw: Path, seed: int) -> str:
    """A network that was never trained, for the protocol of a scan: it changes images a little."""
    shape = UNetShape(4, 4, channels=(4, 8), blocks=1, noise=False)
    generator = torch.Generator().manual_seed(seed)
    network = ConditionalUNet(shape, generator)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    protocol = make_context(parse_header(read_header(raw))).protocol
    card = {"protocol_checksum": protocol_checksum(protocol), "protocol": "72 points"}
    least = (1, 16, 16)
    return write_network(
        path, network, NetworkDescription("artifact_removal", shape, (), (), (1, 16, 16), least, card)
    )


@pytest.fixture(scope="module")
def weights(folder: Path, raw: Path) -> Path:
    path = folder / "weights" / "net.safetensors"
    _write(path, raw, 0)
    return path


@pytest.fixture(scope="module")
def maps(folder: Path, raw: Path, weights: Path) -> Path:
    replay(raw, "arnet", folder / "maps.h5", [*SMALL, f"reconstruct.weights={weights}"])
    return folder / "maps.h5"


def same_bits(first: Path, second: Path) -> bool:
    one, other = read_images(first), read_images(second)
    return len(one) == len(other) > 0 and all(
        a.getHead().image_series_index == b.getHead().image_series_index
        and a.data.tobytes() == b.data.tobytes()  # no value is NaN in the same place
        for a, b in zip(one, other, strict=True)
    )


def test_images_name_the_network(maps, weights):
    images = read_images(maps)
    assert {image.data.shape[1] for image in images} == {2}  # both slices
    checksum = read_network(weights, "artifact_removal").checksum
    assert {image.meta["Quantitron_Weights"] for image in images} == {checksum[:16]}


def test_the_network_makes_a_difference(maps, raw, weights, tmp_path):
    other = tmp_path / "other.safetensors"
    checksum = _write(other, raw, 1)
    replay(raw, "arnet", tmp_path / "maps.h5", [*SMALL, f"reconstruct.weights={other}"])
    replay(raw, "arnet", tmp_path / "same.h5", [*SMALL, f"reconstruct.weights={weights}"])
    assert same_bits(maps, tmp_path / "same.h5")
    assert not same_bits(maps, tmp_path / "maps.h5")
    here, there = (read_images(path)[0].meta["Quantitron_Weights"] for path in (maps, tmp_path / "maps.h5"))
    assert there == checksum[:16] != here


def test_a_server_looks_in_its_own_folders(maps, raw, weights, tmp_path, monkeypatch):
    """The client names the file as the server knows it, and gets the bits of a replay; then the file is
    altered, and the sentence about it comes before any map."""
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", FOLDER_VARIABLE: str(weights.parent)}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("run_command.py")), "serve", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings,
    )
    assert process.stderr is not None
    while " on 127.0.0.1:" not in (line := process.stderr.readline()):
        assert line, "the host ended"
    address = line.strip().split(" on ")[1].split()[0]
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    settings = [*SMALL, "reconstruct.weights=net.safetensors"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there
    try:
        replay(raw, "arnet", tmp_path / "file.h5", [*SMALL, f"reconstruct.weights={weights}"])
        replay(raw, "arnet", tmp_path / "socket.h5", settings, gadgetron=address)
        assert same_bits(tmp_path / "file.h5", tmp_path / "socket.h5")
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        altered = weights.with_name("altered.safetensors")
        altered.write_bytes(content)
        settings[-1] = "reconstruct.weights=altered.safetensors"
        with pytest.raises(ScanError, match=r"altered.safetensors was altered: its checksum does not hold"):
            replay(raw, "arnet", tmp_path / "altered.h5", settings, gadgetron=address)
        assert not (tmp_path / "altered.h5").exists()
    finally:
        torch.set_num_threads(threads)
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 0, rest


def test_the_same_name_is_looked_for_here(raw, weights, tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    settings = [*SMALL, "reconstruct.weights=net.safetensors"]
    with pytest.raises(ScanError, match=f"there is no weights file {tmp_path}/net.safetensors"):
        replay(raw, "arnet", tmp_path / "maps.h5", settings)
    assert not (tmp_path / "maps.h5").exists()
