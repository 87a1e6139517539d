"""Configurations of small codec runs of several rates, for the tests of training."""

from __future__ import annotations

from pathlib import Path

from tools.tiny_flow import TINY_FLOW

RATES = {"r031": (2, 16, 48), "r010": (4, 32, 64), "r002": (8, 16, 64)}
"""Rate -> stride, codes, crop side."""
ADDED = {"r125": (1, 16, 48)}
"""A rate that a finished model gets."""


ALEX = "alex = { weight = 0.8 }"
PIXELS = ALEX + "\npixels = { weight = 0.5, from_step = 2, warmup = 2 }"
FEATURES = ALEX + "\nfeatures = { weight = 0.5, from_step = 2, warmup = 2 }"
"""Tables of losses."""


def config_text(rates: list[str], extra: str = "", steps: int = 6, losses: str = ALEX) -> str:
    known = {**RATES, **ADDED}
    tables = "".join(
        f"""
[codec.rates.{name}]
share = {1.0 / (i + 1)}
hyper_encoder = {{ channels = 8, hyper_channels = 8, stride = {known[name][0]} }}
quantizer = {{ hyper_channels = 8, codebook_size = {known[name][1]}, code_dim = 4,
               output_channels = 4 }}
crops = {{ sides = [{known[name][2]}], counts = [2] }}
""".replace(",\n              ", ",")
        for i, name in enumerate(rates)
    )
    return f"""
[autoencoder]
autoencoder = {{ widths = [8, 16] }}
crops = {{ sides = [48], counts = [2] }}
loop = {{ steps = 2, warmup = 1, log_every = 1 }}

[codec]
text_encoder = {{ buckets = 32, dim = 8, length = 4 }}
loop = {{ steps = {steps}, warmup = 1, log_every = 2, learning_rate = 1e-3 }}
adversary = {{ pixel_widths = [4, 4, 8], feature_width = 4 }}
{extra}

[codec.losses]
{losses}
{tables}
{TINY_FLOW}"""


ALL = list(RATES)


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path
