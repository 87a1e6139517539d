"""Layers of the integer transformer in Triton kernels, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from percov2.entropy import ranges
from percov2.entropy.transformer_config import TransformerConfig

__all__ = ["Head", "Layer", "Plan"]


Plan = tuple[Tensor, ...]
"""Blocks of readers and keys, made by ``reader_plan.plan_readers``."""


class _Linear:
    """The tensors of one linear map."""

    def __init__(self, tensors: dict[str, Tensor], name: str) -> None:
        kinds = ("weight", "bias", "multiplier", "shift")
        self._tensors = [tensors[f"{name}.{kind}"].contiguous() for kind in kinds]

    def __call__(
        self,
        x: Tensor,
        table: Tensor | None = None,
        residual: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        from percov2.triton_kernels import linear

        return linear(x, *self._tensors, table=table, residual=residual, dtype=dtype)


class Layer:
    """``layers.Layer`` in Triton kernels."""

    def __init__(self, config: TransformerConfig, tensors: dict[str, Tensor], index: int) -> None:
        prefix = f"layers.{index}"
        self._inner = config.inner
        self._attention_gain = tensors[f"{prefix}.attention_norm.gain"]
        self._mlp_gain = tensors[f"{prefix}.mlp_norm.gain"]
        self._gelu = tensors[f"{prefix}.gelu"]
        self._bias = tensors[f"{prefix}.attention.bias"].contiguous()
        self._shift = tensors[f"{prefix}.attention.shift"]
        self._gain_bits = int(tensors[f"{prefix}.attention.gain_bits"])
        table = torch.tensor(ranges.WEIGHT_TABLE, dtype=torch.int8)
        self._weights = table.to(self._shift.device)
        self._q, self._kv, self._out, self._up, self._down = (
            _Linear(tensors, f"{prefix}.{name}") for name in ("q", "kv", "out", "up", "down")
        )

    def keys_values(self, contents: Tensor) -> tuple[Tensor, Tensor]:
        """Return (k, v), int8 [B, K, heads * head_dim], of a residual, int32 [B, K, dim]."""
        from percov2.triton_kernels import layer_norm

        both = self._kv(layer_norm(contents, self._attention_gain))
        return both[..., : self._inner], both[..., self._inner :]

    def advance(self, residual: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """Return the residual of the readers after this layer, int32 [B, E, dim].

        ``k`` and ``v`` are int8 [B, K, heads * head_dim] and include all keys of the plan.
        """
        from percov2.triton_kernels import attention, layer_norm

        q = self._q(layer_norm(residual, self._attention_gain))
        attended = attention(q, k, v, plan, self._bias, self._shift, self._gain_bits, self._weights)
        residual = self._out(attended, residual=residual)
        hidden = self._up(layer_norm(residual, self._mlp_gain), table=self._gelu)
        return self._down(hidden, residual=residual)


class Head:
    """``layers.Head`` in Triton kernels."""

    def __init__(self, config: TransformerConfig, tensors: dict[str, Tensor]) -> None:
        self._gain = tensors["head_norm.gain"]
        self._linear = _Linear(tensors, "head")

    def logits(self, residual: Tensor) -> Tensor:
        """Return the base-2 logits, int16 [B, n, V], of a residual, int32 [B, n, dim]."""
        from percov2.triton_kernels import layer_norm

        return self._linear(layer_norm(residual, self._gain), dtype=torch.int16)
