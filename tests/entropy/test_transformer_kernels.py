"""The compiled kernels of every instruction set against the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import percov2
from percov2.entropy import ranges, rans, schedule
from percov2.entropy.int_transformer import IntTransformer, random_tensors
from percov2.entropy.staging import StagedDecoder, one_pass_logits
from percov2.entropy.transformer_config import TransformerConfig
from tools.executors import load_on, model_on, random_on, same

TINY = Path(percov2.__file__).parent / "pretrained" / "tiny" / "r031" / "entropy"
SIZES = {
    "one of each": TransformerConfig(2, 1, 1, 1, 1, 1),
    "ragged": TransformerConfig(40, 48, 3, 17, 2, 24),
    "head_dim 8": TransformerConfig(300, 20, 2, 8, 1, 1040),
    "head_dim 32": TransformerConfig(16, 64, 1, 32, 2, 100),
    "head_dim 64": TransformerConfig(31, 130, 3, 64, 1, 65),
    "head_dim 45": TransformerConfig(8, 37, 1, 45, 2, 47),
}


@pytest.fixture(params=rans.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = rans.instruction_set()
    rans.use_instruction_set(request.param)
    yield request.param
    rans.use_instruction_set(before)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def tokens_of(batch: int, height: int, width: int, size: int) -> np.ndarray:
    generator = np.random.default_rng(batch * 100 + height * 10 + width)
    return generator.integers(0, size, (batch, height, width), dtype=np.int32)


def staged_logits(model: IntTransformer, tokens: np.ndarray, stages: np.ndarray) -> np.ndarray:
    decoder = StagedDecoder(model, stages, len(tokens))
    ordered = tokens.reshape(len(tokens), -1)[:, schedule.order(stages)]
    parts: list[np.ndarray] = []
    known = 0
    while decoder.remaining:
        parts.append(decoder.logits())
        decoder.accept(ordered[:, known : known + parts[-1].shape[1]])
        known += parts[-1].shape[1]
    return np.concatenate(parts, 1)


def assert_equal_to_torch(
    config: TransformerConfig, tensors: dict[str, np.ndarray], grids: list[tuple[int, int, int]]
) -> None:
    compiled = model_on("cpu", config, tensors)
    oracle = model_on("torch", config, tensors)
    for batch, height, width in grids:
        tokens = tokens_of(batch, height, width, config.codebook_size)
        stages = schedule.stages("qlds5", height, width)
        expected = one_pass_logits(oracle, tokens, stages)
        assert same(one_pass_logits(compiled, tokens, stages), expected)
        assert same(staged_logits(compiled, tokens, stages), expected)


@pytest.mark.parametrize("name", SIZES)
def test_random_models_equal_torch(instruction_set, name):
    config = SIZES[name]
    tensors = random_tensors(config, 7)
    assert_equal_to_torch(config, tensors, [(1, 1, 1), (2, 5, 7), (1, 3, 21), (1, 20, 35)])


@pytest.mark.parametrize("head_dim", [17, 32, 64])
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_weights_equal_torch(instruction_set, head_dim, sign):
    config = TransformerConfig(24, 48, 2, head_dim, 2, 1040)
    tensors = random_tensors(config, head_dim)
    generator = np.random.default_rng(head_dim)
    for name, tensor in sorted(tensors.items(), reverse=True):  # weights before biases
        kind = name.rpartition(".")[2]
        if kind == "weight":  # rows of one sign, so that the largest sums come up
            tensor[:] = generator.integers(0, 2, (len(tensor), 1)) * 254 - 127
            if ".up." in name or ".kv." in name:
                tensor[::2, ::3] *= -1
        elif kind == "bias" and "attention.bias" not in name:
            weight = tensors[name.replace("bias", "weight")].astype(np.int32)
            tensor[:] = sign * (ranges.ACC_LIMIT - 1 - 127 * np.abs(weight).sum(1))
        elif kind == "gain":
            tensor[:] = np.where(tensor > 600, 2047, -2047 * sign)
        elif kind == "multiplier":
            tensor.fill(127)
    tensors["layers.0.attention.bias"][:] = 2047 * sign
    tensors["layers.1.attention.bias"][:, ::2] = -2047
    tensors["layers.0.attention.shift"].fill(5)
    tensors["layers.0.attention.gain_bits"].fill(5)
    tensors["layers.1.attention.gain_bits"].fill(0)
    for size in ("row", "column", "query", "token", "start"):
        tensors[f"embedding.{size}"][..., ::3] = -(2**15)
        tensors[f"embedding.{size}"][..., 1::3] = 2**15 - 1
    assert_equal_to_torch(config, tensors, [(2, 6, 19), (1, 17, 33)])


@pytest.mark.parametrize("name", ["checkerboard", "qlds12", "var", "raster"])
def test_one_pass_equals_stages(instruction_set, name):
    config = SIZES["ragged"]
    model = random_on("cpu", config, 5)
    tokens = tokens_of(3, 6, 35, 40)
    stages = schedule.stages(name, 6, 35)
    logits = one_pass_logits(model, tokens, stages)
    assert same(staged_logits(model, tokens, stages), logits)
    assert len(np.unique(logits)) > 1000


def test_batches_and_threads_do_not_matter(instruction_set, threads):
    if instruction_set == "scalar":
        model, tokens = IntTransformer.random(SIZES["ragged"], 5), tokens_of(64, 4, 6, 40)
    else:
        model, tokens = IntTransformer.load(TINY), tokens_of(64, 7, 9, 256)
    stages = schedule.stages("qlds8", *tokens.shape[1:])
    torch.set_num_threads(1)
    expected = one_pass_logits(model, tokens, stages)
    torch.set_num_threads(threads)
    for batch in (1, 2, 7, 64):
        assert same(one_pass_logits(model, tokens[:batch], stages), expected[:batch])
        assert same(staged_logits(model, tokens[:batch], stages), expected[:batch])


def test_instruction_sets_agree_on_the_tiny_model():
    model = IntTransformer.load(TINY)
    tokens = tokens_of(1, 9, 34, 256)
    stages = schedule.stages("quincunx", 9, 34)
    before, results = rans.instruction_set(), []
    try:
        for name in rans.instruction_sets():
            rans.use_instruction_set(name)
            results.append(one_pass_logits(model, tokens, stages))
    finally:
        rans.use_instruction_set(before)
    oracle = one_pass_logits(load_on("torch", TINY), tokens, stages)
    assert all(same(result, oracle) for result in results)


def test_weights_equal_the_table(instruction_set):
    weights = rans.attention_weights(np.arange(2**16 + 5, dtype=np.int32))
    assert weights[:128].tolist() == list(ranges.WEIGHT_TABLE)
    assert not weights[128:].any()
    assert rans.attention_weights(np.array([2**31 - 1, 0], dtype=np.int32)).tolist() == [0, 127]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own():
    script = """
import os, sys
import numpy as np
from percov2.entropy import rans
logits = np.arange(64 * 40, dtype=np.int16).reshape(64, 40)
symbols = np.zeros(64, dtype=np.int32)
expected = rans.intervals(logits, symbols, 12, 1)
def right():
    return np.array_equal(rans.intervals(logits, symbols, 12, 3), expected)
assert right()
child = os.fork()
if child == 0:
    fine = right() and right()
    tasks = "/proc/self/task"
    os._exit(0 if fine and (not os.path.exists(tasks) or len(os.listdir(tasks)) == 3) else 1)
status = os.waitpid(child, 0)[1]
assert status == 0 and right()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_calls_from_several_threads_at_once():
    model = random_on("cpu", SIZES["ragged"], 5)
    stages = schedule.stages("qlds5", 5, 6)
    grids = [tokens_of(3 + i, 5, 6, 40) for i in range(6)]
    expected = [one_pass_logits(model, tokens, stages) for tokens in grids]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                results = pool.map(lambda tokens: one_pass_logits(model, tokens, stages), grids)
                assert all(same(a, b) for a, b in zip(results, expected, strict=True))
    finally:
        torch.set_num_threads(before)
