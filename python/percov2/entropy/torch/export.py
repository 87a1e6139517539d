"""Export of the trained float form to the integer form."""

from __future__ import annotations

import torch
from torch import Tensor

from percov2.entropy import ranges
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.torch.quantization import (
    LOGIT_SCALE,
    RESIDUAL_SCALE,
    SCORE_SCALE,
    QuantizedLinear,
)
from percov2.entropy.torch.transformer import TokenTransformer, TransformerLayer

__all__ = ["export"]


@torch.no_grad()
def export(model: TokenTransformer) -> IntTransformer:
    """Return the integer form of a model whose activations have been observed.

    Raises ValueError if a scale was never observed or a weight is too large for the program.
    """
    for name, buffer in model.named_buffers():
        if name.endswith("amax") and not bool((buffer > 0).all()):
            raise ValueError(f"{name} was never observed: train, or run batches with observing on")
    tensors: dict[str, Tensor] = {
        f"embedding.{name}": torch.round(value.to(torch.float64) / RESIDUAL_SCALE).to(torch.int16)
        for name, value in model.embeddings().items()
    }
    for i, layer in enumerate(model.stack()):
        tensors |= {f"layers.{i}.{name}": value for name, value in _layer(layer).items()}
    tensors["head_norm.gain"] = model.head_norm.integer_gain()
    tensors |= _linear("head", model.head, model.head_norm.scale, torch.tensor([LOGIT_SCALE]))
    return IntTransformer(model.config, tensors)


def _linear(
    name: str, linear: QuantizedLinear, in_scale: float, out_scale: Tensor
) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in linear.integers(in_scale, out_scale).items()}


def _layer(layer: TransformerLayer) -> dict[str, Tensor]:
    q_scale, _, shift = layer.score_scales()
    limit = ranges.MAX_SCORE_BIAS
    bias = torch.round(layer.bias / SCORE_SCALE).clamp(-limit, limit)
    residual = torch.tensor([RESIDUAL_SCALE])
    norm, mlp_norm = layer.attention_norm, layer.mlp_norm
    q_channels = q_scale.repeat_interleave(layer.config.head_dim)
    return {
        "attention_norm.gain": norm.integer_gain(),
        **_linear("q", layer.q, norm.scale, q_channels),
        **_linear("kv", layer.kv, norm.scale, layer.kv_scale()),
        "attention.bias": bias.to(torch.int16),
        "attention.shift": shift.to(torch.int8),
        "attention.gain_bits": torch.tensor([layer.gain_bits()], dtype=torch.int8),
        **_linear("out", layer.out, layer.mean_scale(), residual),
        "mlp_norm.gain": mlp_norm.integer_gain(),
        **_linear("up", layer.up, mlp_norm.scale, layer.up_range.scale),
        "gelu": _gelu_table(float(layer.up_range.scale), float(layer.gelu_range.scale)),
        **_linear("down", layer.down, float(layer.gelu_range.scale), residual),
    }


def _gelu_table(in_scale: float, out_scale: float) -> Tensor:
    """Return int8 [256]: GELU((index - 128) * in_scale) / out_scale, rounded, clamped to ±127."""
    x = (torch.arange(256, dtype=torch.float64) - 128) * in_scale
    y = torch.round(torch.nn.functional.gelu(x) / out_scale)
    return y.clamp(-ranges.INT8_LIMIT, ranges.INT8_LIMIT).to(torch.int8)
