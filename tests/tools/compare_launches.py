"""The work of a device after the logits of a batch: argument cpu (interpreted kernels).

One Triton kernel makes intervals, and two CUDA kernels make streams. This script counts the call
that queues both; tests/entropy/test_rans_cuda.py runs them. The streams are copied once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from percov2.entropy import rans
from percov2.entropy.torch import cdf, rans_cuda
from percov2.entropy.torch.token_coder import _LOGITS_AT_ONCE_FUSED, TokenCoder
from percov2.entropy.transformer_config import TransformerConfig
from percov2.triton_kernels import intervals
from tools.executors import random_on

DEVICE = torch.device(sys.argv[1])


class Work(TorchDispatchMode):
    """Names of the operators that start a kernel or move bytes: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        view = any(argument.alias_info is not None for argument in func._schema.arguments)
        if not view and not name.startswith("empty"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


work = Work()


def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, which notes its name and hides its own operators."""

    def noting(*arguments: Any) -> Any:
        before = list(work.seen)
        result = call(*arguments)
        work.seen = [*before, name]
        return result

    return noting


def encode(config: TransformerConfig, wasteful: bool = False) -> list[str]:
    """The work between the last logits and the bytes on the host."""
    model = random_on("triton", config, 9, DEVICE)
    logits_of = model.logits
    quantize = cdf.marked_intervals

    def logits(residual: torch.Tensor) -> torch.Tensor:
        result = logits_of(residual)
        work.seen.clear()
        return result

    def marked(values: torch.Tensor, *rest: Any) -> torch.Tensor:
        return quantize(values + 0 if wasteful else values, *rest)

    tokens = torch.randint(0, config.codebook_size, (2, 3, 4)).to(torch.int32)
    with (
        mock.patch.object(model, "logits", logits),
        mock.patch.object(cdf, "marked_intervals", marked),
        mock.patch.object(cdf, "fused", return_value=True),
        mock.patch.object(intervals, "launch", noted("intervals", intervals.launch)),
        mock.patch.object(rans_cuda, "DEVICE_TYPE", DEVICE.type),
        mock.patch.object(rans, "cuda_encode_sizes", return_value=(4096, 64, 4096)),
        mock.patch.object(rans, "cuda_encode", noted("encode, pack", lambda *given: None)),
        mock.patch.object(
            rans_cuda.EncodedStreams, "to_host", noted("copy", lambda streams: ((), (), ()))
        ),
        mock.patch.object(rans.RansEncoder, "resumed", return_value=None),
        work,
    ):
        TokenCoder(model, "cuda").encoder(tokens, "qlds5", [1, 2])
    return work.seen


assert _LOGITS_AT_ONCE_FUSED >= 256 * 1024 * 1024  # a batch of 256 x 1024 tokens is one part
SMALL = TransformerConfig(codebook_size=16, dim=24, heads=2, head_dim=8, layers=1, hidden=40)
seen = encode(SMALL)
assert seen == ["intervals", "encode, pack", "copy"], seen
assert encode(SMALL, wasteful=True) == ["add", "intervals", "encode, pack", "copy"]
print("agreed")
