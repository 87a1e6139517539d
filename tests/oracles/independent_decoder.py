"""A decoder of `.pcv2` files up to the tokens, and a writer, from the documents alone.

docs/reference/bitstream.md, schedules.md and entropy-model.md claim to suffice for such a decoder.
This one is plain, slow Python without numpy, written without the package's source, and shares no
code with it. "§" is a section of the document that a part names.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from binascii import crc_hqx
from collections.abc import Callable, Sequence
from typing import NamedTuple

from oracles.independent_coder import LOWER, Coder, Interval, Symbol, encode, symbol_of
from oracles.independent_model import (
    Grid,
    Model,
    draw,
    fingerprint,
    intervals,
    require,
    stage_map,
    table,
)

# --------------------------------------------------------------------------- bitstream.md §3–5

MAX_PIXELS = 64_000_000

RATE = table(1536, 1024, 768, *[96] * 4, *[43] * 6, *[42] * 3)
SCHEDULE = table(1280, *[467] * 6, 14)
ALL_STAGES = table(3840, 256)
STAGES_EXPONENT = table(640, 640, 896, 896, 512, *[43] * 8, *[42] * 4)
SEED_EXPONENT = table(4032, *[4] * 16)
STANDARD_SIZE = table(3712, 384)
SIDE_EXPONENT = table(4, 4, 8, 8, 16, 24, 48, 80, 192, 384, 768, 784, 832, 832, 80, 24, 8)
DENSE = table(4092, 4)
CAPTION_CODEC = table(3712, 96, 96, 128, 32, 32)
CAPTION_EXPONENT = table(16, 16, 64, 192, 704, 1024, 1024, 704, 256, 64, 16, 8, 8)


class Broken(ValueError):
    """The check fails: what §8 may restore."""


class Header(NamedTuple):
    """The fields before the caption; `stages_sent` is 0 for all, `dense` the coded symbol."""

    model_id: int
    height: int
    width: int
    rate: int = 0
    schedule: int = 0
    stages_sent: int = 0
    seed: int = 0
    dense: int = 0
    caption_codec: int = 0


class Decoded(NamedTuple):
    """What a file says. `stages` of the tokens were in it, the others have been drawn."""

    header: Header
    caption: str
    tokens: list[list[int]]
    stages: int


ModelOf = Callable[[int, int], tuple[Model, int]]
CaptionModel = tuple[Model, list[str]]


def open_file(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Header, Coder]:
    """§2, 1 and 2, up to the caption codec."""
    require(len(data) > 0, "an empty file")
    require(data[0] == 0xFC and data[1:2] in (b"", b"\x21"), "another magic or version")
    require(len(data) >= 4, "a file of less than four bytes")
    require(data[4:5] != b"\x00", "the payload begins with a zero byte")
    coder = Coder(data, 4)
    rate, schedule = coder.symbol(RATE), coder.symbol(SCHEDULE)
    require(schedule != 7, "a reserved schedule")
    sent = coder.number(STAGES_EXPONENT) if coder.symbol(ALL_STAGES) else 0
    seed = coder.number(SEED_EXPONENT) - 1 if sent else 0
    height = width = 512
    if coder.symbol(STANDARD_SIZE):
        height, width = coder.number(SIDE_EXPONENT), coder.number(SIDE_EXPONENT)
        require((height, width) != (512, 512), "512×512 in the long form")
    require(height * width <= max_pixels, "too many pixels")
    dense, codec = coder.symbol(DENSE), coder.symbol(CAPTION_CODEC)
    require(codec <= 3, "a reserved caption codec")
    identity = int.from_bytes(data[2:4], "big")
    return Header(identity, height, width, rate, schedule, sent, seed, dense, codec), coder


def stored_caption(coder: Coder) -> bytes:
    """The caption bytes of codecs 1 and 2."""
    length = coder.number(CAPTION_EXPONENT)
    require(length <= len(coder.data) - coder.position + 4, "a caption longer than the file")
    caption = bytes(coder.bits(8) for _ in range(length))
    require(caption[-1] != 0, "the caption's last byte is zero")
    return caption


def _spelt_caption(coder: Coder, model: Model, texts: list[str]) -> tuple[bytes, bytes]:
    """The caption of codec 3, pieces until the end, and the caption model's fingerprint."""
    encoded = [text.encode() for text in texts]
    told = b"".join(bytes([len(text)]) + text for text in encoded)
    pieces = [b"", *(bytes([b]) for b in range(256)), *encoded]
    require(len(pieces) == model.config["codebook_size"], "pieces of another model")
    grid, spelt = Grid(model, 1, 64), b""
    for x in range(64):
        piece = coder.symbol(*intervals(grid.logits((0, x))))
        if piece == 0:
            require(spelt[:1] == b" ", "the pieces do not begin with a space")
            return spelt[1:], hashlib.sha256(fingerprint(model) + told).digest()
        spelt += pieces[piece]
        grid.know({(0, x): piece})
    raise ValueError("the pieces have no end")


def _text(codec: int, caption: bytes) -> str:
    """§2, 6: the caption's text."""
    if codec == 0:
        return ""
    if codec == 2:
        inflater = zlib.decompressobj(-15)
        try:
            inflated = inflater.decompress(caption + bytes(4), 4097)
        except zlib.error as error:
            raise ValueError("the caption is no deflate stream") from error
        require(inflater.eof and len(inflater.unused_data) <= 4, "a caption of another length")
        caption = inflated
    require(1 <= len(caption) <= 4096, "a caption of another length")
    text = caption.decode("utf-8")  # UnicodeDecodeError is a ValueError
    require(not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), "a control character")
    return text


# --------------------------------------------------------------------------- bitstream.md §6–9


def prefix(head: Header) -> bytes:
    """§1: the first four bytes."""
    return b"\xfc\x21" + struct.pack(">H", head.model_id)


def check(head: Header, caption: bytes, tokens: Sequence[int], identity: bytes = b"") -> int:
    """§9; `identity` is the fingerprint of the model that coded the caption (codec 3)."""
    told = prefix(head) + struct.pack(">BBI", head.rate, head.schedule, head.stages_sent)
    told += struct.pack(">H", head.seed) if head.stages_sent else b""
    told += struct.pack(">IIBB", head.height, head.width, head.dense, head.caption_codec)
    told += struct.pack(">I", len(caption)) + caption + identity
    return crc_hqx(told + struct.pack(f"<{len(tokens)}i", *tokens), 0xFFFF)


def _decode(
    data: bytes,
    model_of: ModelOf,
    captions: CaptionModel | None,
    lenient: bool = False,
    cut: bool = False,
) -> Decoded:
    """lenient: whatever the dense promise says (§8); cut: whatever the check says, too."""
    head, coder = open_file(data)
    caption, identity = b"", b""
    if head.caption_codec in (1, 2):
        caption = stored_caption(coder)
    require(coder.trusted or not cut, "header or caption are cut")
    model, side = model_of(head.model_id, head.rate)
    h, w = -(-head.height // side), -(-head.width // side)
    most = 8 * (len(data) - 4) + 512
    require(h * w <= (2**16 if head.stages_sent else 2**24), "too many tokens")
    # Before the stages are made: of a file with all of them, the promise bounds all tokens.
    unbound = lenient or head.dense or head.stages_sent
    require(bool(unbound) or h * w <= most, "a broken promise")
    stages = stage_map(head.schedule, h, w)
    count = max(stages)
    held = head.stages_sent or count
    require(head.stages_sent < count, "more stages sent than there are, or all of them")
    require(not (lenient or head.stages_sent) or count <= 4096, "too many stages")
    left = sum(stage <= held for stage in stages)
    require(lenient or (count <= 4096 if head.dense else left <= most), "a broken promise")
    if head.caption_codec == 3:
        if captions is None:
            raise ValueError("the caption needs a caption model")
        caption, identity = _spelt_caption(coder, *captions)
        require(coder.trusted or not cut, "the caption is cut")
    grid, tokens = Grid(model, h, w), [-1] * (h * w)
    places: list[list[int]] = [[] for _ in range(count + 1)]
    for n, stage in enumerate(stages):
        places[stage].append(n)

    def logits(n: int) -> list[int]:
        return grid.logits(divmod(n, w))

    def know(stage: int) -> None:
        if stage < count:
            grid.know({divmod(n, w): tokens[n] for n in places[stage]})

    for stage in range(1, held + 1):
        for n in places[stage]:
            late = coder.x < LOWER and left > 512  # below the bound, no byte is left to refill
            require(lenient or head.dense or not late, "a broken promise")
            tokens[n] = coder.symbol(*intervals(logits(n)))
            left -= 1
        if cut and not coder.trusted:
            held = stage - 1
            break
        know(stage)
    # Of a file that is complete but for its check, §8 says more below.
    require(coder.exhausted, "data behind the last token", ValueError if cut else Broken)
    whole = coder.finished(check(head, caption, tokens, identity))
    require(cut or whole, "the check fails", Broken)
    text = _text(head.caption_codec, caption)
    for stage in range(held + 1, count + 1):
        for n in places[stage]:
            tokens[n] = draw(logits(n), head.seed, n)
        know(stage)
    return Decoded(head, text, [tokens[r * w : (r + 1) * w] for r in range(h)], held)


def decode(data: bytes, model_of: ModelOf, caption_model: CaptionModel | None = None) -> Decoded:
    """Decode a file.

    `model_of` gives for a model id and a rate the entropy model and the token side in pixels, or
    raises. ValueError: the file is to be refused.
    """
    return _decode(data, model_of, caption_model)


def decode_cut(
    data: bytes, model_of: ModelOf, caption_model: CaptionModel | None = None
) -> Decoded:
    """Decode a file that may lack its end: what of it holds, and draw the rest (§8)."""
    try:
        return _decode(data, model_of, caption_model, lenient=True)
    except Broken:
        return _decode(data, model_of, caption_model, lenient=True, cut=True)


# --------------------------------------------------------------------------- the other way


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
