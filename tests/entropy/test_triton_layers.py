"""LayerNorm and linear maps in Triton: interpreted against torch, compiled ahead of time."""

from __future__ import annotations

import pytest
import torch

from percov2 import triton_kernels
from tools.compiled_kernels import (
    CAPABILITIES,
    ENDS,
    compare_on,
    compile_kernel,
    layer_norm_source,
    linear_source,
    needs_triton,
)


@needs_triton
def test_interpreted_kernels_agree_with_the_oracle() -> None:
    compare_on("cpu", "compare_layers.py")


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dim", [128, 1024])
def test_norm_compiles_without_spills(dim: int, capability: int) -> None:
    source = layer_norm_source(dim)
    report = compile_kernel(source, capability)
    assert report.stack == 0, report
    assert report.registers <= 128, report
    numbers = source.constants["BLOCK_ROWS"] * source.constants["BLOCK_DIM"]
    tile = numbers // 4 // 128  # four numbers for each thread and load
    assert report.loads[128] == report.wide_loads, report
    assert report.loads[128] in (tile, tile + 1), report  # the gain may be wide, too


@needs_triton
@pytest.mark.parametrize(
    ("rows", "end", "capability"),
    [
        *((4096, end, 90) for end in ENDS),
        (4096, "table", 80),
        (4096, "residual", 100),
        (64, "table", 80),
        (64, "residual", 90),
        (64, "int8", 100),
    ],
)
def test_linear_compiles_without_spills(rows: int, end: str, capability: int) -> None:
    report = compile_kernel(linear_source(rows, 512, end), capability)
    assert report.stack == 0, report
    assert report.registers <= 128, report
    assert report.wide_loads >= 2, report  # both operands
    assert report.shared <= 99 * 1024, report  # of the smallest card of this generation
    assert report.tensor_cores, report


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 8)}, "x is torch.float32"),
        ({"x": torch.ones(2, 7, dtype=torch.int8)}, "\\[..., 8\\]"),
        ({"weight": torch.ones(4, 1041, dtype=torch.int8)}, "1041"),
        ({"bias": torch.ones(5, dtype=torch.int32)}, "bias"),
        ({"shift": torch.ones(4, dtype=torch.int32)}, "shift"),
        ({"table": torch.ones(255, dtype=torch.int8)}, "table"),
        ({"residual": torch.ones(2, 5, dtype=torch.int32)}, "residual"),
        ({"dtype": torch.int32}, "int8 or int16"),
        ({"multiplier": torch.ones(4, dtype=torch.int8, device="meta")}, "meta"),
        ({}, "TRITON_INTERPRET"),
    ],
)
def test_wrong_arguments_of_a_map_are_refused(change: dict, message: str) -> None:
    byte = torch.int8
    good = {
        "x": torch.ones(2, 8, dtype=byte),
        "weight": torch.ones(4, 8, dtype=byte),
        "bias": torch.ones(4, dtype=torch.int32),
        "multiplier": torch.ones(4, dtype=byte),
        "shift": torch.ones(4, dtype=byte),
    }
    with pytest.raises(ValueError, match=message):
        triton_kernels.linear(**{**good, **change})


@needs_triton
@pytest.mark.parametrize(
    ("residual", "gain", "message"),
    [
        (torch.ones(2, 8), torch.ones(8, dtype=torch.int16), "float32"),
        (torch.ones(2, 1025).int(), torch.ones(1025, dtype=torch.int16), "1024"),
        (torch.ones(2, 8).int(), torch.ones(7, dtype=torch.int16), "gain"),
        (torch.ones(2, 8).int(), torch.ones(8, dtype=torch.int16), "TRITON_INTERPRET"),
    ],
)
def test_wrong_arguments_of_a_norm_are_refused(
    residual: torch.Tensor, gain: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        triton_kernels.layer_norm(residual, gain)
