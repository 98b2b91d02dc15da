"""Running a generator ahead in a thread."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import torch

from quantitron.gadgets.read_ahead import read_ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_items_come_in_order_and_the_thread_ends():
    assert list(read_ahead(iter(range(100)))) == list(range(100))
    assert list(read_ahead([])) == []
    assert list(read_ahead([None, None])) == [None, None]
    assert "read ahead" not in threads()


def test_an_error_comes_after_the_items_before_it():
    def source():
        yield 1
        yield 2
        raise ValueError("broken")

    items = read_ahead(source())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(items)
    assert "read ahead" not in threads()


def test_closing_early_closes_the_source_and_makes_no_more_items():
    made, closed = [], []

    def source():
        try:
            for number in range(1000):
                made.append(number)
                yield number
        finally:
            closed.append(threading.current_thread().name)

    with closing(read_ahead(source(), depth=2)) as items:
        assert next(items) == 0
    assert closed == ["read ahead"]
    assert len(made) <= 4  # one taken, two waiting, one in the making
    assert "read ahead" not in threads()


def test_an_error_of_the_reader_ends_the_thread():
    def reader():
        with closing(read_ahead(iter(range(1000)))) as items:
            for item in items:
                if item == 5:
                    raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        reader()
    assert "read ahead" not in threads()


def test_it_works_ahead():
    second = threading.Event()

    def source():
        yield 1
        second.set()
        yield 2

    with closing(read_ahead(source())) as items:
        assert next(items) == 1
        assert second.wait(timeout=10)  # set although nobody asked for the second item


def test_number_of_threads_of_torch_stays():
    before = torch.get_num_threads()

    def source():
        torch.set_num_threads(1)
        yield torch.get_num_threads()

    assert list(read_ahead(source())) == [1]
    assert torch.get_num_threads() == before
