"""Caches of an object's own methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from threading import RLock
from typing import TypeVar
from weakref import WeakMethod

__all__ = ["remembered"]

Result = TypeVar("Result")


def remembered(method: Callable[..., Result], maxsize: int | None = None) -> Callable[..., Result]:
    """Return a bound method with a cache of its last ``maxsize`` results, all by default.

    Unlike ``lru_cache``, it does not keep the object alive that stores it, whose networks may fill
    gigabytes, and threads that ask for the same result compute it once.
    """
    weak, turn = WeakMethod(method), RLock()

    @lru_cache(maxsize)
    def call(*arguments: object) -> Result:
        bound = weak()
        assert bound is not None  # the object holds this function
        return bound(*arguments)

    def in_turn(*arguments: object) -> Result:
        with turn:
            return call(*arguments)

    in_turn.cache_info = call.cache_info  # type: ignore[attr-defined]
    return in_turn
