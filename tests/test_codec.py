"""The codec with a random model: bytes against a plain-Python writer, batches, messages."""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import io
import math
import pickle
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from oracles import independent_coder, independent_decoder
from percov2 import BackboneOptions, BitstreamError, Codec, EncodeOptions
from percov2.bench.model import torch_threads
from percov2.cli.options import model_choices
from percov2.container import bitstream
from percov2.container.tokens_file import OpenFile, SparseFileWarning, pack, unpack, unpack_cut
from percov2.entropy import SCHEDULES, IntTransformer, TokenCoder, order, stages
from percov2.entropy.staging import one_pass_logits
from percov2.entropy.transformer_config import TransformerConfig
from percov2.models.config import find_model
from tools.photos import noise


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(9, 40)) + np.cos(y / 17 + c) for c in range(3)]
    pixels = 128 + 50 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def random_tokens(rng: np.random.Generator, h: int, w: int, size: int) -> np.ndarray:
    return rng.integers(0, size, (h, w), dtype=np.int32)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("rate", "size", "caption"),
    [("fine", (1, 1), ""), ("fine", (70, 33), "Zürich"), ("coarse", (512, 512), "")],
)
def test_bytes_equal_a_plain_python_writer(codec, schedule, rate, size, caption):
    point = codec.config.rate(rate)
    rate_index = [r.name for r in codec.config.rates].index(rate)
    h, w = -(-size[0] // point.token_side), -(-size[1] // point.token_side)
    if schedule == "raster" and h * w > 64:
        size, (h, w) = (2 * point.token_side,) * 2, (2, 2)
    tokens = random_tokens(np.random.default_rng(h), h, w, point.codebook_size)
    (data,) = codec.pack([tokens], [size], rate=rate, schedule=schedule, caption=[caption])

    entropy = IntTransformer.load(codec.model.folder / rate / "entropy")
    stage_map = stages(schedule, h, w)
    logits = one_pass_logits(entropy, torch.from_numpy(tokens)[None], stage_map)[0].tolist()
    symbols = tokens.reshape(-1)[order(stage_map)].tolist()
    text = caption.encode()
    head = independent_decoder.Header(
        codec.model_id(rate),
        *size,
        rate_index,
        SCHEDULES.index(schedule),
        caption_codec=1 if text else 0,
    )
    check = independent_decoder.check(head, text, tokens.reshape(-1).tolist())
    assert data == independent_decoder.write(
        head, text, independent_decoder.chosen(logits, symbols), check
    )
    np.testing.assert_array_equal(codec.decode_tokens([data])[0], tokens)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
    schedule=st.sampled_from([s for s in SCHEDULES if s != "raster"]),
    rate=st.sampled_from(["fine", "coarse"]),
    caption=st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40),
)
def test_files_return_tokens_and_caption(codec, height, width, seed, schedule, rate, caption):
    point = codec.config.rate(rate)
    h, w = -(-height // point.token_side), -(-width // point.token_side)
    tokens = random_tokens(np.random.default_rng(seed), h, w, point.codebook_size)
    (data,) = codec.pack(
        [tokens], [(height, width)], rate=rate, schedule=schedule, caption=[caption]
    )
    (decoded,) = codec.decode([data])
    np.testing.assert_array_equal(decoded.tokens, tokens)
    assert decoded.tokens.dtype == np.int32
    assert decoded.caption == caption
    assert (decoded.header.height, decoded.header.width) == (height, width)
    assert decoded.rate == point


def test_coder_overhead_is_below_half_a_byte(codec):
    rng = np.random.default_rng(5)
    coder = TokenCoder(IntTransformer.load(codec.model.folder / "fine" / "entropy"))
    overhead = []
    for i in range(60):
        h, w = rng.integers(1, 9, 2).tolist()
        tokens = random_tokens(rng, h, w, 64)
        size = (16 * h, 16 * w)
        (data,) = codec.pack([tokens], [size], caption=["x" * (i % 3)])
        _, freqs = coder.intervals(torch.from_numpy(tokens)[None], codec.config.default_schedule)
        header = bitstream.read(data).header
        bits = float(np.sum(16 - np.log2(freqs)))
        bits += sum(12 - math.log2(freq) for _, freq in bitstream.header_intervals(header))
        overhead.append(len(data) - bitstream.PREFIX_BYTES - 2 - bits / 8)
    assert np.mean(overhead) <= 0.5
    assert max(overhead) < 1.5


def test_tokens_give_the_same_bytes_alone_in_batches_and_with_threads(codec):
    rng = np.random.default_rng(1)
    shapes = [(3, 5), (4, 4), (3, 5), (1, 1), (4, 4), (3, 5)]
    maps = [random_tokens(rng, h, w, 64) for h, w in shapes]
    sizes = [(16 * h - i % 3, 16 * w) for i, (h, w) in enumerate(shapes)]
    captions = ["", "sea", "", "sand", "", ""]
    results = []
    for count in (1, 2):
        with torch_threads(count):
            results.append(codec.pack(maps, sizes, caption=captions))
            alone = zip(maps, sizes, captions, strict=True)
            results.append([codec.pack([m], [s], caption=[c])[0] for m, s, c in alone])
            for decoded, expected in zip(codec.decode_tokens(results[-1]), maps, strict=True):
                np.testing.assert_array_equal(decoded, expected)
    assert all(result == results[0] for result in results)


def test_pictures_of_mixed_sizes_round_trip_like_single_ones(codec):
    images = [photo(65, 40), photo(1, 1), photo(48, 48, 1), photo(65, 40, 2), photo(3, 90)]
    captions = ["a lake", "", "", "two dogs", ""]
    files = codec.compress(images, caption=captions)
    restored = codec.decompress(files, seed=4)
    assert [r.size for r in restored] == [i.size for i in images]
    assert {r.mode for r in restored} == {"RGB"}
    with torch_threads(2):
        for image, caption, file, picture in zip(images, captions, files, restored, strict=True):
            assert codec.compress([image], caption=[caption]) == [file]
            (again,) = codec.decompress([file], seed=4)
            np.testing.assert_array_equal(np.asarray(again), np.asarray(picture))


def test_tokens_steps_guidance_and_seed_reach_the_picture(codec):
    maps = [np.full((4, 4), value, dtype=np.int32) for value in (0, 1)]
    files = codec.pack(maps, [(64, 64)] * 2, caption=["a lake"] * 2)

    def pixels(file: bytes = files[0], **options: float) -> bytes:
        return codec.decompress([file], **options)[0].tobytes()

    usual = pixels()
    assert usual == pixels(steps=codec.config.steps, guidance=codec.config.guidance, seed=0)
    others = [pixels(files[1]), pixels(steps=5), pixels(guidance=8.0), pixels(seed=1)]
    assert usual not in others


def test_a_rate_s_own_steps_are_its_default(codec, monkeypatch):
    files = [codec.compress([photo(64, 64)], rate=rate.name)[0] for rate in codec.config.rates]
    slow = codec.decompress(files, steps=3)
    fine, coarse = codec.config.rates
    rates = (fine, dataclasses.replace(coarse, steps=3))
    monkeypatch.setattr(codec.model, "config", dataclasses.replace(codec.config, rates=rates))
    usual = codec.decompress(files)
    assert usual[0].tobytes() != slow[0].tobytes()
    assert usual[1].tobytes() == slow[1].tobytes()


def test_the_decoder_s_noise_is_the_seed_s(codec, random_model, tmp_path):
    shutil.copytree(random_model, tmp_path / "noisy")
    dataclasses.replace(codec.config, decoder_noise=0.5).save(tmp_path / "noisy")
    noisy = Codec.from_pretrained(tmp_path / "noisy")
    files = codec.compress([photo(64, 64)])
    # A flow that returns zeros: what is left of the seed is the decoder's noise.
    for model in (codec.model, noisy.model):
        model.flow.proj_out.weight.data.zero_()
        model.flow.proj_out.bias.data.zero_()
    try:
        plain, other = (codec.decompress(files, steps=1, seed=s)[0].tobytes() for s in (0, 1))
        assert plain == other
        once, again, third = (
            noisy.decompress(files, steps=1, seed=s)[0].tobytes() for s in (0, 0, 1)
        )
        assert once == again and plain != once != third
    finally:
        codec.model.__dict__.pop("flow")


def certain_model(size: int = 256) -> IntTransformer:
    """An entropy model that is as sure as it can be of token 0, everywhere."""
    model = IntTransformer.random(TransformerConfig(size, 8, 1, 8, 1, 8), seed=0)
    tensors = {name: tensor.copy() for name, tensor in model.tensors.items()}
    tensors["head.weight"].fill(0)
    tensors["head.bias"].fill(-(2**22))
    tensors["head.bias"][0] = 2**22
    return IntTransformer(model.config, tensors)


@pytest.mark.parametrize(("side", "dense"), [(16, True), (60, False)])
def test_giant_plain_pictures_give_up_the_dense_promise(side, dense):
    coder = TokenCoder(certain_model())
    tokens = np.zeros((side, side), dtype=np.int32)
    header = bitstream.Header(model_id=7, height=16 * side, width=16 * side, dense=not dense)
    (data,) = pack(coder, [header], [tokens])
    parsed = bitstream.read(data)
    assert parsed.header.dense is dense
    (back,) = unpack(coder, [OpenFile(data, parsed, (side, side))])
    np.testing.assert_array_equal(back, tokens)


def test_large_sparse_files_are_restored_only_if_asked(monkeypatch):
    monkeypatch.setattr(bitstream, "MAX_SPARSE_TOKENS", 3599)
    coder = TokenCoder(certain_model())
    tokens = np.zeros((60, 60), dtype=np.int32)
    header = bitstream.Header(model_id=7, height=960, width=960)
    with pytest.warns(SparseFileWarning, match="3600 tokens of this plain picture of 960x960"):
        (data,) = pack(coder, [header], [tokens])
    file = OpenFile(data, bitstream.read(data), (60, 60))
    monkeypatch.setattr(bitstream, "MAX_DRAWN_TOKENS", 3599)
    for read in (unpack, unpack_cut):
        with pytest.raises(BitstreamError, match=r"3600 tokens .* more than the 3599 .*_sparse if"):
            read(coder, [file])
    assert np.array_equal(unpack(coder, [file], allow_sparse=True)[0], tokens)
    ((found, held),) = unpack_cut(coder, [file], allow_sparse=True)
    assert np.array_equal(found, tokens) and held == 12


def test_large_files_are_not_restored_in_part(monkeypatch):
    monkeypatch.setattr(bitstream, "MAX_DRAWN_TOKENS", 255)
    coder = TokenCoder(IntTransformer.random(TransformerConfig(256, 8, 1, 8, 1, 8), seed=0))
    tokens = np.random.default_rng(0).integers(0, 256, (16, 16), np.int32)
    (data,) = pack(coder, [bitstream.Header(model_id=7, height=256, width=256)], [tokens])
    ((found, _),) = unpack_cut(coder, [OpenFile(data, bitstream.read(data), (16, 16))])
    assert np.array_equal(found, tokens)
    cut = data[:-20]
    with pytest.raises(BitstreamError, match="the file is damaged or cut"):
        unpack_cut(coder, [OpenFile(cut, bitstream.read(cut), (16, 16))])


def test_giant_plain_pictures_need_a_schedule_with_few_stages():
    coder = TokenCoder(certain_model())
    raster = SCHEDULES.index("raster")
    tokens = np.zeros((65, 64), dtype=np.int32)
    header = bitstream.Header(model_id=7, height=1040, width=1024, schedule=raster)
    with pytest.raises(ValueError, match=r"'raster' .* 4160 stages.*choose another schedule"):
        pack(coder, [header], [tokens])
    symbols = bitstream.header_intervals(dataclasses.replace(header, dense=False))
    coded = independent_coder.encode(0x1234, [(start, freq, 12) for start, freq in symbols])
    data = bitstream.prefix(header) + coded
    with pytest.raises(BitstreamError, match="4160 stages without the dense promise"):
        unpack(coder, [OpenFile(data, bitstream.read(data), (65, 64))])


def test_a_dense_file_whose_data_end_early_is_refused_before_its_tail_is_decoded():
    coder = TokenCoder(IntTransformer.random(TransformerConfig(256, 8, 1, 8, 1, 8), seed=0))
    header = bitstream.Header(model_id=7, height=960, width=960)
    symbols = [(start, freq, 12) for start, freq in bitstream.header_intervals(header)]
    junk = [(byte, 1, 8) for byte in np.random.default_rng(0).bytes(440)]
    data = bitstream.prefix(header) + independent_coder.encode(0x1234, symbols + junk)
    stages_begun = []

    class Counting(TokenCoder):
        def decode(self, decoder, scheduled, height, width, on_stage=None, *options):
            def watch(remaining: int) -> None:
                stages_begun.append(remaining)
                on_stage(remaining)

            return super().decode(decoder, scheduled, height, width, watch, *options)

    with pytest.raises(BitstreamError, match=r"file 3 of 4: .*tokens early"):
        unpack(
            Counting(coder.model), [OpenFile(data, bitstream.read(data), (60, 60), "file 3 of 4: ")]
        )
    assert stages_begun[-1] > bitstream.DENSE_SLACK
    data = data[:40]
    with pytest.raises(BitstreamError, match="cannot hold the 3600 tokens"):
        unpack(coder, [OpenFile(data, bitstream.read(data), (60, 60))])


def test_faults_name_the_file_of_a_batch(codec):
    files = codec.compress([photo(64, 64), photo(64, 64, 1), photo(64, 64, 2)])
    files[1] = files[1][:-1]
    with pytest.raises(BitstreamError, match=r"^file 1 of 3: the file is damaged or cut"):
        codec.decompress(files)
    files[1] = b"BM" + files[1]
    with pytest.raises(BitstreamError, match=r"^file 1 of 3: not a .pcv2 file"):
        codec.decode(files)
    with pytest.raises(BitstreamError, match=r"^not a .pcv2 file"):
        codec.decode(files[1:2])


def test_another_model_is_refused_by_both_ids(codec, tmp_path):
    from tools import random_model

    other = Codec.from_pretrained(random_model.build(tmp_path / "other", seed=9))
    ours, theirs = codec.model_id("fine"), other.model_id("fine")
    assert ours != theirs
    with pytest.raises(BitstreamError, match=f"{ours:04x}.*rate fine.*{theirs:04x}"):
        other.decompress(codec.compress([photo(20, 20)]))


def test_the_model_id_depends_on_what_tokens_mean(codec):
    from percov2.container.model_id import model_id

    base = (16, 4, b"f" * 32, b"c" * 64)
    variants = [
        base,
        (8, *base[1:]),
        (16, 5, *base[2:]),
        (16, 4, b"h" * 32, base[3]),
        (*base[:3], b"e" * 64),
        (*base[:3], b"c" * 68),
    ]
    assert len({model_id(*variant) for variant in variants}) == len(variants)
    hashed = b"\0\0\0\x10" + b"\0\0\0\x04" + b"f" * 32 + b"\0\0\0\x40" + b"c" * 64
    assert model_id(*base) == int(hashlib.sha256(hashed).hexdigest()[:4], 16)


def header_only(model_id: int, **fields: int) -> bytes:
    header = bitstream.Header(model_id, height=64, width=64, **fields)
    symbols = [(start, freq, 12) for start, freq in bitstream.header_intervals(header)]
    return bitstream.prefix(header) + independent_coder.encode(0x5555, symbols)


def test_unusable_fields_have_their_own_messages(codec):
    ours = codec.model_id("fine")
    for model_id, fields, message in (
        (ours, {"rate": 9}, "rate 9, but model 'random' has rates 0 to 1"),
        (ours ^ 1, {"rate": 9}, "another model"),
        (ours, {"stages_sent": 12}, r"a part of 12 stages, but schedule .* has 12"),
    ):
        with pytest.raises(BitstreamError, match=message):
            codec.decode([header_only(model_id, **fields)])
    (data,) = codec.compress([photo(64, 64)])
    with pytest.raises(BitstreamError, match="64x64 = 4096 pixels, more than the limit of 4095"):
        codec.decompress([data], max_pixels=4095)


def test_wrong_arguments_are_refused(codec, random_model):
    image = photo(40, 40)
    grid = np.zeros((3, 3), dtype=np.int32)
    for match, call in [
        ("unknown rate 'r9'.*fine, coarse", lambda: codec.compress([image], rate="r9")),
        ("unknown schedule 'x'", lambda: codec.compress([image], schedule="x")),
        ("limit of 100", lambda: codec.compress([image], max_pixels=100)),
        ("has integers", lambda: codec.pack([grid], [(64, 48)])),
        ("has integers", lambda: codec.pack([grid.astype(float)], [(48, 48)])),
        ("range from 0 to 64", lambda: codec.pack([grid + 64 * np.eye(3, dtype=int)], [(48, 48)])),
        ("0 sizes for 1", lambda: codec.pack([grid], [])),
        ("unknown device", lambda: Codec.from_pretrained(random_model, "abacus")),
        ("no model 'nix'", lambda: Codec.from_pretrained("nix")),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
    assert codec.compress([]) == codec.decompress([]) == []


def test_inputs_without_an_order_or_an_end_are_refused(codec, file):
    data, picture = file.read_bytes(), photo(16, 16)
    for value in ({data}, io.BytesIO(data), np.array([data]), {"a": data}):
        with pytest.raises(ValueError, match="a file must be a path, the bytes of a"):
            codec.decompress(value)
    for value in ({1, 2}, io.BytesIO(data), frozenset()):
        with pytest.raises(ValueError, match="a picture must be a path"):
            codec.compress(value)
    for caption in (None, 3, b"hi", {"a", "b"}, "one", ["a", 1]):
        with pytest.raises(ValueError, match="caption must be a list of 2 texts, one each, not "):
            codec.compress([picture, picture], caption=caption)
    with pytest.raises(ValueError, match="caption has 1 texts for 2 pictures"):
        codec.compress([picture, picture], caption=["a"])
    with pytest.raises(ValueError, match="picture 1 of 2: not a picture"):
        codec.compress([picture, b"no"])


def test_steps_take_one_or_many_as_the_whole_does(codec, file):
    pixels = np.asarray(photo(16, 24))
    assert len(codec.encode_tokens(pixels)) == len(codec.encode_tokens(iter([pixels]))) == 1
    data = file.read_bytes()
    tokens = codec.decode(data)[0].tokens
    for value in (file, [file], iter([data]), str(file)):
        assert np.array_equal(codec.decode_tokens(value)[0], tokens)
    for name, value in (("target_bytes", 90), ("effort", 1), ("slack", 0.1)):
        with pytest.raises(ValueError, match="pack chooses no tokens"):
            codec.pack([tokens], [(50, 70)], **{name: value})


def test_a_codec_travels_by_its_folder_and_options(codec, random_model):
    picture = noise(40, 24)
    options = BackboneOptions(runtime="torch")
    opened = Codec.from_pretrained(random_model, options=options)
    file = opened.compress(picture)
    for other in (pickle.loads(pickle.dumps(opened)), copy.deepcopy(opened)):
        assert other.compress(picture) == file
        assert other.model.opened_with == options and other.model is not opened.model
    assert pickle.loads(pickle.dumps(EncodeOptions(stages=2))) == EncodeOptions(stages=2)


def test_numpy_integers_are_sizes(codec):
    tokens = codec.encode_tokens([noise(40, 24)])
    assert codec.pack(tokens, np.array([[24, 40]])) == codec.pack(tokens, [(24, 40)])


def test_numpy_integers_are_options(codec):
    picture = noise(40, 24)
    for name, value in (("stages", 3), ("target_bytes", 60)):
        for more in ({}, {"draw_seed": np.int64(7)}):
            expected = codec.compress(picture, **{name: value, **more})
            assert codec.compress(picture, **{name: np.int64(value), **more}) == expected
    restored = [codec.decompress(expected, seed=seed).tobytes() for seed in (2, np.int64(2))]
    assert restored[0] == restored[1]


def test_a_generator_of_files_is_restored(codec, file):
    data = file.read_bytes()
    assert [one.size for one in codec.decompress(data for _ in range(2))] == [(70, 50)] * 2


def test_a_codec_works_in_a_spawned_worker(codec):
    pixels = np.asarray(noise(40, 24))
    loader = torch.utils.data.DataLoader(
        [pixels], collate_fn=codec.compress, num_workers=1, multiprocessing_context="spawn"
    )
    assert list(loader) == [codec.compress([pixels])]


OTHERS = ("{}", "[", '{"model_type": "bert"}', '{"rates": {"EUR": 1.1}}', '{"rates": null}')
OTHERS += ('["rates"]', '"rates of exchange"', '{"rates": [{"EUR": 1.1}]}', '{"rates": []}', "null")


@pytest.mark.parametrize("inside", ["tiny", "tiny/percov2"])
def test_a_folder_of_another_kind_does_not_hide_an_embedded_model(inside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(inside).mkdir(parents=True)
    for text in OTHERS:
        (Path(inside) / "config.json").write_text(text)
        assert find_model("tiny")[0].parent.name == "pretrained"
        assert "r031" in model_choices()["rate"]


def test_a_path_never_means_an_embedded_model(tmp_path, monkeypatch, random_model):
    monkeypatch.chdir(tmp_path)
    for path in ("./tiny", "tiny/", "../pretrained/tiny", str(tmp_path / "tiny")):
        with pytest.raises(ValueError, match=f"no model '{re.escape(path)}'"):
            find_model(path)
    Path("tiny").mkdir()
    Path("tiny/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tiny/config\.json: it describes no percov2 model"):
        find_model("./tiny")
    shutil.rmtree("tiny")
    shutil.copytree(random_model, "tiny")
    for path in ("tiny", "./tiny"):
        assert find_model(path)[0] == Path("tiny")


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_a_deleted_codec_is_freed_at_once(runtime):
    """Networks may fill gigabytes, so that they must not wait for the collector of cycles."""
    grey = Image.new("RGB", (64, 64), "grey")
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):  # imports of the first round may keep frames
            codec = Codec.from_pretrained("tiny", options=BackboneOptions(runtime=runtime))
            codec.decompress(codec.compress(grey, caption="a wall", rate="r002"))
            left = weakref.ref(codec), weakref.ref(codec.model)
            del codec
        assert [one() for one in left] == [None, None]
    finally:
        gc.enable()


def test_a_notebook_shows_a_decoded_file_as_a_table(codec):
    data = codec.compress(noise(70, 50), rate="coarse", caption="a <red> door")
    shown = codec.decode([data])[0]._repr_html_()
    for text in ("70×50", "coarse", "3×2, 300 codes", "6 of 6 stages", "a &lt;red&gt; door"):
        assert text in shown
