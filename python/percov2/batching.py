"""Many pictures: batches of equal shape, and a pipeline of threads for iterables."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Condition
from typing import Any, Generic, TypeVar, cast

__all__ = [
    "TOKENS_AT_ONCE",
    "Outcome",
    "Pipeline",
    "by_group",
    "current_item",
    "in_order",
]


TOKENS_AT_ONCE = 16384
"""Largest number of tokens per batch of a network. It bounds the memory."""

_ALONE_FROM = 8
"""Number of items with equal keys that never share a call with others."""
_PADDED = 16
"""Largest size of a call if all items were as large as the largest, in multiples of ``at_once``."""

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Result = TypeVar("Result")


def by_group(
    items: Sequence[Item],
    keys: Sequence[Hashable],
    sizes: Sequence[int],
    work: Callable[[list[Item]], Sequence[Result]],
    at_once: int = TOKENS_AT_ONCE,
    joined: Sequence[bool] = (),
) -> list[Result]:
    """Run ``work`` on lists of items with equal keys. Return the results in the items' order.

    Args:
        items: the items.
        keys: one key per item. Only items with equal keys share a call.
        sizes: number of tokens of each item.
        work: a function that returns one result per item.
        at_once: largest number of tokens per call. A call takes at least one item.
        joined: True for each item that may also share a call with items of other keys. It does so
            if its key is rare. Empty means that no item may.
    """
    results: dict[int, Result] = {}
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    lists: list[list[int]] = []
    others: list[int] = []
    for members in groups.values():
        if joined and len(members) < _ALONE_FROM and all(joined[i] for i in members):
            others += members
        else:
            lists.append(members)
    for members in [*lists, sorted(others, key=lambda i: sizes[i])]:
        for chosen in _cut(members, sizes, at_once):
            results.update(zip(chosen, work([items[i] for i in chosen]), strict=True))
    return [results[i] for i in range(len(items))]


def _cut(members: list[int], sizes: Sequence[int], at_once: int) -> Iterator[list[int]]:
    """Yield parts of ``members``, in which sizes never decrease, that one call may take."""
    chosen: list[int] = []
    total = 0
    for i in members:
        total += sizes[i]
        padded = (len(chosen) + 1) * sizes[i]
        if chosen and (total > at_once or padded > _PADDED * at_once):
            yield chosen
            chosen, total = [], sizes[i]
        chosen.append(i)
    if chosen:
        yield chosen


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Generator[Result, None, None]:
    """Run ``work`` on items in threads. Yield the results in the items' order.

    At most ``ahead`` items are taken from the iterable whose results are not yet yielded. The
    first exception of ``work`` or of the iterable ends the iterator. Work that has not begun then
    never begins.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """The result for one of many inputs, or the error in its place.

    Attributes:
        input: the input.
        value: the result; None if there is an error.
        error: ValueError for an invalid input, OSError for one that cannot be read, MemoryError.
    """

    input: Any
    value: Result | None = None
    error: Exception | None = None

    def get(self) -> Result:
        """Return the result, or raise the error."""
        if self.error is not None:
            raise self.error
        assert self.value is not None
        return self.value


_FAULTS = (ValueError, OSError, MemoryError)
_CURRENT: ContextVar[int | None] = ContextVar("percov2_current_item", default=None)


def current_item() -> int | None:
    """Return the index of the input that this thread of a pipeline works on, for warnings."""
    return _CURRENT.get()


@contextlib.contextmanager
def _working_on(index: int | None) -> Iterator[None]:
    token = _CURRENT.set(index)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class _Budget:
    """A limit on the pixels that are worked on at once. Work that exceeds it runs alone."""

    def __init__(self, pixels: int) -> None:
        self._limit, self._used = pixels, 0
        self._changed = Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._used + pixels <= self._limit)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()


@dataclass(frozen=True)
class Pipeline(Generic[Item, Loaded, Result]):
    """Load inputs, work on batches of them, and yield outcomes in order, all at the same time.

    Attributes:
        load: a function from an input to what ``work`` takes. It runs in ``loaders`` threads.
        work: a function from a list to a list of results. It runs in ``workers`` threads.
        pixels: the number of pixels of what ``load`` returns.
        batch_size: largest number of inputs per call of ``work``.
        loaders, workers: numbers of threads.
        pixels_at_once: largest number of pixels that are worked on at once, unless one input has
            more.
    """

    load: Callable[[Item], Loaded]
    work: Callable[[list[Loaded]], Sequence[Result]]
    pixels: Callable[[Loaded], int]
    batch_size: int
    loaders: int
    workers: int
    pixels_at_once: int

    def run(self, inputs: Iterable[Item]) -> Iterator[Outcome[Result]]:
        """Yield the outcome of every input, in order.

        An input that ``load`` or ``work`` refuses gives an outcome with an error. Other errors,
        and those of the iterable, end the run. At most a few batches are in memory.
        """
        budget = _Budget(self.pixels_at_once)
        ahead = self.loaders + 2 * self.batch_size
        loaded = in_order(self._load, enumerate(inputs), self.loaders, ahead)
        batches = _chunks(loaded, self.batch_size)

        def work(batch: list[_Loaded[Loaded]]) -> list[Outcome[Result]]:
            return self._work(batch, budget)

        for outcomes in in_order(work, batches, self.workers, 2 * self.workers):
            yield from outcomes

    def _load(self, numbered: tuple[int, Item]) -> _Loaded[Loaded]:
        index, item = numbered
        try:
            with _working_on(index):
                return _Loaded(index, item, self.load(item))
        except _FAULTS as error:
            return _Loaded(index, item, error=error)

    def _work(self, batch: list[_Loaded[Loaded]], budget: _Budget) -> list[Outcome[Result]]:
        """Return outcomes in order; a batch that is refused is tried one by one."""
        sound = [one for one in batch if one.error is None]
        values = [cast(Loaded, one.value) for one in sound]
        alone = sound[0].index if len(sound) == 1 else None
        results: Sequence[Result] = []
        try:
            if sound:
                with budget.taken(sum(map(self.pixels, values))), _working_on(alone):
                    results = self.work(values)
        except _FAULTS as error:
            if len(sound) > 1:  # most of them are not at fault
                return [self._work([one], budget)[0] for one in batch]
            sound[0].error = error
        made = iter(results)
        return [
            Outcome(one.input, error=one.error) if one.error else Outcome(one.input, next(made))
            for one in batch
        ]


@dataclass
class _Loaded(Generic[Loaded]):
    index: int
    input: Any
    value: Loaded | None = None
    error: Exception | None = None


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
