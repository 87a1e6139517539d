"""Pictures grouped by shape."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

TOKENS_AT_ONCE = 16384
"""Tokens whose pictures go through a network together (bounds memory)."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def by_group(
    items: Sequence[Item],
    keys: Sequence[Hashable],
    sizes: Sequence[int],
    work: Callable[[list[Item]], Sequence[Result]],
    at_once: int = TOKENS_AT_ONCE,
) -> list[Result]:
    """Run ``work`` on lists of items with equal keys and return its results in the items' order.

    Args:
        items: what ``work`` takes; it returns one result per item.
        keys: only items with equal keys share a call.
        sizes: tokens per item.
        work: the function.
        at_once: tokens that one call takes at most, but it takes one item at least.
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
