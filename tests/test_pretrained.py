"""The embedded model on a photograph: the package as installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import percov2
from oracles.independent_coder import encode
from percov2 import BitstreamError
from percov2.bench.model import torch_threads
from percov2.codec import Codec
from percov2.container import bitstream
from percov2.container.caption_model import CaptionModel
from percov2.evaluation.metrics import measure
from percov2.models.tiny import backbone
from percov2.models.torch.hyper_encoder import HyperEncoder
from tools.photos import noise

FOLDER = Path(percov2.__file__).parent / "pretrained" / "tiny"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.from_pretrained("tiny")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    from skimage import data

    return Image.fromarray(data.astronaut()[:256, 64:384])


def test_model_id_file_names_every_rate(codec):
    lines = (FOLDER / "model_id").read_text(encoding="ascii").splitlines()
    rates = [rate.name for rate in codec.config.rates]
    assert lines == [f"{codec.model_id(rate):04x} {rate}" for rate in rates]


def test_the_caption_model_is_the_documented_one():
    folder = FOLDER.parent / "captions"
    document = Path(__file__).parents[1] / "docs" / "reference" / "bitstream.md"
    fingerprint = CaptionModel.load(folder).fingerprint().hex()
    assert f"`{fingerprint}`" in document.read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_500_000


def test_captions_cost_a_few_bytes_and_any_text_survives(codec, photo):
    small = photo.resize((64, 64))
    without = len(codec.compress([small])[0])
    likely = "A man riding a wave on a surfboard in the ocean."
    assert len(codec.compress([small], caption=[likely])[0]) - without <= 8
    for text in (
        "Ein Müßiggänger läuft über die Straße.",
        "猫が窓の外を見ている",
        "x7#Q 🎨 	~~",
    ):
        (file,) = codec.compress([small], caption=[text])
        assert codec.decode([file])[0].caption == text
        assert len(file) - without <= len(text.encode()) + 2


def test_folder_is_small_and_holds_no_pickles():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30_000_000
    known = {"", ".json", ".md", ".onnx", ".safetensors", ".sha256"}
    assert {path.suffix for path in files} <= known


@pytest.mark.parametrize("cut", [False, True])
def test_a_few_bytes_cannot_declare_a_giant_picture(codec, cut):
    header = bitstream.Header(codec.model_id("r031"), 8000, 8000, dense=cut)
    symbols = [(start, freq, 12) for start, freq in bitstream.header_intervals(header)]
    data = bitstream.prefix(header) + encode(0x1234, symbols)
    assert len(data) <= 20
    message = "cannot hold the 250000 tokens" if cut else "250000 tokens .* more than the 65536"
    with pytest.raises(BitstreamError, match=message):
        codec.decode([data], allow_truncated=cut)


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_a_forked_child_paints_or_refuses(runtime):
    script = """
import os, signal, sys
from PIL import Image
from percov2 import BackboneOptions, Codec
if sys.argv[1] == "torch":
    import torch
    torch.set_num_threads(2)
codec = Codec.from_pretrained("tiny", options=BackboneOptions(runtime=sys.argv[1]))
data = codec.compress(Image.new("RGB", (128, 128), "grey"))
expected = codec.decompress(data).tobytes()
child = os.fork()
if child == 0:
    signal.alarm(20)  # a child that hangs
    try:
        os._exit(codec.decompress(data).tobytes() != expected)
    except (RuntimeError, ValueError):
        os._exit(0)
sys.exit(os.waitpid(child, 0)[1] != 0)
"""
    command, threads = [sys.executable, "-c", script, runtime], {"OMP_NUM_THREADS": "2"}
    assert subprocess.run(command, env={**os.environ, **threads}, check=False).returncode == 0


def test_photo_survives_within_the_rate(codec, photo):
    (file,) = codec.compress([photo], caption=["a woman in an orange suit"])
    assert 8 * len(file) / (photo.width * photo.height) <= 0.04
    (restored,) = codec.decompress([file])
    values, _ = measure(np.asarray(photo), np.asarray(restored), ("psnr",))
    grey = np.full_like(np.asarray(photo), int(np.asarray(photo).mean()))
    blank, _ = measure(np.asarray(photo), grey, ("psnr",))
    assert values["psnr"] is not None and blank["psnr"] is not None
    assert values["psnr"] > blank["psnr"] + 4


def test_the_flow_transformer_paints(codec, photo):
    (file,) = codec.compress([photo])
    once, again, more, other = (
        codec.decompress([file], **options)[0].tobytes()
        for options in ({}, {}, {"steps": 3}, {"seed": 1})
    )
    assert once == again and once not in (more, other)


def test_tokens_do_not_depend_on_batch_or_threads(codec, photo):
    mirrored = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    alone = codec.encode_tokens([photo])[0]
    for count in (1, 2):
        with torch_threads(count):
            assert np.array_equal(codec.encode_tokens([mirrored, photo])[1], alone)


@pytest.mark.parametrize("rate", ["r031", "r010", "r002"])
def test_tiles_of_the_encoders_give_the_tokens_of_the_whole(rate, monkeypatch):
    codec = Codec.from_pretrained("tiny")
    picture = noise(900, 700).filter(ImageFilter.GaussianBlur(3))
    (whole,) = codec.encode_tokens([picture], rate)
    monkeypatch.setattr(backbone, "_ENCODED", 60)
    monkeypatch.setattr(backbone, "_REDUCED", 200)
    (tiled,) = codec.encode_tokens([picture], rate)
    np.testing.assert_array_equal(tiled, whole)


@pytest.mark.parametrize(("unit", "reach", "tile"), [(1, 0, 1), (2, 1, 4), (3, 2, 6), (1, 3, 7)])
def test_tiles_have_all_that_their_positions_depend_on(unit, reach, tile):
    """The network gives the largest value of all that a position depends on."""

    sides = []

    def network(part: np.ndarray) -> np.ndarray:
        height, width = part.shape[2] // unit, part.shape[3] // unit
        sides.append(max(height, width))
        found = np.empty((1, 1, height, width), np.float32)
        for y, x in np.ndindex(height, width):
            rows = slice(max(0, y - reach) * unit, (y + reach + 1) * unit)
            columns = slice(max(0, x - reach) * unit, (x + reach + 1) * unit)
            found[0, 0, y, x] = part[:, :, rows, columns].max()
        return found

    values = np.random.default_rng(0).random((1, 2, 13 * unit, 6 * unit), np.float32)
    for some in (values, values.swapaxes(2, 3)):
        tiled = backbone._by_tiles(network, some, unit, reach, tile)
        assert max(sides) <= max(tile, 1 + 2 * reach)
        np.testing.assert_array_equal(tiled, network(some))
        sides.clear()


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_the_reach_of_the_hyper_encoder_is_that_of_its_gradient(ratio):
    network = HyperEncoder(1, 4, 4, stride=ratio).double()
    for parameter in network.parameters():
        parameter.data.abs_().div_(8)  # so that nothing cancels and nothing is rectified
    middle, side = 20, 41 * ratio
    latents = torch.zeros(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    network(latents)[0, :, middle, middle].sum().backward()
    (rows,) = np.nonzero(latents.grad[0, 0].sum(1).numpy())
    before, after = middle * ratio - rows.min(), rows.max() - (middle + 1) * ratio + 1
    assert backbone._hyper_reach(ratio) == -(-max(before, after) // ratio)


PAINTED = """
from PIL import Image
from percov2 import Codec
from percov2.models.tiny import backbone
from percov2.models.torch.hyper_encoder import HyperEncoder

bars = []
backbone.tqdm = lambda parts, name, **more: bars.append((name, len(parts))) or parts


def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


codec = Codec.from_pretrained("tiny")
small, large = codec.compress(
    [Image.new("RGB", (side, side), "navy") for side in (64, 2048)], rate="r002"
)
codec.decompress(small)
before = memory("VmRSS")
codec.decompress(large)
print(memory("VmHWM") - before, bars)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_a_large_picture_is_painted_in_bounded_memory_with_a_bar():
    """Without tiles, the decoder needs 690 MB for it, with tiles 280 MB."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", PAINTED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    extra, _, bars = done.stdout.partition(" ")
    assert int(extra) < 450_000
    assert "('decoding', 4)" in bars and "'painting'" in bars
