"""The integer transformer in torch on any device. All other executors are tested against it.

Encoding is one pass with the contents and queries of all stages. Decoding stage g is one pass with
the contents of stage g - 1 and the queries of stage g over cached keys and values. An entry sees
the same keys either way and the arithmetic is exact, so the results are equal integers.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.entropy.torch.blocks import Block, plan_blocks
from percov2.entropy.torch.grids import Grid, Grids, PlacedGrids
from percov2.entropy.torch.layers import Head, Layer
from percov2.entropy.transformer_config import TransformerConfig
from percov2.entropy.visibility import Entries, sixteenth, size_class

__all__ = ["Executor", "Staged", "places"]


_KEPT_TOKENS = 2**19
"""Tokens of the grids whose entries are kept. Triton keeps about 500 more bytes per token of grids
that were in a batch of unequal grids."""


class Executor:
    """The layers of one model on one device.

    ``tensors`` holds the tensors of ``int_transformer.tensor_layout(config)``, on ``device``. Stage
    maps are int32 [h, w] with values 1 .. S. The callers check stage maps and tokens. Executors
    with other layers replace ``layer_type``, ``head_type`` and ``plan_of``.

    B grids of one size and schedule are B rows that share one plan. Unequal grids are a single row,
    in which an entry sees only keys of its own grid.
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
        self._lock = threading.Lock()
        self._grids: OrderedDict[Hashable, Grid] = OrderedDict()

    def grids(self, maps: Sequence[NDArray[np.int32]], sent: Sequence[int] | None = None) -> Grids:
        """Return the grids of stage maps; see ``Grids``. The latest grids are kept."""
        found = []
        for stages in maps:
            name = Grid.name_of(stages)
            with self._lock:
                grid = self._grids.pop(name, None)
            grid = grid or Grid(stages)
            with self._lock:
                self._grids[name] = grid
            found.append(grid)
        with self._lock:
            tokens = sum(len(grid.coding) for grid in self._grids.values())
            while tokens > _KEPT_TOKENS:
                tokens -= len(self._grids.popitem(last=False)[1].coding)
        return Grids(found, sent)

    def plan_of(self, grids: Grids, stage: int | None, contents: bool) -> Any:
        """Return the plan of a pass; the arguments are those of ``Grids.maps``."""
        if len(grids.grids) == 1:
            return self.plan(*grids.grids[0].entries(stage, contents))
        present, readers, keys = grids.maps(stage, contents)
        joined = torch.from_numpy(np.concatenate([readers, keys]))
        joined = joined.to(self.device, non_blocking=True)
        reader_at, key_at = joined.split([len(readers), len(keys)])
        blocks: list[Block] = []
        for grid in present:
            reader, key = grid.entries(stage, contents)
            blocks += [
                replace(block, readers=reader_at[block.readers], keys=key_at[block.keys])
                for block in self.plan(reader, key)
            ]
            reader_at, key_at = reader_at[len(reader) :], key_at[len(key) :]
        return blocks

    def plans(self, grids: Grids, stage: int | None) -> tuple[Any, Any]:
        """Return the plans of a pass for ``through_layers``. None means the pass of encoding."""
        return self.plan_of(grids, stage, True), self.plan_of(grids, stage, False)

    def plan(self, reader: Entries, key: Entries) -> Any:
        """Return the blocks of readers and keys in the form that the layers expect."""
        return plan_blocks(reader, key, self.device)

    def encode(self, tokens: Tensor, stages: NDArray[np.int32]) -> Tensor:
        """Return the residual of all queries in coding order: int32 [B, h * w, dim].

        ``tokens`` is int64 [B, h, w] on the device.
        """
        return self.encode_placed(tokens.flatten(1), self.grids([stages]).place(self.device))

    def encode_placed(self, tokens: Tensor, placed: PlacedGrids) -> Tensor:
        """Return the residual of all queries in joint order: int32 [B, N, dim].

        ``tokens`` is int64 [B, N] on the device, grid by grid in raster order. B is 1 for several
        grids.
        """
        batch, known = len(tokens), placed.contents(None)
        place = self.place_payload(placed.places)
        start = self.start_payloads(placed).expand(batch, -1, -1)
        contents = self.content_payload(tokens[:, placed.sequence[known]], place[known])
        queries = self.query_payload(place).expand(batch, -1, -1)
        residual = torch.cat([start, contents, queries], 1)
        plans = self.plans(placed.grids, None)
        return self.through_layers(residual, placed.grids.key_count, plans, lambda i, kv: kv)

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
        return Staged(self, self.grids([stages]).place(self.device), batch)

    def staged_placed(self, placed: PlacedGrids) -> Staged:
        """Return the stage-by-stage passes that decode several grids."""
        return Staged(self, placed, 1)

    def logits(self, residual: Tensor) -> Tensor:
        """Return the base-2 logits, int16 [B, n, V], of a residual, int32 [B, n, dim]."""
        return self._head.logits(residual)

    def start_payload(self, height: int, width: int) -> Tensor:
        """Return the residual of the start entries of a grid: int32 [3, dim]."""
        payload = self._tables["start"].clone()
        payload[1] += self._tables["height"][size_class(height)]
        payload[2] += self._tables["width"][size_class(width)]
        return payload

    def start_payloads(self, placed: PlacedGrids) -> Tensor:
        """Return the residual of the start entries of all grids: int32 [3 * G, dim]."""
        heights, widths = placed.classes
        payload = self._tables["start"].repeat(len(heights), 1, 1)
        payload[:, 1] += self._tables["height"][heights]
        payload[:, 2] += self._tables["width"][widths]
        return payload.flatten(0, 1)

    def place_payload(self, place: Tensor) -> Tensor:
        """Return the embeddings, int32 [n, dim], of the sixteenths of both sides, [2, n]."""
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

    def __init__(self, executor: Executor, placed: PlacedGrids, batch: int) -> None:
        self._executor, self._placed, self._batch = executor, placed, batch
        self._grids = grids = placed.grids
        self.stage = 0  # number of stages whose tokens are known
        # In joint order.
        shape = batch, int(grids.ends[-1])
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=executor.device)
        memory = batch, grids.key_count, 2 * executor.inner
        self._cache = [_untouched(memory, executor.device) for _ in executor.layers]

    def begin(self) -> None:
        """Forget all tokens."""
        self.stage = 0
        self._tokens.zero_()

    def residual(self) -> Tensor:
        """Return the residual of the next stage's queries: int32 [B, n, dim]."""
        return self.through_stage(self.stage, self.plans(self.stage))

    def plans(self, stage: int) -> tuple[Any, Any]:
        """Return the plans of a stage, counted from 0, for ``Executor.through_layers``."""
        return self._executor.plans(self._grids, stage)

    def through_stage(self, stage: int, plans: tuple[Any, Any]) -> Tensor:
        """Return the residual of the queries of a stage, whose earlier tokens are known."""
        executor, placed = self._executor, self._placed
        fresh, _ = self._grids.parts(stage)
        count = fresh.stop - fresh.start
        place = executor.place_payload(placed.places[:, placed.entries(stage)])
        if stage:
            tokens = self._tokens[:, placed.contents(stage)]
            new, place = executor.content_payload(tokens, place[:count]), place[count:]
        else:
            new = executor.start_payloads(placed).expand(self._batch, -1, -1)
        queries = executor.query_payload(place).expand(self._batch, -1, -1)

        def known_keys(layer: int, kv: Tensor) -> Tensor:
            cache = self._cache[layer]
            cache[:, fresh] = kv
            return cache[:, : fresh.stop]

        residual = torch.cat([new, queries], 1)
        return executor.through_layers(residual, count, plans, known_keys)

    def accept(self, tokens: Tensor) -> None:
        """Take the tokens of the next stage, [B, n]."""
        known, end = int(self._grids.ends[self.stage]), int(self._grids.ends[self.stage + 1])
        self._tokens[:, known:end] = tokens.to(self._tokens.device)
        self.stage += 1

    def tokens(self) -> Tensor:
        """Return the tokens so far, int32 [B, h, w], with 0 at the other positions.

        Those of several grids are int32 [1, N], grid by grid in raster order.
        """
        grid = torch.zeros_like(self._tokens)
        grid[:, self._placed.sequence] = self._tokens
        grid = grid.to(torch.int32)
        first, *others = self._grids.grids
        return grid if others else grid.view(self._batch, *first.shape)
