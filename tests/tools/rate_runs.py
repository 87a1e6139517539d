"""Small codec runs of several rates, for the tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from percov2.entropy.int_transformer import IntTransformer, TransformerConfig
from percov2.photos import PhotoCrops
from percov2.training.commands import codec_stage
from percov2.training.loop import LoopConfig, train
from percov2.training.stage1 import CodecStage
from tools.random_model import FLOW

ALL = ["r031", "r010", "r002"]
RATES = {"r031": (2, 16, 48), "r010": (4, 32, 64), "r002": (8, 16, 64), "r125": (1, 16, 48)}
"""Rate -> stride, codes, crop side; a finished model of ALL gets the last one."""
ALEX = "alex = { weight = 0.8 }"
PIXELS = ALEX + "\npixels = { weight = 0.5, from_step = 2, warmup = 2 }"
FEATURES = ALEX + "\nfeatures = { weight = 0.5, from_step = 2, warmup = 2 }"
"""Tables of losses."""


def config_text(rates: list[str], extra: str = "", steps: int = 6, losses: str = ALEX) -> str:
    tables = "".join(
        f"""
[codec.rates.{name}]
share = {1.0 / (i + 1)}
hyper_encoder = {{ channels = 8, hyper_channels = 8, stride = {RATES[name][0]} }}
quantizer = {{ hyper_channels = 8, codebook_size = {RATES[name][1]}, code_dim = 4, output_channels = 4 }}
crops = {{ sides = [{RATES[name][2]}], counts = [2] }}
"""  # noqa: E501
        for i, name in enumerate(rates)
    )
    flow = "\n".join(f"{name} = {size}" for name, size in FLOW.items())
    return f"""
[autoencoder]
autoencoder = {{ widths = [8, 16] }}
crops = {{ sides = [48], counts = [2] }}
loop = {{ steps = 4, warmup = 1, log_every = 1 }}

[codec]
text_encoder = {{ buckets = 32, dim = 8, length = 4 }}
loop = {{ steps = {steps}, warmup = 1, log_every = 2, learning_rate = 1e-3 }}
adversary = {{ pixel_widths = [4, 4, 8], feature_width = 4 }}
{extra}

[codec.losses]
{losses}
{tables}
[codec.flow]
{flow}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def stage_of(folder: Path, photos: Path, text: str) -> tuple[CodecStage, LoopConfig]:
    """The codec phase of a configuration on a folder of photos; ``folder`` gets the file."""
    return codec_stage(written(folder, text), PhotoCrops(photos))


def trained(folder: Path, photos: Path, text: str, stop: int | None = None) -> CodecStage:
    """That phase after its steps, or after ``stop`` more of them; the run is ``folder/run``."""
    stage, loop = stage_of(folder, photos, text)
    train(stage, loop, folder / "run", stop_after_steps=stop)
    return stage


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of tensors that are others now."""
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def entropies(folder: Path, rates: Sequence[str]) -> list[str]:
    """Random entropy models, as arguments of ``percov2 train export``."""
    for i, name in enumerate(rates):
        sizes = TransformerConfig(RATES[name][1], dim=16, heads=1, head_dim=16, layers=1, hidden=16)
        IntTransformer.random(sizes, seed=i).save(folder / name)
    return [f"{name}={folder / name}" for name in rates]
