"""A writer of whole files from a header and the intervals of its symbols.

It uses the tables of ``independent_decoder`` and shares nothing with the package.
"""

from __future__ import annotations

from collections.abc import Sequence

from oracles.independent_coder import Interval, Symbol, encode, symbol_of
from oracles.independent_decoder import (
    ALL_STAGES,
    CAPTION_CODEC,
    CAPTION_EXPONENT,
    DENSE,
    RATE,
    SCHEDULE,
    SEED_EXPONENT,
    SIDE_EXPONENT,
    STAGES_EXPONENT,
    STANDARD_SIZE,
    Header,
    prefix,
)
from oracles.independent_model import intervals


def chosen(logits: Sequence[Sequence[int]], symbols: Sequence[int]) -> list[Symbol]:
    """The symbols of rows of logits."""
    tables = (intervals(row) for row in logits)
    return [symbol_of(starts, i, bits) for (starts, bits), i in zip(tables, symbols, strict=True)]


def number(exponents: Sequence[int], value: int) -> list[Symbol]:
    """A number >= 1 as exponent and the bits below its leading one, 12 at a time from the end."""
    binary = f"{value - 1:b}" if value > 1 else ""
    symbols = [symbol_of(exponents, len(binary))]
    below = binary[1:]
    while below:
        width = len(below) % 12 or 12
        chunk, below = below[:width], below[width:]
        symbols.append(Symbol(int(chunk, 2) * 2 ** (12 - width), 2 ** (12 - width)))
    return symbols


def header_symbols(head: Header, caption: bytes = b"") -> list[Symbol]:
    """All symbols of header and caption in decoding order."""
    symbols = [symbol_of(RATE, head.rate), symbol_of(SCHEDULE, head.schedule)]
    symbols.append(symbol_of(ALL_STAGES, int(head.stages_sent > 0)))
    if head.stages_sent:
        symbols += number(STAGES_EXPONENT, head.stages_sent)
        symbols += number(SEED_EXPONENT, head.seed + 1)
    sides = head.height, head.width
    symbols.append(symbol_of(STANDARD_SIZE, int(sides != (512, 512))))
    if sides != (512, 512):
        symbols += [symbol for side in sides for symbol in number(SIDE_EXPONENT, side)]
    symbols += [symbol_of(DENSE, head.dense), symbol_of(CAPTION_CODEC, head.caption_codec)]
    if head.caption_codec in (1, 2):
        symbols += number(CAPTION_EXPONENT, len(caption))
        symbols += [Symbol(16 * byte, 16) for byte in caption]
    return symbols


def write(head: Header, caption: bytes, symbols: Sequence[Interval], check: int) -> bytes:
    """A whole file; ``symbols`` in coding order: pieces of a caption with codec 3, then tokens."""
    return prefix(head) + encode(check, [*header_symbols(head, caption), *symbols])
