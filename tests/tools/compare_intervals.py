"""Logits to intervals on a device, against the torch form: ``compare_intervals.py cpu`` or cuda."""

from __future__ import annotations

import sys

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from percov2.entropy.cdf import WEIGHT_TABLE
from percov2.entropy.torch import cdf
from percov2.triton_kernels import symbol_intervals
from percov2.triton_kernels.intervals import corrected_quotient, quotient

DEVICE = torch.device(sys.argv[1])
TABLE = torch.tensor(WEIGHT_TABLE, dtype=torch.int32).to(DEVICE)


def drawn_logits(kind: str, rows: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """int16 [rows, size]: flat, spread, over the whole range, at both ends, around octaves."""
    shape = (rows, size)
    if kind == "ends":
        return (torch.randint(0, 2, shape, generator=generator) * 65535 - 32768).to(torch.int16)
    if kind == "octaves":
        near = torch.randint(-1, 2, shape, generator=generator)
        return (torch.randint(-24, 1, shape, generator=generator) * 256 + near).to(torch.int16)
    low, high = {"flat": (7, 8), "spread": (-3000, 3000), "all": (-32768, 32768)}[kind]
    return torch.randint(low, high, shape, generator=generator).to(torch.int16)


def on_device(logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int) -> torch.Tensor:
    return symbol_intervals(logits.to(DEVICE), symbols.to(DEVICE), prob_bits, TABLE).cpu()


def compare(logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int) -> None:
    rounded = logits if logits.dtype == torch.int16 else cdf.round_logits(logits)
    expected = cdf.intervals(rounded, symbols, prob_bits)
    starts, freqs = on_device(logits, symbols, prob_bits)
    assert starts.dtype == freqs.dtype == torch.int32
    assert torch.equal(starts, expected[0]) and torch.equal(freqs, expected[1])


SIZES = st.one_of(st.integers(2, 300), st.integers(301, 1100), st.sampled_from([2049, 8191, 8192]))


@settings(
    max_examples=60 if DEVICE.type == "cpu" else 30, deadline=None, derandomize=True, database=None
)
@given(
    size=SIZES,
    rows=st.sampled_from([1, 1, 2, 3, 9, 17]),
    prob_bits=st.integers(8, 20),
    kind=st.sampled_from(["flat", "spread", "all", "ends", "octaves"]),
    seed=st.integers(0, 2**20),
)
def random_cases(size: int, rows: int, prob_bits: int, kind: str, seed: int) -> None:
    prob_bits = max(prob_bits, size.bit_length() + 1)
    generator = torch.Generator().manual_seed(seed)
    logits = drawn_logits(kind, rows, size, generator)
    symbols = torch.randint(0, size, (rows,), generator=generator).to(torch.int32)
    symbols[0] = size - 1 if seed % 2 else 0
    compare(logits, symbols, prob_bits)


def float_cases() -> None:
    generator = torch.Generator().manual_seed(5)
    for size in (2, 100, 1024, 1500):
        logits = torch.randn(5, size, generator=generator) * 4
        logits[1] = (torch.randint(-9, 9, (size,), generator=generator) + 0.5) / 369.32992553710938
        logits[2, 0] = float("-inf")
        logits[3] *= 1e30
        symbols = torch.randint(0, size, (5,), generator=generator).to(torch.int32)
        for given_as in (torch.float32, torch.bfloat16):
            compare(logits.to(given_as), symbols, 18)
        for odd in (float("nan"), float("inf")):
            broken = logits.clone()
            broken[1, size // 2] = odd
            broken[3] = float("-inf")
            _, freqs = on_device(broken, symbols, 18)
            assert (freqs == 0).tolist() == [False, True, False, True, False]


def low_rows() -> None:
    """All logits of a row below those of columns that are not there, in many rows at once."""
    generator = torch.Generator().manual_seed(2)
    for size in (2, 3, 15, 50, 1000):
        logits = torch.randint(-32768, -2, (600, size), generator=generator).to(torch.int16)
        logits[::3] = logits[::3] // 4096 - 2
        symbols = torch.randint(0, size, (600,), generator=generator).to(torch.int32)
        rows = 600 if DEVICE.type == "cuda" or size < 50 else 20
        compare(logits[:rows], symbols[:rows], 16)
        compare(logits[:rows].float().mul(0.01).to(torch.bfloat16), symbols[:rows], 16)


def edges() -> None:
    logits = drawn_logits("spread", 24, 40, torch.Generator().manual_seed(1))
    symbols = torch.arange(24, dtype=torch.int32) - 1
    symbols[20:] = torch.tensor([40, -(2**31), 2**31 - 1, 39])
    starts, freqs = on_device(logits, symbols, 16)
    bad = (symbols < 0) | (symbols >= 40)
    assert torch.equal(freqs == 0, bad) and not starts[bad].any()
    compare(logits[~bad], symbols[~bad], 16)
    shaped = logits.view(2, 3, 4, 40), symbols.clamp(0, 39).view(2, 3, 4)
    compare(*shaped, 12)
    compare(shaped[0].transpose(0, 2), shaped[1].transpose(0, 2), 12)  # not contiguous
    empty = on_device(logits[:0], symbols[:0], 16)
    assert tuple(empty.shape) == (2, 0)


@triton.jit
def quotient_kernel(numerators, divisors, nudges, results, BLOCK: tl.constexpr):
    """The quotient with a nudged estimate, and as the kernel computes it."""
    at = tl.arange(0, BLOCK)
    numerator, divisor = tl.load(numerators + at), tl.load(divisors + at)
    exact = quotient(numerator, divisor)
    tl.store(results + at, exact)
    estimate = exact + tl.load(nudges + at)
    tl.store(results + BLOCK + at, corrected_quotient(numerator, divisor, estimate))


def divisions() -> None:
    """The quotient is exact, and from every estimate that is off by one."""
    size = 8192
    generator = np.random.default_rng(3)
    divisor = 2 ** generator.integers(0, 35, size) + generator.integers(0, 2**20, size)
    whole = generator.integers(0, 2**20, size) >> generator.integers(0, 21, size)
    part = np.where(generator.random(size) < 0.3, 0, generator.integers(0, divisor))
    part = np.where(generator.random(size) < 0.3, divisor - 1, part)
    given = [whole * divisor + part, divisor, generator.integers(-1, 2, size)]
    arrays = [torch.from_numpy(array.astype(np.int64)).to(DEVICE) for array in given]
    results = torch.empty(2, size, dtype=torch.int64, device=DEVICE)
    quotient_kernel[(1,)](*arrays, results, BLOCK=size)
    expected = torch.from_numpy(whole.astype(np.int64)).expand(2, -1)
    assert torch.equal(results.cpu(), expected)


divisions()
edges()
low_rows()
float_cases()
random_cases()
print("agreed")
