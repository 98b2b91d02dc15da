"""Trained networks on disk: safetensors files that bring their own description and checksum.

A file holds the weights as float16 and, as text in its header, the version of this format, the network's
description (``network_description``) and the SHA-256 over the description and all names, shapes and bytes of
the weights: a file that was cut short or altered is found out before its network is made. Nothing in a file
is ever run, and nothing in it can ask for more memory than a few times the file's own size. The checksum says
that a file is whole, not who made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.network_description import description_text, read_description, strict_json
from quantitron.gadgets.unfinished_file import clear_abandoned, discard, unfinished_file
from quantitron.recon.networks.conditional_unet import ConditionalUNet, UNetShape
from quantitron.recon.networks.trained_network import NetworkDescription, NetworkRequest, TrainedNetwork

FORMAT = "quantitron network"
VERSION = "1"
"""Raised whenever a file changes its meaning."""
LARGEST_FILE = 1 << 30
"""Bytes of a file of weights."""
LARGEST_HEADER = 1 << 22
"""Bytes of a safetensors header."""
FOLDER_VARIABLE = "QUANTITRON_WEIGHTS"
"""Environment variable that names a folder of weights."""
TRAINED_BY = {
    "contrast_denoiser": "quantitron train-denoiser",
    "series_denoiser": "quantitron train-series-denoiser",
    "artifact_removal": "quantitron train-arnet",
}
"""The command that trains a network of each kind."""

_PROGRAMS = ((b"PK\x03\x04", "a zip archive, as PyTorch writes them"), (b"\x80", "a pickle"))
"""First bytes of what may hold a program, and what it is."""
_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
"""Of a weight."""


def shipped_network(kind: str) -> Path:
    """Where the weights of this kind that come with the package are; whether they do, the disk knows."""
    return Path(str(files("quantitron.pipelines") / "weights" / f"{kind}.safetensors"))


def requested_network(request: NetworkRequest) -> TrainedNetwork:
    """The network that a solver asks for.

    A relative path is looked for in the folder that the process was started in, then in
    ``QUANTITRON_WEIGHTS``.

    Raises:
        ScanError: if there is none, or it cannot be used.
    """
    if request.weights:
        return read_network(find_weights(request.weights), request.kind)
    path = shipped_network(request.kind)
    if not path.is_file():
        raise ScanError(
            f"no trained {request.kind} comes with this package; train one with "
            f"'{TRAINED_BY[request.kind]}' and name its file with reconstruct.weights"
        )
    return read_network(path, request.kind)


def find_weights(path: str) -> Path:
    """The file that a setting names.

    Raises:
        ScanError: if there is none.
    """
    try:
        named = Path(path).expanduser()
        places = [Path.cwd() / named]
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder and not named.is_absolute():
            places.append(Path(folder).expanduser() / named)
        found = next((place for place in places if place.exists()), None)
    except (OSError, RuntimeError) as error:  # no such user, a folder that may not be entered
        raise ScanError(f"the weights file {path} cannot be looked for: {_reason(error)}") from error
    if found is None:
        raise ScanError(f"there is no weights file {' nor '.join(map(str, places))}")
    return found


def write_network(
    path: str | os.PathLike[str],
    network: ConditionalUNet,
    description: NetworkDescription,
    overwrite: bool = False,
) -> str:
    """Write a network; a file that is there is replaced in one step, when the new one is complete.

    Args:
        path: of the file, usually ending in ``.safetensors``.
        network: with its weights, on any device and of any precision.
        description: of it.
        overwrite: whether a file that is there is replaced.

    Returns:
        The checksum, as ``TrainedNetwork.checksum`` will have it.

    Raises:
        ScanError: if the file is there already or cannot be written, the description is not the network's
            or is no plain JSON, or a weight is not finite or too large for float16.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ScanError(f"{path} exists already")
    if network.shape != description.shape:
        raise ScanError(f"the network for {path} is not the one that its description tells of")
    weights: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        half = value.detach().to("cpu", torch.float16).contiguous()
        if not bool(half.isfinite().all()):
            wrong = "is not finite" if not bool(value.isfinite().all()) else "is too large for float16"
            raise ScanError(f"{path} is not written: a weight of {name} {wrong}")
        weights[name] = half
    try:
        text = description_text(description)
    except ValueError as error:
        raise ScanError(f"{path} is not written: {error}") from error
    checksum = _checksum(text, weights)
    about = {"format": FORMAT, "version": VERSION, "description": text, "sha256": checksum}
    content = _in_order(save(weights, about))
    if len(content) > LARGEST_FILE:
        raise ScanError(f"{path} is not written: it would be larger than {LARGEST_FILE >> 20} MiB")
    _put(path, content)
    return checksum


def read_network(path: str | os.PathLike[str], kind: str) -> TrainedNetwork:
    """Read and check a network.

    Args:
        path: of a file by ``write_network``.
        kind: one of ``trained_network.KINDS``.

    Returns:
        The network, on the CPU, float32, for use without gradients.

    Raises:
        ScanError: if there is no such file, it is anything else, damaged, altered, of an unknown version, or
            a network of another kind; if its weights are not those of the network that it describes, or not
            finite.
    """
    path = Path(path)
    content = _content(path)
    header, start = _header(path, content)
    about = _about(path, header.pop("__metadata__", None))
    shapes = _shapes(path, header, len(content) - start)
    try:
        weights = load(content)
    except SafetensorError as error:
        raise ScanError(f"the weights file {path} is damaged: {error}") from error
    if set(weights) != set(shapes) or _checksum(about["description"], weights) != about["sha256"]:
        raise ScanError(f"the weights file {path} was altered: its checksum does not hold")
    try:
        description = read_description(about["description"])
    except ValueError as error:
        raise ScanError(f"the weights file {path} cannot be used: {error}") from error
    if description.kind != kind:
        raise ScanError(f"the weights file {path} holds a network for {description.kind}, not for {kind}")
    network = _unfilled(description.shape)
    layout = network.state_dict()
    _compare(path, {name: tuple(value.shape) for name, value in layout.items()}, shapes)
    for name, value in weights.items():
        if not bool(value.isfinite().all()):
            raise ScanError(f"the weights file {path} holds values in {name} that are not finite")
    single = {  # float16 to float32 is exact; in memory as the layers have them
        name: torch.empty_strided(value.shape, layout[name].stride()).copy_(value)
        for name, value in weights.items()
    }
    network.load_state_dict(single, assign=True)
    network.requires_grad_(False).eval()
    return TrainedNetwork(description, network, about["sha256"])


def _checksum(description: str, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over all that makes the network, each part preceded by what says where it ends."""
    encoded = description.encode()
    digest = hashlib.sha256(f"{FORMAT} {VERSION} {len(encoded)}\n".encode())
    digest.update(encoded)
    for name in sorted(weights):
        value = weights[name]
        digest.update(f"{len(name.encode())} {name} {list(value.shape)}\n".encode())
        digest.update(value.numpy().astype("<f2", copy=False).tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------- reading


def _content(path: Path) -> bytes:
    try:
        # a pipe must not be waited for
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ScanError(f"{path} is no file of weights")
            if status.st_size > LARGEST_FILE:
                raise ScanError(f"{path} is larger than {LARGEST_FILE >> 20} MiB and no file of weights")
            return file.read(LARGEST_FILE)
    except FileNotFoundError as error:
        raise ScanError(f"there is no weights file {path}") from error
    except (OSError, ValueError) as error:
        raise ScanError(f"the weights file {path} cannot be read: {_reason(error)}") from error


def _header(path: Path, content: bytes) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the byte that it ends at: the weights' names, shapes and places,
    and the texts in ``__metadata__``."""
    length = int.from_bytes(content[:8], "little")
    if content[8:9] != b"{" or not 2 <= length <= LARGEST_HEADER:
        for magic, what in _PROGRAMS:
            if content.startswith(magic):
                raise ScanError(f"{path} is {what}, which may hold a program; weights are safetensors files")
        raise ScanError(f"{path} is not a safetensors file")
    if len(content) < 8 + length:
        raise ScanError(f"the weights file {path} is cut short")
    try:
        header = strict_json(content[8 : 8 + length].decode())
    except ValueError as error:
        raise ScanError(f"the weights file {path} is damaged: its header is no JSON") from error
    if not isinstance(header, dict):
        raise ScanError(f"{path} is not a safetensors file")
    return header, 8 + length


def _about(path: Path, about: object) -> dict[str, str]:
    """The texts that ``write_network`` put into the header."""
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ScanError(f"the weights file {path} was not written by this program")
    if about.get("version") != VERSION:
        raise ScanError(
            f"the weights file {path} has format version {str(about.get('version'))[:20]!a}; this program "
            f"reads version {VERSION}"
        )
    if not all(isinstance(about.get(key), str) for key in ("description", "sha256")):
        raise ScanError(f"the weights file {path} lacks its description or its checksum")
    return about


def _shapes(path: Path, header: dict[str, Any], size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that a header announces; ``size`` bytes follow it."""
    shapes: dict[str, tuple[int, ...]] = {}
    announced = 0
    for name, entry in header.items():
        try:
            kind, shape, (_, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            shapes[name] = tuple(int(length) for length in shape)
            announced = max(announced, int(end))
        except (KeyError, TypeError, ValueError) as error:
            raise ScanError(f"the weights file {path} is damaged: its header is incomplete") from error
        if not _NAME.fullmatch(name):
            raise ScanError(f"the weights file {path} is damaged: a weight is named {name[:40]!a}")
        if kind != "F16":
            raise ScanError(f"the weights file {path} holds {str(kind)[:20]!a} values in {name}, not 'F16'")
    if size < announced:
        raise ScanError(
            f"the weights file {path} is cut short: {size} of its {announced} bytes of weights are there"
        )
    return shapes


def _compare(
    path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse weights that are not those of the network that is described."""
    for name in sorted(set(expected) | set(found)):
        if name not in found:
            raise ScanError(f"the weights file {path} lacks {name} of the network that it describes")
        if name not in expected:
            raise ScanError(
                f"the weights file {path} holds {name}, which the network that it describes does not have"
            )
        if expected[name] != found[name]:
            sizes = " x ".join(map(str, found[name])), " x ".join(map(str, expected[name]))
            raise ScanError(f"the weights file {path}: {name} is {sizes[0]}, not {sizes[1]} as described")


class _WithoutValues(TorchFunctionMode):
    """Leaves out first values. On the device ``meta`` they are nothing, but drawing them there takes torch a
    second to import what it takes. They are drawn in place, so that nobody misses what is returned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func in (Tensor.normal_, nn.init.normal_) else func(*args, **(kwargs or {}))


def _unfilled(shape: UNetShape) -> ConditionalUNet:
    """The layers without memory for their weights: a description may ask for any amount of it."""
    with torch.device("meta"), _WithoutValues():
        return ConditionalUNet(shape)


# -------------------------------------------------------------------------------------------------- writing


def _in_order(content: bytes) -> bytes:
    """A safetensors file with a sorted header: the library's order is different every time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the weights begin at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + content[end:]


def _put(path: Path, content: bytes) -> None:
    unfinished = unfinished_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(path)
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise ScanError(f"{path} cannot be written: {_reason(error)}") from error
    finally:
        discard(unfinished)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
