"""The integer token transformer against its oracle, and its passes against each other.

What torch computes is compared with plain Python, and the compiled kernels of every instruction set
with torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import percov2
from oracles import independent_model
from percov2.bench.model import torch_threads
from percov2.entropy import int_transformer, open_coder, ranges, rans, schedule, tensor_file
from percov2.entropy.int_transformer import (
    IntTransformer,
    check_tensors,
    random_tensors,
    tensor_layout,
)
from percov2.entropy.rans import as_array
from percov2.entropy.staging import StagedDecoder, one_pass_logits
from percov2.entropy.torch.blocks import plan_blocks
from percov2.entropy.transformer_config import TransformerConfig
from percov2.entropy.visibility import (
    content_entries,
    join,
    query_entries,
    start_entries,
    visible,
)
from tools.executors import model_on, random_on, same, staged_logits

TINY = Path(percov2.__file__).parent / "pretrained" / "tiny" / "r031" / "entropy"
SMALL = TransformerConfig(codebook_size=16, dim=24, heads=2, head_dim=8, layers=2, hidden=40)
SIZES = {
    "one of each": TransformerConfig(2, 1, 1, 1, 1, 1),
    "ragged": TransformerConfig(40, 48, 3, 17, 2, 24),
    "head_dim 8": TransformerConfig(300, 20, 2, 8, 1, 1040),
    "head_dim 32": TransformerConfig(16, 64, 1, 32, 2, 100),
    "head_dim 64": TransformerConfig(31, 130, 3, 64, 1, 65),
    "head_dim 45": TransformerConfig(8, 37, 1, 45, 2, 47),
    "wide": SMALL,
}
GRIDS = {
    # From 128 columns on, compiled passes keep keys in rows that are no power of two apart.
    "wide": [(1, 9, width) for width in (112, 113, 128, 129, 250)],
    "tiny": [(1, 9, 34)],
}


@pytest.fixture(scope="module", params=("cpu", "torch"))
def model(request: pytest.FixtureRequest) -> IntTransformer:
    return random_on(request.param, SMALL, 3)


def random_tokens(batch: int, height: int, width: int, size: int = 16) -> np.ndarray:
    generator = np.random.default_rng(height * 1000 + width)
    return generator.integers(0, size, (batch, height, width), dtype=np.int32)


def plain_logits(folder: Path, tokens: np.ndarray, stages: np.ndarray) -> list[list[int]]:
    """Logits [h * w, V] in coding order, stage by stage in plain Python."""
    grid = independent_model.Grid(independent_model.read_model(folder), *stages.shape)
    rows: list[list[int]] = []
    for stage in range(1, int(stages.max()) + 1):
        places = [(int(y), int(x)) for y, x in np.argwhere(stages == stage)]
        rows += [grid.logits(place) for place in places]
        grid.know({place: int(tokens[place]) for place in places})
    return rows


@pytest.mark.parametrize(
    ("height", "width", "name"),
    [(1, 1, "qlds12"), (3, 4, "checkerboard"), (2, 19, "var"), (5, 3, "raster")],
)
def test_logits_equal_the_oracle(model, height, width, name, tmp_path):
    tokens = random_tokens(1, height, width)
    stages = schedule.stages(name, height, width)
    model.save(tmp_path)
    expected = np.array(plain_logits(tmp_path, tokens[0], stages))
    logits = one_pass_logits(model, tokens, stages)
    assert as_array(logits).dtype == np.int16
    assert np.array_equal(as_array(logits)[0], expected)
    assert expected.std() > 100  # the random model is no constant


@pytest.mark.parametrize("name", schedule.SCHEDULES)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (1, 40), (18, 33)])
def test_staged_logits_equal_one_pass(model, name, height, width):
    if name == "raster" and height * width > 300:
        height, width = 2, 40
    tokens = random_tokens(3, height, width)
    stages = schedule.stages(name, height, width)
    together = one_pass_logits(model, tokens, stages)
    assert same(staged_logits(model, tokens[1:], stages), together[1:])
    with torch_threads(1 + (width == 7)):
        assert same(one_pass_logits(model, tokens[:1], stages), together[:1])


def assert_equal_to_torch(
    config: TransformerConfig, tensors: dict[str, np.ndarray], grids: list[tuple[int, int, int]]
) -> None:
    compiled, oracle = (model_on(executor, config, tensors) for executor in ("cpu", "torch"))
    for grid in grids:
        tokens = random_tokens(*grid, config.codebook_size)
        stages = schedule.stages("qlds5", *grid[1:])
        expected = one_pass_logits(oracle, tokens, stages)
        assert same(one_pass_logits(compiled, tokens, stages), expected)
        assert same(staged_logits(compiled, tokens, stages), expected)


@pytest.mark.parametrize("name", [*SIZES, "tiny"])
def test_compiled_passes_equal_torch(instruction_set, name):
    stored = IntTransformer.load(TINY) if name == "tiny" else IntTransformer.random(SIZES[name], 7)
    grids = GRIDS.get(name, [(1, 1, 1), (2, 5, 7), (1, 3, 21), (1, 20, 35)])
    assert_equal_to_torch(stored.config, stored.tensors, grids)


def test_large_passes_equal_torch():
    tensors = random_tensors(SIZES["ragged"], 1)
    for grid in ((1, 32, 48), (2, 37, 52)):
        assert_equal_to_torch(SIZES["ragged"], tensors, [grid])


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


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_batches_and_threads_do_not_matter(instruction_set, threads):
    quick = instruction_set != "scalar"
    model = IntTransformer.load(TINY) if quick else random_on("cpu", SIZES["ragged"], 5)
    tokens = random_tokens(64, 4, 6, model.config.codebook_size)
    stages = schedule.stages("qlds8", 4, 6)
    with torch_threads(1):
        expected = one_pass_logits(model, tokens, stages)
    assert len(np.unique(expected)) > 1000  # the model is no constant
    with torch_threads(threads):
        for batch in (1, 2, 7, 64):
            assert same(one_pass_logits(model, tokens[:batch], stages), expected[:batch])
            assert same(staged_logits(model, tokens[:batch], stages), expected[:batch])


def test_calls_from_several_threads_at_once():
    model = random_on("cpu", SIZES["ragged"], 5)
    stages = schedule.stages("qlds5", 5, 6)
    grids = [random_tokens(3 + i, 5, 6, 40) for i in range(6)]
    expected = [one_pass_logits(model, tokens, stages) for tokens in grids]
    with torch_threads(3), ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = pool.map(lambda tokens: one_pass_logits(model, tokens, stages), grids)
            assert all(same(a, b) for a, b in zip(results, expected, strict=True))


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


def test_weights_equal_the_table(instruction_set):
    weights = rans.attention_weights(np.arange(2**16 + 5, dtype=np.int32))
    assert weights[:128].tolist() == list(ranges.WEIGHT_TABLE)
    assert not weights[128:].any()
    assert rans.attention_weights(np.array([2**31 - 1, 0], dtype=np.int32)).tolist() == [0, 127]
    with pytest.raises(ValueError, match="must not be negative"):
        rans.attention_weights(np.full(64, -(10**8), np.int32))


def test_compiled_passes_refuse_wrong_arrays():
    tensors = random_tensors(SMALL, 1)
    native = IntTransformer(SMALL, tensors)._program
    stages = np.array([[1, 2, 2]], dtype=np.int32)
    tokens = np.zeros((2, 1, 3), dtype=np.int32)
    staged = rans.StagedPass(native, stages, 2)
    assert staged.residual(1).shape == (2, 1, 24)
    for threads in (1, 2**31 - 1):
        assert native.encode(stages, tokens, threads).shape == (2, 3, 24)
    nothing = np.ones((2, 0), np.int32)
    for call, message in (
        (lambda: native.encode(stages, tokens[:, :, :2].copy(), 1), "last axis"),
        (lambda: native.encode(stages, tokens + 16, 1), "token 16 is not in 0"),
        (lambda: native.encode(stages - 1, tokens, 1), "stages must be"),
        (lambda: native.encode(stages + 2, tokens, 1), "stages must be"),
        (lambda: native.encode(stages, tokens, 0), "threads is 0"),
        (lambda: native.logits(np.zeros((1, 3, 23), np.int32), 1), "last axis"),
        (lambda: staged.accept(np.zeros((2, 2), np.int32)), "last axis"),
        (lambda: staged.accept(np.zeros((1, 1), np.int32)), "first axis"),
        (lambda: staged.accept(np.full((2, 1), -1, np.int32)), "token -1 is not in 0"),
        (lambda: rans.StagedPass(native, stages, 0), "batch is 0"),
        (lambda: rans.StagedPass(native, stages, -1), "batch is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for count in (1, 2):
        staged.accept(np.ones((2, count), dtype=np.int32))
    for _ in range(3):
        with pytest.raises(ValueError, match="no tokens are due"):
            staged.accept(nothing)
    with pytest.raises(IndexError, match="every stage is decoded"):
        staged.residual(1)
    del tensors["layers.0.gelu"]
    with pytest.raises(ValueError, match=r"has no layers\.0\.gelu"):
        int_transformer._compiled(SMALL, tensors)


def test_executors_have_names_and_others_are_refused():
    for name in ("cpu", "torch"):
        assert random_on(name, SMALL, 3).executor_name == name
    with pytest.raises(ValueError, match="executor is 'gpu'"):
        random_on("gpu", SMALL, 3)


def test_a_compiled_program_that_computes_otherwise_is_refused(monkeypatch):
    class Wrong:
        def __init__(self, *arguments: object) -> None:
            self._program = native(*arguments)
            self.encode = self._program.encode

        def logits(self, residual: np.ndarray, threads: int) -> np.ndarray:
            return self._program.logits(residual, threads) + 1

    native = rans.IntegerTransformer
    monkeypatch.setattr(rans, "IntegerTransformer", Wrong)
    int_transformer.prove_compiled.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="computes other integers"):
            IntTransformer.random(SMALL, seed=3)
    finally:
        int_transformer.prove_compiled.cache_clear()


@pytest.mark.parametrize("pairs", [1, 50, 1000, 2**30])
def test_blocks_cover_each_visible_pair_once(pairs):
    stages = schedule.stages("qlds8", 20, 36)
    position = schedule.order(stages)
    stage = stages.reshape(-1)[position]
    keys = join(start_entries(), content_entries(stage, position, 36))
    readers = join(keys, query_entries(stage, position, 36))
    expected = visible(readers, keys)
    covered = np.zeros_like(expected)
    times = np.zeros(len(readers), dtype=np.int64)
    for block in plan_blocks(readers, keys, pairs=pairs):
        part = np.ix_(block.readers.numpy(), block.keys.numpy())
        relative = block.relative().view(len(block.readers), len(block.keys)).numpy()
        covered[part] = relative != 964
        times[block.readers.numpy()] += 1
    assert (times == 1).all()
    assert np.array_equal(covered, expected)


def test_save_load_and_fingerprint(model, tmp_path: Path):
    model.save(tmp_path / "entropy")
    loaded = IntTransformer.load(tmp_path / "entropy")
    assert loaded.config == model.config
    assert loaded.fingerprint() == model.fingerprint()
    assert all(same(loaded.tensors[name], model.tensors[name]) for name in model.tensors)
    tensors = dict(model.tensors)
    tensors["head.bias"] = tensors["head.bias"].copy()
    tensors["head.bias"][3] += 1
    assert IntTransformer(SMALL, tensors).fingerprint() != model.fingerprint()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head.weight", -128),
        ("head.multiplier", 0),
        ("head.shift", 0),
        ("head.shift", 25),
        ("head.bias", 2**24 - 24 * 127 * 127),
        ("layers.1.attention.shift", 4),
        ("layers.1.attention.bias", 2048),
        ("layers.0.attention.gain_bits", 6),
        ("layers.0.mlp_norm.gain", -2048),
        ("layers.0.gelu", -128),
    ],
)
def test_tensors_outside_the_ranges_are_refused(model, name, value):
    tensors = {key: tensor.copy() for key, tensor in model.tensors.items()}
    if name == "head.bias":
        tensors["head.weight"][0] = 127
    tensors[name].reshape(-1)[0] = value
    with pytest.raises(ValueError, match=name.removesuffix(".bias").replace(".", r"\.")):
        check_tensors(SMALL, tensors)


def test_missing_and_misshapen_tensors_are_refused(model):
    for name in tensor_layout(SMALL):
        tensors = dict(model.tensors)
        del tensors[name]
        with pytest.raises(ValueError, match="missing or unknown"):
            IntTransformer(SMALL, tensors)
    with pytest.raises(ValueError, match=r"head\.bias"):
        IntTransformer(SMALL, {**model.tensors, "head.bias": np.zeros(3, np.int32)})


def test_broken_files_are_refused(model, tmp_path: Path):
    model.save(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    for broken in (b"", data[:7], data[:-1], b"\xff" * 8 + data[8:], data[:8] + b"[" + data[9:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="safetensors"):
            IntTransformer.load(tmp_path)
    path.write_bytes(data)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"version": 2}, {"dim": 2000}, {"kind": "other"}, {"more": 1}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"version 2|dim is 2000|'other'|more"):
            IntTransformer.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: Expecting property name"):
        IntTransformer.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        IntTransformer.load(tmp_path)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        open_coder(tmp_path / "none")


@pytest.mark.parametrize(
    ("found", "written"),
    [
        ('"shape":[16]', '"shape":[Infinity]'),
        ('"shape":[16]', '"shape":[16.0]'),
        ('"shape":[16]', '"shape":["16"]'),
        ('"data_offsets":[0,', '"data_offsets":[Infinity,'),
        ('"data_offsets":[0,', '"data_offsets":[false,'),
        ('"data_offsets":[0,', '"data_offsets":[-0.0,'),
    ],
)
def test_numbers_of_a_tensor_file_are_whole(tmp_path, found, written):
    tensor_file.write_tensors(tmp_path / "a", {"x": np.zeros(16, np.int8)})
    data = (tmp_path / "a").read_bytes()
    text = data[8:-16].decode().replace(found, written).encode()
    assert text != data[8:-16]
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + data[-16:])
    with pytest.raises(ValueError, match="must be whole numbers"):
        tensor_file.read_tensors(tmp_path / "a")


def test_a_tensor_file_is_a_regular_file_of_bounded_size(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with open(tmp_path / "sparse", "wb") as stream:
        stream.truncate(1 << 31)
    for name in ("pipe", "device", "sparse"):
        with pytest.raises(ValueError, match="is no regular file of at most"):
            tensor_file.read_tensors(tmp_path / name)


def test_wrong_tokens_and_stages_are_refused(model):
    stages = schedule.stages("qlds5", 2, 3)
    with pytest.raises(ValueError, match="codebook has 16"):
        one_pass_logits(model, np.full((1, 2, 3), 16), stages)
    with pytest.raises(ValueError, match="shape"):
        one_pass_logits(model, np.zeros((1, 3, 2), np.int32), stages)
    with pytest.raises(ValueError, match="stages must be"):
        one_pass_logits(model, np.zeros((1, 1, 2), np.int32), np.array([[1, 3]]))
    decoder = StagedDecoder(model, stages, 1)
    with pytest.raises(ValueError, match="next stage needs"):
        decoder.accept(np.zeros((1, 5), np.int32))


def test_torch_with_reduced_precision_is_refused():
    model = random_on("torch", SMALL, 3)
    stages = schedule.stages("qlds5", 2, 3)
    tokens = np.zeros((1, 2, 3), np.int32)
    expected = one_pass_logits(model, tokens, stages)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(RuntimeError, match="highest"):
            one_pass_logits(model, tokens, stages)
        with pytest.raises(RuntimeError, match="highest"):
            model_on("torch", SMALL, model.tensors)
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(one_pass_logits(model, tokens, stages), expected)


def test_tokens_without_their_logits_are_refused():
    staged = StagedDecoder(IntTransformer.random(SMALL, 1), np.array([[1, 2]], np.int32), 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"call logits\(\) before accept"):
            staged.accept(np.zeros((1, 1), np.int32))
        staged.logits()
        staged.accept(np.zeros((1, 1), np.int32))
    assert staged.remaining == 0
