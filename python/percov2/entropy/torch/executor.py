"""The integer transformer in torch on any device. All other executors are tested against it.

Encoding is one pass with the contents and queries of all stages. Decoding stage g is one pass with
the contents of stage g - 1 and the queries of stage g over cached keys and values. An entry sees
the same keys either way and the arithmetic is exact, so the results are equal integers.
"""

from __future__ import annotations

from collections.abc import Callable
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

__all__ = ["Executor", "Staged", "places"]


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
        queries = query_entries(stage, coding, width)

        batch = tokens.shape[0]
        sequence = torch.from_numpy(coding).to(self.device, non_blocking=True)
        place = self.place_payload(places(height, width, sequence))
        start = self.start_payload(height, width).expand(batch, -1, -1)
        known_payload = self.content_payload(tokens.flatten(1)[:, sequence[:known]], place[:known])
        query_payload = self.query_payload(place).expand(batch, -1, -1)
        residual = torch.cat([start, known_payload, query_payload], 1)
        plans = self.plan(join(keys, queries), keys), self.plan(queries, keys)
        return self.through_layers(residual, len(keys), plans, lambda i, kv: kv)

    def through_layers(
        self,
        residual: Tensor,
        count: int,
        plans: tuple[Any, Any],
        known: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """Return the residual of queries after all layers, int32 [B, n, dim].

        Contents, which become keys, and queries pass the layers together. They read the keys of the
        same layer.

        Args:
            residual: the payloads of contents and queries, int32 [B, count + n, dim].
            count: number of contents.
            plans: a plan of contents and queries, and one of the queries alone.
            known: a function of the index of a layer and of k beside v of the contents, int8
                [B, count, 2 * inner]. It returns those of all keys.
        """
        plan, query_plan = plans
        for i, layer in enumerate(self.layers):
            q, kv = layer.project(residual)
            kv = known(i, kv[:, :count])
            if layer is self.layers[-1]:  # no entry reads contents after the last layer
                residual, q, plan = residual[:, count:].contiguous(), q[:, count:], query_plan
            residual = layer.advance(residual, q, kv, plan)
        return residual

    def staged(self, stages: NDArray[np.int32], batch: int) -> Staged:
        """Return the stage-by-stage passes that decode ``batch`` grids."""
        return Staged(self, stages, batch)

    def logits(self, residual: Tensor) -> Tensor:
        """Return the base-2 logits, int16 [B, n, V], of a residual, int32 [B, n, dim]."""
        return self._head.logits(residual)

    def start_payload(self, height: int, width: int) -> Tensor:
        """Return the residual of the start entries of a grid: int32 [3, dim]."""
        payload = self._tables["start"].clone()
        payload[1] += self._tables["height"][size_class(height)]
        payload[2] += self._tables["width"][size_class(width)]
        return payload

    def place_payload(self, place: Tensor) -> Tensor:
        """Return the embeddings, int32 [n, dim], of places, int32 [2, n] from ``places``."""
        return self._tables["row"][place[0]] + self._tables["column"][place[1]]

    def content_payload(self, tokens: Tensor, place: Tensor) -> Tensor:
        """Return the residual of contents, int32 [B, n, dim].

        ``tokens`` is int64 [B, n], and ``place`` are their embeddings of position, int32 [n, dim].
        """
        return self._tables["token"][tokens] + place

    def query_payload(self, place: Tensor) -> Tensor:
        """Return the residual of queries, int32 [n, dim], at ``place``, int32 [n, dim]."""
        return self._tables["query"] + place


def places(height: int, width: int, position: Tensor) -> Tensor:
    """Return the sixteenths of both sides, int32 [2, n], that hold raster positions, int64 [n]."""
    sides = sixteenth(position // width, height), sixteenth(position % width, width)
    return torch.stack(sides).to(torch.int32)


def _untouched(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int8 zeros. On the CPU, the system provides their memory on the first write.

    Therefore a damaged file that declares a large grid costs no memory.
    """
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype=np.int8))
    return torch.zeros(shape, dtype=torch.int8, device=device)


class Staged:
    """The passes of decoding. Per stage, call ``residual``, then ``accept`` with the tokens."""

    def __init__(self, executor: Executor, stages: NDArray[np.int32], batch: int) -> None:
        self._executor, self._shape, self._batch = executor, stages.shape, batch
        coding = order(stages)
        stage = stages.reshape(-1)[coding]
        self._ends = np.searchsorted(stage, np.arange(stage[-1] + 1), side="right")
        self.stage = 0  # number of stages whose tokens are known
        width = stages.shape[1]
        self._keys = join(start_entries(), content_entries(stage, coding, width))
        self._queries = query_entries(stage, coding, width)
        self._coding = torch.from_numpy(coding).to(executor.device, non_blocking=True)
        # In coding order; stage g occupies [ends[g - 1], ends[g]).
        self._tokens = torch.zeros(batch, len(coding), dtype=torch.int64, device=executor.device)
        self._places = places(stages.shape[0], width, self._coding)
        shape = (batch, START_ENTRIES + int(self._ends[-2]), 2 * executor.inner)
        self._cache = [_untouched(shape, executor.device) for _ in executor.layers]

    def begin(self) -> None:
        """Forget all tokens."""
        self.stage = 0
        self._tokens.zero_()

    def residual(self) -> Tensor:
        """Return the residual of the next stage's queries: int32 [B, n, dim]."""
        return self.through_stage(self.stage, self.plans(self.stage))

    def _fresh(self, stage: int) -> slice:
        """Return the keys that appear in a stage: start entries, or contents of the one before."""
        if not stage:
            return slice(0, START_ENTRIES)
        begin, end = (START_ENTRIES + int(self._ends[stage - i]) for i in (1, 0))
        return slice(begin, end)

    def plans(self, stage: int) -> tuple[Any, Any]:
        """Return the plans of a stage, counted from 0, for ``Executor.through_layers``."""
        fresh = self._fresh(stage)
        keys = self._keys.take(slice(0, fresh.stop))
        queries = self._queries.take(slice(int(self._ends[stage]), int(self._ends[stage + 1])))
        plan = self._executor.plan
        return plan(join(self._keys.take(fresh), queries), keys), plan(queries, keys)

    def through_stage(self, stage: int, plans: tuple[Any, Any]) -> Tensor:
        """Return the residual of the queries of a stage, whose earlier tokens are known."""
        executor, fresh = self._executor, self._fresh(stage)
        known, end = int(self._ends[stage]), int(self._ends[stage + 1])
        first = int(self._ends[stage - 1]) if stage else 0
        place = executor.place_payload(self._places[:, first:end])
        if stage:
            new = executor.content_payload(self._tokens[:, first:known], place[: known - first])
        else:
            new = executor.start_payload(*self._shape).expand(self._batch, -1, -1)
        queries = executor.query_payload(place[known - first :]).expand(self._batch, -1, -1)

        def known_keys(layer: int, kv: Tensor) -> Tensor:
            cache = self._cache[layer]
            cache[:, fresh] = kv
            return cache[:, : fresh.stop]

        residual = torch.cat([new, queries], 1)
        return executor.through_layers(residual, fresh.stop - fresh.start, plans, known_keys)

    def accept(self, tokens: Tensor) -> None:
        """Take the tokens of the next stage, [B, n]."""
        known, end = int(self._ends[self.stage]), int(self._ends[self.stage + 1])
        self._tokens[:, known:end] = tokens.to(self._tokens.device)
        self.stage += 1

    def tokens(self) -> Tensor:
        """Return the tokens so far, int32 [B, h, w], with 0 at the other positions."""
        grid = torch.zeros_like(self._tokens)
        grid[:, self._coding] = self._tokens
        return grid.to(torch.int32).view(self._batch, *self._shape)
