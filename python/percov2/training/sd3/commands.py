"""The functions of `percov2 train` for SD3, from configuration files to model folders."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from percov2.entropy.uniform import uniform_model
from percov2.models.backbone import open_backbone
from percov2.models.config import LATENT_SIDE, ModelConfig, Rate
from percov2.models.sd3.flow import save_delta
from percov2.models.torch.storage import save_component
from percov2.photos import found_shards, is_held_out
from percov2.training.loop import LoopConfig, load_averaged, train
from percov2.training.lora import low_rank_tensors
from percov2.training.sd3.networks import SD3Config, SD3Networks
from percov2.training.sd3.pictures import STEPS, Pictures
from percov2.training.sd3.stage import SD3Stage
from percov2.training.settings import build_config, build_phase, read_recipe, write_model_ids
from percov2.training.shards import image_batch, shard_photos

__all__ = ["run_sd3", "run_sd3_export", "run_shard_tokens", "sd3_config"]

_GUIDANCE = 3.0
"""Default guidance, as in PerCo."""


def sd3_config(path: Path, recipe: str | None = None) -> tuple[SD3Config, LoopConfig]:
    """Return section [sd3] of a file with the ``recipe`` (``read_recipe``) merged over it.

    Raises:
        ValueError: the recipe does not exist, there is no rate, or settings are unknown or invalid.
    """
    values = read_recipe(path, "sd3", recipe)
    if "rate" not in values:
        raise ValueError(f"[sd3] of {path.name} has no rate; choose a recipe with a rate")
    values["rate"] = build_config(Rate, values["rate"])
    return build_phase(SD3Config, values)


def run_sd3(
    config: Path,
    data: Path,
    out: Path,
    pictures: Path | None = None,
    minutes: float | None = None,
    recipe: str | None = None,
) -> None:
    """Run `percov2 train sd3`: train stage 1 on the shards of the folder ``data``.

    ``pictures`` is a folder of validation pictures, or None.
    """
    settings, loop = sd3_config(config, recipe)
    shown = None if pictures is None else Pictures.load(pictures, settings.crop)
    torch.manual_seed(loop.seed)
    networks = SD3Networks(settings, loop.precision, Path())
    stage = SD3Stage(networks, found_shards(data), loop.seed, shown)
    train(stage, loop, out, stop_after_minutes=minutes)


def run_sd3_export(
    config: Path,
    codec_run: Path,
    out: Path,
    entropy: list[str] | None = None,
    recipe: str | None = None,
) -> None:
    """Run `percov2 train sd3-export`: add the averaged weights of a run to a model folder.

    Args:
        out: new folder, or model folder with the same base model.
        entropy: folder of the rate's integer entropy model. None means uniform coding.
        recipe: recipe of the run.

    Raises:
        ValueError: there is no run, or ``out`` has another base model or another rate of the same
            name.
    """
    settings, loop = sd3_config(config, recipe)
    networks = SD3Networks(settings, loop.precision, Path())
    load_averaged(codec_run, SD3Stage(networks, [Path("none.tar")], loop.seed))
    model = _with_rate(out, settings, networks.open_base("cpu").location)
    home = out / settings.rate.name
    # An older whole transformer would take precedence over a delta.
    shutil.rmtree(home / "flow", ignore_errors=True)
    if settings.trained == "full":
        networks.flow.half().save_pretrained(home / "flow")
    else:
        state = networks.flow.state_dict()
        kept = {name: state[name] for name in ("pos_embed.proj.weight", "pos_embed.proj.bias")}
        scale = settings.lora_alpha / settings.lora_rank
        save_delta({**kept, **low_rank_tensors(networks.flow)}, scale, home / "flow")
    save_component(networks.hyper_encoder, home / "hyper_encoder", "float16")
    save_component(networks.quantizer, home / "quantizer", "float32")
    if entropy:
        shutil.copytree(entropy[0], home / "entropy", dirs_exist_ok=True)
    else:
        uniform_model(settings.rate.codebook_size).save(home / "entropy")
    model.save(out)
    write_model_ids(out)


def _with_rate(out: Path, settings: SD3Config, location: str) -> ModelConfig:
    """Return the folder's configuration with the rate.

    A new rate comes last, because the order of the rates must not change.
    """
    base = str(Path(location).resolve()) if Path(location).is_dir() else location
    window = settings.crop // LATENT_SIDE
    if not (out / "config.json").is_file():
        sampling: dict[str, Any] = {"steps": STEPS, "guidance": _GUIDANCE, "prediction": "velocity"}
        sampling |= {"window": window, "overlap": window // 4}
        first = settings.rate.name
        return ModelConfig(out.name, (settings.rate,), first, backbone="sd3", base=base, **sampling)
    model = ModelConfig.load(out)
    if (model.backbone, model.base) != ("sd3", base):
        raise ValueError(f"{out} has the base {model.base or model.backbone}, not {base}")
    known = {rate.name: rate for rate in model.rates}
    if known.setdefault(settings.rate.name, settings.rate) != settings.rate:
        raise ValueError(f"{out} has another rate {settings.rate.name}: {known}")
    return dataclasses.replace(model, rates=tuple(known.values()))


def run_shard_tokens(
    model: str | Path, data: Path, out: Path, rate: str | None = None, longest: int = 768
) -> None:
    """Run `percov2 train shard-tokens`: make the token maps of shards for `train entropy`.

    Every shard becomes one file, and processes share the shards. Existing files are kept, so an
    interrupted call resumes.

    Args:
        model: model folder or name.
        data: folder of the shards.
        out: folder for the files ``<shard>.npz``.
        rate: name of the rate. None means the model's default.
        longest: largest shorter side of a photo in pixels. Larger photos are scaled down.

    Raises:
        ValueError: there are no shards, or the model or rate is unknown.
    """
    from accelerate import PartialState

    place = PartialState(cpu=not torch.cuda.is_available())
    shards = found_shards(data)
    out.mkdir(parents=True, exist_ok=True)
    backbone = open_backbone(model, str(place.device))
    point = backbone.config.rate(rate or backbone.config.default_rate)
    mine = shards[place.process_index :: place.num_processes]
    for shard in tqdm(mine, desc="shards", unit="shard", disable=not place.is_main_process):
        path = out / f"{shard.stem}.npz"
        if path.is_file():
            continue
        maps: dict[str, Any] = {}
        held_out: list[bool] = []
        for key, pixels in shard_photos(shard, point.token_side, longest):
            tokens = backbone.encode_tokens(image_batch(pixels), point.name)
            maps[f"tokens_{len(held_out)}"] = tokens[0].cpu().numpy().astype(np.uint16)
            held_out.append(is_held_out(key))
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            np.savez(file, codebook_size=point.codebook_size, held_out=held_out, **maps)
        part.replace(path)
