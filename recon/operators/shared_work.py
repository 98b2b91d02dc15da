"""Independent parts of a computation, shared out among threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")


def share_out(work: Callable[[Part], None], parts: Iterable[Part], device: torch.device) -> None:
    """Do all parts; on a CPU each thread takes whole parts.

    Parts that suit the cache of a core are too small for torch to split, and a part that one thread does
    alone gives the same bits whatever the number of threads.

    Args:
        work: does one part and writes its result where no other part writes.
        parts: what ``work`` takes.
        device: where the work is done; one with a queue of its own, such as a GPU, is given it in turn.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        for part in parts:
            work(part)
        return
    try:
        with ThreadPoolExecutor(threads, "part", initializer=lambda: torch.set_num_threads(1)) as pool:
            list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)  # a thread that sets its own number also sets that of threads to come
