"""Layers of the integer transformer in Triton kernels, on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from percov2.entropy import ranges
from percov2.entropy.torch.reader_plan import Blocks
from percov2.entropy.transformer_config import TransformerConfig

__all__ = ["Head", "Layer", "Plan"]


class Plan:
    """Blocks of readers and keys, and the biases that layers made for them.

    Args:
        parts: the result of ``reader_plan.plan_readers``.
        kept_bytes: memory of the plan and its biases; 0 for a plan that keeps no biases.
    """

    def __init__(self, parts: list[Blocks], kept_bytes: int) -> None:
        self.parts, self.kept_bytes = parts, kept_bytes
        self._kept: dict[tuple[int, int], Tensor] = {}

    def biases(self, part: int, layer: int, make: Callable[[Blocks], Tensor]) -> Tensor:
        """Return the biases of a part and a layer, made by ``make`` unless they are kept."""
        found = self._kept.get((part, layer))
        if found is None:
            found = make(self.parts[part])
            if self.kept_bytes:
                self._kept[part, layer] = found
        return found


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
        self._index = index
        table = torch.tensor((*ranges.WEIGHT_TABLE, 0), dtype=torch.int8)
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
        from percov2.triton_kernels import attention, attention_biases, layer_norm

        q = self._q(layer_norm(residual, self._attention_gain))
        attended = torch.empty_like(q)
        scale = self._shift, self._gain_bits, self._weights
        for i, blocks in enumerate(plan.parts):
            biases = plan.biases(
                i, self._index, lambda part: attention_biases(part, self._bias, self._shift)
            )
            attention(q, k, v, blocks, biases, *scale, attended)
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
