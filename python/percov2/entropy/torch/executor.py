"""The integer transformer in torch on any device. All other executors are tested against it.

Encoding is one pass with the contents and queries of all stages. Decoding stage g is one pass with
the contents of stage g - 1 and the queries of stage g over cached keys and values. An entry sees
the same keys either way and the arithmetic is exact, so the results are equal integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.entropy.schedule import order
from percov2.entropy.torch.blocks import plan_blocks
from percov2.entropy.torch.layers import Head, Layer
from percov2.entropy.transformer_config import TransformerConfig
from percov2.entropy.visibility import (
    START_ENTRIES,
    Entries,
    content_entries,
    join,
    query_entries,
    sixteenth,
    size_class,
    start_entries,
)

__all__ = ["Executor"]


class Executor:
    """The layers of one model on one device.

    ``tensors`` holds the tensors of ``int_transformer.tensor_layout(config)``, on ``device``. Stage
    maps are int32 [h, w] with values 1 .. S. The callers check stage maps and tokens. Executors
    with other layers replace ``layer_type``, ``head_type`` and ``plan``.
    """

    layer_type: Any = Layer
    head_type: Any = Head

    def __init__(
        self, config: TransformerConfig, tensors: dict[str, Tensor], device: torch.device
    ) -> None:
        self.inner, self.device = config.inner, device
        self._tables = {
            name.removeprefix("embedding."): tensor.to(torch.int32)
            for name, tensor in tensors.items()
            if name.startswith("embedding.")
        }
        self.layers = [self.layer_type(config, tensors, i) for i in range(config.layers)]
        self._head = self.head_type(config, tensors)

    def plan(self, reader: Entries, key: Entries) -> Any:
        """Return the blocks of readers and keys in the form that the layers expect."""
        return plan_blocks(reader, key, self.device)

    def encode(self, tokens: Tensor, stages: NDArray[np.int32]) -> Tensor:
        """Return the residual of all queries in coding order: int32 [B, h * w, dim].

        ``tokens`` is int64 [B, h, w] on the device.
        """
        height, width = stages.shape
        coding = order(stages)
        stage = stages.reshape(-1)[coding]
        # No entry reads the contents of the last stage.
        known = int(np.searchsorted(stage, stage[-1]))
        contents = content_entries(stage[:known], coding[:known], width)
        keys = join(start_entries(), contents)
        content_plan = self.plan(keys, keys)
        query_plan = self.plan(query_entries(stage, coding, width), keys)

        batch = tokens.shape[0]
        sequence = torch.from_numpy(coding).to(self.device, non_blocking=True)
        place = self.place_payload(height, width, sequence)
        ordered = tokens.flatten(1)[:, sequence[:known]]
        start = self.start_payload(height, width).expand(batch, -1, -1)
        known_residual = torch.cat([start, self.content_payload(ordered, place[:known])], 1)
        residual = self.query_payload(batch, place)
        for layer in self.layers:
            k, v = layer.keys_values(known_residual)
            residual = layer.advance(residual, k, v, query_plan)
            if layer is not self.layers[-1]:  # no entry reads contents after the last layer
                known_residual = layer.advance(known_residual, k, v, content_plan)
        return residual

    def staged(self, stages: NDArray[np.int32], batch: int) -> _Staged:
        """Return the stage-by-stage passes that decode ``batch`` grids."""
        return _Staged(self, stages, batch)

    def logits(self, residual: Tensor) -> Tensor:
        """Return the base-2 logits, int16 [B, n, V], of a residual, int32 [B, n, dim]."""
        return self._head.logits(residual)

    def start_payload(self, height: int, width: int) -> Tensor:
        """Return the residual of the start entries of a grid: int32 [3, dim]."""
        payload = self._tables["start"].clone()
        payload[1] += self._tables["height"][size_class(height)]
        payload[2] += self._tables["width"][size_class(width)]
        return payload

    def place_payload(self, height: int, width: int, position: Tensor) -> Tensor:
        """Return the embeddings, int32 [n, dim], of raster positions, int64 [n]."""
        rows = sixteenth(position // width, height)
        columns = sixteenth(position % width, width)
        return self._tables["row"][rows] + self._tables["column"][columns]

    def content_payload(self, tokens: Tensor, place: Tensor) -> Tensor:
        """Return the residual of contents, int32 [B, n, dim].

        ``tokens`` is int64 [B, n], and ``place`` are their embeddings of position, int32 [n, dim].
        """
        return self._tables["token"][tokens] + place

    def query_payload(self, batch: int, place: Tensor) -> Tensor:
        """Return the residual of queries, int32 [batch, n, dim], at ``place``, int32 [n, dim]."""
        return (self._tables["query"] + place).repeat(batch, 1, 1)


def _untouched(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int8 zeros. On the CPU, the system provides their memory on the first write.

    Therefore a damaged file that declares a large grid costs no memory.
    """
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype=np.int8))
    return torch.zeros(shape, dtype=torch.int8, device=device)


class _Staged:
    """The passes of decoding. Per stage, call ``residual``, then ``accept`` with the tokens."""

    def __init__(self, executor: Executor, stages: NDArray[np.int32], batch: int) -> None:
        self._executor, self._shape, self._batch = executor, stages.shape, batch
        coding = order(stages)
        stage = stages.reshape(-1)[coding]
        self._ends = np.searchsorted(stage, np.arange(stage[-1] + 1), side="right")
        self._stage = 0  # the last stage whose tokens are known
        width = stages.shape[1]
        self._keys = join(start_entries(), content_entries(stage, coding, width))
        self._queries = query_entries(stage, coding, width)
        self._coding = torch.from_numpy(coding).to(executor.device, non_blocking=True)
        # In coding order; stage g occupies [ends[g - 1], ends[g]).
        self._tokens = torch.zeros(batch, len(coding), dtype=torch.int64, device=executor.device)
        shape = (batch, START_ENTRIES + int(self._ends[-2]), executor.inner)
        self._cache = [
            tuple(_untouched(shape, executor.device) for _ in "kv") for _ in executor.layers
        ]

    def residual(self) -> Tensor:
        """Return the residual of the next stage's queries: int32 [B, n, dim]."""
        executor = self._executor
        known, end = int(self._ends[self._stage]), int(self._ends[self._stage + 1])
        first = int(self._ends[self._stage - 1]) if self._stage else 0
        height, width = self._shape
        place = executor.place_payload(height, width, self._coding[first:end])
        if self._stage:
            new = executor.content_payload(self._tokens[:, first:known], place[: known - first])
            fresh = slice(START_ENTRIES + first, START_ENTRIES + known)
        else:
            new = executor.start_payload(height, width).repeat(self._batch, 1, 1)
            fresh = slice(0, START_ENTRIES)
        residual = executor.query_payload(self._batch, place[known - first :])
        keys = self._keys.take(slice(0, fresh.stop))
        content_plan = executor.plan(self._keys.take(fresh), keys)
        query_plan = executor.plan(self._queries.take(slice(known, end)), keys)
        for layer, (k, v) in zip(executor.layers, self._cache, strict=True):
            k[:, fresh], v[:, fresh] = layer.keys_values(new)
            residual = layer.advance(residual, k, v, query_plan)
            if layer is not executor.layers[-1]:
                new = layer.advance(new, k, v, content_plan)
        return residual

    def accept(self, tokens: Tensor) -> None:
        """Take the tokens of the next stage, [B, n]."""
        known, end = int(self._ends[self._stage]), int(self._ends[self._stage + 1])
        self._tokens[:, known:end] = tokens.to(self._tokens.device)
        self._stage += 1

    def tokens(self) -> Tensor:
        """Return the tokens so far, int32 [B, h, w], with 0 at the other positions."""
        grid = torch.zeros_like(self._tokens)
        grid[:, self._coding] = self._tokens
        return grid.to(torch.int32).view(self._batch, *self._shape)
