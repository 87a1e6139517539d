"""The Triton executor of the integer transformer: chosen, and refused."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch

from percov2.entropy import schedule
from percov2.entropy.int_transformer import random_tensors, trial
from percov2.entropy.staging import StagedDecoder
from percov2.entropy.torch import int_transformer, triton_executor
from percov2.entropy.torch.int_transformer import IntTransformer, default_executor
from percov2.entropy.torch.reader_plan import plan_readers
from percov2.entropy.torch.triton_layers import Plan
from percov2.entropy.transformer_config import TransformerConfig
from percov2.entropy.visibility import start_entries
from tools.compiled_kernels import needs_triton
from tools.executors import model_on, random_on
from tools.launches import Operators, count_kernels

SMALL = TransformerConfig(codebook_size=16, dim=24, heads=2, head_dim=8, layers=1, hidden=40)
CUDA = torch.device("cuda", 0)


@needs_triton
def test_a_cpu_without_interpreter_is_refused() -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        random_on("triton", SMALL, 1)


@needs_triton
def test_each_stream_keeps_its_own_plans_up_to_a_limit(monkeypatch) -> None:
    from percov2.entropy.torch import rans_cuda

    executor = triton_executor.Executor.__new__(triton_executor.Executor)
    executor.device, executor._blocks = torch.device("cpu"), (32, 32)
    executor._key_bytes, executor.layers = 1, [None]
    executor._plans, executor._grids = OrderedDict(), OrderedDict()
    executor._lock = threading.Lock()
    current = 1
    monkeypatch.setattr(rans_cuda, "queue", lambda device: current)
    monkeypatch.setattr(triton_executor, "_KEPT_BYTES", 12 * 160)

    def plan(tokens: int) -> Plan:
        """The plan of the queries, which are in the last of two stages and list all contents."""
        stages = np.ones((1, tokens + 1), dtype=np.int32)
        stages[0, -1] = 2
        return executor.plan_of(executor.grids([stages]), None, False)

    first = plan(20)  # 32 listed keys
    assert plan(20) is first
    current = 2
    second = plan(20)
    assert second is not first and plan(20) is second
    current = 1
    assert plan(20) is first
    assert not plan(6000).keep  # too large to be kept, and nobody goes for it
    assert plan(20) is first
    for tokens in (25, 26, 27, 28):  # 192 keys with these: the plan used longest ago has to go
        assert plan(tokens).size == 12 * 32
    assert plan(20) is first
    current = 2
    assert plan(20) is not second


@needs_triton
def test_kept_biases_count_as_memory() -> None:
    """A second layer gets its own biases, and the same layer the same ones."""
    blocks = plan_readers(start_entries(), start_entries(), torch.device("cpu"), 32, 32)
    made = [torch.zeros(5, dtype=torch.int32) for _ in range(2)]
    left = list(made)
    plan = Plan(blocks, keep=True)
    assert [plan.biases(0, layer, lambda _: left.pop(0)) for layer in (0, 1, 0)] == [*made, made[0]]
    assert plan.size == 12 * 32 + 2 * 20
    once = Plan(blocks, keep=False)
    left = list(made)
    assert [once.biases(0, 0, lambda _: left.pop(0)) for _ in range(2)] == made
    assert once.size == 12 * 32


@needs_triton
def test_a_staged_decode_starts_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 stages and 6 layers: kernels, and operators of torch that compute or copy."""
    monkeypatch.setattr("percov2.triton_kernels.check_device", lambda device: None)
    monkeypatch.setattr(int_transformer, "_executor", lambda *_: triton_executor)
    config = TransformerConfig(codebook_size=16, dim=8, heads=1, head_dim=8, layers=6, hidden=8)
    model = IntTransformer.random(config, 1, executor="triton")
    counts = []
    for _ in range(2):
        with Operators() as operators, count_kernels() as started:
            staged = StagedDecoder(model, schedule.stages("qlds12", 16, 16), 2)
            while staged.remaining:
                tokens = staged.logits().shape[1]
                staged.accept(torch.zeros(2, tokens, dtype=torch.int32))
        counts.append((len(started) + len(operators.started) + 12, len(started)))  # 12 decode
    # Per stage: 5 layers of 7, one of 7, LayerNorm and head; the first call also makes biases.
    assert [kernels for _, kernels in counts] == [12 * (6 * 7 + 2 + 6), 12 * (6 * 7 + 2)]
    assert counts[1][0] <= 900


@needs_triton
def test_a_card_is_tried_with_tiles_of_both_sizes() -> None:
    from percov2.triton_kernels.int_linear import block_sizes

    tokens, stages = trial(11)
    assert tokens.max() < 40
    contents = len(tokens) * (3 + int((stages < stages.max()).sum()))
    assert block_sizes(tokens.size, 48) != block_sizes(contents, 48)


@pytest.mark.parametrize(
    ("installed", "capability", "chosen", "reason"),
    [
        (True, (8, 0), "triton", None),
        (True, (10, 0), "triton", None),
        (True, (7, 5), "torch", "Old Card is older"),
        (False, (9, 0), "torch", "pip install"),
    ],
)
def test_the_choice_on_a_gpu_is_visible(monkeypatch, installed, capability, chosen, reason):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        int_transformer.importlib.util,
        "find_spec",
        lambda name: (object() if installed else None) if name == "triton" else find(name),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for elsewhere in ("cpu", "meta"):
            assert default_executor(torch.device(elsewhere)) == "torch"
        assert not told
        assert default_executor(CUDA) == chosen
    assert [reason in str(one.message) for one in told] == ([True] if reason else [])
    assert all(one.category is RuntimeWarning for one in told)


def test_a_model_stays_on_the_card_that_was_current(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert int_transformer._numbered(torch.device("cuda")) == torch.device("cuda", 3)
    for device in (CUDA, torch.device("cpu"), torch.device("meta")):
        assert int_transformer._numbered(device) == device


def test_a_model_does_not_care_for_the_default_device() -> None:
    tensors = random_tensors(SMALL, 1)
    with torch.device("meta"):
        model = model_on("torch", SMALL, tensors)
        logits = model.logits(torch.zeros(1, 1, 24, dtype=torch.int32, device="cpu"))
    assert logits.device.type == "cpu"
