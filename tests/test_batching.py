"""The pipeline of threads: order, bounds, faults, and what it holds."""

from __future__ import annotations

import itertools
import threading
import time
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from percov2 import batching
from percov2.batching import Outcome, Pipeline, by_group, current_item, in_order


def test_equal_keys_share_calls_of_bounded_size():
    calls = []

    def work(some: list[str]) -> list[str]:
        calls.append("".join(some))
        return [one.upper() for one in some]

    sizes = [{"b": 40, "c": 500}.get(key, 30) for key in "abacaaba"]
    items = list("stuvwxyz")
    assert by_group(items, list("abacaaba"), sizes, work, at_once=100) == list("STUVWXYZ")
    assert calls == ["suw", "xz", "ty", "v"]


def test_items_with_rare_keys_share_calls():
    calls = []

    def work(some: list[str]) -> list[str]:
        calls.append("".join(some))
        return [one.upper() for one in some]

    keys = "aaaaaaaabcbde"  # eight with equal keys stay alone, and so does d
    sizes = [{"c": 5, "e": 1}.get(key, 10) for key in keys]
    items = [chr(ord("a") + i) for i in range(len(keys))]
    joined = [key != "d" for key in keys]
    upper = [item.upper() for item in items]
    assert by_group(items, keys, sizes, work, 30, joined) == upper
    assert calls == ["abc", "def", "gh", "l", "mjik"]
    calls.clear()
    assert by_group(items, keys, sizes, work, 30, [False] * len(keys)) == upper
    assert calls == ["abc", "def", "gh", "ik", "j", "l", "m"]


def test_items_that_share_a_call_are_not_too_unlike(monkeypatch):
    monkeypatch.setattr(batching, "_PADDED", 2)
    calls = []

    def work(some: list[int]) -> list[int]:
        calls.append(some)
        return some

    sizes = [40, 1, 1, 1, 1, 30]
    assert by_group(sizes, range(6), sizes, work, 100, [True] * 6) == sizes
    assert calls == [[1, 1, 1, 1, 30], [40]]


def slowly(value: int) -> int:
    time.sleep(0.001 * (value * 7 % 5))
    return value * value


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 9))
def test_results_have_the_order_of_the_items(count, threads, ahead):
    assert list(in_order(slowly, range(count), threads, ahead)) == [i * i for i in range(count)]


def test_few_items_are_taken_from_an_endless_iterable():
    taken = []

    def items():
        for i in itertools.count():
            taken.append(i)
            yield i

    results = in_order(slowly, items(), 2, 5)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) <= 3 + 5
    results.close()


def test_an_exception_ends_the_work_and_cancels_what_has_not_begun():
    begun = []

    def work(i: int) -> int:
        begun.append(i)
        if i == 2:
            raise RuntimeError("no")
        time.sleep(0.01)
        return i

    with pytest.raises(RuntimeError, match="no"):
        list(in_order(work, range(1000), 1, 100))
    assert len(begun) < 10


def pipeline(load=int, work=lambda some: some, **more) -> Pipeline:
    settings = {"batch_size": 3, "loaders": 2, "workers": 2, "pixels_at_once": 100} | more
    return Pipeline(load, work, lambda value: 1, **settings)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["1", "2", "x", "-5"]), max_size=20), st.integers(1, 5))
def test_faulty_inputs_of_any_batch_leave_the_others_alone(inputs, batch_size):
    """ "x" cannot be loaded, and a batch with -5 is refused."""

    def work(some: list[int]) -> list[int]:
        if min(some) < 0:
            raise ValueError(f"{min(some)} is negative")
        return [value * 10 for value in some]

    found = list(pipeline(int, work, batch_size=batch_size).run(inputs))
    assert [one.value for one in found] == [{"1": 10, "2": 20}.get(text) for text in inputs]
    for text, one in zip(inputs, found, strict=True):
        if text in "x-5":
            with pytest.raises(ValueError, match="literal" if text == "x" else "negative"):
                one.get()


def test_errors_that_are_no_fault_of_an_input_end_the_run():
    def work(some: list[int]) -> list[int]:
        raise TypeError("a mistake in the program")

    with pytest.raises(TypeError, match="mistake"):
        list(pipeline(work=work).run("12"))


def test_threads_know_the_input_they_work_on():
    seen = []

    def load(text: str) -> str:
        seen.append((text, current_item()))
        return text

    work = lambda some: [current_item()]  # noqa: E731
    found = list(pipeline(load, work, batch_size=1).run("abcd"))
    assert sorted(seen) == [("a", 0), ("b", 1), ("c", 2), ("d", 3)]
    assert [one.get() for one in found] == [0, 1, 2, 3]
    assert current_item() is None
    together = lambda some: [str(current_item()) for _ in some]  # noqa: E731
    found = pipeline(load, together, batch_size=2).run("abc")
    assert [one.get() for one in found] == ["None", "None", "2"]


def test_a_pipeline_takes_few_inputs_that_are_not_finished():
    taken = []
    inputs = (taken.append(i) or i for i in range(5000))
    for _ in itertools.islice(pipeline().run(inputs), 30):
        pass
    assert len(taken) < 100


def test_large_pictures_are_in_work_alone():
    running, most, turn = set(), [], threading.Lock()

    def work(some: list[int]) -> list[int]:
        (value,) = some
        with turn:
            running.add(value)
            most.append(sorted(running))
        time.sleep(0.005)
        with turn:
            running.remove(value)
        return some

    sizes = [40, 40, 500, 40, 40, 101, 40]
    budget = {"batch_size": 1, "loaders": 4, "workers": 4, "pixels_at_once": 100}
    found = Pipeline(int, work, lambda i: sizes[i], **budget).run(range(len(sizes)))
    assert [one.get() for one in found] == list(range(len(sizes)))
    for together in most:
        assert len(together) == 1 or not {2, 5} & set(together)


class Big:
    """Something whose lifetime can be watched."""


def test_results_that_were_taken_are_not_kept():
    alive = weakref.WeakSet()

    def work(some: list[int]) -> list[Big]:
        made = [Big() for _ in some]
        alive.update(made)
        return made

    most = 0
    for outcome in pipeline(work=work, batch_size=1).run(range(300)):
        assert isinstance(outcome, Outcome)
        most = max(most, len(alive))
    assert most <= 8
