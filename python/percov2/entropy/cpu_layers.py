"""Layers of the integer transformer in C++: the same integers as torch_layers, faster on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.entropy import rans
from percov2.entropy.entries import Entries
from percov2.entropy.transformer_config import TransformerConfig

Arrays = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]
Plan = tuple[Arrays, Arrays]


def plan(readers: Entries, keys: Entries, device: torch.device) -> Plan:
    """What ``Layer.advance`` needs to know about who reads whom: positions and times of both.

    Raises ValueError for another device than the CPU.
    """
    if device.type != "cpu":
        raise ValueError(f"the executor 'cpu' cannot run on {device}; use 'torch' there")
    return (
        (readers.row, readers.column, readers.reads),
        (keys.row, keys.column, keys.key_stage),
    )


class Layer:
    """One layer; see ``torch_layers.Layer``."""

    def __init__(self, config: TransformerConfig, tensors: dict[str, Tensor], index: int) -> None:
        prefix = f"layers.{index}."
        arrays = {
            name.removeprefix(prefix): tensor.numpy()
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        self._layer = rans.IntegerLayer(
            arrays, config.dim, config.heads, config.head_dim, config.hidden
        )

    def keys_values(self, contents: Tensor) -> tuple[Tensor, Tensor]:
        """Residual int32 [B, K, dim] -> k, v int8 [B, K, heads * head_dim]."""
        k, v = self._layer.keys_values(contents.numpy(), torch.get_num_threads())
        return torch.from_numpy(k), torch.from_numpy(v)

    def advance(self, residual: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """The residual int32 [B, E, dim] of some readers after this layer.

        k, v: int8 [B, K, heads * head_dim], of at least the planned keys.
        """
        readers, keys = plan
        advanced = self._layer.advance(
            residual.numpy(), readers, k.numpy(), v.numpy(), keys, torch.get_num_threads()
        )
        return torch.from_numpy(advanced)


class Head:
    """The last LayerNorm and the map to logits."""

    def __init__(self, config: TransformerConfig, tensors: dict[str, Tensor]) -> None:
        arrays = {
            name: tensor.numpy() for name, tensor in tensors.items() if name.startswith("head")
        }
        self._head = rans.IntegerHead(arrays, config.dim, config.codebook_size)

    def logits(self, residual: Tensor) -> Tensor:
        """Residual int32 [B, n, dim] after the last layer -> int16 base-2 logits [B, n, V]."""
        contiguous = residual.contiguous().numpy()
        return torch.from_numpy(self._head.logits(contiguous, torch.get_num_threads()))
