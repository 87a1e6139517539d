"""Batches of pictures of equal shape."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

__all__ = ["TOKENS_AT_ONCE", "by_group"]


TOKENS_AT_ONCE = 16384
"""Largest number of tokens per batch of a network. It bounds the memory."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def by_group(
    items: Sequence[Item],
    keys: Sequence[Hashable],
    sizes: Sequence[int],
    work: Callable[[list[Item]], Sequence[Result]],
    at_once: int = TOKENS_AT_ONCE,
) -> list[Result]:
    """Run ``work`` on lists of items with equal keys. Return the results in the items' order.

    Args:
        items: the items.
        keys: one key per item. Only items with equal keys share a call.
        sizes: number of tokens of each item.
        work: a function that returns one result per item.
        at_once: largest number of tokens per call. A call takes at least one item.
    """
    results: dict[int, Result] = {}
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        step = max(1, at_once // max(1, sizes[members[0]]))
        for begin in range(0, len(members), step):
            chosen = members[begin : begin + step]
            results.update(zip(chosen, work([items[i] for i in chosen]), strict=True))
    return [results[i] for i in range(len(items))]
