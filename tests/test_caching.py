"""Caches of methods: what is computed, how often, and what they hold."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from percov2.caching import remembered

pytestmark = pytest.mark.core


class Squares:
    def __init__(self, maxsize: int | None = None) -> None:
        self.calls: list[int] = []
        self.square = remembered(self._square, maxsize)

    def _square(self, value: int) -> int:
        self.calls.append(value)
        time.sleep(0.01)
        return value**2 if value < 10 else 100 * self.square(value // 10)


def test_threads_compute_a_result_once():
    squares = Squares()
    threads = [threading.Thread(target=squares.square, args=(i % 2,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(squares.calls) == [0, 1] and squares.square(1) == 1


def test_a_result_may_need_another():
    squares, found = Squares(), []
    thread = threading.Thread(target=lambda: found.append(squares.square(30)), daemon=True)
    thread.start()
    thread.join(10)
    assert found == [900] and squares.calls == [30, 3]


def test_old_results_are_dropped_and_the_object_is_not_held():
    squares = Squares(1)
    assert [squares.square(i) for i in (2, 3, 2)] == [4, 9, 4] and squares.calls == [2, 3, 2]
    left = weakref.ref(squares)
    gc.disable()
    try:
        del squares
        assert left() is None
    finally:
        gc.enable()
