"""Captions: text to coded bytes and back, by deflate or a model, and damaged ones."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from oracles import independent_decoder
from percov2 import Codec
from percov2.container import bitstream
from percov2.container.bitstream import BitstreamError, Header
from percov2.container.caption_model import (
    END,
    FIRST_BYTE,
    FIRST_LEARNED,
    MAX_PIECES,
    Alphabet,
    CaptionModel,
)
from percov2.container.captions import (
    Captioner,
    NoCaptioner,
    TextCaptioner,
    decode_caption,
    encode_caption,
)
from percov2.entropy import IntTransformer, order, stages
from percov2.entropy.staging import one_pass_logits
from percov2.entropy.transformer_config import TransformerConfig

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
@example(text="a lake, a lake, a lake, a lake")  # its deflate stream ends in a zero byte
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


LEARNED = [b" a", b" red", b" door", b" do", b"ors", b" \xc3\xa9", b"re"]
short_texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    alphabet = Alphabet(LEARNED)
    config = TransformerConfig(len(alphabet), dim=8, heads=1, head_dim=8, layers=1, hidden=8)
    path = tmp_path_factory.mktemp("captions")
    CaptionModel(alphabet, IntTransformer.random(config, seed=2)).save(path)
    return path


@pytest.fixture(scope="module")
def captions(folder: Path) -> CaptionModel:
    return CaptionModel.load(folder)


@pytest.fixture(scope="module")
def describing(codec: Codec, folder: Path) -> Codec:
    """The random codec with the random caption model, which it always uses."""

    class Always(Codec):
        def _coded_captions(self, texts, count):  # type: ignore[no-untyped-def]
            return [(bitstream.CAPTION_MODEL, text.encode()) for text in texts]

    return Always(codec.model, folder)


def fewest_pieces(data: bytes) -> int:
    """By trying every first piece."""
    if not data:
        return 0
    starts = [1] + [len(piece) for piece in LEARNED if data.startswith(piece)]
    return 1 + min(fewest_pieces(data[length:]) for length in starts)


@given(short_texts)
@example("a red doors")
@example(" a  red ")
@example("é\u0301\U0001f3a8")
def test_any_text_is_its_pieces_again(text: str) -> None:
    alphabet = Alphabet(LEARNED)
    pieces = alphabet.split(text)
    assert alphabet.join(pieces) == text.encode()
    assert END not in pieces
    assert max(pieces) < len(alphabet)
    if len(text) < 14:
        assert len(pieces) == fewest_pieces(b" " + text.encode())


def test_pieces_of_a_text() -> None:
    alphabet = Alphabet(LEARNED)
    assert alphabet.split("a red doors") == [
        FIRST_LEARNED,
        FIRST_LEARNED + 1,
        FIRST_LEARNED + 2,
        FIRST_BYTE + ord("s"),
    ]
    assert alphabet.split("doors red")[:2] == [FIRST_LEARNED + 2, FIRST_BYTE + ord("s")]
    assert alphabet.split("x") == [FIRST_BYTE + ord(" "), FIRST_BYTE + ord("x")]


@pytest.mark.parametrize("learned", [[b"a"], [b"ab", b"ab"], [b"x" * 33]])
def test_wrong_pieces_are_refused(learned: list[bytes]) -> None:
    with pytest.raises(ValueError, match="learned pieces must differ and have 2 to 32 bytes"):
        Alphabet(learned)


def test_bytes_equal_a_plain_python_writer(describing: Codec, captions: CaptionModel) -> None:
    tokens = np.random.default_rng(0).integers(0, 64, (3, 5), dtype=np.int32)
    text = "a red déjà-vu door"
    (data,) = describing.pack(
        [tokens], [(40, 70)], rate="fine", schedule="checkerboard", caption=[text]
    )

    pieces = [*captions.alphabet.split(text), END]
    row = torch.tensor([pieces + [END] * (MAX_PIECES - len(pieces))])[None]
    caption_logits = one_pass_logits(captions._coder.model, row, stages("raster", 1, MAX_PIECES))[0]
    stage_map = stages("checkerboard", 3, 5)
    entropy = IntTransformer.load(describing.model.folder / "fine" / "entropy")
    token_logits = one_pass_logits(entropy, torch.from_numpy(tokens)[None], stage_map)[0]
    ordered = tokens.reshape(-1)[order(stage_map)].tolist()
    head = independent_decoder.Header(
        describing.model_id("fine"), 40, 70, schedule=2, caption_codec=3
    )
    raster = tokens.reshape(-1).tolist()
    check = independent_decoder.check(head, text.encode(), raster, captions.fingerprint())
    coded = [
        *independent_decoder.chosen(caption_logits[: len(pieces)].tolist(), pieces),
        *independent_decoder.chosen(token_logits.tolist(), ordered),
    ]
    assert data == independent_decoder.write(head, b"", coded, check)
    (decoded,) = describing.decode([data])
    assert decoded.caption == text
    np.testing.assert_array_equal(decoded.tokens, tokens)
    assert decoded.bits["caption"] == pytest.approx(captions.bits(text))


@settings(max_examples=20, deadline=None)
@given(st.lists(short_texts.filter(lambda text: len(text.encode()) < 60), min_size=1, max_size=4))
def test_captions_come_back_from_a_batch(describing: Codec, written: list[str]) -> None:
    tokens = [np.full((2, 2), i, dtype=np.int32) for i in range(len(written))]
    files = describing.pack(tokens, [(30, 30)] * len(written), caption=written)
    assert [file.caption for file in describing.decode(files)] == written
    assert files[0] == describing.pack(tokens[:1], [(30, 30)], caption=written[:1])[0]


def test_a_caption_model_is_needed_and_named(describing: Codec, codec: Codec, folder: Path) -> None:
    tokens = np.zeros((2, 2), dtype=np.int32)
    (data,) = describing.pack([tokens], [(30, 30)], caption=["a red door"])
    with pytest.raises(BitstreamError, match="needs a caption model, and there is none"):
        Codec(codec.model, None).decode([data])
    other = Alphabet([*LEARNED[:-1], b"er"])
    transformer = CaptionModel.load(folder)._coder.model
    CaptionModel(other, transformer).save(folder.parent / "other")
    with pytest.raises(BitstreamError, match="check does not match"):
        Codec(codec.model, folder.parent / "other").decode([data])
    with pytest.raises(ValueError, match="its alphabet has 263"):
        CaptionModel(Alphabet(LEARNED[:-1]), transformer)


def test_the_cheapest_codec_is_taken(codec: Codec, folder: Path) -> None:
    text = "a red door"
    raw = text.encode()
    # The number of a codec costs bits, and so does the length of a raw caption.
    spent = []
    for codec_number in (bitstream.CAPTION_RAW, bitstream.CAPTION_MODEL):
        head = bitstream.Header(0, 1, 1, caption_codec=codec_number, caption=raw)
        spent.append(sum(12 - np.log2(freq) for _, freq in bitstream.header_intervals(head)))
    even = spent[0] - spent[1]
    assert even > 8 * len(raw)
    assert encode_caption(text, lambda _: even - 0.1) == (bitstream.CAPTION_MODEL, raw)
    assert encode_caption(text, lambda _: even + 0.1)[0] == bitstream.CAPTION_RAW
    many = "x" * MAX_PIECES
    assert CaptionModel.load(folder).bits(many) == float("inf")
    image = Image.new("RGB", (40, 40))
    (data,) = Codec(codec.model, folder).compress([image], caption=[many])
    assert bitstream.read(data).header.caption_codec == bitstream.CAPTION_DEFLATE
    assert codec.decode([data])[0].caption == many


@pytest.fixture(scope="module")
def shipped() -> Codec:
    return Codec.from_pretrained("tiny")


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=90))
@example("a" * 4096)
@example("\U0001f408\u200d\u2b1b qX7~" * 3)
@settings(max_examples=25, deadline=None)
def test_unlike_text_costs_two_bytes_at_most(shipped: Codec, text: str) -> None:
    image = Image.new("RGB", (64, 64), (90, 120, 40))
    plain, described = (
        shipped.compress([image], rate="r002", caption=[caption])[0] for caption in ("", text)
    )
    assert len(described) - len(plain) <= len(text.encode()) + 2
    assert shipped.decode([described])[0].caption == text


def test_captions_of_many_files_are_read_in_groups(
    captions: CaptionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group fills at most as much memory as a batch of pictures."""
    sizes, read = [], CaptionModel._read_group

    def counted(self: CaptionModel, files: Any) -> Any:
        sizes.append(len(files))
        return read(self, files)

    monkeypatch.setattr(CaptionModel, "_read_group", counted)
    captions.read([(b"\1\2\3\4", 1 << 24, 4)] * 700)
    assert max(sizes) <= 256 and sum(sizes) == 700
