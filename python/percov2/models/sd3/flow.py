"""The flow transformer of Stable Diffusion 3, widened for z_hat.

A folder ``flow`` holds the whole transformer (``config.json`` and weights, as diffusers saves it)
or ``delta.safetensors``. A delta is the widened patch embedding and, per linear map, a low-rank
update (LoRA, arXiv 2106.09685) of the base model's transformer. Without such a folder, the base's
transformer must itself be widened. Names in a delta:

    pos_embed.proj.weight [D, 16 + C, p, p], pos_embed.proj.bias [D]
    <linear>.lora_down [r, in], <linear>.lora_up [out, r]: weight += scale · up @ down

with the float ``lora_scale`` in the file's metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from percov2.models.torch.flow import widen_patch_embedding
from percov2.models.torch.isolation import loading
from percov2.models.torch.placement import load_part
from percov2.stored_files import one_line

__all__ = ["DELTA_FILE", "apply_delta", "load_delta", "open_flow", "save_delta"]

DELTA_FILE = "delta.safetensors"
_EMBEDDING = ("pos_embed.proj.weight", "pos_embed.proj.bias")
_PAIR = _DOWN, _UP = ".lora_down", ".lora_up"


def save_delta(tensors: Mapping[str, Tensor], lora_scale: float, folder: Path) -> None:
    """Write ``folder/delta.safetensors``; the folder is created if missing.

    The tensors have the names of the module docstring, with both of the patch embedding; ValueError
    for missing or unknown ones. ``lora_scale`` is the factor of all low-rank updates (alpha / r).
    """
    _check_names(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / DELTA_FILE, {"lora_scale": repr(float(lora_scale))})


def _check_names(tensors: Mapping[str, Tensor]) -> None:
    layers = {name.removesuffix(kind) for kind in _PAIR for name in tensors if name.endswith(kind)}
    wanted = [*_EMBEDDING, *(layer + kind for layer in sorted(layers) for kind in _PAIR)]
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in wanted]
    if missing or unknown:
        raise ValueError(f"missing tensors {missing}, unexpected tensors {unknown}")


def load_delta(folder: Path) -> tuple[dict[str, Tensor], float]:
    """Load the tensors and the LoRA scale of ``save_delta``; ValueError if there is no delta."""
    path = folder / DELTA_FILE
    try:
        with safe_open(path, "pt") as file:
            scale = float((file.metadata() or {})["lora_scale"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_names(tensors)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path} is no flow delta: {one_line(error)}") from error
    return tensors, scale


@torch.no_grad()
def apply_delta(
    transformer: SD3Transformer2DModel, tensors: Mapping[str, Tensor], lora_scale: float
) -> None:
    """Widen a base transformer in place and add a delta to it, with sums in float32.

    Raises ValueError for a tensor that fits no layer.
    """
    weight, bias = (tensors[name] for name in _EMBEDDING)
    extra = weight.shape[1] - transformer.config["in_channels"]
    if weight.ndim != 4 or extra < 1:
        raise ValueError(
            f"the delta's patch embedding has shape {tuple(weight.shape)}; the base has "
            f"{transformer.config['in_channels']} input channels, and z_hat needs more"
        )
    widen_patch_embedding(transformer, extra)
    projection = transformer.pos_embed.proj
    if weight.shape != projection.weight.shape or bias.shape != projection.bias.shape:
        raise ValueError(
            f"the delta's patch embedding has shape {tuple(weight.shape)}; this base model needs "
            f"{tuple(projection.weight.shape)}: is it a delta of another base?"
        )
    projection.weight.copy_(weight)
    projection.bias.copy_(bias)
    for layer in (name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)):
        down, up = tensors[layer + _DOWN], tensors[layer + _UP]
        try:
            linear = transformer.get_submodule(layer)
            assert isinstance(linear, nn.Linear)
            update = lora_scale * (up.float() @ down.float())
            linear.weight.copy_(linear.weight.float() + update.to(linear.weight.device))
        except (AttributeError, AssertionError, RuntimeError) as error:
            raise ValueError(
                f"the delta's update of {layer} ({tuple(up.shape)} by {tuple(down.shape)}) fits no "
                "linear map of this base model: is it a delta of another base?"
            ) from error


class _TransformerConfig:
    from_pretrained = SD3Transformer2DModel.load_config


def open_flow(folder: Path, location: str, dtype: torch.dtype) -> SD3Transformer2DModel:
    """Open the flow transformer of a folder ``flow``.

    The folder holds a whole transformer or a delta, or is missing. ``location`` is the hub id or
    folder of the base model, which is not read for a whole transformer. Raises ValueError for no
    flow in any form, and for one that does not match.
    """
    form = {"torch_dtype": dtype, "use_safetensors": True}
    if (folder / "config.json").is_file():
        return load_part(SD3Transformer2DModel, str(folder.parent), folder.name, **form)
    if not (folder / DELTA_FILE).is_file():
        # The base's own transformer may be widened, as in a saved pipeline.
        config = load_part(_TransformerConfig, location, "transformer")
        if config["in_channels"] <= config["out_channels"]:
            raise ValueError(
                f"{folder} contains no flow: neither config.json and weights of a transformer nor "
                f"{DELTA_FILE}, and the transformer of {location} has no input channels for z_hat"
            )
        return load_part(SD3Transformer2DModel, location, "transformer", **form)
    tensors, scale = load_delta(folder)
    transformer = load_part(SD3Transformer2DModel, location, "transformer", **form)
    try:
        with loading():
            apply_delta(transformer, tensors, scale)
    except ValueError as error:
        raise ValueError(f"{folder / DELTA_FILE}: {error}") from error
    return transformer
