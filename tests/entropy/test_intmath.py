"""Integer operations against their definitions, at random and at the limits of their ranges."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracles import independent_model as reference
from percov2.entropy import ranges
from percov2.entropy.torch import intmath

LIMIT = ranges.RESIDUAL_LIMIT
INT32 = (-(2**31), 2**31 - 1)


def int8_list(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(-127, 127), min_size=count, max_size=count)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 3, 64, 1040]), st.sampled_from([1, 2, 7, 65]), st.integers(0, 2**32))
def test_linear_is_exact(terms, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (rows, terms), generator=generator)
    weight = torch.randint(-127, 128, (9, terms), generator=generator)
    weight[0] = 127 * x[0].sign()
    x[0] = 127 * x[0].sign()  # the largest sum there is: 1040 * 127^2 = 16,774,160 < 2^24
    bias = torch.randint(-3000, 3001, (9,), generator=generator)
    result = intmath.linear(x.float(), weight.float(), bias.float())
    assert torch.equal(result.long(), x @ weight.T + bias)


@given(
    st.integers(-(2**24) + 1, 2**24 - 1),
    st.integers(1, 127),
    st.integers(1, 24),
    st.sampled_from([(-127, 127), (-LIMIT, LIMIT), (-(2**15), 2**15 - 1), INT32]),
)
@example(2**24 - 1, 127, 1, INT32)
@example(2**24 - 1, 127, 24, INT32)
def test_requantize(acc, multiplier, shift, limits):
    result = intmath.requantize(
        torch.tensor([float(acc), -float(acc)]),
        torch.full((2,), multiplier, dtype=torch.int32),
        torch.full((2,), shift, dtype=torch.int32),
        *limits,
    )
    assert result.dtype == torch.int32
    assert result.tolist() == [
        reference.requantize(a, multiplier, shift, *limits) for a in (acc, -acc)
    ]


def test_residual_saturates():
    residual = torch.tensor([LIMIT, -LIMIT, 5, LIMIT - 1], dtype=torch.int32)
    update = torch.tensor([LIMIT, -LIMIT, -7, 1], dtype=torch.int32)
    assert intmath.residual_add(residual, update).tolist() == [LIMIT, -LIMIT, -2, LIMIT]


@given(st.lists(st.integers(0, 2**51), min_size=1, max_size=20))
def test_integer_sqrt(values):
    squares = [math.isqrt(v) ** 2 for v in values]
    every = values + squares + [max(0, s - 1) for s in squares]
    result = intmath.integer_sqrt(torch.tensor(every, dtype=torch.int64)).tolist()
    assert result == [math.isqrt(v) for v in every]


@pytest.mark.parametrize("error", [-0.7, 0.7])
def test_integer_sqrt_corrects_a_poor_root(monkeypatch, error):
    def poor(self: torch.Tensor) -> torch.Tensor:
        return self.copy_(torch.sqrt(self) + error).clamp_(min=0)

    monkeypatch.setattr(torch.Tensor, "sqrt_", poor)
    every = torch.cat([torch.arange(3000), 2**50 + torch.arange(3000)])
    assert intmath.integer_sqrt(every).tolist() == [math.isqrt(v) for v in every.tolist()]


def assert_layer_norm(residual: list[int], gain: list[int]) -> None:
    given_as = (torch.tensor(part, dtype=torch.int32) for part in ([residual], gain))
    result = intmath.layer_norm(*given_as)
    assert result.dtype == torch.float32
    assert result[0].tolist() == reference.layer_norm(residual, gain)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_layer_norm(data):
    dim = data.draw(st.sampled_from([1, 2, 5, 64]))
    bound = data.draw(st.sampled_from([1, 50, 4000, LIMIT]))
    residual = data.draw(st.lists(st.integers(-bound, bound), min_size=dim, max_size=dim))
    gain = data.draw(st.lists(st.integers(-2047, 2047), min_size=dim, max_size=dim))
    assert_layer_norm(residual, gain)


@pytest.mark.parametrize("dim", [1, 128, 1024])
def test_layer_norm_at_the_ends(dim):
    one_out = [-LIMIT] * (dim - 1) + [LIMIT]
    halves = [LIMIT if i % 2 else -LIMIT for i in range(dim)]
    for residual in (one_out, halves, [LIMIT] * dim):
        for gain in (-2047, 2047, 1):
            assert_layer_norm(residual, [gain] * dim)


def test_lookup():
    table = torch.arange(256, dtype=torch.float32)
    index = torch.tensor([[-127, 0], [1, 127]], dtype=torch.int32)
    assert intmath.lookup(index, table).tolist() == [[1, 128], [129, 255]]


def test_weight_table():
    assert len(ranges.WEIGHT_TABLE) == 128
    expected = [reference.softmax_weight(d) for d in range(140)]
    assert list(ranges.WEIGHT_TABLE) + [0] * 12 == expected
    page = (Path(__file__).parents[2] / "docs" / "reference" / "entropy-model.md").read_text(
        encoding="utf-8"
    )
    assert [int(n) for n in page.split("```")[1].split()] == list(ranges.WEIGHT_TABLE)
    # How far 126.61 * 2^(-d/16) stays from a half: what rounding a float exp2 relies on.
    margins = [abs(126.61 * 2 ** (-d / 16) % 1 - 0.5) for d in range(300)]
    assert min(margins) > 0.005


@given(st.lists(st.integers(-300, 300), min_size=1, max_size=40), st.integers(5, 12), st.data())
def test_softmax_weights(scores, shift, data):
    # The fractions are what rounding to an integer score leaves over.
    part = st.integers(0, 2**shift - 1)
    parts = data.draw(st.lists(part, min_size=len(scores), max_size=len(scores)))
    exact = [s + p / 2**shift for s, p in zip(scores, parts, strict=True)]
    hidden = [s + ranges.HIDDEN_SCORE for s in exact]
    result = intmath.softmax_weights_(torch.tensor([exact + hidden], dtype=torch.float32))[0]
    expected = [reference.softmax_weight(max(scores) - s) for s in scores]
    assert result.tolist() == expected + [0] * len(scores)


def assert_attention_mean(weighted: list[int], total: int, gain_bits: int) -> None:
    result = intmath.attention_mean(
        torch.tensor(weighted, dtype=torch.float32)[:, None],
        torch.full((len(weighted), 1), float(total)),
        gain_bits,
    )
    expected = [reference.attention_mean(w, total, gain_bits) for w in weighted]
    assert result[:, 0].tolist() == expected


@given(int8_list(8), st.lists(st.integers(0, 127), min_size=7, max_size=7), st.integers(0, 5))
def test_attention_mean(values, weights, gain_bits):
    weights = [127, *weights]
    weighted = sum(w * v for w, v in zip(weights, values, strict=True))
    assert_attention_mean([weighted], sum(weights), gain_bits)


@pytest.mark.parametrize("gain_bits", range(6))
@pytest.mark.parametrize("total", [127, 1040 * 127, 1040 * 127 - 1])
def test_attention_mean_at_the_ends(total, gain_bits):
    half = total // 2
    weighted = [total * 127, -total * 127, 0, 1, -1, half, -half, -half - 1]
    assert_attention_mean(weighted, total, gain_bits)


@pytest.mark.parametrize("name", ["linear", "softmax_weights_"])
def test_self_test_refuses_what_is_not_exact(monkeypatch, name):
    exact = getattr(intmath, name)

    def rounded(*arguments):
        # What a bfloat16 product or a poor exp2 would do: lose the last bits.
        return exact(*arguments).to(torch.bfloat16).to(torch.float32) * 0.999

    intmath.self_test()
    monkeypatch.setattr(intmath, name, rounded)
    with pytest.raises(RuntimeError, match="not exact"):
        intmath.self_test()


NEWER = """
import torch
from percov2.entropy.torch import intmath
for setting in "fp32_precision", "cuda.matmul.fp32_precision":
    exec(f"torch.backends.{setting} = 'tf32'")
    try:
        intmath.require_exact_float32()
    except RuntimeError as error:
        assert "call torch.set_float32_matmul_precision('highest')" in str(error), error
    else:
        raise AssertionError(f"not refused: {setting}")
    torch.set_float32_matmul_precision("highest")
    intmath.require_exact_float32()
"""


def test_reduced_precision_is_refused():
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with pytest.raises(RuntimeError, match="highest"):
            intmath.require_exact_float32()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    intmath.require_exact_float32()
    if hasattr(torch.backends, "fp32_precision"):
        # In a process of its own: torch does not forget that these were used.
        subprocess.run([sys.executable, "-c", NEWER], check=True)
