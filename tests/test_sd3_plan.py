"""The shipped configuration of SD3 training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import percov2.training
from percov2.models.model_config import PAPER_RATES
from percov2.training import sd3_commands
from percov2.training.settings import build_config, read_section
from percov2.training.stage2 import EntropyConfig

CONFIGS = sorted((Path(percov2.training.__file__).parent / "configs").glob("sd3_*.toml"))


def bits_per_pixel(path: Path) -> float:
    config, _ = sd3_commands.sd3_config(path)
    return math.log2(config.rate.codebook_size) / config.rate.token_side**2


def test_there_is_a_configuration_for_each_of_the_papers_rates() -> None:
    rates = {path.stem: sd3_commands.sd3_config(path)[0].rate for path in CONFIGS}
    assert rates == {f"sd3_{rate.name}": rate for rate in PAPER_RATES}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_follow_the_paper(path: Path) -> None:
    config, loop = sd3_commands.sd3_config(path)
    assert (config.lpips_weight > 0) == (bits_per_pixel(path) > 0.05)
    assert (loop.learning_rate, loop.weight_decay, loop.clip) == (1e-5, 0.01, 1.0)
    assert (config.crop, config.caption_dropout, config.t5) == (512, 0.1, True)
    assert config.batch % (8 * loop.accumulate) == 0
    table = read_section(path, "entropy")
    table.pop("loop")
    build_config(EntropyConfig, table)
