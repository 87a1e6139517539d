"""The Pillow plugin: pictures are opened, restored and saved as Pillow's own formats are."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, UnidentifiedImageError

import percov2.pillow
from percov2 import BackboneOptions, Codec, DecodeOptions, EncodeOptions
from percov2.container import bitstream

pytestmark = pytest.mark.core

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "tiny"
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "pillow.md"


@pytest.fixture(scope="module")
def tiny() -> Codec:
    return Codec.from_pretrained("tiny")


@pytest.fixture
def codecs(monkeypatch):
    """Codecs of the plugin that no other test sees."""
    fresh = percov2.pillow._Codecs()
    monkeypatch.setattr(percov2.pillow, "_CODECS", fresh)
    return fresh


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    y, x = np.mgrid[:80, :112]
    levels = np.stack([x * 2, y * 3, 255 - x - y], -1).astype(np.uint8)
    return Image.fromarray(levels)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()


def test_opening_reads_the_header_and_loads_neither_runtime_nor_networks():
    code = f"""
import sys
import percov2.pillow
from PIL import Image
image = Image.open({str(GOLDEN / "r031_raw_caption.pcv2")!r})
assert (image.size, image.mode, image.format) == ((48, 48), "RGB", "PCV2"), image
known = {{"model": "tiny", "rate": "r031", "bytes": 32, "model_id": "54e2"}}
assert image.info.items() >= known.items() and len(image.info["caption"]) == 9, image.info
assert image.info["bpp"] == 8 * 32 / 48**2 and image.get_format_mimetype() == "image/x-pcv2"
loaded = {{"numpy", "onnxruntime", "torch", "percov2._native", "percov2.codec"}} & {{*sys.modules}}
assert not loaded, loaded
image.load()
assert "onnxruntime" in sys.modules and not {{"torch", "scipy"}} & {{*sys.modules}}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "name", ["r031_default", "r031_one_pixel", "r031_qlds8_stages", "r010_quincunx", "r002_var"]
)
def test_loading_restores_what_the_codec_does(tiny, name):
    path = GOLDEN / f"{name}.pcv2"
    (decoded,) = tiny.decode([path.read_bytes()])
    with Image.open(path) as image:
        assert image.size == (decoded.header.width, decoded.header.height)
        assert image.info["rate"] == decoded.rate.name
        assert same(image, tiny.paint([decoded])[0])
    assert image.info["caption"] == decoded.caption
    assert (image.info["stages"], image.info["stage_count"]) == (
        decoded.stages,
        decoded.stage_count,
    )


def test_a_header_is_read_from_the_start_of_a_large_file(tiny):
    """A file longer than the part that is read at first."""
    noise = np.random.default_rng(0).integers(0, 256, (70, 130), np.int32)
    (data,) = tiny.pack([noise], [(1120, 2080)], schedule="quincunx", caption=["noise"])
    assert len(data) > percov2.pillow._HEAD_BYTES
    image = opened(data)
    assert image.info["bytes"] == len(data) and image.size == (2080, 1120)
    image.verify()  # decodes and checks all of it


def test_saving_takes_the_options_of_the_codec(tiny, picture, tmp_path):
    for given in (
        {},
        {"rate": "r010", "schedule": "quincunx", "caption": "a coloured slope"},
        {"stages": 4, "draw_seed": 3},
        {"target_bytes": 40, "slack": 0.02},
        {"options": EncodeOptions(rate="r002")},
    ):
        picture.save(tmp_path / "a.PCV2", **given)
        assert (tmp_path / "a.PCV2").read_bytes() == tiny.compress(picture, **given)
    picture.save(out := io.BytesIO(), "PCV2", quality=80, optimize=True)  # of other formats
    assert out.getvalue() == tiny.compress(picture)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "HSV", "YCbCr"])
def test_every_mode_is_saved_as_the_codec_converts_it(tiny, picture, mode, recwarn):
    image = picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
    image.save(out := io.BytesIO(), "PCV2", rate="r002")
    assert out.getvalue() == tiny.compress(image, rate="r002")
    assert opened(out.getvalue()).size == picture.size


def test_an_option_out_of_range_leaves_no_file(picture, tmp_path):
    with pytest.raises(ValueError, match="target_bytes must be a whole number from 1"):
        picture.save(tmp_path / "a.pcv2", target_bytes=0)
    with pytest.raises(ValueError, match="unknown rate 'r999'"):
        picture.save(tmp_path / "a.pcv2", rate="r999")
    assert not (tmp_path / "a.pcv2").exists()


def test_decoding_options_are_set_before_loading(tiny, picture):
    data = tiny.compress(picture, rate="r002")
    image = opened(data)
    image.options = DecodeOptions(steps=3, seed=7)
    assert same(image, tiny.decompress(data, steps=3, seed=7))
    assert not same(image, opened(data))


def test_a_truncated_file_needs_pillows_flag(tiny, picture, monkeypatch):
    whole = tiny.compress(picture)
    data = whole[:-6]
    (part,) = tiny.decode([data], allow_truncated=True)
    assert 0 < part.stages < part.stage_count
    image = opened(data)
    with pytest.raises(OSError, match="image file is truncated") as raised:
        image.load()
    assert f"restore {part.stages} of its {part.stage_count} stages" in str(raised.value)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert same(image, tiny.decompress(data, allow_truncated=True))
    assert image.info["stages"] == part.stages
    assert same(opened(whole), tiny.decompress(whole))
    with pytest.raises(OSError, match="it ends inside its header"):
        opened(whole[:6]).load()


def test_damage_is_an_error_at_every_load(tiny, picture):
    good = bytearray(tiny.compress(picture, caption="a slope"))
    for data in (bytes(good) + b"x" * 300, bytes([*good[:-9], good[-9] ^ 64, *good[-8:]])):
        image = opened(data)
        for _ in range(2):
            with pytest.raises(OSError, match="damaged"):
                image.load()
        with pytest.raises(OSError, match="damaged"):
            image.verify()
    opened(bytes(good)).verify()


def test_what_is_no_file_of_ours_is_unidentified(tiny, picture):
    data = tiny.compress(picture)
    for other in (b"", b"\xfc", data[:3], b"\xfc\x21\x54\xe2\0\0\0", b"\xfc" + data[2:]):
        with pytest.raises(UnidentifiedImageError):
            opened(other)
    with (
        pytest.warns(UserWarning, match="version 2: this version of percov2 reads 1"),
        pytest.raises(UnidentifiedImageError),
    ):
        opened(b"\xfc\x22" + data[2:])


def test_another_model_is_named(picture, codecs):
    with Image.open(DATA / "caption.pcv2") as image:
        assert image.info["caption"] == "a lighthouse" and image.info["model"] is None
        with pytest.raises(OSError, match="model with id 7e57, which is not among tiny") as raised:
            image.load()
    assert "percov2.pillow.register(MODEL)" in str(raised.value)
    with pytest.raises(ValueError, match="no model 'nowhere'"):
        percov2.pillow.register("nowhere")
    with pytest.raises(ValueError, match="no model 'nowhere'"):
        picture.save(io.BytesIO(), "PCV2", model="nowhere")


def test_pillows_limit_on_pixels_holds(tiny, monkeypatch):
    data = bytes((GOLDEN / "r031_plain.pcv2").read_bytes())
    header = bitstream.read(data).header
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", header.width * header.height // 3)
    with pytest.raises(Image.DecompressionBombError):
        opened(data)


def test_a_closed_file_is_not_loaded(tmp_path, picture):
    picture.save(tmp_path / "a.pcv2", rate="r002")
    with Image.open(tmp_path / "a.pcv2") as image:
        pass
    with pytest.raises(ValueError, match="closed before the image was loaded"):
        image.load()


def test_pictures_are_copied_pickled_resized_and_saved_again(tiny, picture, tmp_path):
    path = tmp_path / "a.pcv2"
    picture.save(path, rate="r010")
    expected = tiny.decompress(path)
    assert same(pickle.loads(pickle.dumps(Image.open(path))), expected)
    assert same(copy.copy(Image.open(path)), expected)
    with Image.open(path) as image:
        image.thumbnail((56, 56))
        assert image.size == (56, 40)
    Image.open(path).save(tmp_path / "a.png")
    assert same(Image.open(tmp_path / "a.png"), expected)
    Image.open(path).save(path, rate="r002")  # the same file
    assert path.read_bytes() == tiny.compress(expected, rate="r002")


def test_threads_share_one_codec(tiny, picture, monkeypatch, codecs):
    made, original = [], Codec.from_pretrained

    def counted(*arguments):
        made.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(Codec, "from_pretrained", counted)
    data = tiny.compress(picture, rate="r002")
    expected = tiny.decompress(data).tobytes()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: opened(data).tobytes(), range(16)))
    assert found == [expected] * 16 and len(made) == 1


def _load_in_child(data: bytes, out) -> None:
    image = opened(data)
    pixels = image.tobytes()
    codec = percov2.pillow._CODECS.get("tiny")
    out.send((pixels, codec.model.runtime))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_load_pictures_with_one_thread_each(tiny, picture, method, codecs):
    percov2.pillow.register(options=BackboneOptions(dtype="fp32"))
    data = tiny.compress(picture, rate="r002")
    expected = opened(data).tobytes()  # the parent's networks are loaded
    threads = codecs.get("tiny").model.runtime
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    worker = context.Process(target=_load_in_child, args=(data, there))
    worker.start()
    assert here.poll(60)
    pixels, runtime = here.recv()
    worker.join(20)
    assert worker.exitcode == 0
    assert runtime.endswith(", 1 threads") and (
        len(os.sched_getaffinity(0)) == 1 or threads != runtime
    )
    if method == "fork":  # a spawned worker imports the plugin anew, without the choice of dtype
        assert pixels == expected


def test_registering_again_changes_only_what_is_given(codecs):
    percov2.pillow.register(options=BackboneOptions(threads=1))
    codec = codecs.get("tiny")
    percov2.pillow.register()
    assert codecs.get("tiny") is codec
    percov2.pillow.register(options=BackboneOptions(threads=2))
    assert codecs.get("tiny") is not codec
    assert Image.ID.count("PCV2") == 1


def test_a_thousand_opened_files_leave_no_handles_and_no_memory(picture, tmp_path):
    path = tmp_path / "a.pcv2"
    picture.save(path, rate="r002", caption="a slope")

    def handles() -> int:
        return len(os.listdir("/proc/self/fd"))

    def work() -> None:
        for i in range(1000):
            with Image.open(path) as image:
                assert image.size == (112, 80)
                if i % 100 == 0:
                    image.load()

    work()
    gc.collect()
    before = handles()
    tracemalloc.start()
    try:
        work()
        gc.collect()
        first = tracemalloc.get_traced_memory()[0]
        work()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - first < 20_000
    finally:
        tracemalloc.stop()
    assert handles() == before


def test_the_page_runs_as_shown(picture, tmp_path, monkeypatch, codecs):
    monkeypatch.chdir(tmp_path)
    picture.save("photo.png")
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        lines = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines + block[1], str(PAGE), "exec"), names)
