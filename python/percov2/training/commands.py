"""What `percov2 train …` runs: configuration files to stages, and stages to run folders."""

from __future__ import annotations

import dataclasses
import shutil
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from percov2.codec import Codec
from percov2.models.autoencoder import PatchAutoencoder
from percov2.models.preset import CodecModel, ModelConfig, Rate
from percov2.models.storage import save_component
from percov2.training.data import PhotoCrops, decode_shards
from percov2.training.loop import LoopConfig, load_averaged, train
from percov2.training.stage1 import (
    AutoencoderConfig,
    AutoencoderStage,
    CodecConfig,
    CodecStage,
    CropPlan,
)
from percov2.training.stage2 import EntropyConfig, train_entropy

Config = TypeVar("Config")


def read_section(path: Path, section: str) -> dict[str, Any]:
    """One phase's table of a TOML configuration file.

    Raises:
        ValueError: when the file has no such table.
    """
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    if section not in tables:
        raise ValueError(f"{path.name} has no [{section}] section; it has {sorted(tables)}")
    return tables[section]


def build_config(kind: type[Config], values: dict[str, Any]) -> Config:
    """A config dataclass from a TOML table.

    Raises:
        ValueError: for a key that the dataclass does not have.
    """
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - names)
    if unknown:
        raise ValueError(f"unknown settings {unknown}; known ones are {sorted(names)}")
    return kind(**values)


def _split(table: dict[str, Any], *drop: str) -> tuple[dict[str, Any], LoopConfig]:
    values = {k: v for k, v in table.items() if k not in ("loop", *drop)}
    if "crops" in values:
        crops = {k: tuple(v) for k, v in values["crops"].items()}
        values["crops"] = build_config(CropPlan, crops)
    return values, build_config(LoopConfig, table.get("loop", {}))


def autoencoder_stage(config: Path, data: PhotoCrops) -> tuple[AutoencoderStage, LoopConfig]:
    """The autoencoder phase of a configuration file, freshly initialised."""
    values, loop = _split(read_section(config, "autoencoder"))
    return AutoencoderStage(build_config(AutoencoderConfig, values), data), loop


def codec_stage(config: Path, data: PhotoCrops) -> tuple[CodecStage, LoopConfig]:
    """The joint phase, freshly initialised."""
    first, _ = autoencoder_stage(config, data)
    values, loop = _split(read_section(config, "codec"), "rate")
    return CodecStage(build_config(CodecConfig, values), first.autoencoder, data), loop


def run_data(data: Path, out: Path) -> None:
    """`percov2 train data`: decode the shards of a folder into a memory-mapped cache."""
    decode_shards(sorted(data.glob("*.tar")), out)


def run_autoencoder(config: Path, data: Path, out: Path, minutes: float | None = None) -> None:
    """`percov2 train autoencoder`."""
    stage, loop = autoencoder_stage(config, PhotoCrops(data))
    train(stage, loop, out, stop_after_minutes=minutes)


def run_codec(
    config: Path, data: Path, autoencoder_run: Path, out: Path, minutes: float | None = None
) -> None:
    """`percov2 train codec`."""
    crops = PhotoCrops(data)
    first, _ = autoencoder_stage(config, crops)
    load_averaged(autoencoder_run, first)
    stage, loop = codec_stage(config, crops)
    stage.autoencoder.load_state_dict(first.autoencoder.state_dict())
    train(stage, loop, out, stop_after_minutes=minutes)


def run_export(
    config: Path, data: Path, codec_run: Path, out: Path, entropy: Path | None = None
) -> None:
    """`percov2 train export`: averaged weights of a run -> a model folder.

    Args:
        entropy: folder of an exported integer entropy model; without it the folder can make tokens
            and pictures but not files.
    """
    stage, _ = codec_stage(config, PhotoCrops(data))
    load_averaged(codec_run, stage)
    rate = read_section(config, "codec")["rate"]
    save_component(stage.autoencoder, out / "autoencoder", "float16")
    save_component(stage.flow, out / "flow", "int8")
    save_component(stage.text_encoder, out / "text_encoder", "int8")
    save_component(stage.hyper_encoder, out / rate / "hyper_encoder", "float16")
    save_component(stage.quantizer, out / rate / "quantizer", "float32")
    side = PatchAutoencoder.stride * int(stage.hyper_encoder.config["stride"])
    size = int(stage.quantizer.config["codebook_size"])
    ModelConfig(
        name=out.name,
        rates=(Rate(rate, side, size),),
        default_rate=rate,
        prediction=stage.config.prediction,
    ).save(out)
    if entropy is not None:
        shutil.copytree(entropy, out / rate / "entropy", dirs_exist_ok=True)
        # Beside the config, so that `percov2 info` can name model and rate without loading them.
        known = Codec.from_pretrained(out).model_id(rate)
        (out / "model_id").write_text(f"{known:04x} {rate}\n", encoding="utf-8")


def run_tokens(
    model: Path, data: Path, out: Path, rate: str | None = None, precision: str = "no"
) -> None:
    """`percov2 train tokens`: every photo's token map, for stage 2.

    Args:
        out: ``.npz`` with ``tokens_<i>`` int32 [h, w] per photo and ``codebook_size``.
        precision: "bf16" halves the time; a few tokens near a tie may differ from the codec's own.
    """
    codec = CodecModel(model)
    point = codec.config.rate(rate or codec.config.default_rate)
    photos = PhotoCrops(data)
    maps: dict[str, Any] = {"codebook_size": np.int32(point.codebook_size)}
    for i, photo in enumerate(tqdm(photos.photos, desc="tokens", unit="photo")):
        pixels = photos.pixels(photo)
        height = photo.height - photo.height % point.token_side
        width = photo.width - photo.width % point.token_side
        image = torch.from_numpy(pixels[:height, :width].copy()).permute(2, 0, 1)[None]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            tokens = codec.encode_tokens(image.float().div(127.5).sub(1.0), point.name)
        maps[f"tokens_{i}"] = tokens[0].numpy()
    np.savez(out, **maps)


def run_entropy(config: Path, data: Path, out: Path, minutes: float | None = None) -> None:
    """`percov2 train entropy`: token maps -> ``out/entropy``, for `train export`."""
    table = read_section(config, "entropy")
    loop = build_config(LoopConfig, table.pop("loop"))
    train_entropy(build_config(EntropyConfig, table), loop, data, out, minutes=minutes)
