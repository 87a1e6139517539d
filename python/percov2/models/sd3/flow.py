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

from percov2.models.placement import load_part
from percov2.models.tiny.flow import widen_patch_embedding

__all__ = ["DELTA_FILE", "apply_delta", "load_delta", "open_flow", "save_delta"]


DELTA_FILE = "delta.safetensors"
_EMBEDDING = ("pos_embed.proj.weight", "pos_embed.proj.bias")
_DOWN, _UP = ".lora_down", ".lora_up"


def save_delta(tensors: Mapping[str, Tensor], lora_scale: float, folder: Path) -> None:
    """Write ``folder/delta.safetensors``.

    Args:
        tensors: tensors with the names of the module docstring; both of the patch embedding.
        lora_scale: factor of all low-rank updates (alpha / r).
        folder: where to write; created if missing.

    Raises:
        ValueError: missing or unknown names.
    """
    _check_names(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / DELTA_FILE, {"lora_scale": repr(float(lora_scale))})


def _check_names(tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in _EMBEDDING if name not in tensors]
    rest = [name for name in tensors if name not in _EMBEDDING]
    partner = {_DOWN: _UP, _UP: _DOWN}
    for name in rest:
        for kind, other in partner.items():
            if name.endswith(kind) and name.removesuffix(kind) + other not in tensors:
                missing.append(name.removesuffix(kind) + other)
    unknown = [name for name in rest if not name.endswith((_DOWN, _UP))]
    if missing or unknown:
        raise ValueError(f"missing tensors {missing}, unexpected tensors {unknown}")


def load_delta(folder: Path) -> tuple[dict[str, Tensor], float]:
    """Load the tensors and the LoRA scale written by ``save_delta``.

    Raises:
        ValueError: the file is damaged or no delta.
    """
    path = folder / DELTA_FILE
    try:
        with safe_open(path, "pt") as file:
            scale = float((file.metadata() or {})["lora_scale"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_names(tensors)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path} is no flow delta: {error}") from error
    return tensors, scale


@torch.no_grad()
def apply_delta(
    transformer: SD3Transformer2DModel, tensors: Mapping[str, Tensor], lora_scale: float
) -> None:
    """Widen a base transformer in place and add a delta to it, with sums in float32.

    Raises:
        ValueError: a tensor that fits no layer.
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
    for name in tensors:
        if name.endswith(_DOWN):
            layer = name.removesuffix(_DOWN)
            _add_update(transformer, layer, tensors[name], tensors[layer + _UP], lora_scale)


def _add_update(
    transformer: nn.Module, layer: str, down: Tensor, up: Tensor, lora_scale: float
) -> None:
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


def _widened_base(folder: Path, location: str, dtype: torch.dtype) -> SD3Transformer2DModel:
    """Load the base's own transformer if it is widened, as in a saved pipeline."""
    config = load_part(_TransformerConfig, location, "transformer")
    if config["in_channels"] <= config["out_channels"]:
        raise ValueError(
            f"{folder} holds no flow: neither config.json and weights of a transformer nor "
            f"{DELTA_FILE}, and the transformer of {location} has no input channels for z_hat"
        )
    return load_part(
        SD3Transformer2DModel, location, "transformer", torch_dtype=dtype, use_safetensors=True
    )


class _TransformerConfig:
    from_pretrained = SD3Transformer2DModel.load_config


def open_flow(folder: Path, location: str, dtype: torch.dtype) -> SD3Transformer2DModel:
    """Open the flow transformer of a folder ``flow``.

    Args:
        folder: a whole transformer, a delta, or a missing folder.
        location: hub id or folder of the base model; not read for a whole transformer.
        dtype: dtype of the weights.

    Raises:
        ValueError: no flow in any form, or one that does not fit.
    """
    if (folder / "config.json").is_file():
        return load_part(
            SD3Transformer2DModel,
            str(folder.parent),
            folder.name,
            torch_dtype=dtype,
            use_safetensors=True,
        )
    if not (folder / DELTA_FILE).is_file():
        return _widened_base(folder, location, dtype)
    tensors, scale = load_delta(folder)
    transformer = load_part(
        SD3Transformer2DModel, location, "transformer", torch_dtype=dtype, use_safetensors=True
    )
    try:
        with torch.inference_mode(False):
            apply_delta(transformer, tensors, scale)
    except ValueError as error:
        raise ValueError(f"{folder / DELTA_FILE}: {error}") from error
    return transformer
