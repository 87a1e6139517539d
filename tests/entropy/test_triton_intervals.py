"""Fused logits to intervals: interpreted against percov2.entropy.cdf, compiled ahead of time."""

from __future__ import annotations

import pytest
import torch

from percov2 import triton_kernels
from percov2.entropy.cdf import WEIGHT_TABLE
from tools.compiled_kernels import (
    CAPABILITIES,
    compare_on,
    compile_kernel,
    needs_triton,
    symbol_intervals_source,
)

TABLE = torch.tensor(WEIGHT_TABLE, dtype=torch.int32)


@needs_triton
def test_interpreted_kernel_agrees_with_the_oracle() -> None:
    compare_on("cpu", "compare_intervals.py")


@needs_triton
@pytest.mark.parametrize(
    ("size", "kind", "capability"),
    [
        *((size, "INT16", each) for size in (256, 1024, 8192) for each in CAPABILITIES),
        (1024, "BFLOAT16", 90),
        (1024, "FLOAT32", 90),
    ],
)
def test_rows_are_read_once_in_128_bit_loads(size: int, kind: str, capability: int) -> None:
    source = symbol_intervals_source(size, kind)
    report = compile_kernel(source, capability)
    assert report.stack == 0, report
    assert report.registers <= 128, report
    # Each logit once: the tile in 16-byte pieces, one for each thread and load.
    width = 32 if kind == "FLOAT32" else 16
    logits = source.constants["BLOCK_ROWS"] * source.constants["BLOCK_SIZE"]
    pieces = logits * width // 128 // (32 * source.warps)
    assert report.loads[128] == report.wide_loads == pieces, report
    # Nothing travels between threads but a few row results.
    assert report.shared <= 256, report


@needs_triton
@pytest.mark.parametrize("kind", ["INT16", "BFLOAT16"])
@pytest.mark.parametrize("size", [2, 50, 256])
def test_pairs_of_16_bits_are_filled_with_nothing_but_zeros(size: int, kind: str) -> None:
    # On an H200 with Triton 3.6 every second place of a pair that was not read became -1, and with
    # it the largest logit of rows where all lie lower.
    assert compile_kernel(symbol_intervals_source(size, kind), 90).fills == {"0x0"}


@needs_triton
def test_a_codebook_of_any_size_compiles() -> None:
    report = compile_kernel(symbol_intervals_source(50), 90)
    assert report.stack == 0, report


@needs_triton
@pytest.mark.parametrize(
    ("logits", "symbols", "prob_bits", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3), 16, "float32 \\(3,\\)"),
        (torch.zeros(3, 4).double(), torch.zeros(3).int(), 16, "float64"),
        (torch.zeros(3, 4), torch.zeros(2).int(), 16, "one for each row"),
        (torch.zeros(3, 1), torch.zeros(3).int(), 16, "1 entries"),
        (torch.zeros(3, 300), torch.zeros(3).int(), 9, "twice"),
        (torch.zeros(3, 4), torch.zeros(3).int(), 21, "8 to 20"),
        (torch.zeros(3, 4), torch.zeros(3, device="meta").int(), 16, "meta"),
        (torch.zeros(3, 4), torch.zeros(3).int(), 16, "TRITON_INTERPRET"),
    ],
)
def test_wrong_arguments_are_refused(
    logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        triton_kernels.symbol_intervals(logits, symbols, prob_bits, TABLE)
