"""The integer transformer in Triton kernels on a GPU, with the same integers as ``executor``.

It shares the passes and embeddings of ``executor``. The layers and the head run in
percov2.triton_kernels, with int8 products and int8 activations between kernels. A layer takes nine
launches for contents and seven for queries. No launch waits for the device.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from percov2.entropy.torch import executor, rans_cuda
from percov2.entropy.torch.reader_plan import plan_readers
from percov2.entropy.torch.triton_layers import Head, Layer, Plan
from percov2.entropy.transformer_config import TransformerConfig
from percov2.entropy.visibility import Entries

__all__ = ["Executor"]


_KEPT_PLANS = 64
_KEPT_KEYS = 2**22
"""Limit of listed keys (50 MB) over all kept plans. Images often have the same size and plan."""


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
        self._plans: OrderedDict[tuple[int, bytes], Plan] = OrderedDict()
        self._lock = threading.Lock()
        super().__init__(config, tensors, device)

    def plan(self, reader: Entries, key: Entries) -> Plan:
        """Return the plan of readers and keys. The latest plans stay on the device.

        Each stream of the device keeps its own plans. The kernels of a stream therefore run after
        the upload of a plan, and before the memory of a dropped plan is used again.
        """
        columns = [reader.row, reader.column, reader.reads, key.row, key.column, key.key_stage]
        sizes = np.array([len(reader), len(key)], dtype=np.int64)
        content = b"".join(np.ascontiguousarray(column).tobytes() for column in columns)
        name = (rans_cuda.queue(self.device), hashlib.sha256(sizes.tobytes() + content).digest())
        with self._lock:
            plan = self._plans.pop(name, None)
            if plan is None:
                plan = plan_readers(reader, key, self.device, *self._blocks)
            if _listed(plan) <= _KEPT_KEYS:
                self._plans[name] = plan
                while len(self._plans) > _KEPT_PLANS or self._kept_keys() > _KEPT_KEYS:
                    self._plans.popitem(last=False)
        return plan

    def _kept_keys(self) -> int:
        return sum(map(_listed, self._plans.values()))


def _listed(plan: Plan) -> int:
    """Return the number of keys that a plan lists."""
    return plan[-1].shape[1]
