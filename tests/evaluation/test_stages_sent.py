"""``percov2 eval stages``: figures over the number of stages sent, kept over interruptions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from percov2.evaluation.hybrid import stages_sent
from percov2.evaluation.setting import Setting
from percov2.options import DecodeOptions, EncodeOptions
from tools.command_line import run
from tools.photos import noise


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate([(48, 64), (64, 96)]):
        noise(*size, seed=i).save(folder / f"{i}.png")
    return folder


def test_more_stages_are_more_bytes_and_the_last_one_is_the_whole_file(codec, pictures, tmp_path):
    paths = sorted(pictures.iterdir())
    setting = Setting(EncodeOptions(rate="fine", schedule="quincunx"))
    records = stages_sent(codec, paths, tmp_path / "out", setting, progress=False)
    assert [r["stages"] for r in records] == list(range(1, records[0]["of"] + 1))
    sizes = [record["bytes"] for record in records]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    images = [Image.open(path) for path in paths]
    whole = codec.compress(images, rate="fine", schedule="quincunx")
    # 64x48 has as few stages as there are records; the larger picture has more.
    total = records[-1]["of"]
    assert codec.decode(whole)[0].stage_count == total
    bounded = codec.compress(images, rate="fine", schedule="quincunx", stages=total)
    assert sizes[-1] == np.mean([len(file) for file in bounded])
    assert (tmp_path / "out" / "0_stages.jpg").is_file()
    stored = tmp_path / "out" / "stages.json"
    kept = json.loads(stored.read_text())
    assert kept["records"] == records
    marked = [{**record, "psnr": -1.0} for record in records[:-1]]
    stored.write_text(json.dumps({**kept, "records": marked}))
    again = stages_sent(codec, paths, tmp_path / "out", setting, progress=False)
    assert [r["psnr"] for r in again[:-1]] == [-1.0] * (total - 1)
    assert again[-1] == records[-1]
    for other in (
        Setting(EncodeOptions(rate="coarse", schedule="quincunx")),
        Setting(EncodeOptions(rate="fine", schedule="qlds5")),
        Setting(decode=DecodeOptions(seed=1)),
    ):
        with pytest.raises(ValueError, match="choose another folder"):
            stages_sent(codec, paths, tmp_path / "out", other, progress=False)
    with pytest.raises(ValueError, match="choose another folder"):
        stages_sent(codec, paths[:1], tmp_path / "out", setting, progress=False)


def test_the_command_writes_a_plot(pictures, random_model, tmp_path, capsys):
    options = ("--model", random_model, "--rate", "coarse", "--schedule", "checkerboard")
    assert run("eval", "stages", pictures, "--out", tmp_path / "out", *options) == 0
    assert "1 of " in capsys.readouterr().out
    assert (tmp_path / "out" / "stages.png").stat().st_size > 1000
    assert run("eval", "stages", tmp_path / "none", "--out", tmp_path / "out", *options) == 2
