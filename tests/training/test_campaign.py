"""The campaign on a borrowed GPU, end to end on the CPU with a toy budget."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from percov2.training.commands import codec_stage, run_export
from percov2.training.data import PhotoCrops, decode_shards
from percov2.training.loop import train
from tools.rate_runs import PIXELS, config_text, written


def campaign() -> ModuleType:
    """benchmarks/campaign.py, which belongs to no package."""
    path = Path(__file__).parents[2] / "benchmarks" / "campaign.py"
    spec = importlib.util.spec_from_file_location("campaign", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_shards(folder: Path) -> None:
    """Two shards of two photos each."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"photos-{shard}.tar", "w") as tar:
            for i in range(2):
                out = io.BytesIO()
                pixels = generator.integers(0, 256, (64, 72 + 8 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(out, "png")
                member = tarfile.TarInfo(f"pic-{shard}{i}.png")
                member.size = len(out.getvalue())
                tar.addfile(member, io.BytesIO(out.getvalue()))


def test_a_campaign_trains_and_its_pieces_make_a_run(tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    write_shards(shards)
    decode_shards(sorted(shards.glob("*.tar")), tmp_path / "cache")
    text = config_text(["r031"], "frozen_tokens = true", losses=PIXELS)
    config = written(tmp_path, text + "\n[codec.recipes.short]\nloop = { steps = 3 }\n")
    stage, loop = codec_stage(config, PhotoCrops(tmp_path / "cache"))
    train(stage, loop, tmp_path / "start", stop_after_steps=3)

    module = campaign()
    monkeypatch.setattr(module, "PIECE", 20_000)
    # The script puts its own tree first; processes that later tests start must not find it there.
    monkeypatch.setattr(sys, "path", list(sys.path))
    common = ["--start", str(tmp_path / "start")]
    folders = {"--shards": shards, "--out": tmp_path / "out", "--work": tmp_path / "work"}
    settings = {"--config": config, "--recipe": "short", "--minutes": 5, "--tests": 0}
    options = [str(x) for pair in {**folders, **settings}.items() for x in pair]
    module.main(["run", *common, *options])
    log = json.loads((tmp_path / "out" / "campaign.json").read_text())
    assert log["steps"] == 3 and log["origins"] == {"r031": "from r031"}
    assert (tmp_path / "out" / "samples.png").is_file() and (tmp_path / "out" / "log.csv").is_file()
    for name in ("photos.bin", "photos.json"):
        found = (tmp_path / "work" / "photos" / name).read_bytes()
        assert found == (tmp_path / "cache" / name).read_bytes()
    pieces = sorted((tmp_path / "out").glob("weights-*.safetensors"))
    assert len(pieces) > 1
    assert all(piece.stat().st_size < 40_000 for piece in pieces)

    module.main(["join", *common, str(tmp_path / "out"), "--run", str(tmp_path / "joined")])
    joined = torch.load(tmp_path / "joined" / "checkpoint.pt", weights_only=True)
    trained = torch.load(tmp_path / "work" / "run" / "checkpoint.pt", weights_only=True)
    assert joined["ema"].keys() == trained["ema"].keys() and joined["step"] == 3
    for name, value in trained["ema"].items():
        assert torch.allclose(joined["ema"][name], value, rtol=1e-3, atol=1e-4), name
    network = trained["side"]["pixels"]["network"]
    assert joined["side"]["pixels"]["network"].keys() == network.keys()
    run_export(config, tmp_path / "cache", tmp_path / "joined", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_run_of_minutes_ends_by_the_clock(photo_cache, tmp_path):
    text = config_text(["r031"], steps=100000).replace("warmup = 1,", "warmup = 1, minutes = 0.02,")
    stage, loop = codec_stage(written(tmp_path, text), PhotoCrops(photo_cache))
    assert 1 <= train(stage, loop, tmp_path / "run") < 1000
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["minutes"] >= 0.02
    last = state["optimizer"]["param_groups"][0]["lr"]
    assert last < 0.5 * loop.learning_rate
