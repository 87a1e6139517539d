"""The functions of `percov2 train`, which turn configuration files into stages and runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from percov2.datasets.shards import SHARDS
from percov2.entropy.int_transformer import IntTransformer
from percov2.images import to_unit_range
from percov2.models.checksums import write_checksums
from percov2.models.config import ModelConfig
from percov2.models.tiny.backbone import TinyModel
from percov2.models.tiny.torch.autoencoder import PatchAutoencoder
from percov2.models.tiny.torch.backbone import TinyTorchModel
from percov2.models.tiny.torch.graphs import write_graphs
from percov2.models.tiny.torch.int8_decoder import write_int8_decoder
from percov2.models.torch.storage import save_component
from percov2.photos import CropPlan, PhotoCrops, decode_shards, found_shards, is_held_out
from percov2.training import checkpoint, warm_start
from percov2.training.adversary import AdversaryConfig
from percov2.training.autoencoder_stage import AutoencoderConfig, AutoencoderStage
from percov2.training.captions import CaptionsConfig, train_captions
from percov2.training.loop import LoopConfig, load_averaged, train
from percov2.training.losses import LossTerms, Term
from percov2.training.rates import RateConfig, RateNetworks
from percov2.training.settings import (
    as_table,
    build_config,
    build_phase,
    constructed,
    read_recipe,
    read_section,
    write_model_ids,
)
from percov2.training.shards import image_batch
from percov2.training.stage1 import CodecConfig, CodecStage
from percov2.training.stage2 import EntropyConfig, train_entropy

_CALIBRATION_PHOTOS = 32
_CALIBRATION_SIDE = 256

__all__ = ["autoencoder_stage", "codec_stage", "run_autoencoder", "run_captions", "run_codec"]
__all__ += ["run_data", "run_entropy", "run_export", "run_tokens"]


def _losses(values: dict[str, Any]) -> LossTerms:
    terms = as_table(values, "losses").items()
    return build_config(LossTerms, {name: build_config(Term, term) for name, term in terms})


def _rate(common: dict[str, Any], own: dict[str, Any]) -> RateConfig:
    """Merge a rate's settings over the phase's settings. Losses are merged one by one."""
    own = as_table(own, "a rate")
    each = (as_table(table.get("losses", {}), "losses") for table in (common, own))
    losses = _losses({name: term for table in each for name, term in table.items()})
    crops = build_config(CropPlan, own.get("crops", {}))
    return build_config(RateConfig, {**common, **own, "losses": losses, "crops": crops})


def autoencoder_stage(config: Path, data: PhotoCrops) -> tuple[AutoencoderStage, LoopConfig]:
    """Return the autoencoder phase of a configuration file, initialised with the run's seed."""
    values = read_section(config, "autoencoder")
    if "crops" in values:
        values["crops"] = build_config(CropPlan, values["crops"])
    if "losses" in values:
        values["losses"] = _losses(values["losses"])
    settings, loop = build_phase(AutoencoderConfig, values)
    torch.manual_seed(loop.seed)
    return AutoencoderStage(settings, data), loop


def codec_stage(
    config: Path, data: PhotoCrops, recipe: str | None = None
) -> tuple[CodecStage, LoopConfig]:
    """Return the joint phase of a configuration file, initialised with the run's seed.

    ``recipe`` is the ``chosen`` of ``read_recipe``.

    Raises:
        ValueError: there is no such recipe, or settings are invalid.
    """
    values = read_recipe(config, "codec", recipe)
    # Settings of the phase that a rate may replace.
    names = {"losses", "aligned", "frozen_tokens"} & values.keys()
    common = {key: values.pop(key) for key in names}
    rates = as_table(values.get("rates", {}), "rates")
    values["rates"] = {name: _rate(common, rate) for name, rate in rates.items()}
    values["adversary"] = build_config(AdversaryConfig, values.get("adversary", {}))
    data = data.weighing(as_table(values.pop("sources", {}), "sources"))
    sizes = as_table(read_section(config, "autoencoder").get("autoencoder", {}), "autoencoder")
    sizes |= as_table(values.pop("decoder", {}), "decoder")
    settings, loop = build_phase(CodecConfig, values)
    torch.manual_seed(loop.seed)
    autoencoder = constructed(PatchAutoencoder, "autoencoder and decoder", sizes)
    return CodecStage(settings, autoencoder, data), loop


def run_data(data: Path, out: Path) -> None:
    """Run `percov2 train data`: decode the shards of a folder into a memory-mapped cache."""
    decode_shards(found_shards(data, SHARDS), out)


def run_autoencoder(config: Path, data: Path, out: Path, minutes: float | None = None) -> None:
    """Run `percov2 train autoencoder`."""
    stage, loop = autoencoder_stage(config, PhotoCrops(data))
    train(stage, loop, out, stop_after_minutes=minutes)


def run_codec(
    config: Path,
    data: Path,
    out: Path,
    autoencoder_run: Path | None = None,
    start_from: Path | None = None,
    minutes: float | None = None,
    recipe: str | None = None,
) -> None:
    """Run `percov2 train codec`.

    Args:
        autoencoder_run: folder made by `train autoencoder`, which gives the autoencoder's weights.
            The hyper-encoders and the flow start at random.
        start_from: folder made by `train codec`, or a model folder, which gives all first weights.
        recipe: as for ``codec_stage``.

    Raises:
        ValueError: not exactly one of ``autoencoder_run`` and ``start_from`` is given.
    """
    if (autoencoder_run is None) == (start_from is None):
        raise ValueError("give either --autoencoder-run or --start-from")
    crops = PhotoCrops(data)
    stage, loop = codec_stage(config, crops, recipe)
    if stage.config.distil:
        if start_from is None or not (start_from / "config.json").is_file():
            raise ValueError("distil needs --start-from with a model folder, the teacher")
        stage.learn_from(TinyTorchModel(start_from).autoencoder)
    # An interrupted run resumes from its own checkpoint, which holds all weights.
    if not checkpoint.is_present(out / "checkpoint.pt"):
        if autoencoder_run is not None:
            first, _ = autoencoder_stage(config, crops)
            load_averaged(autoencoder_run, first)
            stage.autoencoder.load_state_dict(first.autoencoder.state_dict())
        if start_from is not None:
            for rate, origin in warm_start.start_from(stage, start_from).items():
                print(f"{rate}: {origin}")
    train(stage, loop, out, stop_after_minutes=minutes)


def run_export(
    config: Path,
    data: Path,
    codec_run: Path,
    out: Path,
    entropy: list[str] | None = None,
    recipe: str | None = None,
) -> None:
    """Run `percov2 train export`: write the averaged weights of a run to a model folder.

    Args:
        out: new or existing model folder. A rate or entropy model in it stays, unless the run has
            one of the same name, which replaces it. New rates come last.
        entropy: ``RATE=FOLDER`` for each exported integer entropy model; ``FOLDER`` alone is for
            the first rate. A rate without an entropy model cannot make files.
        recipe: recipe of the run.

    Raises:
        ValueError: an entropy model is for a rate that is not in the configuration, or a folder is
            no entropy model.
    """
    photos = PhotoCrops(data)
    stage, _ = codec_stage(config, photos, recipe)
    first = next(iter(stage.rates))
    pairs = [text.partition("=") if "=" in text else (first, "=", text) for text in entropy or ()]
    if unknown := sorted({name for name, *_ in pairs} - set(stage.rates)):
        raise ValueError(f"unknown rates {unknown}; {config.name} has {list(stage.rates)}")
    coders = {name: IntTransformer.load(folder) for name, _, folder in pairs}
    load_averaged(codec_run, stage)
    old = ModelConfig.load(out) if (out / "config.json").is_file() else None
    points = {rate.name: rate for rate in old.rates} if old else {}
    for part in ("autoencoder", "flow", "text_encoder"):
        save_component(stage.get_submodule(part), out / part, "int8")
    if stage.dial is not None:
        save_component(stage.dial, out / "dial", "float16")
    for name, networks in stage.rates.items():
        assert isinstance(networks, RateNetworks)
        save_component(networks.hyper_encoder, out / name / "hyper_encoder", "int8")
        save_component(networks.quantizer, out / name / "quantizer", "float32")
        points[name] = networks.point(name)
    ModelConfig(
        name=out.name,
        rates=tuple(points.values()),
        default_rate=old.default_rate if old else first,
        prediction=stage.config.prediction,
        decoder_noise=stage.config.decoder_noise,
        realism=None if stage.dial is None else 1.0,
    ).save(out)
    for name, coder in coders.items():
        coder.save(out / name / "entropy")
    write_graphs(out)
    write_int8_graph(out, photos)
    write_checksums(out)
    write_model_ids(out)


def write_int8_graph(folder: Path, photos: PhotoCrops) -> None:
    """Write the int8 graph of a small model's decoder, with scales measured on training photos.

    The scales come from crops of one size. Photos smaller than a token of the coarsest rate do not
    count. Without larger ones, there is no int8 graph.
    """
    model = TinyModel(folder, threads=1)
    side = max(rate.token_side for rate in model.config.rates)
    smaller = [min(photo.height, photo.width) // side * side for photo in photos.photos]
    crop = min(max(smaller, default=0), _CALIBRATION_SIDE)
    if not crop:
        return
    large = [photo for photo in photos.photos if min(photo.height, photo.width) >= crop]
    latents = []
    for i, photo in enumerate(large[:: max(1, len(large) // _CALIBRATION_PHOTOS)]):
        rate = model.config.rates[i % len(model.config.rates)].name
        images = to_unit_range(photos.pixels(photo)[None, :crop, :crop])
        tokens = model.encode_tokens(images, rate)
        steps = model.config.default_steps(rate)
        latents.append(model.latents(tokens, rate, [""], steps, 1.0, seed=i))
    write_int8_decoder(folder / "autoencoder", latents)


def _token_views(
    pixels: NDArray[np.uint8], side: int, views: int, generator: np.random.Generator
) -> Iterator[NDArray[np.uint8]]:
    """Yield a photo cut to whole tokens, then ``views`` - 1 mirrored or shifted versions of it."""
    height, width = pixels.shape[:2]
    for view in range(views):
        # The shift is below a token, and leaves at least one token.
        room = [min(side, length - side + 1) for length in (height, width)]
        top, left = (int(generator.integers(most)) if view else 0 for most in room)
        bottom = top + (height - top) // side * side
        right = left + (width - left) // side * side
        cut = pixels[top:bottom, left:right]
        yield cut[:, ::-1] if view and generator.integers(2) else cut


def run_tokens(
    model: str | Path,
    data: Path,
    out: Path,
    rate: str | None = None,
    precision: str = "no",
    views: int = 1,
) -> None:
    """Run `percov2 train tokens`: make the token maps of photos for stage 2.

    Photos smaller than a token are left out.

    Args:
        out: ``.npz`` file to write, with ``tokens_<i>`` int32 [h, w], ``held_out`` bool [maps] and
            ``codebook_size``.
        precision: "no" or "bf16". "bf16" halves the time, but a few tokens near a tie may differ
            from the codec's tokens.
        views: number of maps per photo. Maps after the first are mirrored and shifted at random.
            Rates with few tokens per photo need several maps. Held-out photos have only one.

    Raises:
        ValueError: ``views`` is below 1, the rate is unknown, or there are no photos.
    """
    if views < 1:
        raise ValueError(f"views must be at least 1, not {views}")
    codec = TinyTorchModel(Path(model))
    point = codec.config.rate(rate or codec.config.default_rate)
    side = point.token_side
    photos = PhotoCrops(data, "all")
    large = [photo for photo in photos.photos if min(photo.height, photo.width) >= side]
    maps: dict[str, Any] = {}
    held_out: list[bool] = []
    generator = np.random.default_rng(0)
    for photo in tqdm(large, desc="tokens", unit="photo"):
        held = is_held_out(photo.key)
        for cut in _token_views(photos.pixels(photo), side, 1 if held else views, generator):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                tokens = codec.encode_tokens(image_batch(cut), point.name)
            maps[f"tokens_{len(maps)}"] = tokens[0].numpy()
            held_out.append(held)
    if left_out := len(photos.photos) - len(large):
        print(f"{left_out} photos are smaller than a token of {side} pixels and were left out")
    np.savez(out, **maps, codebook_size=np.int32(point.codebook_size), held_out=held_out)


def run_entropy(
    config: Path, data: Path, out: Path, rate: str | None = None, minutes: float | None = None
) -> None:
    """Run `percov2 train entropy`: train on token maps and write ``out/entropy``.

    Args:
        rate: name of a table ``[entropy.rates.NAME]``, whose settings are merged over
            ``[entropy]``. None uses ``[entropy]`` alone.

    Raises:
        ValueError: there is no such table, or settings are invalid.
    """
    values = read_recipe(config, "entropy", rate, "rates")
    train_entropy(*build_phase(EntropyConfig, values), data, out, minutes=minutes)


def run_captions(config: Path, texts: list[Path], out: Path, minutes: float | None = None) -> None:
    """Run `percov2 train captions`: train on lines of text and write ``out/captions``."""
    phase = build_phase(CaptionsConfig, read_section(config, "captions"))
    train_captions(*phase, texts, out, minutes=minutes)
