"""Configurations and budgets of SD3 training, on full-size networks without weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import percov2.training
from percov2.models.model_config import PAPER_RATES
from percov2.training import sd3_commands
from percov2.training.sd3_budget import budget, report
from percov2.training.settings import build_config, read_section
from percov2.training.stage2 import EntropyConfig

CONFIGS = sorted((Path(percov2.training.__file__).parent / "configs").glob("sd3_*.toml"))
TEXT_ENCODERS = ("CLIP-L text encoder", "CLIP-G text encoder", "T5-XXL text encoder")
MEDIUM = 2_028_328_000
"""Parameters of stable-diffusion-3-medium's transformer."""


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


def test_the_budget_of_sd3_medium() -> None:
    config, loop = sd3_commands.sd3_config(CONFIGS[3])
    found = budget(config, loop, 8)
    widened = MEDIUM + 320 * 1536 * 2 * 2
    assert found.parameters["flow transformer"] == widened
    assert found.trained == widened + found.parameters["hyper-encoder and quantizer"]
    assert found.memory["AdamW"] == 8 * found.trained
    assert found.memory["frozen weights"] == 2 * (
        found.parameters["autoencoder"] + sum(found.parameters[name] for name in TEXT_ENCODERS)
    )
    # Each of 24 blocks multiplies every token by 12 d² weights (4 of attention, 8 of its
    # feed-forward part), and attention adds 4 · n² · d.
    n, d = 1024 + 333, 1536
    forward = 24 * (2 * 12 * d * d * n + 4 * n * n * d)
    flow = next(v for k, v in found.flops.items() if k.startswith("flow transformer: 4 x"))
    assert flow == pytest.approx(4 * forward, rel=0.02)
    total = sum(found.flops.values())
    assert found.hours(3600, 2, total) == pytest.approx(0.5)
    assert "hours" in report(found, config, loop, 8, 350e12)
    with pytest.raises(ValueError, match="cannot be divided"):
        budget(config, loop, 7)
