"""Sources of captions, and the codecs between a caption's text and its bytes in a file's header."""

from __future__ import annotations

import math
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from percov2.container.bitstream import (
    CAPTION_DEFLATE,
    CAPTION_MODEL,
    CAPTION_NONE,
    CAPTION_RAW,
    MAX_CAPTION_BYTES,
    PROB_BITS,
    BitstreamError,
    Header,
    header_intervals,
)

__all__ = [
    "CAPTIONERS",
    "CAPTION_CODECS",
    "Captioner",
    "NoCaptioner",
    "TextCaptioner",
    "check_captioner",
    "decode_caption",
    "encode_caption",
]


CAPTION_CODECS = ("none", "raw", "deflate", "model")
"""Names of the caption codecs of ``percov2.container.bitstream``. The index is the number."""
CAPTIONERS = ("none", "text", "blip2", "molmo2")
"""Names accepted by ``percov2.captioners.open_captioner``."""

# A deflate stream often ends in zero bits, so zero bytes at its end are not stored. The reader
# appends this many zero bytes, which is more than any accepted stream has lost.
_DEFLATE_PADDING = 4


class Captioner(Protocol):
    """A callable that describes images in words, which guide the decoder."""

    def __call__(self, images: Sequence[Any]) -> list[str]:
        """Return one caption for each PIL image. An empty caption takes no space in a file."""
        ...


class NoCaptioner:
    """A captioner that gives every image an empty caption."""

    def __call__(self, images: Sequence[Any]) -> list[str]:
        """Return one empty string per image."""
        return [""] * len(images)


class TextCaptioner:
    """A captioner that returns texts of the user.

    Args:
        text: one caption for all images, or a list with one caption per image.

    Raises:
        ValueError: ``encode_caption`` refuses a text.
    """

    def __init__(self, text: str | Sequence[str]) -> None:
        self._text: str | list[str] = text if isinstance(text, str) else list(text)
        for caption in [self._text] if isinstance(self._text, str) else self._text:
            encode_caption(caption)

    def __call__(self, images: Sequence[Any]) -> list[str]:
        """Return one caption per image.

        Raises ValueError if a list of captions has another length than ``images``.
        """
        if isinstance(self._text, str):
            return [self._text] * len(images)
        if len(self._text) != len(images):
            raise ValueError(
                f"{len(self._text)} captions for {len(images)} images; give one per image"
            )
        return list(self._text)


def check_captioner(name: str, text: str = "", location: str | None = None) -> None:
    """Raise ValueError if ``percov2.captioners.open_captioner`` would refuse the arguments."""
    if name not in CAPTIONERS:
        raise ValueError(f"unknown captioner {name!r}; choose one of {', '.join(CAPTIONERS)}")
    if bool(text) != (name == "text"):
        raise ValueError(
            "captioner 'text' needs a caption"
            if name == "text"
            else f"captioner {name!r} does not accept a caption; leave out {text!r}"
        )
    if location is not None and name in ("none", "text"):
        raise ValueError(f"captioner {name!r} has no network: leave out {location!r}")
    encode_caption(text)


def encode_caption(
    text: str, model_bits: Callable[[str], float] | None = None
) -> tuple[int, bytes]:
    """Encode a caption with the codec that gives the fewest bits.

    Args:
        text: the caption, at most 4096 bytes of UTF-8, without control characters except tab and
            newline.
        model_bits: a function that returns the cost of a text with a caption model, in bits. None
            means that there is no model.

    Returns:
        (codec, coded bytes) for ``bitstream.Header``. An empty text gives
        (``CAPTION_NONE``, ``b""``).

    Raises:
        ValueError: the text is too long or not allowed.
    """
    if not text:
        return CAPTION_NONE, b""
    bad = _first_control_character(text)
    if bad is not None:
        raise ValueError(f"a caption cannot hold the control character {bad!r}; remove it")
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the caption is not valid Unicode text: {error}") from None
    if len(raw) > MAX_CAPTION_BYTES:
        raise ValueError(
            f"the caption has {len(raw)} bytes of UTF-8, the limit is {MAX_CAPTION_BYTES}; "
            "shorten it"
        )
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = (deflater.compress(raw) + deflater.flush()).rstrip(b"\0")
    costs = {(CAPTION_RAW, raw): _header_bits(CAPTION_RAW, raw)}
    if len(deflated) < len(raw) and _inflates_to(deflated, raw):
        costs[CAPTION_DEFLATE, deflated] = _header_bits(CAPTION_DEFLATE, deflated)
    if model_bits is not None:
        costs[CAPTION_MODEL, raw] = _header_bits(CAPTION_MODEL, raw) + model_bits(text)
    return min(costs, key=lambda coded: costs[coded])


def _header_bits(codec: int, coded: bytes) -> float:
    """Return the cost in bits of a header with this caption, without the model's part."""
    header = Header(0, 1, 1, 0, 0, caption_codec=codec, caption=coded)
    return sum(PROB_BITS - math.log2(freq) for _, freq in header_intervals(header))


def decode_caption(codec: int, coded: bytes) -> str:
    """Decode a caption. Memory and time are bounded for any input.

    Args:
        codec: ``CAPTION_NONE``, ``CAPTION_RAW``, ``CAPTION_DEFLATE`` or ``CAPTION_MODEL``.
        coded: the field ``caption`` of the header.

    Raises:
        BitstreamError: the codec is unknown, or ``encode_caption`` never writes such bytes.
    """
    if codec == CAPTION_NONE:
        if coded:
            raise BitstreamError(f"damaged caption: {len(coded)} bytes where there is none")
        return ""
    if codec in (CAPTION_RAW, CAPTION_MODEL):
        raw = coded
    elif codec == CAPTION_DEFLATE:
        raw = _inflate(coded)
    else:
        raise BitstreamError(f"unknown caption codec {codec}")
    if not 1 <= len(raw) <= MAX_CAPTION_BYTES:
        raise BitstreamError(f"damaged caption: {len(raw)} bytes, 1 to {MAX_CAPTION_BYTES} allowed")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BitstreamError("damaged caption: it is not UTF-8 text") from None
    bad = _first_control_character(text)
    if bad is not None:
        raise BitstreamError(f"damaged caption: it holds the control character {bad!r}")
    return text


def _inflate(coded: bytes) -> bytes:
    inflater = zlib.decompressobj(-15)
    try:
        raw = inflater.decompress(coded + bytes(_DEFLATE_PADDING), MAX_CAPTION_BYTES + 1)
    except zlib.error:
        raise BitstreamError("damaged caption: it is not a deflate stream") from None
    if len(raw) > MAX_CAPTION_BYTES:
        raise BitstreamError(f"damaged caption: it inflates to over {MAX_CAPTION_BYTES} bytes")
    if not inflater.eof or len(inflater.unused_data) > _DEFLATE_PADDING:
        raise BitstreamError("damaged caption: its deflate stream does not end where it should")
    return raw


def _inflates_to(coded: bytes, raw: bytes) -> bool:
    try:
        return _inflate(coded) == raw
    except BitstreamError:
        return False


def _first_control_character(text: str) -> str | None:
    for character in text:
        if character not in "\t\n" and unicodedata.category(character) == "Cc":
            return character
    return None
