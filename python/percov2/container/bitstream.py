"""The ``.pcv2`` file before its tokens: plain prefix, entropy-coded header and caption.

docs/reference/bitstream.md is normative. This module needs only the standard library, so that a
file can be inspected without the compiled coder. It never codes tokens. The writer pushes the
tokens onto a rANS stack, then the intervals of ``header_intervals``. The reader decodes the header
and the caption in plain Python and returns the coder's state.
"""

from __future__ import annotations

import binascii
import math
import struct
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

__all__ = [
    "CAPTION_DEFLATE",
    "CAPTION_MODEL",
    "CAPTION_NONE",
    "CAPTION_RAW",
    "DENSE_SLACK",
    "MAX_CAPTION_BYTES",
    "MAX_DRAWN_TOKENS",
    "MAX_PIXELS",
    "MAX_SEED",
    "MAX_SIDE",
    "MAX_SPARSE_STAGES",
    "MAX_SPARSE_TOKENS",
    "MAX_STAGES_SENT",
    "PREFIX_BYTES",
    "PROB_BITS",
    "RATES",
    "SCHEDULE_INDICES",
    "BitstreamError",
    "Header",
    "ParsedFile",
    "check",
    "header_intervals",
    "is_file",
    "keeps_dense_promise",
    "prefix",
    "read",
    "version_fault",
]


_MAGIC = 0xFC2
"""First 12 bits of a file. The byte 0xFC occurs in no UTF-8 text."""
_VERSION = 1
"""Version of the format, in the next 4 bits."""
PREFIX_BYTES = 4
"""Plain bytes before the rANS stream: magic, version and model id."""

PROB_BITS = 12
"""All header and caption symbols are coded with probabilities in 1/4096."""
_STATE_BOUND = 1 << 23
"""The decoder refills states below this value while bytes remain."""

MAX_PIXELS = 64_000_000
"""The reader's default limit of height * width."""
MAX_SIDE = 1 << 16
MAX_STAGES_SENT = 1 << 16
MAX_SEED = (1 << 16) - 1
MAX_CAPTION_BYTES = 4096
DENSE_SLACK = 512
"""Number of tokens that the dense promise allows in addition to eight per byte."""
MAX_SPARSE_STAGES = 4096
"""Largest number of stages of a file without the dense promise. Each stage costs a model pass."""
MAX_SPARSE_TOKENS = 1 << 16
"""Largest token map without the dense promise that a reader decodes unasked. 20 bytes may declare
any map, and each token costs time."""
MAX_DRAWN_TOKENS = 1 << 16
"""Largest token map that a file may hold in part, because drawn tokens cost no bits."""

CAPTION_NONE, CAPTION_RAW, CAPTION_DEFLATE, CAPTION_MODEL = 0, 1, 2, 3
"""Caption codecs; 4 and 5 are reserved."""

_RATE = (1536, 1024, 768, 96, 96, 96, 96, 43, 43, 43, 43, 43, 43, 42, 42, 42)
_SCHEDULE = (1280, 467, 467, 467, 467, 467, 467, 14)  # the last one is reserved
_ALL_STAGES = (3840, 256)
_STAGES_EXPONENT = (640, 640, 896, 896, 512, 43, 43, 43, 43, 43, 43, 43, 43, 42, 42, 42, 42)
_SEED_EXPONENT = (4032, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4)
_CAPTION_CODEC = (3712, 96, 96, 128, 32, 32)  # the last two are reserved
_STANDARD_SIZE = (3712, 384)
_SIDE_EXPONENT = (4, 4, 8, 8, 16, 24, 48, 80, 192, 384, 768, 784, 832, 832, 80, 24, 8)
_DENSE = (4092, 4)
_CAPTION_EXPONENT = (16, 16, 64, 192, 704, 1024, 1024, 704, 256, 64, 16, 8, 8)

RATES = len(_RATE)
SCHEDULE_INDICES = len(_SCHEDULE) - 1
_KNOWN_CAPTION_CODECS = 4
_STANDARD_SIDE = 512


class BitstreamError(ValueError):
    """The error for bytes that are not a valid ``.pcv2`` file. The message names the fault."""


@dataclass(frozen=True)
class Header:
    """The fields of a file before its tokens.

    Attributes:
        model_id: 0..65535, the id of the rate's tokens. It is the first 16 bits of a SHA-256 over
            token side, codebook and entropy model (docs/reference/bitstream.md, section 1).
        height: image rows in pixels, 1..65536.
        width: image columns in pixels, 1..65536.
        rate: index of the rate in the model's list, 0..15.
        schedule: index of the entropy schedule (``percov2.entropy.schedule.SCHEDULES``), 0..6.
        stages_sent: last stage whose tokens the file holds. A decoder draws the tokens of the later
            stages. 0 means that the file holds all stages.
        seed: seed of these draws, 0..65535. It is 0 if the file holds all stages.
        caption_codec: ``CAPTION_NONE``, ``CAPTION_RAW``, ``CAPTION_DEFLATE`` or ``CAPTION_MODEL``.
        caption: the coded bytes of the caption, at most 4096. The last byte is not zero. The field
            is empty if and only if the codec is ``CAPTION_NONE``, with one exception: with
            ``CAPTION_MODEL`` it is the text in UTF-8, and empty until a caption model has read it.
        dense: True if the file keeps the promise of ``keeps_dense_promise``.

    Raises:
        ValueError: a field is out of its range.
    """

    model_id: int
    height: int
    width: int
    rate: int = 0
    schedule: int = 0
    stages_sent: int = 0
    caption_codec: int = CAPTION_NONE
    caption: bytes = b""
    dense: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("model_id", 0, 0xFFFF),
            ("height", 1, MAX_SIDE),
            ("width", 1, MAX_SIDE),
            ("rate", 0, RATES - 1),
            ("schedule", 0, SCHEDULE_INDICES - 1),
            ("stages_sent", 0, MAX_STAGES_SENT),
            ("seed", 0, MAX_SEED if self.stages_sent else 0),
            ("caption_codec", 0, _KNOWN_CAPTION_CODECS - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"header field {name} must be {low}..{high}, got {value}")
        if len(self.caption) > MAX_CAPTION_BYTES:
            raise ValueError(
                f"a coded caption has at most {MAX_CAPTION_BYTES} bytes, got {len(self.caption)}"
            )
        unread = self.caption_codec == CAPTION_MODEL and not self.caption
        if (self.caption_codec == CAPTION_NONE) != (self.caption == b"") and not unread:
            raise ValueError(
                f"caption codec {self.caption_codec} does not go with {len(self.caption)} "
                "caption bytes: codec 0 is for no bytes, the others for at least one"
            )
        if self.caption.endswith(b"\0"):
            raise ValueError("the last byte of a coded caption must not be zero")


@dataclass(frozen=True)
class ParsedFile:
    """The header and caption of a file, and the coder's state after them.

    Attributes:
        header: the decoded fields.
        state: rANS state before the first token, or before the caption if a model must read it. It
            has been refilled, so it is at least 2^23 unless no byte is left.
        position: index in the whole file of the next byte to read.
        whole: True if no symbol of the header or caption was read after the end of the data. A
            complete short file may also have False here. A truncated file with False has no valid
            header.
        bits: cost in bits (sum of -log2 p, or plain bits) by name: "header", "caption" (its length
            and bytes) and "check". Tokens and coder overhead make up the rest of the file.
    """

    header: Header
    state: int
    position: int
    whole: bool
    bits: dict[str, float]


def prefix(header: Header) -> bytes:
    """Return the four plain bytes that open a file."""
    return struct.pack(">HH", _MAGIC << 4 | _VERSION, header.model_id)


def check(header: Header, tokens_le_int32: bytes, caption_model: bytes = b"") -> int:
    """Return the 16-bit check, the initial state of the file's rANS encoder.

    Args:
        header: the fields of the file.
        tokens_le_int32: the token map in raster order as little-endian int32, with -1 for each
            token that the file does not hold.
        caption_model: fingerprint of the caption model. It is empty for other caption codecs.
    """
    seed = struct.pack(">H", header.seed) if header.stages_sent else b""
    fields = struct.pack(">BBI", header.rate, header.schedule, header.stages_sent) + seed
    fields += struct.pack(
        ">IIBBI",
        header.height,
        header.width,
        0 if header.dense else 1,
        header.caption_codec,
        len(header.caption),
    )
    crc = binascii.crc_hqx(prefix(header) + fields + header.caption + caption_model, 0xFFFF)
    return binascii.crc_hqx(tokens_le_int32, crc)


def keeps_dense_promise(token_count: int, payload_bytes: int, tail_tokens: int) -> bool:
    """Return True if a file may carry the dense flag.

    The flag bounds the work that a damaged size field can cause. A file of large plain areas may
    break the promise, and then its writer clears the flag. A reader refuses a file that has the
    flag but breaks the promise.

    Args:
        token_count: number of tokens in the file.
        payload_bytes: number of bytes after the four plain bytes.
        tail_tokens: number of tokens to decode once no byte is left and the state is below 2^23. A
            writer may give the number of tokens that it pushed before the first output byte, which
            is never smaller.
    """
    return token_count <= 8 * payload_bytes + DENSE_SLACK and tail_tokens <= DENSE_SLACK


def header_intervals(header: Header) -> list[tuple[int, int]]:
    """Return the intervals (start, freq) of the header and caption, in units of 1/4096.

    They are in decoding order. A writer pushes them in reverse order, after all tokens and the
    pieces of a modelled caption.
    """
    out: list[tuple[int, int]] = []

    def put(table: tuple[int, ...], symbol: int) -> None:
        out.append((sum(table[:symbol]), table[symbol]))

    def put_number(table: tuple[int, ...], number: int) -> None:
        exponent = (number - 1).bit_length()
        put(table, exponent)
        left = max(exponent - 1, 0)
        while left:
            width = (left - 1) % PROB_BITS + 1
            left -= width
            chunk = (number - 1) >> left & ((1 << width) - 1)
            out.append((chunk << (PROB_BITS - width), 1 << (PROB_BITS - width)))

    put(_RATE, header.rate)
    put(_SCHEDULE, header.schedule)
    put(_ALL_STAGES, int(header.stages_sent != 0))
    if header.stages_sent:
        put_number(_STAGES_EXPONENT, header.stages_sent)
        put_number(_SEED_EXPONENT, header.seed + 1)
    standard = header.height == header.width == _STANDARD_SIDE
    put(_STANDARD_SIZE, int(not standard))
    if not standard:
        put_number(_SIDE_EXPONENT, header.height)
        put_number(_SIDE_EXPONENT, header.width)
    put(_DENSE, int(not header.dense))
    put(_CAPTION_CODEC, header.caption_codec)
    if header.caption_codec not in (CAPTION_NONE, CAPTION_MODEL):
        put_number(_CAPTION_EXPONENT, len(header.caption))
        for byte in header.caption:
            out.append((byte << (PROB_BITS - 8), 1 << (PROB_BITS - 8)))
    return out


class _Decoder:
    """The rANS decoder of docs/reference/bitstream.md, section 3, which also counts bits."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data = data
        self.state = 0
        self.position = position
        self.bits = 0.0
        self.whole = True
        self._refill()

    def _refill(self) -> None:
        while self.state < _STATE_BOUND and self.position < len(self.data):
            self.state = self.state << 8 | self.data[self.position]
            self.position += 1

    def _advance(self, start: int, freq: int) -> None:
        self.whole &= self.state >= _STATE_BOUND
        slot = self.state & ((1 << PROB_BITS) - 1)
        self.state = freq * (self.state >> PROB_BITS) + slot - start
        self.bits += PROB_BITS - math.log2(freq)
        self._refill()

    def symbol(self, table: tuple[int, ...]) -> int:
        starts = [0, *accumulate(table)]
        symbol = bisect_right(starts, self.state & ((1 << PROB_BITS) - 1)) - 1
        self._advance(starts[symbol], table[symbol])
        return symbol

    def uniform(self, width: int) -> int:
        """Decode a number of ``width`` (at most 12) bits, with all values equally likely."""
        shift = PROB_BITS - width
        value = (self.state & ((1 << PROB_BITS) - 1)) >> shift
        self._advance(value << shift, 1 << shift)
        return value

    def number(self, table: tuple[int, ...]) -> int:
        """Decode a number >= 1: its exponent with a table, then the bits below its leading 1."""
        exponent = self.symbol(table)
        value, left = int(exponent > 0), max(exponent - 1, 0)
        while left:
            width = (left - 1) % PROB_BITS + 1
            left -= width
            value = value << width | self.uniform(width)
        return value + 1


def read(data: bytes, max_pixels: int = MAX_PIXELS) -> ParsedFile:
    """Read the prefix, header and caption of a file.

    Args:
        data: the whole file.
        max_pixels: largest number of pixels that an image may have.

    Raises:
        BitstreamError: the data is empty, too short, not a ``.pcv2`` file or of another version, it
            contains an impossible field, or it declares an image that is too large.
    """
    data = bytes(data)
    _read_prefix(data)
    decoder = _Decoder(data, PREFIX_BYTES)
    rate = decoder.symbol(_RATE)
    schedule = decoder.symbol(_SCHEDULE)
    if schedule >= SCHEDULE_INDICES:
        raise BitstreamError(
            f"impossible header field: schedule {schedule} is not known to this version of percov2"
        )
    stages_sent = seed = 0
    if decoder.symbol(_ALL_STAGES):
        stages_sent = decoder.number(_STAGES_EXPONENT)
        seed = decoder.number(_SEED_EXPONENT) - 1
    height = width = _STANDARD_SIDE
    if decoder.symbol(_STANDARD_SIZE):
        height, width = decoder.number(_SIDE_EXPONENT), decoder.number(_SIDE_EXPONENT)
        if height == width == _STANDARD_SIDE:
            raise BitstreamError("impossible header field: size 512x512 in its long form")
    if height * width > max_pixels:
        raise BitstreamError(
            f"the file declares a picture of {width}x{height} = {width * height} pixels, more than "
            f"the limit of {max_pixels}; raise max_pixels if you trust the file"
        )
    dense = not decoder.symbol(_DENSE)
    codec = decoder.symbol(_CAPTION_CODEC)
    if codec >= _KNOWN_CAPTION_CODECS:
        raise BitstreamError(
            f"impossible header field: caption codec {codec} is not known to this version of "
            "percov2"
        )
    header_bits = 8 * PREFIX_BYTES + decoder.bits
    caption = _read_caption(decoder) if codec in (CAPTION_RAW, CAPTION_DEFLATE) else b""
    caption_bits = 8 * PREFIX_BYTES + decoder.bits - header_bits
    return ParsedFile(
        header=Header(
            model_id=int.from_bytes(data[2:4], "big"),
            height=height,
            width=width,
            rate=rate,
            schedule=schedule,
            stages_sent=stages_sent,
            caption_codec=codec,
            caption=caption,
            dense=dense,
            seed=seed,
        ),
        state=decoder.state,
        position=decoder.position,
        whole=decoder.whole,
        bits={"header": header_bits, "caption": caption_bits, "check": 16.0},
    )


def is_file(start: bytes) -> bool:
    """Return True if bytes begin as a ``.pcv2`` file of any version does."""
    return len(start) >= 2 and start[0] == _MAGIC >> 4 and start[1] >> 4 == _MAGIC & 15


def version_fault(start: bytes) -> str:
    """Return "" for bytes that begin as a file of a version that is read, else the fault."""
    if len(start) > 1 and start[1] & 15 != _VERSION:
        return (
            f"unsupported .pcv2 version {start[1] & 15}: this version of percov2 reads {_VERSION}"
        )
    return ""


def _read_prefix(data: bytes) -> None:
    if not data:
        raise BitstreamError("the file is empty")
    starts = f"it starts with {data[:4].hex(' ')}, a .pcv2 file with fc 2x"
    if data[0] != _MAGIC >> 4 or (len(data) > 1 and data[1] >> 4 != _MAGIC & 15):
        raise BitstreamError(f"not a .pcv2 file: {starts}")
    if fault := version_fault(data):
        raise BitstreamError(fault)
    if len(data) < PREFIX_BYTES:
        raise BitstreamError(
            f"the file is too short: {len(data)} bytes, a header needs at least {PREFIX_BYTES}"
        )
    # A writer flushes its state without leading zeros. Accepting them would give one content
    # several files.
    if data[PREFIX_BYTES : PREFIX_BYTES + 1] == b"\0":
        raise BitstreamError("damaged file: its coded part begins with a zero byte")


def _read_caption(decoder: _Decoder) -> bytes:
    length = decoder.number(_CAPTION_EXPONENT)
    # A byte costs 8 bits, and the state holds fewer than 31 + 4 bits beyond the bytes left. The
    # last byte is never zero, so this bound is exact (docs/reference/bitstream.md, section 5).
    room = len(decoder.data) - decoder.position + 4
    if length > room:
        raise BitstreamError(
            f"impossible header field: a caption of {length} coded bytes, "
            f"but the file has room for {room} at most"
        )
    caption = bytes(decoder.uniform(8) for _ in range(length))
    if caption.endswith(b"\0"):
        raise BitstreamError("impossible header field: the last byte of the coded caption is zero")
    return caption
