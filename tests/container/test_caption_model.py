"""Captions coded by a model: pieces, bytes against a plain-Python writer, damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from oracles import independent_decoder, independent_encoder
from percov2 import BitstreamError, Codec
from percov2.container import bitstream
from percov2.container.caption_model import (
    END,
    FIRST_BYTE,
    FIRST_LEARNED,
    MAX_PIECES,
    Alphabet,
    CaptionModel,
)
from percov2.container.captions import encode_caption
from percov2.entropy import IntTransformer, order, stages
from percov2.entropy.staging import one_pass_logits
from percov2.entropy.transformer_config import TransformerConfig

LEARNED = [b" a", b" red", b" door", b" do", b"ors", b" \xc3\xa9", b"re"]
texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30)


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


@given(texts)
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
        *independent_encoder.chosen(caption_logits[: len(pieces)].tolist(), pieces),
        *independent_encoder.chosen(token_logits.tolist(), ordered),
    ]
    assert data == independent_encoder.write(head, b"", coded, check)
    (decoded,) = describing.decode([data])
    assert decoded.caption == text
    np.testing.assert_array_equal(decoded.tokens, tokens)
    assert decoded.bits["caption"] == pytest.approx(captions.bits(text))


@settings(max_examples=20, deadline=None)
@given(st.lists(texts.filter(lambda text: len(text.encode()) < 60), min_size=1, max_size=4))
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
    with pytest.raises(BitstreamError, match="check does not fit"):
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
