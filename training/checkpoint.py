"""Where a training stands, on disk: safetensors and JSON, replaced in one step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from quantitron.gadgets.errors import ScanError

STATE = "state.json"
"""Names the file of tensors that belongs to it, and its checksum."""
_UNFINISHED = ".part"
"""Ends the name of a file that is being written."""


@dataclass
class TrainingState:
    """All but the tensors."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Time spent on them."""
    window: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Sum and number of the losses since the last point of the curve."""
    losses: list[list[float]] = field(default_factory=list)
    """Points of the loss curve: step, mean loss since the point before, learning rate, seconds."""
    validations: list[dict[str, Any]] = field(default_factory=list)
    """What the validation said, with its step."""

    @property
    def last_loss(self) -> float:
        """Mean over the last point of the curve, or over what there is."""
        if self.losses:
            return self.losses[-1][1]
        return self.window[0] / self.window[1] if self.window[1] else 0.0


def save_checkpoint(
    folder: Path, state: TrainingState, tensors: Mapping[str, Tensor], identity: Mapping[str, object]
) -> None:
    """Write a checkpoint; the one before is there until the new one is complete, and stays where it fails.

    Args:
        folder: made if it does not exist.
        state: where the training stands.
        tensors: of weights and optimiser.
        identity: what a training that goes on from here must have in common with this one.

    Raises:
        ScanError: if it cannot be written.
    """
    content = save({name: value.detach().to("cpu").contiguous() for name, value in tensors.items()})
    name = f"step-{state.step:08d}.safetensors"
    text = json.dumps(
        {
            "tensors": name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "identity": dict(identity),
            "state": asdict(state),
        }
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        for file, data in ((name, content), (STATE, text.encode())):
            partial = folder / f".{file}{_UNFINISHED}"
            with partial.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(folder / file)
        for old in folder.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink()
    except OSError as error:
        with suppress(OSError):  # the first error is the one to tell
            _clear(folder)
            folder.rmdir()  # only where it is empty
        raise ScanError(f"the checkpoint {folder} cannot be written: {error.strerror or error}") from error


def holds_nothing(folder: Path) -> bool:
    """Whether a folder for checkpoints holds but what a process left that was killed before its first one."""
    return all(file.name.endswith(_UNFINISHED) for file in folder.iterdir())


def _clear(folder: Path) -> None:
    """Remove what a process left that was killed, or whose disk was full, while it wrote."""
    for name in (STATE, "step-*.safetensors"):
        for unfinished in folder.glob(f".{name}{_UNFINISHED}"):
            unfinished.unlink()


def load_checkpoint(folder: Path, identity: Mapping[str, object]) -> tuple[TrainingState, dict[str, Tensor]]:
    """Read a checkpoint.

    Args:
        folder: that ``save_checkpoint`` wrote to.
        identity: of the training that is to go on.

    Raises:
        ScanError: if there is none, it is not whole, or it is one of another training.
    """
    try:
        stored = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ScanError(f"{folder} holds no checkpoint of a training") from error
    except (OSError, ValueError) as error:
        raise ScanError(f"the checkpoint {folder / STATE} cannot be read: {error}") from error
    try:
        file = folder / Path(str(stored["tensors"])).name
        checksum, known = str(stored["sha256"]), dict(stored["identity"])
        state = TrainingState(**stored["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise ScanError(f"{folder / STATE} is no checkpoint of a training") from error
    wanted = json.loads(json.dumps(dict(identity)))
    if (difference := _difference(known, wanted)) is not None:
        raise ScanError(f"{folder} is a checkpoint of another training: {difference}")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ScanError(f"the checkpoint {file} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != checksum:
        raise ScanError(f"the checkpoint {file} was cut short or altered")
    try:
        return state, load(content)
    except SafetensorError as error:
        raise ScanError(f"the checkpoint {file} is no safetensors file: {error}") from error


def _difference(known: Mapping[str, object], wanted: Mapping[str, object]) -> str | None:
    """The first entry that differs, down to the one within another."""
    for key in sorted(set(known) | set(wanted)):
        was, now = known.get(key), wanted.get(key)
        if was == now:
            continue
        # Of lists of numbers the whole says more than one of them, unless both are cut short alike.
        alike = _short(was) == _short(now)
        one, other = _entries(was, alike), _entries(now, alike)
        within = _difference(one, other) if one is not None and other is not None else None
        return f"{key}.{within}" if within else f"{key} was {_short(was)} and is {_short(now)}"
    return None


def _entries(value: object, any_list: bool) -> Mapping[str, object] | None:
    """Entries of a mapping by name, those of a list of mappings (or of any) by number; None of all else."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and (any_list or all(isinstance(entry, dict) for entry in value)):
        return {str(number): entry for number, entry in enumerate(value)}
    return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
