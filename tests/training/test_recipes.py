"""Recipes of a configuration file, and the shipped one of SD3 training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import percov2.training
from percov2.models.config import PAPER_RATES
from percov2.photos import PhotoCrops
from percov2.training.commands import codec_stage
from percov2.training.sd3.commands import sd3_config
from percov2.training.settings import build_config, read_recipe, read_section
from percov2.training.stage2 import EntropyConfig

SD3 = Path(percov2.training.__file__).parent / "configs" / "sd3.toml"
FILE = """
[phase]
steps = 5
loop = { rate = 1.0, clip = 2.0 }

[phase.recipes.long]
steps = 50
loop = { rate = 0.5 }

[phase.recipes.new]
sizes = [3]
loop = { clip = 9.0 }
"""


def test_recipes_replace_settings_table_by_table_in_their_order(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(FILE)
    for recipe, expected in (
        (None, {"steps": 5, "loop": {"rate": 1.0, "clip": 2.0}}),
        ("long", {"steps": 50, "loop": {"rate": 0.5, "clip": 2.0}}),
        ("long,new", {"steps": 50, "sizes": [3], "loop": {"rate": 0.5, "clip": 9.0}}),
    ):
        assert read_recipe(path, "phase", recipe) == expected
    with pytest.raises(ValueError, match=r"no \[phase.recipes.x\]; it has \['long', 'new'\]"):
        read_recipe(path, "phase", "long,x")


def test_sd3_has_a_recipe_and_an_entropy_rate_for_each_of_the_papers_rates():
    names = [rate.name for rate in PAPER_RATES]
    assert list(read_section(SD3, "sd3")["recipes"]) == names
    assert list(read_section(SD3, "entropy")["rates"]) == names
    with pytest.raises(ValueError, match="has no rate; choose a recipe"):
        sd3_config(SD3)


@pytest.mark.parametrize("rate", PAPER_RATES, ids=lambda rate: rate.name)
def test_sd3_recipes_follow_the_paper(rate):
    config, loop = sd3_config(SD3, rate.name)
    assert config.rate == rate
    bits_per_pixel = math.log2(rate.codebook_size) / rate.token_side**2
    assert (config.lpips_weight > 0) == (bits_per_pixel > 0.05)
    assert (loop.learning_rate, loop.weight_decay, loop.clip) == (1e-5, 0.01, 1.0)
    assert (config.crop, config.caption_dropout, config.t5) == (512, 0.1, True)
    assert config.batch % (8 * loop.accumulate) == 0
    table = read_recipe(SD3, "entropy", rate.name, "rates")
    table.pop("loop")
    build_config(EntropyConfig, table)


AUTOENCODER = "[autoencoder]\nautoencoder = { widths = [32, 32] }\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = [", r"c\.toml is no TOML file: Invalid value"),
        ("codec = 3", r"\[codec\] must be a table, not 3"),
        ("[codec]\nloop = 5", "unknown settings 5"),
        ('[codec]\nloop = { steps = "x" }', "setting steps must be a whole number, not 'x'"),
        ("[codec]\nloop = { steps = true }", "setting steps must be a whole number, not True"),
        ("[codec]\nloop = { steps = 1, learning_rate = nan }", "learning_rate must be a number"),
        ("[codec]\nrates = []", r"rates must be a table, not \[\]"),
        ("[codec]\nrates = { r = 3 }", "a rate must be a table, not 3"),
        ("[codec]\nlosses = 1\nrates = { r = {} }", "losses must be a table"),
        ("[codec]\nrates = { r = { losses = { alex = 3 } } }", "unknown settings 3"),
        ("[codec]\nrates = { r = { losses = { foo = {} } } }", r"unknown settings \['foo'\]"),
        (
            '[codec]\nrates = { r = { crops = { sides = "x" } } }',
            "setting sides must be a list, each a whole number",
        ),
        ('[codec]\nloop = { steps = 1 }\nwindow = "a"', "setting window must be a whole number"),
        (
            "[codec]\nloop = { steps = 1 }\nrealism_ends = [0.1, 2, 3]",
            "setting realism_ends must be a list of 2 values",
        ),
        ("[codec]\nsources = 3", "sources must be a table"),
        (
            "[codec]\nloop = { steps = 1 }\nrates = { r = { hyper_encoder = { zims = 3 } } }",
            r"unknown settings \['zims'\] of hyper_encoder",
        ),
        (
            '[codec]\nloop = { steps = 1 }\nrates = { r = { quantizer = { code_dim = "x" } } }',
            "settings of quantizer: ",
        ),
        ("[codec]\nloop = {}\nrates = { r = {} }", r"missing settings \['steps'\]"),
        ("[codec]\nloop = { steps = 1 }\ndecoder = { zims = 3 }", r"\['zims'\] of autoencoder"),
        ("[codec]\nrecipes = 3", r"\[codec\.recipes\] must be a table"),
    ],
)
def test_wrong_settings_of_the_joint_phase_are_one_line(text, message, tmp_path, photo_cache):
    (tmp_path / "c.toml").write_text(f"{text}\n{AUTOENCODER}")
    with pytest.raises(ValueError, match=message) as caught:
        codec_stage(tmp_path / "c.toml", PhotoCrops(photo_cache), None)
    assert "\n" not in str(caught.value)
