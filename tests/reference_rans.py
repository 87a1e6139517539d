"""Slow and obvious forms of the coder: Python integers only, written from the definition.

Nothing here is shared with the package: the weight table is computed, not copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

LOWER_BOUND = 1 << 23

Interval = tuple[int, int, int]  # start, freq, prob_bits


@lru_cache(maxsize=1)
def weight_table() -> tuple[int, ...]:
    """The largest r with r - 1/2 <= 2^(22 - k/256), exactly; entry 0 is one less."""

    def entry(k: int) -> int:
        low, high = 0, 1 << 23
        while low < high:
            middle = (low + high + 1) // 2
            if (2 * middle - 1) ** 256 <= 1 << (256 * 23 - k):
                low = middle
            else:
                high = middle - 1
        return low

    table = [entry(k) for k in range(256)]
    table[0] -= 1
    return tuple(table)


def weights(logits: Sequence[int]) -> list[int]:
    """22-bit weights of one row of logits."""
    top = max(logits)
    result = []
    for logit in logits:
        octaves, fraction = divmod(top - logit, 256)
        result.append(weight_table()[fraction] >> octaves if octaves <= 22 else 0)
    return result


def cdf(logits: Sequence[int], prob_bits: int) -> list[int]:
    """start_i = floor(P_i (M - V) / S) + i for i = 0 .. V."""
    row = weights(logits)
    total = sum(row)
    spread = (1 << prob_bits) - len(row)
    return [sum(row[:i]) * spread // total + i for i in range(len(row) + 1)]


def interval(logits: Sequence[int], symbol: int, prob_bits: int) -> tuple[int, int]:
    """Start and freq of one symbol."""
    bounds = cdf(logits, prob_bits)
    return bounds[symbol], bounds[symbol + 1] - bounds[symbol]


def encode(check: int, symbols: Sequence[Interval]) -> bytes:
    """The stream whose decoder meets `symbols` in this order and then the check."""
    x = check
    newest_first: list[int] = []
    for start, freq, prob_bits in reversed(symbols):
        while x >= freq * (1 << (31 - prob_bits)):
            newest_first.insert(0, x % 256)
            x //= 256
        x = (x // freq) * (1 << prob_bits) + x % freq + start
    head = x.to_bytes((x.bit_length() + 7) // 8, "big")
    return head + bytes(newest_first)


class Decoder:
    """Reads one stream; x and position are its whole state."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.x = 0
        self.position = 0
        self._shift_in()

    def _shift_in(self) -> None:
        while self.x < LOWER_BOUND and self.position < len(self.data):
            self.x = self.x * 256 + self.data[self.position]
            self.position += 1

    def decode(self, bounds: Sequence[int], prob_bits: int) -> int:
        """The next symbol by a table of V + 1 bounds."""
        target = self.x % (1 << prob_bits)
        symbol = max(i for i in range(len(bounds) - 1) if bounds[i] <= target)
        freq = bounds[symbol + 1] - bounds[symbol]
        self.x = freq * (self.x >> prob_bits) + target - bounds[symbol]
        self._shift_in()
        return symbol

    @property
    def exhausted(self) -> bool:
        return self.position == len(self.data) and self.x < LOWER_BOUND

    def finished(self, check: int) -> bool:
        return (
            self.x == check and self.position == len(self.data) and not self.data.startswith(b"\0")
        )


def streams(buffer: Iterable[int], offsets: Sequence[int]) -> list[bytes]:
    """The byte strings of a batch."""
    data = bytes(buffer)
    return [data[a:b] for a, b in pairwise(offsets)]
