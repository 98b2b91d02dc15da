"""Which device a reconstruction runs on. Chosen once, at the edge (DESIGN decision 6)."""

from __future__ import annotations

import os

import torch

ENVIRONMENT = "QUANTITRON_DEVICE"
"""Environment variable that ``auto`` obeys."""


def choose_device(wanted: str = "auto") -> torch.device:
    """Turn a setting into a device that exists.

    Args:
        wanted: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``auto`` takes ``QUANTITRON_DEVICE`` where that is
            set, else the first GPU, else the CPU.

    Raises:
        ValueError: if the name is none of these, or that GPU is not there.
    """
    source = f"device '{wanted}'"
    if wanted == "auto":
        wanted = os.environ.get(ENVIRONMENT) or "auto"
        source = f"{ENVIRONMENT}={wanted}"
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = wanted.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ValueError(f"{source} is none of auto, cpu, cuda, cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"{source} was asked for, but no CUDA GPU is available on this machine")
    index = int(number or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(f"{source} was asked for, but there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)
