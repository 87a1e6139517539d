"""The campaign on a borrowed GPU, end to end on the CPU with a toy budget."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from percov2.photos import decode_shards
from percov2.training import checkpoint, loop
from percov2.training.commands import run_export
from tools.photos import write_shard
from tools.rate_runs import PIXELS, config_text, trained


def campaign() -> ModuleType:
    """benchmarks/campaign.py, which belongs to no package."""
    path = Path(__file__).parents[2] / "benchmarks" / "campaign.py"
    spec = importlib.util.spec_from_file_location("campaign", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_campaign_trains_and_its_pieces_make_a_run(tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    shards.mkdir()
    for seed in range(2):
        write_shard(shards / f"photos-{seed}.tar", 2, seed, side=64)
    decode_shards(sorted(shards.glob("*.tar")), tmp_path / "cache")
    text = config_text(["r031"], "frozen_tokens = true", losses=PIXELS)
    text += "\n[codec.recipes.short]\nloop = { steps = 3 }\n"
    trained(tmp_path, tmp_path / "cache", text, 3)
    config = tmp_path / "config.toml"

    module = campaign()
    monkeypatch.setattr(module, "PIECE", 20_000)
    # The script puts its own tree first; processes that later tests start must not find it there.
    monkeypatch.setattr(sys, "path", list(sys.path))
    common = ["--start", str(tmp_path / "run")]
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
    joined = checkpoint.read(tmp_path / "joined" / "checkpoint.pt")
    whole = checkpoint.read(tmp_path / "work" / "run" / "checkpoint.pt")
    assert joined["ema"].keys() == whole["ema"].keys() and joined["step"] == 3
    for name, value in whole["ema"].items():
        assert torch.allclose(joined["ema"][name], value, rtol=1e-3, atol=1e-4), name
    network = whole["side"]["pixels"]["network"]
    assert joined["side"]["pixels"]["network"].keys() == network.keys()
    run_export(config, tmp_path / "cache", tmp_path / "joined", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_run_of_minutes_ends_by_the_clock(photo_cache, tmp_path, monkeypatch):
    clock = itertools.count()
    ticks = SimpleNamespace(monotonic=lambda: 0.1 * next(clock), time=time.time)
    monkeypatch.setattr(loop, "time", ticks)
    text = config_text(["r031"], steps=100000).replace("warmup = 1,", "warmup = 1, minutes = 0.02,")
    trained(tmp_path, photo_cache, text)
    state = checkpoint.read(tmp_path / "run" / "checkpoint.pt")
    assert 1 <= state["step"] < 1000 and state["minutes"] >= 0.02
    assert state["optimizer"]["param_groups"][0]["lr"] < 0.5e-3
