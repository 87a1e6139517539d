"""One stream of several lanes, slow and obvious: Python integers, written from the definition."""

from __future__ import annotations

from collections.abc import Sequence

LOWER_BOUND = 1 << 23

Interval = tuple[int, int, int]  # start, freq, prob_bits


def initial_states(count: int, lanes: int, check: int) -> list[int]:
    """2^23 each; the lane of the last symbol (of symbol -1 if there is none) adds the check."""
    states = [LOWER_BOUND] * lanes
    states[(count - 1) % lanes] += check
    return states


def encode(lanes: int, check: int, symbols: Sequence[Interval]) -> bytes:
    """The stream whose decoder meets `symbols` in this order and then the initial states."""
    states = initial_states(len(symbols), lanes, check)
    newest_first: list[int] = []
    for i, (start, freq, prob_bits) in reversed(list(enumerate(symbols))):
        x = states[i % lanes]
        while x >= freq * (1 << (31 - prob_bits)):
            newest_first.insert(0, x % 256)
            x //= 256
        states[i % lanes] = (x // freq) * (1 << prob_bits) + x % freq + start
    return b"".join(x.to_bytes(4, "big") for x in states) + bytes(newest_first)


class Decoder:
    """Reads one stream symbol by symbol; beyond its end it reads zeros and takes note of that."""

    def __init__(self, data: bytes, lanes: int) -> None:
        self.states = [int.from_bytes(data[4 * k : 4 * k + 4], "big") for k in range(lanes)]
        if len(data) < 4 * lanes or not all(LOWER_BOUND <= x < 1 << 31 for x in self.states):
            raise ValueError("no encoder writes such a head")
        self.bytes = list(data[4 * lanes :])
        self.missing = 0
        self.count = 0

    def decode(self, bounds: Sequence[int], prob_bits: int) -> int:
        """The next symbol by a table of V + 1 bounds."""
        lane = self.count % len(self.states)
        x = self.states[lane]
        target = x % (1 << prob_bits)
        symbol = max(i for i in range(len(bounds) - 1) if bounds[i] <= target)
        x = (bounds[symbol + 1] - bounds[symbol]) * (x >> prob_bits) + target - bounds[symbol]
        while x < LOWER_BOUND:
            self.missing += not self.bytes
            x = 256 * x + (self.bytes.pop(0) if self.bytes else 0)
        self.states[lane] = x
        self.count += 1
        return symbol

    def finished(self, check: int) -> bool:
        expected = initial_states(self.count, len(self.states), check)
        return self.states == expected and not self.bytes and not self.missing
