"""Two processes that share a batch learn the same as one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from percov2.training import checkpoint
from percov2.training.loop import leave_processes
from tools import shared_run
from tools.sd3_training import build, write_config

TOOLS = Path(__file__).parents[1] / "tools"
STEPS = 2
WEIGHTS = 1e-5
"""Tolerance of every weight and average; a step moves weights by up to 1e-3."""
ROUNDING_ONLY = ("kv.bias", "to_k.bias", "add_k_proj.bias")
"""A key's bias moves all scores of a query alike: its gradient is 0 but for rounding errors, which
the optimiser scales up to whole steps."""
MOMENTS = 1e-3
"""Tolerance of every averaged gradient, relative to the largest of its tensor."""


def launch(processes: int, *arguments: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(TOOLS / "shared_run.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    build(folder)
    (folder / "tokens").mkdir()
    random = np.random.default_rng(0)
    maps = {f"tokens_{i}": random.integers(0, 16, (4, 5)) for i in range(12)}
    held_out = np.arange(12) == 5
    np.savez(folder / "tokens" / "a.npz", codebook_size=16, held_out=held_out, **maps)
    config = write_config(folder / "c.toml", folder / "base", steps=str(STEPS))
    shared_run.run(config, folder, folder / "one")
    launch(2, config, folder, folder / "two")
    return {name: folder / name for name in ("one", "two")}


@pytest.mark.parametrize("stage", ["codec", "entropy"])
def test_two_processes_equal_one_with_the_whole_batch(stage, runs):
    one, two = (checkpoint.read(runs[n] / stage / "checkpoint.pt") for n in ("one", "two"))
    assert one["step"] == two["step"] == STEPS
    for part in ("model", "ema"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            if name.endswith(ROUNDING_ONLY):
                continue
            assert float((two[part][name] - value).abs().max()) <= WEIGHTS, (part, name)
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    for index, state in one["optimizer"]["state"].items():
        mean, other = state["exp_avg"], two["optimizer"]["state"][index]["exp_avg"]
        largest = float(mean.abs().max())
        assert float((mean - other).abs().max()) <= MOMENTS * largest + 1e-8, index
    assert one["side"] == two["side"] and one["generator"] == two["generator"]


def test_a_run_leaves_its_group():
    """Members that exit abort now and then (seen in 2 of 8 exits)."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    leave_processes()
    assert not torch.distributed.is_initialized()
    leave_processes()
