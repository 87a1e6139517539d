"""LayerNorm and linear maps on a device, against torch: ``compare_layers.py cpu`` or cuda."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from percov2 import triton_kernels
from percov2.entropy import ranges
from percov2.entropy.torch import intmath
from percov2.triton_kernels.int_layernorm import (
    corrected_root,
    integer_root,
    rounded_quotient,
    settled_root,
)

DEVICE = torch.device(sys.argv[1])
CASES = settings(
    max_examples=60 if DEVICE.type == "cpu" else 30, deadline=None, derandomize=True, database=None
)


def layer_norm(residual: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return triton_kernels.layer_norm(residual.to(DEVICE), gain.to(DEVICE)).cpu()


def linear(*tensors: torch.Tensor, **others: Any) -> torch.Tensor:
    for name in ("table", "residual"):
        if name in others:
            others[name] = others[name].to(DEVICE)
    return triton_kernels.linear(*(x.to(DEVICE) for x in tensors), **others).cpu()


def integers(low: int, high: int, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Between low and high, both included; one in ten at one of the ends."""
    drawn = torch.randint(low, high + 1, shape, generator=rng)
    ends = torch.where(torch.rand(shape, generator=rng) < 0.5, low, high)
    return torch.where(torch.rand(shape, generator=rng) < 0.1, ends, drawn)


@CASES
@given(
    rows=st.sampled_from([1, 2, 3, 17, 40]),
    dim=st.one_of(st.integers(1, 200), st.sampled_from([255, 256, 257, 1023, 1024])),
    kind=st.sampled_from(["wide", "narrow", "constant", "one", "halves"]),
    seed=st.integers(0, 2**20),
)
def norms(rows: int, dim: int, kind: str, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    limit = ranges.RESIDUAL_LIMIT
    residual = {
        "wide": lambda: integers(-limit, limit, (rows, dim), rng),
        "narrow": lambda: torch.randint(-3, 4, (rows, dim), generator=rng),
        "constant": lambda: integers(-limit, limit, (rows, 1), rng).expand(rows, dim),
        "one": lambda: (torch.arange(rows * dim).view(rows, dim) % dim == seed % dim) * limit,
        "halves": lambda: torch.randint(0, 2, (rows, dim), generator=rng) * 2 * limit - limit,
    }[kind]()
    gain = integers(-ranges.MAX_GAIN, ranges.MAX_GAIN, (dim,), rng)
    residual, gain = residual.to(torch.int32), gain.to(torch.int16)
    result = layer_norm(residual, gain)
    assert result.dtype == torch.int8
    assert torch.equal(result.float(), intmath.layer_norm(residual, gain.to(torch.int32)))


@triton.jit
def root_kernel(numbers, guesses, neighbours, results, BLOCK: tl.constexpr):
    """Roots as the LayerNorm computes them, from given guesses, and from roots off by one."""
    at = tl.arange(0, BLOCK)
    number = tl.load(numbers + at)
    tl.store(results + at, integer_root(number))
    tl.store(results + BLOCK + at, corrected_root(number, tl.load(guesses + at)))
    tl.store(results + 2 * BLOCK + at, settled_root(number, tl.load(neighbours + at)))


@triton.jit
def quotient_kernel(products, roots, guesses, results, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    result = rounded_quotient(tl.load(products + at), tl.load(roots + at), tl.load(guesses + at))
    tl.store(results + at, result)


def guesses_do_not_matter() -> None:
    """A float guess may be wrong as far as the kernel's comments say, whatever rounded it."""
    size = 16384
    rng = np.random.default_rng(0)
    root = 2 ** rng.integers(0, 25, size) + rng.integers(0, 2**12, size)
    root[:64] = np.arange(64)
    number = root * root + np.where(rng.random(size) < 0.5, 0, rng.integers(0, 2 * root + 1))
    number = number - (rng.random(size) < 0.2) * (number > 0)
    root = np.array([int(n) for n in np.floor(np.sqrt(number.astype(np.longdouble)))])
    assert ((root**2 <= number) & ((root + 1) ** 2 > number)).all()
    # Small guesses are floors of nearly exact roots, wrong only next to an integer.
    near = np.where(number == root**2, -1, (number == (root + 1) ** 2 - 1).astype(np.int64))
    off = np.where(root >= 2**12 + 64, rng.integers(-60, 61, size), near)
    results = torch.empty(3, size, dtype=torch.int64, device=DEVICE)
    guesses = np.maximum(root + off, 0), np.maximum(root + rng.integers(-1, 2, size), 0)
    arrays = [torch.from_numpy(a.astype(np.int64)) for a in (number, *guesses)]
    root_kernel[(1,)](*(array.to(DEVICE) for array in arrays), results, BLOCK=size)
    assert np.array_equal(results.cpu().numpy(), np.stack([root] * 3))

    divisor = 2 ** rng.integers(0, 25, size) + rng.integers(0, 100, size)
    product = rng.integers(-(2**32), 2**32, size)
    product = np.where(rng.random(size) < 0.7, divisor * rng.integers(-140, 140, size), product)
    product += np.where(rng.random(size) < 0.5, rng.integers(-2, 3, size) + divisor // 2, 0)
    product = product.clip(1 - 2**32, 2**32 - 1)
    quotient = (product + divisor // 2) // divisor
    guess = (quotient + rng.integers(-1, 2, size) * (abs(quotient) <= 128)).clip(-128, 128)
    given = [product.astype(np.int64).astype(np.int32), divisor, guess]
    result = torch.empty(size, dtype=torch.int32, device=DEVICE)
    quotient_kernel[(1,)](
        *(torch.from_numpy(array.astype(np.int32)).to(DEVICE) for array in given),
        result,
        BLOCK=size,
    )
    assert np.array_equal(result.cpu().numpy(), quotient.clip(-127, 127))


def random_map(outputs: int, terms: int, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Weights, biases, multipliers and shifts inside their ranges, up to the ends."""
    weight = integers(-127, 127, (outputs, terms), rng).to(torch.int8)
    room = ranges.ACC_LIMIT - 1 - 127 * weight.to(torch.int64).abs().sum(1)
    bias = torch.where(torch.rand(outputs, generator=rng) < 0.5, room, -room).to(torch.int32)
    bias[::2] //= 1000
    multiplier = integers(1, 127, (outputs,), rng).to(torch.int8)
    return weight, bias, multiplier, integers(1, 24, (outputs,), rng).to(torch.int8)


@CASES
@given(
    rows=st.sampled_from([1, 2, 31, 33, 70]),
    outputs=st.sampled_from([1, 7, 32, 50, 97]),
    terms=st.one_of(st.integers(1, 150), st.sampled_from([256, 1039, 1040])),
    end=st.sampled_from(["int8", "int16", "table", "residual"]),
    seed=st.integers(0, 2**20),
)
def maps(rows: int, outputs: int, terms: int, end: str, seed: int) -> None:
    compare_map(rows, outputs, terms, end, seed)


def compare_map(rows: int, outputs: int, terms: int, end: str, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight, bias, multiplier, shift = random_map(outputs, terms, rng)
    x = integers(-127, 127, (rows, terms), rng).to(torch.int8)
    x[0] = weight[0].sign() * 127  # the largest sum
    acc = intmath.linear(x.float(), weight.float(), bias.float())
    low, high = {
        "int16": (ranges.LOGIT_MIN, ranges.LOGIT_MAX),
        "residual": (-ranges.RESIDUAL_LIMIT, ranges.RESIDUAL_LIMIT),
    }.get(end, (-127, 127))
    expected = intmath.requantize(acc, multiplier.int(), shift.int(), low, high)
    if end == "table":
        table = integers(-127, 127, (256,), rng).to(torch.int8)
        result = linear(x, weight, bias, multiplier, shift, table=table)
        expected = table[(expected + 128).long()]
    elif end == "residual":
        limit = ranges.RESIDUAL_LIMIT
        residual = integers(-limit, limit, (rows, outputs), rng).to(torch.int32)
        before = residual.clone()
        result = linear(x, weight, bias, multiplier, shift, residual=residual)
        assert torch.equal(residual, before)
        expected = intmath.residual_add(residual, expected)
    else:
        dtype = getattr(torch, end)
        result = linear(x, weight, bias, multiplier, shift, dtype=dtype)
        assert result.dtype == dtype
    assert torch.equal(result, expected.to(result.dtype))


norms()
guesses_do_not_matter()
maps()
compare_map(1100, 130, 200, "table", 1)  # tiles for many rows
compare_map(1100, 65, 1040, "residual", 2)
nothing = torch.zeros(2, 0, 8, dtype=torch.int32)
assert layer_norm(nothing, torch.ones(8, dtype=torch.int16)).shape == (2, 0, 8)
tensors = random_map(5, 8, torch.Generator().manual_seed(0))
assert linear(nothing.to(torch.int8), *tensors).shape == (2, 0, 5)
# Views are read as what they mean.
x = torch.arange(-60, 60, dtype=torch.int8).view(8, 15)[:, :9].T
assert torch.equal(linear(x, *tensors), linear(x.contiguous(), *tensors))
across = tensors[0].T.contiguous().T
assert not across.is_contiguous()
assert torch.equal(linear(x, across, *tensors[1:]), linear(x, *tensors))
wide = x.to(torch.int32) * 999
gain = torch.arange(100, 108, dtype=torch.int16)
assert torch.equal(layer_norm(wide, gain), layer_norm(wide.contiguous(), gain))
print("agreed")
