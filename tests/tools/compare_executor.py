"""The Triton executor on a device, against torch on the CPU: argument cpu or cuda.

On cpu also what encoding a batch asks of a device after its logits. One Triton kernel makes
intervals, two CUDA kernels make streams (the call that queues both is counted here;
tests/entropy/test_cuda.py runs them), and the streams are copied once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from percov2.entropy import rans, schedule
from percov2.entropy.staging import one_pass_logits
from percov2.entropy.torch import cdf, rans_cuda, triton_executor
from percov2.entropy.torch.int_transformer import IntTransformer
from percov2.entropy.torch.token_coder import _LOGITS_AT_ONCE_FUSED, TokenCoder
from percov2.entropy.transformer_config import TransformerConfig
from percov2.triton_kernels import intervals
from tools.executors import random_on, same, staged_logits

DEVICE = torch.device(sys.argv[1])


def compare(config: TransformerConfig, name: str, shape: tuple[int, int, int]) -> None:
    tokens = torch.randint(0, config.codebook_size, shape).to(torch.int32)
    stages = schedule.stages(name, *shape[1:])
    oracle = random_on("torch", config, 3)
    model = random_on("triton", config, 3, DEVICE)
    assert model.executor_name == "triton"
    expected = one_pass_logits(oracle, tokens, stages)
    assert expected.float().std() > 100
    for _ in range(2):  # the second time with kept plans
        logits = one_pass_logits(model, tokens, stages).cpu()
        assert logits.dtype == torch.int16
        assert same(logits, expected)
    assert same(staged_logits(model, tokens, stages), expected)


def compare_joined(config: TransformerConfig, grids: list[tuple[str, int, int]]) -> None:
    """Unequal grids in joint passes, against torch one after the other."""
    maps = [schedule.stages(*grid) for grid in grids]
    tokens = [torch.randint(0, config.codebook_size, stages.shape) for stages in maps]
    oracle = random_on("torch", config, 3)
    model = random_on("triton", config, 3, DEVICE)
    expected = [
        one_pass_logits(oracle, grid[None].to(torch.int32), stages)[0]
        for grid, stages in zip(tokens, maps, strict=True)
    ]
    flat = model.place(torch.cat([grid.flatten() for grid in tokens])[None].to(torch.int32))
    # The second time with kept blocks, the third time in several parts.
    for part in (2**28, 2**28, 2**14):
        triton_executor._PART_BYTES = part
        placed = model.join(maps)
        joint = placed.grids
        residual = model.encode_joined(flat, placed)
        at = torch.from_numpy(joint.query_at).to(DEVICE)
        assert same(model.logits(residual)[0, at].cpu(), torch.cat(expected))
        staged, found = model.staged_joined(placed), []
        for begin, end in pairwise(joint.ends.tolist()):
            found.append(staged.residual())
            staged.accept(flat[:, placed.sequence[begin:end]])
        assert same(torch.cat(found, 1).cpu(), residual.cpu())
        assert same(staged.tokens().cpu(), flat.to(torch.int32).cpu())
    triton_executor._PART_BYTES = 2**28


def kernel_codes_tokens(config: TransformerConfig) -> None:
    """cdf's functions as they are on a GPU: the same intervals, and wrong tokens are marked."""
    model = random_on("torch", config, 5)
    tokens = torch.randint(0, config.codebook_size, (2, 3, 4)).to(torch.int32)
    expected = TokenCoder(model).intervals(tokens, "qlds5")
    stages = schedule.stages("qlds5", 3, 4)
    logits = one_pass_logits(model, tokens, stages).to(DEVICE)
    symbols = tokens.flatten(1)[:, torch.from_numpy(schedule.order(stages))].to(DEVICE)
    chosen = cdf.fused
    cdf.fused = lambda device: True
    try:
        both = cdf.marked_intervals(logits, symbols, 16)
        pair = cdf.intervals(logits, symbols.long(), 16)
        symbols[0, 3], symbols[1, 0] = -1, config.codebook_size
        marked = cdf.marked_intervals(logits, symbols.long() + 2**32 * (symbols < 0), 16)
    finally:
        cdf.fused = chosen
    for got in (both, pair):
        assert np.array_equal(got[0].cpu().numpy(), expected[0])
        assert np.array_equal(got[1].cpu().numpy(), expected[1])
    assert (marked[1] == 0).nonzero().tolist() == [[0, 3], [1, 0]]


def coder_round_trip(config: TransformerConfig, shape: tuple[int, int, int]) -> None:
    """The default executor: intervals equal to the CPU's, payloads that decode, wrong tokens."""
    tokens = torch.randint(0, config.codebook_size, shape).to(torch.int32)
    model = IntTransformer.random(config, 7, device=DEVICE)
    assert (model.executor_name == "triton") == cdf.fused(DEVICE) == (DEVICE.type == "cuda")
    coder, oracle = TokenCoder(model), TokenCoder(IntTransformer.random(config, 7))
    starts, freqs = coder.intervals(tokens, "qlds12")
    expected = oracle.intervals(tokens, "qlds12")
    assert np.array_equal(starts, expected[0]) and np.array_equal(freqs, expected[1])
    encoder = rans.RansEncoder([11] * len(tokens))
    count = [starts.shape[1]] * len(tokens)
    encoder.encode(starts.ravel(), freqs.ravel(), count, coder.prob_bits)
    decoder = rans.RansDecoder(*encoder.finish())
    assert same(coder.decode(decoder, "qlds12", *shape[1:]), tokens)
    wrong = tokens.to(DEVICE)
    wrong[0, 0, 0] = config.codebook_size
    with pytest.raises(ValueError, match=f"codebook has {config.codebook_size}"):
        coder.intervals(wrong, "qlds12")


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


def work_of_encoding(config: TransformerConfig, wasteful: bool = False) -> list[str]:
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
        TokenCoder(model, "cuda").encode(tokens, "qlds5", [1, 2])
    return list(work.seen)


torch.manual_seed(0)
torch.set_num_threads(1)
SMALL = TransformerConfig(codebook_size=16, dim=24, heads=2, head_dim=8, layers=2, hidden=40)
compare(SMALL, "qlds5", (2, 3, 4))
ODD = TransformerConfig(codebook_size=50, dim=33, heads=1, head_dim=20, layers=1, hidden=70)
compare(ODD, "var", (1, 1, 1))
compare(ODD, "raster", (1, 1, 3))
compare_joined(SMALL, [("qlds5", 3, 4), ("checkerboard", 1, 1), ("raster", 1, 3), ("var", 5, 4)])
kernel_codes_tokens(SMALL)
coder_round_trip(SMALL, (2, 3, 4))
if DEVICE.type == "cpu":
    assert _LOGITS_AT_ONCE_FUSED >= 256 * 1024 * 1024  # a batch of 256 x 1024 tokens is one part
    seen = work_of_encoding(SMALL)
    assert seen == ["intervals", "encode, pack", "copy"], seen
    assert work_of_encoding(SMALL, wasteful=True) == ["add", *seen]
else:
    compare(SMALL, "checkerboard", (3, 18, 33))
    compare(TransformerConfig(), "qlds12", (4, 16, 16))
    compare_joined(TransformerConfig(), [("qlds12", 12 + i, 40 - i) for i in range(20)])
    coder_round_trip(TransformerConfig(), (5, 32, 48))
    coder_round_trip(TransformerConfig(codebook_size=1024, layers=2), (2, 8, 8))
print("agreed")
