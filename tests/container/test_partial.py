"""Files with some of their stages, and truncated files, against a plain-Python reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from oracles import independent_coder
from percov2 import BitstreamError, Codec
from percov2.container import bitstream
from percov2.container.tokens_file import (
    OpenFile,
    Tokens,
    encode,
    pack,
    unpack,
    unpack_cut,
    write,
    write_within,
)
from percov2.entropy import IntTransformer, TokenCoder, stages
from percov2.entropy.schedule import SCHEDULES
from percov2.entropy.transformer_config import TransformerConfig
from tools.executors import coder_of, model_on, torch_threads

SIDE = 16
CONFIG = TransformerConfig(codebook_size=64, dim=16, heads=2, head_dim=8, layers=2, hidden=16)


@pytest.fixture(scope="module")
def coder() -> TokenCoder:
    return TokenCoder(IntTransformer.random(CONFIG, seed=4))


def header(h: int, w: int, name: str, sent: int = 0, seed: int = 0) -> bitstream.Header:
    return bitstream.Header(
        7, SIDE * h, SIDE * w, schedule=SCHEDULES.index(name), stages_sent=sent, seed=seed
    )


def some_tokens(seed: int, h: int, w: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, 64, (h, w), dtype=np.int32)


def opened(files: Sequence[bytes]) -> list[OpenFile]:
    parsed = [bitstream.read(data) for data in files]
    sizes = [(p.header.height // SIDE, p.header.width // SIDE) for p in parsed]
    return [
        OpenFile(data, p, size, f"file {i}: ")
        for i, (data, p, size) in enumerate(zip(files, parsed, sizes, strict=True))
    ]


def test_batches_threads_and_executors_draw_the_same(coder: TokenCoder) -> None:
    maps = [some_tokens(i, 5, 8) for i in range(4)]
    heads = [header(5, 8, "quincunx", 3, seed) for seed in (0, 0, 9, 9)]
    files = pack(coder, heads, maps)
    cut = [*files[:2], *(file[:-2] for file in files), files[0][:14]]
    alone = [unpack(coder, opened([file]))[0] for file in files]
    alone_cut = [unpack_cut(coder, opened([file]))[0] for file in cut]
    for other in (coder, coder_of(model_on("torch", CONFIG, coder.model.tensors))):
        for threads in (1, 2):
            with torch_threads(threads):
                together = unpack(other, opened(files))
                together_cut = unpack_cut(other, opened(cut))
            assert all(map(np.array_equal, alone, together))
            for (tokens, held), (others, taken) in zip(alone_cut, together_cut, strict=True):
                assert np.array_equal(tokens, others) and held == taken
    assert not np.array_equal(alone[0], alone[1])


@pytest.mark.parametrize("name", ["qlds12", "raster"])
def test_a_limit_is_used_up(coder: TokenCoder, name: str) -> None:
    """Where a stage costs next to nothing, sizes do not always grow with stages."""
    tensors = {key: tensor.copy() for key, tensor in coder.model.tensors.items()}
    tensors["head.weight"].fill(0)
    tensors["head.bias"].fill(0)
    tensors["head.bias"][0] = 2**20
    sure_of_0 = TokenCoder(IntTransformer(CONFIG, tensors))
    for seed in range(4):
        rare = np.random.default_rng(seed).random((6, 6)) < 0.1
        tokens = np.where(rare, some_tokens(seed, 6, 6), 0).astype(np.int32)
        head = header(6, 6, name)
        total = int(stages(name, 6, 6).max())
        heads = [*(replace(head, stages_sent=k) for k in range(1, total)), head]
        made = pack(sure_of_0, heads, [tokens] * total)
        sizes = [len(file) for file in made]
        assert sizes != sorted(sizes)
        encoded = encode(sure_of_0, [head], [tokens])
        for limit in range(min(sizes), max(sizes) + 2):
            (file,) = write_within(encoded, limit)
            assert file == made[max(k for k in range(total) if sizes[k] <= limit)]
        with pytest.raises(ValueError, match=rf"needs {sizes[0]} bytes for its first stage"):
            write_within(encoded, min(sizes) - 1)


def test_a_picture_of_one_stage_says_what_it_needs(coder: TokenCoder) -> None:
    encoded = encode(coder, [header(1, 1, "qlds12")], [some_tokens(0, 1, 1)])
    (file,) = write(encoded)
    with pytest.raises(ValueError, match=rf"needs {len(file)} bytes for its first stage"):
        write_within(encoded, len(file) - 1)


def test_a_caption_for_a_missing_model_is_not_written(coder: TokenCoder) -> None:
    head = replace(
        header(3, 3, "qlds5"), caption_codec=bitstream.CAPTION_MODEL, caption=b"a red door"
    )
    with pytest.raises(ValueError, match="b'a red door' needs the caption model"):
        pack(coder, [head], [some_tokens(0, 3, 3)])


def test_impossible_parts_are_refused(coder: TokenCoder) -> None:
    for h, w, name, sent, message in [
        (3, 3, "qlds5", 5, "a part of 5 stages, but schedule .qlds5. has 5"),
        (
            257,
            256,
            "qlds12",
            1,
            "a file of more than 65536 tokens must hold all stages, and this one has 65792",
        ),
        (65, 64, "raster", 9, "a file of more than 4096 stages must hold all"),
    ]:
        head = header(h, w, name, sent)
        with pytest.raises(ValueError, match=message):
            pack(coder, [head], [np.zeros((h, w), np.int32)])
        coded = independent_coder.encode(
            1, [(a, b, 12) for a, b in bitstream.header_intervals(head)]
        )
        files = opened([bitstream.prefix(head) + coded])
        for read in (unpack, unpack_cut):
            with pytest.raises(BitstreamError, match=f"impossible header field: .*{message}"):
                read(coder, files)


def test_files_cut_in_their_head_or_too_long_are_refused(coder: TokenCoder) -> None:
    (file,) = pack(coder, [header(6, 7, "qlds5")], [some_tokens(1, 6, 7)])
    head = replace(header(6, 7, "qlds5"), caption_codec=1, caption=b"a red door")
    (captioned,) = pack(coder, [head], [some_tokens(1, 6, 7)])
    messages = []
    for length in range(len(captioned)):
        try:
            (found,) = unpack_cut(coder, opened([captioned[:length]]))
        except BitstreamError as error:
            messages.append(str(error))
        else:
            assert found[1] >= 0
            assert bitstream.read(captioned[:length]).header == head
    assert "file 0: the file is cut: it ends inside its header or caption" in messages
    assert len(messages) < len(captioned) - 20  # most of the file is tokens
    with pytest.raises(BitstreamError, match="file 0: the file is damaged, not cut"):
        unpack_cut(coder, opened([file + b"xxxx"]))
    with pytest.raises(BitstreamError, match="damaged or cut"):
        unpack(coder, opened([file[:-1]]))


def test_the_codec_writes_and_restores_parts(codec: Codec) -> None:
    image = Image.effect_noise((200, 170), 60).convert("RGB")
    (whole,) = codec.compress([image])
    (part,) = codec.compress([image], stages=4)
    assert len(part) < len(whole)
    assert codec.compress([image], stages=99) == [whole]
    (bounded,) = codec.compress([image], target_bytes=len(whole) - 1)
    assert len(part) < len(bounded) < len(whole)
    assert codec.compress([image], target_bytes=len(whole)) == [whole]
    decoded, full = codec.decode([part, whole])
    assert (decoded.stages, full.stages, full.stage_count) == (4, 12, 12)
    (cut,) = codec.decode([whole[: len(part)]], allow_truncated=True)
    assert 1 <= cut.stages <= 4
    assert codec.decompress([whole[:40]], allow_truncated=True)[0].size == image.size
    (drawn,) = codec.compress([image], stages=4, draw_seed=65535)
    assert len(part) < len(drawn) <= len(part) + 4
    (other,) = codec.decode([drawn])
    held = stages("qlds12", *other.tokens.shape) <= 4
    np.testing.assert_array_equal(other.tokens[held], decoded.tokens[held])
    assert (other.tokens != decoded.tokens).any()
    (within,) = codec.compress([image], target_bytes=len(drawn), draw_seed=65535)
    assert within == drawn
    assert codec.compress([image], stages=99, draw_seed=7) == [whole]
    with pytest.raises(ValueError, match="draw_seed needs stages or target_bytes"):
        codec.compress([image], draw_seed=1)
    with pytest.raises(ValueError, match=r"draw_seed must be a whole number .* not 65536"):
        codec.compress([image], stages=4, draw_seed=65536)
    with pytest.raises(ValueError, match="exclude each other"):
        codec.compress([image], stages=1, target_bytes=90)
    with pytest.raises(ValueError, match=r"stages must be a whole number .* not 0"):
        codec.compress([image], stages=0)
