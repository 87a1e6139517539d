"""The coder of docs/reference/bitstream.md, §3, both ways, in Python integers.

A part of ``independent_decoder``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

LOWER = 2**23

Interval = tuple[int, int, int]
"""start, freq, prob_bits."""


class Symbol(NamedTuple):
    """One coded symbol: its interval [start, start + freq) of 2^prob_bits."""

    start: int
    freq: int
    prob_bits: int = 12

    @property
    def information(self) -> float:
        """Bits."""
        return self.prob_bits - math.log2(self.freq)


def symbol_of(starts: Sequence[int], i: int, prob_bits: int = 12) -> Symbol:
    """Symbol i of a table whose last number is 2^prob_bits."""
    return Symbol(starts[i], starts[i + 1] - starts[i], prob_bits)


def encode(check: int, symbols: Sequence[Interval]) -> bytes:
    """The stream whose decoder meets `symbols` in this order and then the check."""
    x = check
    newest_first = bytearray()
    for start, freq, prob_bits in reversed(symbols):
        while x >= freq << (31 - prob_bits):
            newest_first.append(x % 256)
            x //= 256
        x = (x // freq << prob_bits) + x % freq + start
    head = x.to_bytes((x.bit_length() + 7) // 8, "big")
    return head + newest_first[::-1]


def split(buffer: Iterable[int], offsets: Sequence[int]) -> list[bytes]:
    """The byte strings of a batch."""
    data = bytes(buffer)
    return [data[a:b] for a, b in pairwise(offsets)]


class Coder:
    """The decoder of a stream that begins at `position`; x and position are its whole state."""

    def __init__(self, data: bytes, position: int = 0, x: int = 0) -> None:
        self.x, self.data, self.position = x, data, position
        self.canonical = data[position : position + 1] != b"\x00"
        self.trusted = True  # every symbol so far (§8)
        self._refill()

    def _refill(self) -> None:
        while self.x < LOWER and self.position < len(self.data):
            self.x = 256 * self.x + self.data[self.position]
            self.position += 1

    def symbol(self, starts: Sequence[int], prob_bits: int = 12) -> int:
        """Decode one symbol; `starts` ends with 2^prob_bits."""
        self.trusted = self.trusted and self.x >= LOWER
        slot = self.x % (1 << prob_bits)
        i = bisect_right(starts, slot) - 1
        self.x = (starts[i + 1] - starts[i]) * (self.x >> prob_bits) + slot - starts[i]
        self._refill()
        return i

    def bits(self, k: int) -> int:
        """k ≤ 12 equally likely bits."""
        return self.symbol(range(0, 4097, 1 << (12 - k)))

    def number(self, exponents: Sequence[int]) -> int:
        """A number from 1."""
        e = self.symbol(exponents)
        if e == 0:
            return 1
        value, left = 1, e - 1
        while left:
            k = (left - 1) % 12 + 1
            value, left = value << k | self.bits(k), left - k
        return value + 1

    @property
    def exhausted(self) -> bool:
        """No byte is left to refill the state."""
        return self.position == len(self.data) and self.x < LOWER

    def finished(self, check: int) -> bool:
        """The stream is whole, as far as a check of 16 bits can tell."""
        return self.x == check and self.position == len(self.data) and self.canonical
