"""One thread for work that is too short to share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread() -> Iterator[None]:
    """Let torch use one thread inside the block.

    A block of lines takes about a millisecond. Sharing that gains little on an idle machine; on a busy one
    the threads wait for each other far longer (measured: 10 times slower beside three busy processes on two
    cores).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
