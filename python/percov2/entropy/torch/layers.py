"""Layers of the integer transformer in torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from percov2.entropy import ranges
from percov2.entropy.torch import intmath
from percov2.entropy.torch.blocks import Block
from percov2.entropy.transformer_config import TransformerConfig

__all__ = ["Head", "Layer", "Plan"]


_ROWS_AT_ONCE = 1024
"""Rows that pass a layer together, so that intermediate results stay in cache."""

Plan = list[Block]
"""Blocks of readers and keys, made by ``blocks.plan_blocks``."""


class _Linear:
    """A quantized linear map: an exact product in float32, then a requantization in int32."""

    def __init__(self, tensors: dict[str, Tensor], name: str, low: int, high: int) -> None:
        self._weight = tensors[f"{name}.weight"].to(torch.float32)
        self._bias = tensors[f"{name}.bias"].to(torch.float32)
        self._multiplier = tensors[f"{name}.multiplier"].to(torch.int32)
        self._shift = tensors[f"{name}.shift"].to(torch.int32)
        self._low, self._high = low, high

    def __call__(self, x: Tensor) -> Tensor:
        """Map float32 integers [n, K] to int32 [n, outputs] in [low, high]."""
        acc = intmath.linear(x, self._weight, self._bias)
        return intmath.requantize(acc, self._multiplier, self._shift, self._low, self._high)


class Layer:
    """One layer of the program: attention, then feed-forward. Each is added to the residual."""

    def __init__(self, config: TransformerConfig, tensors: dict[str, Tensor], index: int) -> None:
        prefix = f"layers.{index}"
        small, large = ranges.INT8_LIMIT, ranges.RESIDUAL_LIMIT
        self._heads, self._head_dim = config.heads, config.head_dim
        self._attention_gain = tensors[f"{prefix}.attention_norm.gain"].to(torch.int32)
        self._q = _Linear(tensors, f"{prefix}.q", -small, small)
        self._kv = _Linear(tensors, f"{prefix}.kv", -small, small)
        # Score = floor(q.k * 2^-shift + 1/2) + bias; the bias includes the half.
        bias = tensors[f"{prefix}.attention.bias"].to(torch.float32) + 0.5
        hidden = bias.new_full((config.heads, 1), float(ranges.HIDDEN_SCORE))
        self._bias = torch.cat([bias, hidden], 1)
        shift = tensors[f"{prefix}.attention.shift"].to(torch.float32)
        self._score_scale = torch.exp2(-shift)[:, None, None]
        self._gain_bits = int(tensors[f"{prefix}.attention.gain_bits"])
        self._out = _Linear(tensors, f"{prefix}.out", -large, large)
        self._mlp_gain = tensors[f"{prefix}.mlp_norm.gain"].to(torch.int32)
        self._up = _Linear(tensors, f"{prefix}.up", -small, small)
        self._gelu = tensors[f"{prefix}.gelu"].to(torch.float32)
        self._down = _Linear(tensors, f"{prefix}.down", -large, large)

    def _project(self, residual: Tensor, linear: _Linear) -> Tensor:
        """Return int8 [B, E, parts, heads, head_dim] of a residual int32 [B, E, dim]."""
        rows = residual.reshape(-1, residual.shape[-1]).split(_ROWS_AT_ONCE)
        parts = [
            linear(intmath.layer_norm(part, self._attention_gain)).to(torch.int8) for part in rows
        ]
        parts_of_rows = torch.cat(parts).unflatten(1, (-1, self._heads, self._head_dim))
        return parts_of_rows.unflatten(0, residual.shape[:2])

    def project(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return q, int8 [B, E, inner], and k beside v, int8 [B, E, 2 * inner].

        The residual is int32 [B, E, dim], and inner is heads * head_dim.
        """
        q, kv = (self._project(residual, linear) for linear in (self._q, self._kv))
        return q.flatten(2), kv.flatten(2)

    def advance(self, residual: Tensor, q: Tensor, kv: Tensor, plan: Plan) -> Tensor:
        """Return the residual of the readers after this layer, int32 [B, E, dim].

        ``q`` is that of the readers. ``kv``, int8 [B, K, 2 * inner], includes all keys of the plan.
        """
        residual = residual.clone()
        heads = (self._heads, self._head_dim)
        k, v = (half.unflatten(2, heads) for half in kv.chunk(2, 2))
        inputs = self._attend(q.unflatten(2, heads), k, v, plan)
        rows = residual.view(-1, residual.shape[-1]).split(_ROWS_AT_ONCE)
        parts = inputs.view(-1, self._heads * self._head_dim).split(_ROWS_AT_ONCE)
        for part, x in zip(rows, parts, strict=True):
            intmath.residual_add(part, self._out(x.to(torch.float32)))
            hidden = self._up(intmath.layer_norm(part, self._mlp_gain))
            intmath.residual_add(part, self._down(intmath.lookup(hidden, self._gelu)))
        return residual

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """Return the attention's output for q int8 [B, E, heads, head_dim], in the same shape."""
        result = q.new_empty(q.shape)
        for block in plan:
            shape = (self._heads, len(block.readers), len(block.keys))
            bias = self._bias.index_select(1, block.relative()).view(shape)
            for b in range(q.shape[0]):
                query = q[b].index_select(0, block.readers).to(torch.float32).transpose(0, 1)
                key = k[b].index_select(0, block.keys).to(torch.float32).permute(1, 2, 0)
                # |q.k| <= 64 * 127^2 < 2^20 and shift <= 12: exact, and so is the sum with bias.
                scores = torch.bmm(query * self._score_scale, key).add_(bias)
                weights = intmath.softmax_weights_(scores)
                value = v[b].index_select(0, block.keys).to(torch.float32).transpose(0, 1)
                mean = intmath.attention_mean(
                    torch.bmm(weights, value), weights.sum(-1, keepdim=True), self._gain_bits
                )
                result[b].index_copy_(0, block.readers, mean.transpose(0, 1).to(torch.int8))
        return result


class Head:
    """The last LayerNorm and the map to logits."""

    def __init__(self, config: TransformerConfig, tensors: dict[str, Tensor]) -> None:
        self._gain = tensors["head_norm.gain"].to(torch.int32)
        self._linear = _Linear(tensors, "head", ranges.LOGIT_MIN, ranges.LOGIT_MAX)
        self._size = config.codebook_size

    def logits(self, residual: Tensor) -> Tensor:
        """Return the base-2 logits, int16 [B, n, V], of a residual, int32 [B, n, dim]."""
        rows = residual.reshape(-1, residual.shape[-1]).split(_ROWS_AT_ONCE)
        parts = [self._linear(intmath.layer_norm(part, self._gain)) for part in rows]
        flat = torch.cat([part.to(torch.int16) for part in parts])
        return flat.view(*residual.shape[:-1], self._size)
