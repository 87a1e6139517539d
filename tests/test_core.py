"""The core as a laptop has it: everything but training, GPUs and large models, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.core

ABSENT = ("torch", "diffusers", "transformers", "scipy", "torchmetrics", "skimage")
ABSENT += ("matplotlib", "huggingface_hub")
WITHOUT = f"""
import sys
sys.modules |= dict.fromkeys({ABSENT!r})  # a None makes the import fail and hides the module
"""


def run_without_extras(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that finds none of the extras' packages."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )


def percov2(*arguments: object) -> str:
    """Run a command without extras; returns what it printed."""
    result = run_without_extras("from percov2.cli.main import main\nsys.exit(main())", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A smooth picture of 96x64 pixels in 16-bit grey."""
    y, x = np.mgrid[:64, :96]
    path = tmp_path_factory.mktemp("core") / "picture.png"
    Image.fromarray((20000 + 300 * y + 100 * x).astype(np.uint16)).save(path)
    return path


@pytest.mark.parametrize("rate", ["r031", "r010", "r002"])
def test_compress_describe_and_restore(picture, tmp_path, rate):
    file, restored = tmp_path / "a.pcv2", tmp_path / "a.png"
    assert f"(96x64, {rate})" in percov2(
        "compress", picture, file, "--rate", rate, "--caption", "a grey slope", "--threads", 2
    )
    record = json.loads(percov2("info", file, "--verify", "--json"))
    assert record["caption"] == "a grey slope" and len(record["sha256"]) == 64
    percov2("decompress", file, restored, "--steps", 2, "--guidance", 2)
    with Image.open(restored) as image:
        assert image.size == (96, 64) and image.mode == "RGB"


def test_partial_files_and_limits(picture, tmp_path):
    part, cut = tmp_path / "part.pcv2", tmp_path / "cut.pcv2"
    percov2("compress", picture, part, "--stages", 4, "--draw-seed", 3)
    percov2("decompress", part, tmp_path / "part.png")
    percov2("compress", picture, part, "--target-bytes", 30, "--slack", 0.02)
    assert part.stat().st_size <= 30
    percov2("compress", picture, cut)
    cut.write_bytes(cut.read_bytes()[:-5])
    percov2("decompress", cut, tmp_path / "cut.png", "--allow-truncated")


def test_a_round_trip_measures_what_numpy_can_and_names_the_extra_of_the_rest(tmp_path):
    y, x = np.mgrid[:192, :176]
    levels = np.stack([x, y, 255 - x], -1).astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "large.png")
    said = percov2("roundtrip", tmp_path / "large.png", "--out", tmp_path / "out")
    assert "PSNR" in said and "MS-SSIM 0." in said
    assert "lpips_alex was not measured" in said and "pip install 'percov2[eval]'" in said


def test_the_library_takes_one_picture_or_many():
    code = """
import numpy as np
from PIL import Image
from percov2 import Codec
codec = Codec.from_pretrained("tiny")
pictures = [Image.new(mode, (40, 24)) for mode in ("RGB", "L", "P", "CMYK", "RGBA", "I;16", "1")]
files = codec.compress(pictures, rate="r002")
assert files == [codec.compress(picture, rate="r002") for picture in pictures]
assert [image.size for image in codec.decompress(files)] == [(40, 24)] * 7
tokens = codec.encode_tokens(np.zeros((2, 24, 40, 3), np.uint8))
assert [grid.shape for grid in tokens] == [(2, 3)] * 2
import percov2.entropy as entropy
coder = entropy.open_coder(codec.model.folder / "r031" / "entropy")
encoder = coder.encode([tokens[0]], "qlds12", [7])
assert np.array_equal(coder.decode(coder.decoder(*encoder.finish()), "qlds12", 2, 3)[0], tokens[0])
assert not {name for name, module in sys.modules.items() if module} & {"torch", "scipy"}
"""
    result = run_without_extras(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["--effort", "1"], "torch"),
        (["--device", "cuda"], "torch"),
        (["--runtime", "torch"], "torch"),
        (["--captioner", "blip2"], "torch"),
        (["--model", "sd3:owner/name"], "torch"),
    ],
)
def test_options_that_need_an_extra_name_it(picture, tmp_path, arguments, extra):
    code = "from percov2.cli.main import main\nsys.exit(main())"
    result = run_without_extras(code, "compress", picture, tmp_path / "a.pcv2", *arguments)
    assert result.returncode == 2
    assert f"pip install 'percov2[{extra}]'" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("eval kodak . --out x", "eval"),
        ("train data --data . --out x", "train"),
        ("bench entropy --quick", "torch"),
        ("import-perco a b", "torch"),
    ],
)
def test_commands_that_need_an_extra_name_it(command, extra, tmp_path):
    code = "from percov2.cli.main import main\nsys.exit(main())"
    result = run_without_extras(code, *command.split())
    assert result.returncode == 2
    assert f"pip install 'percov2[{extra}]'" in result.stderr and "Traceback" not in result.stderr


def test_entropy_models_on_a_gpu_say_what_they_need(tmp_path):
    result = run_without_extras("import percov2.entropy\npercov2.entropy.open_coder('x', 'cuda')")
    assert "MissingExtra: an entropy model on cuda needs torch: pip install" in result.stderr


@pytest.mark.parametrize("name", ["PerCoV2Pipeline", "Codec"])
def test_names_of_the_package_say_what_they_need(name):
    result = run_without_extras(f"import percov2\nprint(percov2.{name})")
    if name == "Codec":
        assert result.returncode == 0
    else:
        assert "pip install 'percov2[torch]'" in result.stderr
