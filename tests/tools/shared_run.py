"""A few steps of both stages, for one process or several: ``shared_run.py CONFIG DATA OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from percov2.training.loop import LoopConfig, leave_processes, train
from percov2.training.sd3.commands import run_sd3
from percov2.training.settings import build_config, read_section
from percov2.training.stage2 import EntropyConfig, EntropyStage, TokenMaps


def run(config: Path, data: Path, out: Path) -> None:
    """``data/shards`` through stage 1 to ``out/codec``, ``data/tokens`` to ``out/entropy``."""
    run_sd3(config, data / "shards", out / "codec")
    table = read_section(config, "entropy")
    loop = build_config(LoopConfig, table.pop("loop"))
    torch.manual_seed(loop.seed)
    stage = EntropyStage(build_config(EntropyConfig, table), TokenMaps(data / "tokens"))
    train(stage, loop, out / "entropy")


if __name__ == "__main__":
    run(*(Path(argument) for argument in sys.argv[1:]))
    leave_processes()
