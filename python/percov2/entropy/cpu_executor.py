"""The integer transformer in C++: the same integers as torch_executor, faster on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.entropy import rans
from percov2.entropy.transformer_config import TransformerConfig


class Executor:
    """See ``torch_executor.Executor``.

    Raises ValueError for another device than the CPU, or tensors that do not fit the config.
    """

    def __init__(
        self, config: TransformerConfig, tensors: dict[str, Tensor], device: torch.device
    ) -> None:
        if device.type != "cpu":
            raise ValueError(f"the executor 'cpu' cannot run on {device}; use 'torch' there")
        self._native = rans.IntegerTransformer(
            {name: tensor.numpy() for name, tensor in tensors.items()},
            config.codebook_size,
            config.dim,
            config.heads,
            config.head_dim,
            config.layers,
            config.hidden,
        )

    def encode(self, tokens: Tensor, stages: NDArray[np.int32]) -> Tensor:
        """The residual of all queries in coding order: int32 [B, h * w, dim].

        tokens: int64 [B, h, w].
        """
        given = tokens.to("cpu", torch.int32).contiguous().numpy()
        residual = self._native.encode(np.ascontiguousarray(stages), given, torch.get_num_threads())
        return torch.from_numpy(residual)

    def staged(self, stages: NDArray[np.int32], batch: int) -> Staged:
        """Stage after stage of ``batch`` grids."""
        return Staged(rans.StagedPass(self._native, np.ascontiguousarray(stages), batch))

    def logits(self, residual: Tensor) -> Tensor:
        """Residual int32 [B, n, dim] after the last layer -> int16 base-2 logits [B, n, V]."""
        contiguous = residual.contiguous().numpy()
        return torch.from_numpy(self._native.logits(contiguous, torch.get_num_threads()))


class Staged:
    """See ``torch_executor.Staged``."""

    def __init__(self, native: rans.StagedPass) -> None:
        self._native = native

    def residual(self) -> Tensor:
        """The residual of the next stage's queries: int32 [B, n, dim]."""
        return torch.from_numpy(self._native.residual(torch.get_num_threads()))

    def accept(self, tokens: Tensor) -> None:
        """The tokens of the next stage: [B, n]."""
        self._native.accept(tokens.to("cpu", torch.int32).contiguous().numpy())

    def tokens(self) -> Tensor:
        """The tokens so far, 0 elsewhere: int32 [B, h, w]."""
        return torch.from_numpy(self._native.tokens())
