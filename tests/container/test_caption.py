"""Captions: text <-> coded bytes, and damaged ones."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from percov2.container.bitstream import BitstreamError, Header
from percov2.container.captions import (
    Captioner,
    NoCaptioner,
    TextCaptioner,
    decode_caption,
    encode_caption,
)

PAPER_LIKE = "a red barn in front of a snowy mountain and a lake in front of a red barn"

texts = st.text(
    alphabet=st.one_of(st.sampled_from("abe \n\t"), st.characters(exclude_categories=("Cc", "Cs"))),
    max_size=400,
)


def deflate(raw: bytes, level: int = 9) -> bytes:
    compressor = zlib.compressobj(level, zlib.DEFLATED, -15)
    return compressor.compress(raw) + compressor.flush()


@given(text=texts)
@example(text="")
@example(text="a")
@example(text=PAPER_LIKE)
@example(text="a" * 4096)
@example(text="\u00e9" * 2048)
@example(text="\U0001f3d4 \u5c71")
@settings(max_examples=300, deadline=None)
def test_round_trip(text: str) -> None:
    codec, coded = encode_caption(text)
    assert decode_caption(codec, coded) == text
    assert len(coded) <= len(text.encode())
    Header(1, 512, 512, caption_codec=codec, caption=coded)  # the header takes what comes out


def test_picks_the_shortest() -> None:
    assert encode_caption("") == (0, b"")
    assert encode_caption("a lake") == (1, b"a lake")
    codec, coded = encode_caption(PAPER_LIKE)
    assert codec == 2
    assert len(coded) <= len(deflate(PAPER_LIKE.encode())) < len(PAPER_LIKE)
    assert len(encode_caption("a" * 4096)[1]) < 30


def test_zero_bytes_at_the_end_of_deflate_are_not_stored() -> None:
    raw = b"a lake, a lake, a lake, a lake"
    stream = deflate(raw)
    assert stream.endswith(b"\0")
    codec, coded = encode_caption(raw.decode())
    assert (codec, coded) == (2, stream.rstrip(b"\0"))


def test_reads_what_any_deflate_writer_made() -> None:
    for level in range(10):
        coded = deflate(PAPER_LIKE.encode(), level).rstrip(b"\0")
        assert decode_caption(2, coded) == PAPER_LIKE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" * 4097, "4097 bytes of UTF-8, the limit is 4096"),
        ("\u00e9" * 2049, "4098 bytes"),
        ("a\0b", r"control character '\\x00'"),
        ("\x1b[2J", r"control character '\\x1b'"),
        ("\x9b", "control character"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_refuses_text_that_cannot_be_stored(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_caption(text)


@pytest.mark.parametrize(
    ("codec", "coded", "message"),
    [
        (0, b"x", "1 bytes where there is none"),
        (1, b"", "0 bytes, 1 to 4096"),
        (1, b"x" * 4097, "4097 bytes"),
        (1, b"\xff\xfe", "not UTF-8"),
        (1, b"\x1b[2J", "control character"),
        (2, b"\xff\xff\xff", "not a deflate stream"),
        (2, deflate(b"x" * 5000), "inflates to over 4096 bytes"),
        (2, deflate(b"\0" * 50_000_000), "inflates to over 4096 bytes"),
        (2, b"\x01\x32\x00\xcd\xffonly ten b", "does not end where it should"),
        (2, deflate(PAPER_LIKE.encode()) + b"more", "does not end where it should"),
        (2, deflate(b"")[:1], "0 bytes, 1 to 4096"),
        (2, deflate(b"\xff\xfe"), "not UTF-8"),
        (4, b"x", "unknown caption codec 4"),
        (-1, b"x", "unknown caption codec -1"),
    ],
)
def test_refuses_damaged_captions(codec: int, coded: bytes, message: str) -> None:
    with pytest.raises(BitstreamError, match=message):
        decode_caption(codec, coded)


@given(codec=st.integers(0, 6), coded=st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_any_bytes_decode_or_are_refused(codec: int, coded: bytes) -> None:
    try:
        text = decode_caption(codec, coded)
    except BitstreamError:
        return
    assert len(text.encode()) <= 4096
    assert decode_caption(*encode_caption(text)) == text


def test_no_captioner() -> None:
    captioner: Captioner = NoCaptioner()
    assert captioner([object()] * 3) == ["", "", ""]
    assert captioner([]) == []


def test_text_captioner() -> None:
    captioner: Captioner = TextCaptioner("a lake")
    assert captioner([object()] * 2) == ["a lake", "a lake"]
    assert TextCaptioner(["a", "b"])([1, 2]) == ["a", "b"]
    with pytest.raises(ValueError, match="2 captions for 3 images"):
        TextCaptioner(["a", "b"])([1, 2, 3])
    with pytest.raises(ValueError, match="limit is 4096"):
        TextCaptioner("a" * 5000)
    with pytest.raises(ValueError, match="control character"):
        TextCaptioner(["fine", "not\0"])
