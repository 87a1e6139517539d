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
        keep: True to keep biases. They take 128 bytes per listed key, head and layer.
    """

    def __init__(self, parts: list[Blocks], keep: bool) -> None:
        self.parts, self.keep = parts, keep
        self._kept: dict[tuple[int, int], Tensor] = {}

    def biases(self, part: int, layer: int, make: Callable[[Blocks], Tensor]) -> Tensor:
        """Return the biases of a part and a layer, made by ``make`` unless they are kept."""
        found = self._kept.get((part, layer))
        if found is None:
            found = make(self.parts[part])
            if self.keep:
                self._kept[part, layer] = found
        return found

    @property
    def size(self) -> int:
        """Return the memory of the plan and of the biases that it keeps, in bytes."""
        listed = sum(part.size for part in self.parts)
        return 12 * listed + sum(biases.nbytes for biases in self._kept.values())


class _Linear:
    """The tensors of one linear map, or of several maps of the same input, side by side."""

    def __init__(self, tensors: dict[str, Tensor], *names: str) -> None:
        kinds = ("weight", "bias", "multiplier", "shift")
        self._tensors = [torch.cat([tensors[f"{name}.{kind}"] for name in names]) for kind in kinds]

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
        self._qkv = _Linear(tensors, f"{prefix}.q", f"{prefix}.kv")
        self._out, self._up, self._down = (
            _Linear(tensors, f"{prefix}.{name}") for name in ("out", "up", "down")
        )

    def project(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return q, int8 [B, E, inner], and k beside v, int8 [B, E, 2 * inner].

        The residual is int32 [B, E, dim], and inner is heads * head_dim.
        """
        from percov2.triton_kernels import layer_norm

        every = self._qkv(layer_norm(residual, self._attention_gain))
        return every[..., : self._inner], every[..., self._inner :]

    def advance(self, residual: Tensor, q: Tensor, kv: Tensor, plan: Plan) -> Tensor:
        """Return the residual of the readers after this layer, int32 [B, E, dim].

        ``q`` is that of the readers. ``kv``, int8 [B, K, 2 * inner], includes all keys of the plan.
        """
        from percov2.triton_kernels import attention, attention_biases, layer_norm

        k, v = kv[..., : self._inner], kv[..., self._inner :]
        attended = q.new_empty(q.shape)
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
