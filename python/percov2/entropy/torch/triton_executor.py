"""The integer transformer in Triton kernels on a GPU, with the same integers as ``executor``.

It shares the passes and embeddings of ``executor``. The layers and the head run in
percov2.triton_kernels, with int8 products and int8 activations between kernels. A layer takes nine
launches for contents and seven for queries. No launch waits for the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.entropy.torch import executor, rans_cuda
from percov2.entropy.torch.grids import Grid, Grids
from percov2.entropy.torch.reader_plan import HostBlocks, key_table, place_blocks, split_blocks
from percov2.entropy.torch.recorded import Recordings, graph_recorder
from percov2.entropy.torch.triton_layers import Head, Layer, Plan
from percov2.entropy.transformer_config import TransformerConfig

__all__ = ["Executor"]


_KEPT_PLANS = 64
_KEPT_BYTES = 2**30
"""Memory of all kept plans and their biases. Images often have the same size and plan."""
_MOST_RECORDED = 2**19
"""Largest number of tokens of a recorded batch, whose memory stays on the device."""
_MOST_STAGES_KEPT = 64
"""Grids of more stages keep no blocks, because they would have almost one for each token."""
_PART_BYTES = 2**28
"""Memory of the biases of a part of a plan, in one layer."""


class Executor(executor.Executor):
    """The executor in Triton kernels.

    Raises:
        RuntimeError: triton is not installed.
        ValueError: the kernels do not run on the device. (The CPU runs them only with
            TRITON_INTERPRET=1.)
    """

    layer_type = Layer
    head_type = Head

    def __init__(
        self, config: TransformerConfig, tensors: dict[str, Tensor], device: torch.device
    ) -> None:
        from percov2 import triton_kernels

        triton_kernels.check_device(device)
        self._blocks = triton_kernels.attention_blocks()
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._key_bytes = 4 * config.heads * self._blocks[0]  # biases of a listed key and layer
        self._recordings: Recordings | None = None
        super().__init__(config, tensors, device)

    def replay(self) -> None:
        """Record staged decoding in CUDA graphs, and replay them. Results do not change."""
        self._recordings = Recordings(partial(graph_recorder, self.device))

    def staged(self, stages: NDArray[np.int32], batch: int) -> Any:
        """Return the passes that decode grids, as ``executor.Executor``."""
        make = partial(super().staged, stages, batch)
        if self._recordings is None or batch * stages.size > _MOST_RECORDED:
            return make()
        key = rans_cuda.queue(self.device), stages.shape, stages.tobytes(), batch
        return self._recordings.staged(key, make)

    def plan_of(self, grids: Grids, stage: int | None, contents: bool) -> Plan:
        """Return the plan of a pass. The latest plans of single grids stay on the device.

        Each stream of the device keeps its own plans. The kernels of a stream therefore run after
        the upload of a plan, and before the memory of a dropped plan is used again. A batch of
        unequal grids hardly comes twice, so its plan is dropped. Its blocks stay on the host, for
        other batches with some of these grids.
        """
        most = _PART_BYTES // self._key_bytes
        if len(grids.grids) > 1:
            present, readers, keys = grids.maps(stage, contents)
            blocks = [self._split(grid, stage, contents, keep=True) for grid in present]
            return Plan(place_blocks(blocks, readers, keys, self.device, most), keep=False)
        (grid,) = grids.grids
        name = rans_cuda.queue(self.device), grid.name, stage, contents
        with self._lock:
            plan = self._plans.pop(name, None)
            if plan is None:
                split = self._split(grid, stage, contents, keep=False)
                parts = place_blocks([split], None, None, self.device, most)
                size = sum(part.size for part in parts) * self._key_bytes * len(self.layers)
                plan = Plan(parts, size <= _KEPT_BYTES)
            if plan.keep:
                self._plans[name] = plan
                while len(self._plans) > _KEPT_PLANS or self._kept_bytes() > _KEPT_BYTES:
                    self._plans.popitem(last=False)
        return plan

    def _split(self, grid: Grid, stage: int | None, contents: bool, keep: bool) -> HostBlocks:
        blocks: HostBlocks | None = grid.kept.get((stage, contents))
        if blocks is None:
            blocks = split_blocks(*grid.entries(stage, contents), *self._blocks)
            if keep and grid.stage_count <= _MOST_STAGES_KEPT:
                # The stages share one table of keys.
                table = grid.kept.setdefault("keys", key_table(grid.keys))
                blocks = blocks._replace(key_table=table[:, : blocks.key_table.shape[1]])
                grid.kept[stage, contents] = blocks
        return blocks

    def _kept_bytes(self) -> int:
        return sum(plan.size for plan in self._plans.values())
