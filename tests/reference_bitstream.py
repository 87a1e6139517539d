"""Oracle of the file format: docs/bitstream.md written down once more, slowly.

Nothing here is shared with ``percov2.bitstream``: the tables are copied from the document, the
coder works on Python integers. ``write`` makes a whole file from a header and the (start, freq)
of its tokens; ``read_header`` reads it back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

RATE = [1536, 1024, 768] + [96] * 4 + [43] * 6 + [42] * 3
SCHEDULE = [1280] + [467] * 6 + [14]
ALL_STAGES = [3840, 256]
STAGES_EXPONENT = [640, 640, 896, 896, 512] + [43] * 8 + [42] * 4
SEED_EXPONENT = [4032] + [4] * 16
STANDARD_SIZE = [3712, 384]
SIDE_EXPONENT = [4, 4, 8, 8, 16, 24, 48, 80, 192, 384, 768, 784, 832, 832, 80, 24, 8]
DENSE = [4092, 4]
CAPTION_CODEC = [3712, 96, 96, 128, 32, 32]
CAPTION_EXPONENT = [16, 16, 64, 192, 704, 1024, 1024, 704, 256, 64, 16, 8, 8]


class Symbol(NamedTuple):
    """One coded symbol: its interval [start, start + freq) of 2^prob_bits."""

    start: int
    freq: int
    prob_bits: int

    @property
    def bits(self) -> float:
        return self.prob_bits - math.log2(self.freq)


def crc16(data: bytes) -> int:
    """CRC-16 with polynomial 0x1021 and start value 0xFFFF, bit by bit."""
    crc = 0xFFFF
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = crc << 1 ^ (0x11021 if crc & 0x8000 else 0)
    return crc


def rans_encode(symbols: Sequence[Symbol], check: int) -> bytes:
    """Code symbols, given in decoding order, into a payload."""
    state = check
    emitted: list[int] = []
    for start, freq, prob_bits in reversed(symbols):
        while state >= freq * 2 ** (31 - prob_bits):
            emitted.append(state % 256)
            state //= 256
        state = state // freq * 2**prob_bits + start + state % freq
    flushed: list[int] = []
    while state > 0:
        flushed.insert(0, state % 256)
        state //= 256
    return bytes(flushed + emitted[::-1])


class RansDecoder:
    """Decodes a payload symbol by symbol."""

    def __init__(self, payload: bytes, state: int = 0, position: int = 0) -> None:
        self.payload = payload
        self.state = state
        self.position = position
        self._refill()

    def _refill(self) -> None:
        while self.state < 2**23 and self.position < len(self.payload):
            self.state = 256 * self.state + self.payload[self.position]
            self.position += 1

    def symbol(self, freqs: Sequence[int], prob_bits: int) -> int:
        slot = self.state % 2**prob_bits
        start = 0
        for symbol, freq in enumerate(freqs):
            if slot < start + freq:
                self.state = freq * (self.state // 2**prob_bits) + slot - start
                self._refill()
                return symbol
            start += freq
        raise AssertionError("frequencies do not sum to 2^prob_bits")


class Fields(NamedTuple):
    """The fields of a header, under names of its own."""

    model_id: int
    height: int
    width: int
    rate: int = 0
    schedule: int = 0
    stages_sent: int = 0
    caption_codec: int = 0
    caption: bytes = b""
    dense: bool = True
    seed: int = 0


def from_table(freqs: Sequence[int], symbol: int) -> Symbol:
    return Symbol(sum(freqs[:symbol]), freqs[symbol], 12)


def number(freqs: Sequence[int], value: int) -> list[Symbol]:
    """A number >= 1 as exponent and the bits below its leading one, 12 at a time from the end."""
    binary = f"{value - 1:b}" if value > 1 else ""
    symbols = [from_table(freqs, len(binary))]
    below = binary[1:]
    while below:
        width = len(below) % 12 or 12
        chunk, below = below[:width], below[width:]
        symbols.append(Symbol(int(chunk, 2) * 2 ** (12 - width), 2 ** (12 - width), 12))
    return symbols


def header_symbols(fields: Fields) -> list[Symbol]:
    """All symbols of header and caption in decoding order."""
    symbols = [from_table(RATE, fields.rate), from_table(SCHEDULE, fields.schedule)]
    if fields.stages_sent == 0:
        symbols.append(from_table(ALL_STAGES, 0))
    else:
        symbols.append(from_table(ALL_STAGES, 1))
        symbols += number(STAGES_EXPONENT, fields.stages_sent)
        symbols += number(SEED_EXPONENT, fields.seed + 1)
    if (fields.height, fields.width) == (512, 512):
        symbols.append(from_table(STANDARD_SIZE, 0))
    else:
        symbols.append(from_table(STANDARD_SIZE, 1))
        symbols += number(SIDE_EXPONENT, fields.height)
        symbols += number(SIDE_EXPONENT, fields.width)
    symbols.append(from_table(DENSE, 0 if fields.dense else 1))
    symbols.append(from_table(CAPTION_CODEC, fields.caption_codec))
    if fields.caption_codec in (1, 2):
        symbols += number(CAPTION_EXPONENT, len(fields.caption))
        symbols += [Symbol(16 * byte, 16, 12) for byte in fields.caption]
    return symbols


def check(fields: Fields, tokens: Sequence[int], caption_model: bytes = b"") -> int:
    """The check of a file; tokens in raster order, -1 where not sent.

    caption_model: the fingerprint of the model that coded the caption (codec 3).
    """
    data = bytes([0xFC, 0x21]) + fields.model_id.to_bytes(2, "big")
    data += bytes([fields.rate, fields.schedule])
    data += fields.stages_sent.to_bytes(4, "big")
    if fields.stages_sent:
        data += fields.seed.to_bytes(2, "big")
    data += fields.height.to_bytes(4, "big") + fields.width.to_bytes(4, "big")
    data += bytes([0 if fields.dense else 1, fields.caption_codec])
    data += len(fields.caption).to_bytes(4, "big") + fields.caption
    data += caption_model
    for token in tokens:
        data += token.to_bytes(4, "little", signed=True)
    return crc16(data)


def write(fields: Fields, token_symbols: Sequence[Symbol], check_value: int) -> bytes:
    """A whole file; token symbols in coding order, behind those of a caption with codec 3."""
    plain = bytes([0xFC, 0x21]) + fields.model_id.to_bytes(2, "big")
    return plain + rans_encode([*header_symbols(fields), *token_symbols], check_value)


def read_number(decoder: RansDecoder, freqs: Sequence[int]) -> int:
    length = decoder.symbol(freqs, 12)
    binary = "1" if length else "0"
    while len(binary) < length:
        width = (length - len(binary)) % 12 or 12
        chunk = decoder.symbol([2 ** (12 - width)] * 2**width, 12)
        binary += f"{chunk:0{width}b}"
    return int(binary, 2) + 1


def read_header(data: bytes) -> tuple[Fields, RansDecoder]:
    """Read a valid file's header; the decoder is left before the first token."""
    assert data[:2] == bytes([0xFC, 0x21])
    decoder = RansDecoder(data, position=4)
    rate = decoder.symbol(RATE, 12)
    schedule = decoder.symbol(SCHEDULE, 12)
    stages_sent = seed = 0
    if decoder.symbol(ALL_STAGES, 12):
        stages_sent = read_number(decoder, STAGES_EXPONENT)
        seed = read_number(decoder, SEED_EXPONENT) - 1
    height = width = 512
    if decoder.symbol(STANDARD_SIZE, 12):
        height = read_number(decoder, SIDE_EXPONENT)
        width = read_number(decoder, SIDE_EXPONENT)
    dense = decoder.symbol(DENSE, 12) == 0
    codec = decoder.symbol(CAPTION_CODEC, 12)
    length = read_number(decoder, CAPTION_EXPONENT) if codec in (1, 2) else 0
    caption = bytes(decoder.symbol([16] * 256, 12) for _ in range(length))
    model_id = 256 * data[2] + data[3]
    fields = Fields(
        model_id, height, width, rate, schedule, stages_sent, codec, caption, dense, seed
    )
    return fields, decoder
