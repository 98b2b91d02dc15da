"""Runs what feeds a gadget in a thread, so that receiving and preparing lines overlaps with summing them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

import torch

T = TypeVar("T")

PATIENCE = 0.05
"""Seconds after which a waiting producer looks whether anybody still wants its items."""


def read_ahead(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items in the same order, made up to ``depth`` items ahead in a thread.

    Closing the result (``contextlib.closing``) waits for the item in the making, closes ``items`` and ends
    the thread; afterwards the caller may use again what ``items`` reads from.

    Args:
        items: what is run in the thread.
        depth: items that may wait; bounds memory.

    Raises:
        Exception: whatever ``items`` raises, after all items before it.
    """
    threads = torch.get_num_threads()
    box: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                box.put((item, error), timeout=PATIENCE)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        source = iter(items)
        try:
            for item in source:
                if not put(item, None):
                    break
            else:
                put(None, StopIteration())
        except BaseException as error:  # handed to the thread that reads
            put(None, error)
        finally:
            if hasattr(source, "close"):
                source.close()

    worker = threading.Thread(target=make, name="read ahead", daemon=True)
    worker.start()
    try:
        while True:
            item, error = box.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # an item whenever there is no error
    finally:
        stopped.set()
        worker.join()
        torch.set_num_threads(threads)  # a thread that sets its own number also sets that of threads to come
