"""Files of trained networks: what was written comes back, and nothing else is ever taken for a network."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from quantitron.gadgets import network_weights, reconstruct
from quantitron.gadgets.acquisition_block import HEADER_DTYPE
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.image_metadata import provenance_meta
from quantitron.gadgets.images import Images
from quantitron.gadgets.network_weights import (
    FOLDER_VARIABLE,
    LARGEST_FILE,
    TRAINED_BY,
    find_weights,
    read_network,
    requested_network,
    shipped_network,
    write_network,
)
from quantitron.gadgets.reconstruct import Reconstruct
from quantitron.host import command, doctor
from quantitron.recon.data import Basis, Encoding, Maps, Problem, Protocol, ReducedKSpace
from quantitron.recon.networks.conditional_unet import ConditionalUNet, UNetShape
from quantitron.recon.networks.trained_network import (
    KINDS,
    NetworkDescription,
    NetworkRequest,
    TrainedNetwork,
)
from quantitron.recon.solvers import Solver

SHAPE = UNetShape(channels=(4, 8), blocks=1, attention=(1,), heads=2, modalities=3, noise=True, embedding=8)
CARD = {"data": ["brains", {"seed": 3}], "psnr": 31.5, "licence": None, "note": "über 1 mm", "flips": True}
DESCRIPTION = NetworkDescription(
    "contrast_denoiser", SHAPE, ("T1w", "T2w", "PDw"), (0.01, 0.1), (16, 32, 32), (1, 16, 16), CARD
)


def _network(seed: int = 0, shape: UNetShape = SHAPE) -> ConditionalUNet:
    """With weights everywhere, also where a new network has zeros."""
    generator = torch.Generator().manual_seed(seed)
    network = ConditionalUNet(shape, generator)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return network


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "brain.safetensors"
    write_network(path, _network(), DESCRIPTION)
    return path


def _parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return load(content), json.loads(content[8 : 8 + length])["__metadata__"]


def _craft(path: Path, weights, about) -> None:
    """A file by someone who knows how checksums are made."""
    about = {**about, "sha256": network_weights._checksum(about["description"], weights)}
    path.write_bytes(save(weights, about))


# --------------------------------------------------------------------------------------------- there and back


def test_a_network_comes_back(file):
    network = _network()
    found = read_network(file, "contrast_denoiser")
    assert found.description == DESCRIPTION
    written = network.state_dict()
    for name, value in found.network.state_dict().items():
        assert value.dtype == torch.float32
        assert value.stride() == written[name].stride()  # as the layers want it in memory
        assert torch.equal(value, written[name].half().float())
    assert not any(weight.requires_grad for weight in found.network.parameters())
    network.load_state_dict({name: value.half().float() for name, value in written.items()})
    x, level, modality = torch.randn(2, 1, 4, 16, 16), torch.tensor([0.1, 0.3]), torch.tensor([0, 2])
    with torch.no_grad():
        assert torch.equal(found.network(x, level, modality), network(x, level, modality))


def test_reading_leaves_chance_alone(file):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    read_network(file, "contrast_denoiser")
    assert torch.equal(torch.rand(3), expected)


def test_the_checksum_names_the_network(file, tmp_path):
    other = tmp_path / "other.safetensors"
    same = write_network(other, _network(), DESCRIPTION)
    assert read_network(file, "contrast_denoiser").checksum == same
    assert len(same) == 64
    assert file.read_bytes() == other.read_bytes()
    different = {
        write_network(other, _network(1), DESCRIPTION, overwrite=True),
        write_network(other, _network(), replace(DESCRIPTION, card={}), overwrite=True),
        write_network(other, _network(), replace(DESCRIPTION, least=(1, 8, 8)), overwrite=True),
    }
    assert len(different | {same}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_place(kind, tmp_path):
    if kind == "artifact_removal":
        shape = UNetShape(6, 6, (4, 8), 1, (), noise=False)
        description = NetworkDescription(kind, shape)
    else:
        shape = UNetShape(6, 6, (4,), 1)
        description = NetworkDescription(kind, shape, noise_levels=(1e-3, 1, 2))
    path = tmp_path / "folder" / "weights.safetensors"
    write_network(path, _network(0, shape), description)
    assert read_network(path, kind).description == description
    other = KINDS[KINDS.index(kind) - 1]
    with pytest.raises(ScanError, match=f"weights.safetensors holds a network for {kind}, not for {other}"):
        read_network(path, other)
    assert shipped_network(kind).name == f"{kind}.safetensors"
    assert shipped_network(kind).parent.name == "weights"


# ---------------------------------------------------------------------------------------------------- writing


def test_what_is_there_stays_unless_told(file):
    before = file.read_bytes()
    with pytest.raises(ScanError, match=r"brain.safetensors exists already"):
        write_network(file, _network(1), DESCRIPTION)
    assert file.read_bytes() == before
    write_network(file, _network(1), DESCRIPTION, overwrite=True)
    assert file.read_bytes() != before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (7e4, "a weight of entry.weight is too large for float16"),
        (float("nan"), "a weight of entry.weight is not finite"),
        (float("inf"), "a weight of entry.weight is not finite"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(value, sentence, tmp_path):
    network = _network()
    with torch.no_grad():
        network.entry.weight[1, 0, 2, 0, 1] = value
    with pytest.raises(ScanError, match=f"x.safetensors is not written: {sentence}"):
        write_network(tmp_path / "x.safetensors", network, DESCRIPTION)
    assert not list(tmp_path.iterdir())


DEEP = {"a": [[[[[[[[[1]]]]]]]]]}


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"file": Path("a")}, "PosixPath"),
        ({"psnr": np.float32(1)}, "float32"),
        ({"psnr": float("inf")}, "no finite number"),
        ({"levels": {1: 2}}, "has the key 1, which is no text"),
        ({"text": "x" * 300_000}, "longer than"),
        (DEEP, "within one another"),
    ],
)
def test_a_card_is_plain(card, words, tmp_path):
    with pytest.raises(ScanError, match=rf"x.safetensors is not written: .*{words}"):
        write_network(tmp_path / "x.safetensors", _network(), replace(DESCRIPTION, card=card))
    assert not list(tmp_path.iterdir())


def test_a_network_that_could_not_be_read_is_not_written(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ScanError, match="not the one that its description tells of"):
        write_network(path, _network(0, replace(SHAPE, heads=4)), DESCRIPTION)
    with pytest.raises(ScanError, match="a modality is named twice"):
        write_network(path, _network(), replace(DESCRIPTION, modalities=("T1w", "T1w", "T2w")))
    path.write_text("no folder")
    with pytest.raises(ScanError, match=r"x.safetensors/y.safetensors cannot be written: \w+"):
        write_network(path / "y.safetensors", _network(), DESCRIPTION)


def test_an_interrupted_write_leaves_what_was_there(file, monkeypatch):
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ScanError, match="cannot be written: No space left on device"):
        write_network(file, _network(1), DESCRIPTION, overwrite=True)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


# ---------------------------------------------------------------------------------------------------- reading


def _refused(path: Path, sentence: str) -> None:
    with pytest.raises(ScanError, match=sentence) as caught:
        read_network(path, "contrast_denoiser")
    text = str(caught.value)
    assert str(path) in text
    assert len(text.splitlines()) == 1
    assert len(text) < len(str(path)) + 200


def test_what_is_no_file(tmp_path):
    _refused(tmp_path / "absent.safetensors", "there is no weights file")
    _refused(tmp_path, "cannot be read: Is a directory")
    os.mkfifo(tmp_path / "pipe")
    _refused(tmp_path / "pipe", "is no file of weights")
    _refused(tmp_path / ("x" * 300), "cannot be read: File name too long")


@pytest.mark.parametrize("kept", [0, 4, 8, 9, 500, 0.2, 0.5, 0.999, -1])
def test_a_truncated_file(file, kept):
    content = file.read_bytes()
    kept = int(kept * len(content)) if isinstance(kept, float) else kept
    file.write_bytes(content[:kept])
    _refused(file, "is cut short|is not a safetensors file" if kept in (0, 4, 8) else "is cut short")


def test_any_altered_byte_is_noticed(file):
    """One bit in each of 150 places, headers more often than weights."""
    content = file.read_bytes()
    header = int.from_bytes(content[:8], "little")
    random = np.random.default_rng(0)
    places = [
        *range(12),
        *random.integers(8, 8 + header, 90),
        *random.integers(8 + header, len(content), 48),
    ]
    sound = read_network(file, "contrast_denoiser")
    for place in places:
        altered = bytearray(content)
        altered[place] ^= 1 << int(random.integers(8))
        file.write_bytes(altered)
        try:
            found = read_network(file, "contrast_denoiser")
        except ScanError:
            continue
        # what JSON allows to be written in several ways means the same
        assert found.description == sound.description
        assert found.checksum == sound.checksum
        for name, value in found.network.state_dict().items():
            assert torch.equal(value, sound.network.state_dict()[name])
    file.write_bytes(content + b"\0")
    _refused(file, "is damaged")


def test_an_altered_description_is_noticed(file):
    weights, about = _parts(file)
    for key, text in (
        ("description", about["description"].replace("31.5", "41.5")),
        ("sha256", hashlib.sha256(b"").hexdigest()),
    ):
        assert text != about[key]
        file.write_bytes(save(weights, {**about, key: text}))
        _refused(file, "was altered: its checksum does not hold")
    names = list(weights)
    swapped = {**weights, names[0]: weights[names[0]] + 1}
    file.write_bytes(save(swapped, about))
    _refused(file, "was altered: its checksum does not hold")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"not a network at all, but long enough", "is not a safetensors file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "is not a safetensors file"),
        (bytes(64), "is not a safetensors file"),
        ((1 << 62).to_bytes(8, "little") + b"{" + b" " * 64, "is not a safetensors file"),
        ((8).to_bytes(8, "little") + b"{nonsens", "is damaged: its header is no JSON"),
        ((8).to_bytes(8, "little") + b'{"\xff": 1}', "is damaged|cut short"),
        ((8).to_bytes(8, "little") + b"{}      ", "was not written by this program"),
        ((200_000).to_bytes(8, "little") + b'{"":' + b"[" * 199_996, "is damaged: its header is no JSON"),
    ],
)
def test_what_is_no_safetensors_file(content, sentence, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    _refused(path, sentence)


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.safetensors"])
@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 4", "protocol 0"])
def test_nothing_is_unpickled(name, form, tmp_path):
    path, sprung = tmp_path / name, tmp_path / "sprung"
    if form.startswith("protocol"):
        start = b"\x80\x04" if form == "protocol 4" else b""
        path.write_bytes(start + b"cos\nmkdir\n(V" + os.fsencode(sprung) + b"\ntR.")
    else:
        trapped = {"weight": torch.ones(3), "trap": _Trap(sprung)}
        torch.save(trapped, path, _use_new_zipfile_serialization=form == "zip")
    words = "which may hold a program; weights are safetensors files"
    _refused(path, words if form != "protocol 0" else "is not a safetensors file")
    assert not sprung.exists()


def test_a_foreign_safetensors_file(file):
    weights, about = _parts(file)
    file.write_bytes(save(weights))
    _refused(file, "was not written by this program")
    file.write_bytes(save(weights, {"format": "pt"}))
    _refused(file, "was not written by this program")
    file.write_bytes(save(weights, {**about, "version": "2"}))
    _refused(file, "has format version '2'; this program reads version 1")
    del about["sha256"]
    file.write_bytes(save(weights, about))
    _refused(file, "lacks its description or its checksum")


def _renamed(weights):
    return {("entry.wait" if name == "entry.weight" else name): value for name, value in weights.items()}


CRAFTED = [
    (lambda w: {n: v for n, v in w.items() if n != "exit.bias"}, "lacks exit.bias of the network"),
    (lambda w: {**w, "exit.scale": torch.ones(1).half()}, "holds exit.scale, which the network"),
    (_renamed, "holds entry.wait, which the network that it describes does not have"),
    (
        lambda w: {**w, "entry.weight": w["entry.weight"][:, :, :1].contiguous()},
        "entry.weight is 4 x 1 x 1 x 3 x 3, not 4 x 1 x 3 x 3 x 3 as described",
    ),
    (
        lambda w: {**w, "exit.bias": torch.full((1,), torch.nan).half()},
        "values in exit.bias that are not fin",
    ),
    (
        lambda w: {**w, "exit.bias": torch.full((1,), torch.inf).half()},
        "values in exit.bias that are not fin",
    ),
    (lambda w: {**w, "exit.bias": torch.ones(1)}, "holds 'F32' values in exit.bias, not 'F16'"),
    (lambda w: {**w, "a\nb": torch.ones(1).half()}, r"a weight is named 'a\\nb'"),
    (lambda w: {**w, "empty": torch.ones(0, 1 << 40).half()}, "holds empty, which the network"),
    (lambda w: {"exit.bias": w["exit.bias"]}, "lacks attention.1.out.bias of the network"),
]


@pytest.mark.parametrize(("change", "sentence"), CRAFTED)
def test_weights_of_another_network(file, change, sentence):
    """The checksum holds: these were made so."""
    weights, about = _parts(file)
    _craft(file, change(weights), about)
    _refused(file, sentence)


HUGE = [1 << 12] * 6
ABSURD = [
    ({"shape": {"channels": HUGE}}, "lacks|not .* as described"),
    ({"shape": {"channels": [1 << 40, 8]}}, "'channels' is absurd, not in 1..4096"),
    ({"shape": {"channels": [1] * 1000}}, "its channels are 1000, more than 6"),
    ({"shape": {"blocks": 10**9}}, "'blocks' is absurd"),
    ({"shape": {"blocks": 9}}, "'blocks' is 9, not in 1..8"),
    ({"shape": {"embedding": -8}}, "'embedding' is -8, not in"),
    ({"shape": {"embedding": 7}}, "length of the embedding must be even"),
    ({"shape": {"heads": True}}, "'heads' is no whole number"),
    ({"shape": {"heads": 3}}, "cannot be shared out to 3 heads"),
    ({"shape": {"noise": 1}}, "neither true nor false"),
    ({"shape": {"attention": [5]}}, "attention on level 5"),
    ({"shape": {"wings": 2}}, "its shape holds 'wings'"),
    ({"shape": []}, "its shape is no object"),
    ({"kind": "oracle"}, "kind 'oracle'; there are contrast_denoiser"),
    ({"kind": "x" * 10**5}, "its kind is no name"),
    ({"modalities": ["T1w", "T2w"]}, "2 modalities are named, the network knows 3"),
    ({"modalities": ["T1w", "T2w", "a\nb"]}, "modalities are names"),
    ({"modalities": "abc"}, "its modalities are no list"),
    ({"noise_levels": [0.1, "x"]}, "noise_levels are numbers"),
    ({"noise_levels": [0.1, 0.1]}, "noise levels must ascend"),
    ({"noise_levels": []}, "noise levels belong to a network"),
    ({"patch": [1, 2]}, "'patch' has 2 axes, not 3"),
    ({"least": [1, 0, 2]}, "'least' is 0, not in 1..4096"),
    ({"card": []}, "its card is no object"),
    ({"card": DEEP}, "within one another"),
    ({"more": 1}, "its description holds 'more'"),
]


@pytest.mark.parametrize(("change", "sentence"), ABSURD)
def test_descriptions_that_no_one_should_follow(file, change, sentence):
    weights, about = _parts(file)
    values = json.loads(about["description"])
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key == "shape" else value
    _craft(file, weights, {**about, "description": json.dumps(values)})
    _refused(file, sentence)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"kind": 1, "kind": 2}',
        '{"kind": NaN}',
        '{"kind": 1e999}',
        '{"kind": ' + "9" * 10_000 + "}",
        " " * 300_000,
        "\x00",
    ],
)
def test_descriptions_that_are_none(file, text):
    weights, about = _parts(file)
    _craft(file, weights, {**about, "description": text})
    _refused(file, "cannot be used: ")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """2 GiB more than the process has."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("the size of a process is only known from /proc")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_file_cannot_ask_for_memory(file, little_memory):
    """Networks and files of absurd size."""
    with pytest.raises((MemoryError, RuntimeError)):
        torch.empty(3 << 30, dtype=torch.uint8)  # the limit holds
    weights, about = _parts(file)
    values = json.loads(about["description"])
    values["shape"]["channels"] = HUGE  # 100 GB
    wide = file.with_name("wide.safetensors")
    _craft(wide, weights, {**about, "description": json.dumps(values)})
    _refused(wide, "lacks|not .* as described")
    sparse = file.with_name("sparse.safetensors")
    with sparse.open("wb") as hole:
        hole.write(file.read_bytes()[:2000])
        hole.truncate(LARGEST_FILE + 1)
    _refused(sparse, "is larger than 1024 MiB")
    claims = file.with_name("claims.safetensors")
    entry = {"dtype": "F16", "shape": [1 << 40], "data_offsets": [0, 1 << 41]}
    header = json.dumps({"__metadata__": about, "entry.weight": entry}).encode()
    claims.write_bytes(len(header).to_bytes(8, "little") + header + bytes(1000))
    _refused(claims, "is cut short: 1000 of its 2199023255552 bytes")


# ------------------------------------------------------------------------------------------------- which file


def test_where_weights_are_looked_for(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    assert find_weights("brain.safetensors") == file
    assert find_weights(str(file)) == file
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ScanError) as caught:
        find_weights("brain.safetensors")
    assert str(caught.value) == f"there is no weights file {elsewhere / 'brain.safetensors'}"
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert find_weights("brain.safetensors") == file
    with pytest.raises(ScanError, match=r"elsewhere/no.safetensors nor .*/no.safetensors"):
        find_weights("no.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_weights("~/brain.safetensors") == file
    with pytest.raises(ScanError, match="cannot be looked for"):
        find_weights("x" * 5000)


def test_without_a_name_the_package_is_asked(file, monkeypatch):
    monkeypatch.setattr(
        network_weights, "shipped_network", lambda kind: file.with_name(f"{kind}.safetensors")
    )
    with pytest.raises(ScanError) as caught:
        requested_network(NetworkRequest("contrast_denoiser"))
    assert str(caught.value) == (
        "no trained contrast_denoiser comes with this package; train one with 'quantitron train-denoiser' "
        "and name its file with reconstruct.weights"
    )
    file.rename(file.with_name("contrast_denoiser.safetensors"))
    assert requested_network(NetworkRequest("contrast_denoiser")).description == DESCRIPTION


def test_the_commands_that_train_exist():
    known = {f"quantitron {registered.name}" for registered in command.app.registered_commands}
    assert set(TRAINED_BY) == set(KINDS)
    assert set(TRAINED_BY.values()) <= known


def test_doctor_looks_for_the_networks(file, monkeypatch):
    monkeypatch.setattr(
        network_weights, "shipped_network", lambda kind: file.with_name(f"{kind}.safetensors")
    )
    file.rename(file.with_name("contrast_denoiser.safetensors"))
    path = file.with_name("artifact_removal.safetensors")
    path.write_bytes(b"nothing of the kind")
    states = {finding.what: finding for finding in doctor.networks()}
    assert states["network contrast_denoiser"].state == "ok"
    checksum = read_network(file.with_name("contrast_denoiser.safetensors"), "contrast_denoiser").checksum
    assert checksum[:16] in states["network contrast_denoiser"].detail
    assert states["network series_denoiser"].state == "note"
    assert TRAINED_BY["series_denoiser"] in states["network series_denoiser"].detail
    assert states["network artifact_removal"].state == "broken"
    assert "is not a safetensors file" in states["network artifact_removal"].detail


def test_the_network_of_mri2qmap_comes_with_the_package_and_no_other():
    """The others are for one protocol each; this one has to be there."""
    assert [kind for kind in KINDS if shipped_network(kind).is_file()] == ["contrast_denoiser"]


def test_what_comes_with_the_package_is_whole():
    kind = "contrast_denoiser"
    network = read_network(shipped_network(kind), kind)
    assert network.description.card
    assert shipped_network(kind).stat().st_size < 8 << 20


# ---------------------------------------------------------------------------------------------- to the solver

ENCODING = Encoding((2, 6, 4), (0.02, 0.06, 0.04), (2, 4, 4))
PROTOCOL = Protocol("megre", (0.004, 0.009), (0.1,), (0.3,))


@dataclass(frozen=True)
class Restoring(Solver):
    """Maps that hold the first weight of the network that it was given."""

    name: ClassVar[str] = "restoring"
    sequences: ClassVar[tuple[str, ...]] = ("megre",)
    seen: ClassVar[list[TrainedNetwork | None]] = []
    denoiser: str = "network"
    weights: str = ""
    modality: str = "T1w"

    @property
    def network(self) -> NetworkRequest | None:
        return NetworkRequest("contrast_denoiser", self.weights) if self.denoiser == "network" else None

    def check_network(self, network: NetworkDescription, encoding: Encoding, protocol: Protocol) -> None:
        if self.modality not in network.modalities:
            raise ValueError(f"the network knows no {self.modality}, only {', '.join(network.modalities)}")

    def solve(self, problem: Problem, progress) -> Iterator[Maps]:
        self.seen.append(problem.network)
        value = torch.ones(1, *ENCODING.matrix)
        yield Maps({"pd": value}, value > 0)


@pytest.fixture
def restoring(monkeypatch):
    monkeypatch.setattr(reconstruct, "SOLVERS", (*reconstruct.SOLVERS, Restoring))
    Restoring.seen.clear()


def _context(slices: int = 1) -> Context:
    context = Context(header=None, encoding=replace(ENCODING, slices=slices), protocol=PROTOCOL, axes={})
    head = np.zeros(slices, HEADER_DTYPE)
    head["read_dir"][:, 0] = head["phase_dir"][:, 1] = head["slice_dir"][:, 2] = 1
    head["position"][:, 2] = 5 * np.arange(slices)
    context.remember_geometry(head, np.arange(slices))
    return context


def _images(context: Context, slices: int = 1, **settings):
    gadget = Reconstruct.build({"solver": "restoring", "device": "cpu", **settings}, "test")
    gadget.prepare(context)
    count, gram = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1, 1)
    basis = Basis(torch.ones(1, 1), torch.ones(1), 1.0, "dictionary")
    reduced = ReducedKSpace(gram, 10 * torch.ones(1, 1, 1, 1, 1, 1, 1), count, 1.0, 1, basis)
    problem = Problem(ENCODING, PROTOCOL, reduced)
    return list(Images()(gadget(iter([problem] * slices), context), context))


def test_every_slice_gets_the_network_and_images_name_it(file, restoring):
    context = _context(3)
    images = _images(context, 3, weights=str(file))
    assert len(Restoring.seen) == 3
    assert all(network is context.network for network in Restoring.seen)
    assert context.network is not None
    assert context.network.description == DESCRIPTION
    assert images
    for image in images:
        assert image.meta["Quantitron_Weights"] == context.network.checksum[:16]


def test_images_made_without_a_network_name_none(restoring):
    images = _images(_context(), denoiser="tv")
    assert Restoring.seen == [None]
    assert images
    assert all("Quantitron_Weights" not in image.meta for image in images)
    assert "Quantitron_Weights" not in provenance_meta()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weights": "absent.safetensors"}, "there is no weights file /.*/absent.safetensors"),
        ({"modality": "FLAIR"}, "solver 'restoring': the network knows no FLAIR, only T1w, T2w, PDw"),
    ],
)
def test_a_network_that_will_not_do_is_refused_before_data_flow(file, restoring, settings, sentence):
    gadget = Reconstruct.build({"solver": "restoring", "weights": str(file), **settings}, "test")
    with pytest.raises(ScanError, match=sentence):
        gadget.prepare(_context())
    assert not Restoring.seen
