"""The integer transformer on a GPU, in the Triton kernels: the same integers as torch_executor.

The passes, and what is gathered before the first layer, are torch_executor's; layers and head run
in percov2.triton_kernels, where products are int8 and everything between kernels is a byte. A
layer is nine launches for contents and seven for queries, and none waits for the device.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from percov2.entropy import torch_executor
from percov2.entropy.entries import Entries
from percov2.entropy.reader_plan import plan_readers
from percov2.entropy.transformer_config import TransformerConfig
from percov2.entropy.triton_layers import Head, Layer, Plan

_KEPT_PLANS = 64
_KEPT_KEYS = 2**18
"""Plans with at most this many listed keys (3 MB) are kept: images often have the same size."""


class Executor(torch_executor.Executor):
    """See ``torch_executor.Executor``.

    Raises RuntimeError if triton is not installed and ValueError if its kernels do not run on the
    device (the CPU runs them with TRITON_INTERPRET=1 only).
    """

    layer_type = Layer
    head_type = Head

    def __init__(
        self, config: TransformerConfig, tensors: dict[str, Tensor], device: torch.device
    ) -> None:
        from percov2 import triton_kernels

        triton_kernels.check_device(device)
        self._blocks = triton_kernels.attention_blocks()
        self._plans: OrderedDict[bytes, Plan] = OrderedDict()
        super().__init__(config, tensors, device)

    def plan(self, reader: Entries, key: Entries) -> Plan:
        """Who reads whom, in blocks; those of the last passes are kept on the device."""
        columns = [reader.row, reader.column, reader.reads, key.row, key.column, key.key_stage]
        sizes = np.array([len(reader), len(key)], dtype=np.int64)
        content = b"".join(np.ascontiguousarray(column).tobytes() for column in columns)
        name = hashlib.sha256(sizes.tobytes() + content).digest()
        plan = self._plans.pop(name, None)
        if plan is None:
            plan = plan_readers(reader, key, self.device, *self._blocks)
        if plan[-1].shape[1] <= _KEPT_KEYS:
            self._plans[name] = plan
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        return plan
