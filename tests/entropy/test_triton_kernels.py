"""Triton kernels: interpreted and on a card against their oracles, compiled ahead of time."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import percov2.triton_kernels
from percov2 import triton_kernels
from percov2.entropy import schedule, visibility
from percov2.entropy.cdf import WEIGHT_TABLE
from percov2.entropy.torch.reader_plan import plan_readers
from tools.compiled_kernels import (
    CAPABILITIES,
    Report,
    Source,
    compare_on,
    compile_kernel,
    launched,
    needs_triton,
)

TABLE = torch.tensor(WEIGHT_TABLE, dtype=torch.int32)
BYTE = torch.int8


# Equal integers ----------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_kernels_compute_what_the_oracles_compute(device: str) -> None:
    compare_on(device, "intervals", "layers", "executor", "attention")


@pytest.mark.cuda
def test_a_card_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    compare_on("cuda:1", "executor")


def test_every_reader_has_a_block_with_all_that_it_sees() -> None:
    grids = {"qlds12": (1, 1), "var": (9, 50), "checkerboard": (40, 33), "raster": (9, 9)}
    for name, shape in grids.items():
        stages = schedule.stages(name, *shape)
        coding = schedule.order(stages)
        stage = stages.reshape(-1)[coding]
        keys = visibility.join(
            visibility.start_entries(), visibility.content_entries(stage, coding, shape[1])
        )
        for reader in (keys, visibility.query_entries(stage, coding, shape[1])):
            (plan,) = plan_readers(reader, keys, torch.device("cpu"), 32, 64)
            places, readers, first, listed = (part.numpy() for part in plan[:4])
            assert plan.size == first[-1] == listed.shape[1]
            assert np.array_equal(places[1], reader.reads)
            at = reader.row >= 0
            assert np.array_equal(places[0] // 2**16 == reader.row, at)
            assert np.array_equal((places[0] % 2**16)[at], reader.column[at])
            assert sorted(readers[readers >= 0]) == list(range(len(reader)))
            seen = visibility.visible(reader, keys)
            for i, block in enumerate(readers):
                mine, place, stage = listed[:, first[i] : first[i + 1]]
                assert len(mine) % 64 == 0
                real = stage < visibility.NEVER
                mine = mine[real]
                assert len(set(mine)) == len(mine)
                assert np.array_equal(stage[real], keys.key_stage[mine])
                known = keys.row[mine] * 2**16 + keys.column[mine]
                known[:3] = (2**15 - 1) * 2**16 + np.arange(3)
                assert np.array_equal(place[real], known)
                hidden = np.delete(np.arange(len(keys)), mine)
                assert not seen[np.ix_(block[block >= 0], hidden)].any()


# What the compiler makes of them -----------------------------------------------------------------


def ones(*shape: int, dtype: torch.dtype = BYTE, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def intervals_source(size: int, kind: torch.dtype) -> Source:
    symbols = ones(20, dtype=torch.int32)
    return launched("intervals", ones(20, size, dtype=kind), symbols, 16, TABLE)


def compiled(source: Source, capability: int) -> Report:
    """The kernel, which spills nothing and leaves room for four programs of four warps."""
    report = compile_kernel(source, capability)
    assert report.stack == 0 and report.registers * min(source.warps, 4) <= 512, report
    return report


@needs_triton
@pytest.mark.parametrize(
    ("size", "kind", "capability"),
    [
        *((size, torch.int16, each) for size in (256, 1024, 8192) for each in CAPABILITIES),
        (1024, torch.bfloat16, 90),
        (1024, torch.float32, 90),
    ],
)
def test_rows_are_read_once_in_128_bit_loads(size: int, kind: torch.dtype, capability: int) -> None:
    source = intervals_source(size, kind)
    report = compiled(source, capability)
    # Each logit once: the tile in 16-byte pieces, one for each thread and load.
    width = 8 * kind.itemsize
    logits = source.constants["BLOCK_ROWS"] * source.constants["BLOCK_SIZE"]
    pieces = logits * width // 128 // (32 * source.warps)
    assert report.loads[128] == report.wide_loads == pieces, report
    # Nothing travels between threads but a few row results.
    assert report.shared <= 256, report


@needs_triton
@pytest.mark.parametrize("kind", [torch.int16, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 50, 256])
def test_pairs_of_16_bits_are_filled_with_nothing_but_zeros(size: int, kind: torch.dtype) -> None:
    # On an H200 with Triton 3.6 every second place of a pair that was not read became -1, and with
    # it the largest logit of rows where all lie lower.
    report = compile_kernel(intervals_source(size, kind), 90)
    assert report.fills == {"0x0"} and report.stack == 0, report


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dim", [128, 1024])
def test_norms_read_in_wide_loads(dim: int, capability: int) -> None:
    gain = ones(dim, dtype=torch.int16)
    source = launched("int_layernorm", ones(20, dim, dtype=torch.int32), gain)
    report = compiled(source, capability)
    numbers = source.constants["BLOCK_ROWS"] * source.constants["BLOCK_DIM"]
    tile = numbers // 4 // 128  # four numbers for each thread and load
    assert report.loads[128] == report.wide_loads, report
    assert report.loads[128] in (tile, tile + 1), report  # the gain may be wide, too


@needs_triton
@pytest.mark.parametrize(
    ("rows", "end", "capability"),
    [
        *((4097, end, 90) for end in ("int8", "int16", "table", "residual")),
        (4097, "table", 80),
        (4097, "residual", 100),
        (60, "table", 80),
        (60, "residual", 90),
        (60, "int8", 100),
    ],
)
def test_linear_maps_run_on_tensor_cores(rows: int, end: str, capability: int) -> None:
    byte = ones(512)
    arguments = [ones(rows, 512), ones(512, 512), byte.int(), byte, byte]
    arguments += {
        "int8": [None, None, None],
        "int16": [None, None, torch.int16],
        "table": [ones(256), None, None],
        "residual": [None, ones(rows, 512, dtype=torch.int32), None],
    }[end]
    report = compiled(launched("int_linear", *arguments), capability)
    assert report.wide_loads >= 2, report  # both operands
    assert report.shared <= 99 * 1024, report  # of the smallest card of this generation
    assert report.tensor_cores, report


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_attention_runs_on_tensor_cores(head_dim: int, capability: int) -> None:
    arguments = attention_arguments(2 * head_dim).values()
    report = compiled(launched("stage_attention", *arguments), capability)
    assert report.wide_loads >= 8, report  # biases, keys and values
    assert report.shared <= 16 * 1024, report
    assert report.tensor_cores, report
    # A thread computes 16 pairs of a reader and a key per step of each of the two loops.
    instructions = sum(length for length in report.loops if length > 32) / 16
    assert 10 < instructions < 32, report.loops


# Where they are queued ---------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("place", ["cuda:1", "cpu"])
def test_a_kernel_goes_to_the_device_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from percov2.triton_kernels import placement

    current: list[torch.device] = []
    seen: list[Any] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self._device = device

        def __enter__(self) -> None:
            current.append(self._device)

        def __exit__(self, *failure: object) -> None:
            current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given, **named: seen.append((grid, given, named, list(current)))

    monkeypatch.setattr(torch.cuda, "device", Guard)
    device = torch.device(place)
    tensor = SimpleNamespace(device=device, is_cuda=device.type == "cuda")
    placement.queue(Kernel(), (7,), tensor, 5, SIZE=3)
    assert seen == [((7,), (tensor, 5), {"SIZE": 3}, [device] if tensor.is_cuda else [])]
    assert not current


def test_every_launch_goes_there() -> None:
    """A launch is written kernel[grid](...): in one place only."""
    folder = Path(str(percov2.triton_kernels.__file__)).parent
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    assert [name for name, text in texts.items() if re.search(r"kernel\[", text)] == [
        "placement.py"
    ]
    del texts["__init__.py"], texts["placement.py"]
    assert all("queue(" in text for text in texts.values())


# What they refuse --------------------------------------------------------------------------------


def attention_arguments(inner: int = 16) -> dict[str, Any]:
    stages = schedule.stages("raster", 2, 3)
    coding = schedule.order(stages)
    stage = stages.reshape(-1)[coding]
    keys = visibility.join(
        visibility.start_entries(), visibility.content_entries(stage[:5], coding[:5], 3)
    )
    queries = visibility.query_entries(stage, coding, 3)
    blocks = triton_kernels.attention_blocks()
    (plan,) = plan_readers(queries, keys, torch.device("cpu"), *blocks)
    return {
        "queries": ones(1, 6, inner),
        "keys": ones(1, 8, inner),
        "values": ones(1, 8, inner),
        "plan": plan,
        "biases": ones(2, 1, *blocks, dtype=torch.int32),
        "shifts": torch.full((2,), 6, dtype=BYTE),
        "gain_bits": 1,
        "weights": ones(129),
        "out": ones(1, 6, inner),
    }


REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "symbol_intervals": [
        ({"symbols": torch.zeros(3)}, r"float32 \(3,\)"),
        ({"logits": torch.zeros(3, 4).double()}, "float64"),
        ({"symbols": torch.zeros(2).int()}, "one for each row"),
        ({"logits": torch.zeros(3, 1)}, "1 entries"),
        ({"logits": torch.zeros(3, 300), "prob_bits": 9}, "twice"),
        ({"prob_bits": 21}, "8 to 20"),
        ({"symbols": torch.zeros(3, device="meta").int()}, "meta"),
    ],
    "linear": [
        ({"x": torch.ones(2, 8)}, "x is torch.float32"),
        ({"x": ones(2, 7)}, r"\[..., 8\]"),
        ({"weight": ones(4, 1041)}, "1041"),
        ({"bias": ones(5, dtype=torch.int32)}, "bias"),
        ({"shift": ones(4, dtype=torch.int32)}, "shift"),
        ({"table": ones(255)}, "table"),
        ({"residual": ones(2, 5, dtype=torch.int32)}, "residual"),
        ({"dtype": torch.int32}, "int8 or int16"),
        ({"multiplier": ones(4, device="meta")}, "meta"),
    ],
    "layer_norm": [
        ({"residual": torch.ones(2, 8)}, "float32"),
        ({"residual": torch.ones(2, 1025).int(), "gain": ones(1025, dtype=torch.int16)}, "1024"),
        ({"gain": ones(7, dtype=torch.int16)}, "gain"),
    ],
    "attention": [
        ({"queries": ones(1, 6, 17)}, "queries"),
        ({"keys": ones(1, 8, 8)}, "keys"),
        ({"values": ones(1, 8, 32)[..., ::2]}, "strides"),
        ({"queries": ones(1, 5, 16)}, "5 readers"),
        ({"biases": ones(2, 2, 32, 32, dtype=torch.int32)}, "biases"),
        ({"shifts": torch.ones(2)}, "shifts"),
        ({"gain_bits": 6}, "gain_bits"),
        ({"weights": ones(128)}, "weights"),
        ({"out": ones(1, 6, 32)[..., ::2]}, "out"),
        *(({"plan": i}, name) for i, name in enumerate(("reader_places", "readers"))),
        ({"plan": 3}, "listed_keys"),
    ],
    "attention_biases": [
        ({"table": ones(2, 963, dtype=torch.int16)}, "table"),
        ({"shifts": torch.ones(2)}, "shifts"),
        *(({"plan": i}, name) for i, name in enumerate(("reader_places", "readers"))),
        ({"size": 48}, "multiple of 32 up to"),
    ],
}
GOOD: dict[str, dict[str, Any]] = {
    "symbol_intervals": {
        "logits": torch.zeros(3, 4),
        "symbols": torch.zeros(3).int(),
        "prob_bits": 16,
        "table": TABLE,
    },
    "linear": {
        "x": ones(2, 8),
        "weight": ones(4, 8),
        "bias": ones(4, dtype=torch.int32),
        "multiplier": ones(4),
        "shift": ones(4),
    },
    "layer_norm": {"residual": torch.ones(2, 8).int(), "gain": ones(8, dtype=torch.int16)},
}


@needs_triton
@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name: str) -> None:
    good = GOOD.get(name) or attention_arguments()
    if name == "attention_biases":
        table = ones(2, 964, dtype=torch.int16)
        good = {"plan": good["plan"], "table": table, "shifts": good["shifts"]}
    for change, message in [*REFUSED[name], ({}, "TRITON_INTERPRET")]:
        if "plan" in change:  # one of its tensors loses its last element
            parts = list(good["plan"])
            parts[change["plan"]] = parts[change["plan"]][..., :-1]
            change = {"plan": tuple(parts)}
        if "size" in change:
            change = {"plan": good["plan"]._replace(size=change["size"])}
        with pytest.raises(ValueError, match=message):
            getattr(triton_kernels, name)(**{**good, **change})
