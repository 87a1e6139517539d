"""Storage of a network: one folder with float32, float16 or int8-per-row weights.

``config.json`` is the network's diffusers config; ``model.safetensors`` holds the tensors. An int8
matrix ``name`` comes with ``name.scale``, one float32 factor per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from percov2.models.stored_tensors import SCALE
from percov2.models.torch.isolation import loading
from percov2.stored_files import MOST_JSON_BYTES, check_regular, one_line

__all__ = ["FORMATS", "check_sizes", "load_component", "save_component"]

Component = TypeVar("Component", bound=ModelMixin)

FORMATS = ("float32", "float16", "int8")
# Constructors compute these sine tables; storing them would cost megabytes.
_REBUILT = ("pos_embed.pos_embed",)


def save_component(model: ModelMixin, folder: Path, weight_format: str) -> None:
    """Write a network's config and weights.

    Tensors that equal those in the folder keep their stored form: rounding them twice may change
    their last bits, and an encoder's last bits may change tokens. ``weight_format`` is "float32",
    "float16" or "int8" (matrices int8 per row, the rest float16); ValueError for others.
    """
    if weight_format not in FORMATS:
        raise ValueError(f"weight_format must be one of {FORMATS}, not {weight_format!r}")
    folder.mkdir(parents=True, exist_ok=True)
    assert isinstance(model, ConfigMixin)
    model.save_config(folder)
    path = folder / "model.safetensors"
    try:
        before = load_file(path) if path.is_file() else {}
    except (SafetensorError, OSError):
        before = {}
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name in _REBUILT:
            continue
        if name in before and torch.equal(_restored(before, name), value.cpu()):
            kept = (name, name + SCALE) if before[name].dtype == torch.int8 else (name,)
            tensors.update({key: before[key] for key in kept})
        elif weight_format == "int8" and value.ndim >= 2 and value.numel() >= 1024:
            rows = value.float().flatten(1)
            scale = tensors[name + SCALE] = rows.abs().amax(1).clamp_min(1e-12) / 127
            tensors[name] = (rows / scale[:, None]).round().to(torch.int8).view(value.shape)
        elif value.is_floating_point() and weight_format != "float32":
            tensors[name] = value.half()
        else:
            tensors[name] = value.clone()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@loading()
def load_component(kind: type[Component], folder: Path, device: str = "cpu") -> Component:
    """Load a network written by :func:`save_component`, as float32, in evaluation mode.

    Raises ValueError for an incomplete folder and for tensors that do not match the config.
    """
    path = folder / "model.safetensors"
    for file, most in ((path.with_name("config.json"), MOST_JSON_BYTES), (path, None)):
        check_regular(file, most)
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error
    try:
        config = kind.load_config(folder)
        check_sizes(config, stored)
        model: Any = kind.from_config(config)
    except MemoryError:
        raise
    except Exception as error:  # constructors raise errors of many types for wrong arguments
        raise ValueError(f"{folder / 'config.json'}: {one_line(error)}") from error
    try:
        scales = {name + SCALE for name in stored}
        state = {name: _restored(stored, name) for name in stored if name not in scales}
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = one_line(error)
        raise ValueError(f"{path} is damaged or does not match its config: {reason}") from error
    missing = [name for name in missing if name not in _REBUILT]
    if missing or unexpected:
        raise ValueError(f"{folder}: missing tensors {missing}, unexpected tensors {unexpected}")
    return model.to(device).eval()


def check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a setting that is too large for a network of these tensors.

    A network is constructed before its tensors can be compared, and a forged size would cost
    minutes or all memory. Every size is at most the number of stored values, and a number of layers
    or blocks is at most the number of tensors.
    """
    values = sum(tensor.numel() for tensor in tensors.values())

    def check(name: str, value: Any) -> None:
        if isinstance(value, list | tuple):
            for one in value:
                check(name, one)
        most = len(tensors) if "layers" in name or "blocks" in name else values
        if type(value) in (int, float) and not value <= most:
            raise ValueError(f"{name} is {value}, too large for {len(tensors)} stored tensors")

    for name, value in config.items():
        check(name, value)


def _restored(stored: dict[str, Tensor], name: str) -> Tensor:
    """Return a stored tensor as float32, or unchanged if it holds plain integers."""
    value = stored[name]
    if value.dtype == torch.int8:
        factors = stored[name + SCALE]
        if factors.shape != value.shape[:1]:
            raise ValueError(f"{name} has {len(value)} rows, but {factors.numel()} factors")
        return value.float() * factors.view(-1, *[1] * (value.ndim - 1))
    return value.float() if value.is_floating_point() else value
