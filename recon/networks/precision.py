"""In which precision networks run: half where the processor multiplies in it, else float32."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "float32")
"""``auto``: bfloat16 where it is as good as native, else float32."""


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """A context in which layers run in the precision that suits the device; weights stay float32.

    Args:
        device: that the network runs on.
        precision: one of ``PRECISIONS``.

    Raises:
        ValueError: if ``precision`` is none of them.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}' is none of {', '.join(PRECISIONS)}")
    dtype = torch.float32 if precision == "float32" else fastest_dtype(device)
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if half else torch.bfloat16, enabled=half)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it, else float32.

    GPUs that only emulate bfloat16 get float32, not float16: features may leave the range of float16.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        # Of these two queries older versions of torch have none; they run in float32.
        queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(bool(getattr(torch.cpu, query, bool)()) for query in queries)
    return torch.bfloat16 if native else torch.float32
