"""Integer logits to intervals: torch and compiled forms against Python integers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import independent_model as reference
from percov2 import _native
from percov2.entropy import rans
from percov2.entropy.cdf import WEIGHT_TABLE, check_precision, default_prob_bits
from percov2.entropy.cdf import weights as plain_weights
from percov2.entropy.torch import cdf


def logits_of(seed: int, rows: int, size: int, spread: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    wide = np.rint(generator.standard_normal((rows, size)) * spread)
    return np.clip(wide, -32768, 32767).astype(np.int16)


def test_weight_table_is_frozen_and_exact() -> None:
    for k, weight in enumerate(WEIGHT_TABLE):
        # r - 1/2 <= 2^(22 - k/256) < r + 1/2, but for entry 0, which is one less.
        r, power = weight + (k == 0), 1 << (256 * 23 - k)
        assert (2 * r - 1) ** 256 <= power < (2 * r + 1) ** 256
    assert tuple(reference.TABLE) == WEIGHT_TABLE
    assert tuple(_native.weight_table().tolist()) == WEIGHT_TABLE
    data = b"".join(value.to_bytes(4, "little") for value in WEIGHT_TABLE)
    assert hashlib.sha256(data).hexdigest() == (
        "842254e4aa51538597240e50d980baac6a2a37314017416d578d8bf8351bc7e4"
    )


def test_weights_at_the_extremes() -> None:
    row = [32767, 32766, 32767 - 256, 32767 - 22 * 256 + 1, 32767 - 22 * 256, -32768]
    got = cdf.weights(torch.tensor(row, dtype=torch.int16)).tolist()
    assert got == reference.weights(row) == plain_weights(np.array(row, np.int16)).tolist()
    assert got[0] == (1 << 22) - 1
    assert got[3] == 1
    assert got[4] == got[5] == 0


@pytest.mark.parametrize("size", [2, 3, 64, 255, 256, 257, 1023, 1024, 1025, 2048, 8192])
@pytest.mark.parametrize("spread", [0, 300, 20000])
def test_all_forms_agree(size: int, spread: int) -> None:
    prob_bits = default_prob_bits(size)
    rows = 2 if size > 1024 else 6
    logits = logits_of(size + spread, rows, size, spread)
    logits[0] = -32768
    logits[0, size - 1] = 32767  # one certain symbol, and it is the last
    bounds = cdf.cdf(torch.from_numpy(logits), prob_bits)
    assert bounds.dtype == torch.int32
    assert np.array_equal(bounds.numpy(), rans.cdf(logits, prob_bits))
    # The oracle is quadratic: whole rows when small, single symbols else.
    symbols = np.random.default_rng(1).integers(0, size, rows).astype(np.int32)
    symbols[0] = size - 1
    for row, symbol in enumerate(symbols.tolist()):
        if size <= 257:
            assert bounds[row].tolist() == reference.intervals(logits[row].tolist(), prob_bits)[0]
        weights = reference.weights(logits[row].tolist())
        total, limit = sum(weights), (1 << prob_bits) - size
        start = sum(weights[:symbol]) * limit // total + symbol
        end = sum(weights[: symbol + 1]) * limit // total + symbol + 1
        torch_form = cdf.intervals(
            torch.from_numpy(logits[row]), torch.tensor(symbol, dtype=torch.int32), prob_bits
        )
        compiled = rans.intervals(logits[row : row + 1], symbols[row : row + 1], prob_bits)
        assert [int(v) for v in torch_form] == [start, end - start]
        assert [int(v[0]) for v in compiled] == [start, end - start]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_are_strictly_increasing_and_complete(data: st.DataObject) -> None:
    prob_bits = data.draw(st.integers(8, 20))
    size = data.draw(st.integers(2, min(8192, 1 << (prob_bits - 1))))
    spread = data.draw(st.sampled_from([0, 1, 100, 3000, 30000]))
    logits = logits_of(data.draw(st.integers(0, 2**31)), 2, size, spread)
    bounds = cdf.cdf(torch.from_numpy(logits), prob_bits).numpy()
    assert (bounds[:, 0] == 0).all()
    assert (bounds[:, -1] == 1 << prob_bits).all()
    assert (np.diff(bounds, axis=-1) >= 1).all()
    assert np.array_equal(bounds, rans.cdf(torch.from_numpy(logits), prob_bits, threads=2))
    symbols = np.random.default_rng(size).integers(0, size, 2).astype(np.int32)
    starts, freqs = rans.intervals(torch.from_numpy(logits), symbols, prob_bits, threads=2)
    assert np.array_equal(starts, bounds[[0, 1], symbols])
    assert np.array_equal(starts + freqs, bounds[[0, 1], symbols + 1])


def test_adding_a_constant_changes_nothing() -> None:
    logits = torch.from_numpy(logits_of(5, 3, 64, 500))
    assert torch.equal(cdf.cdf(logits, 16), cdf.cdf(logits + 7000, 16))


def test_cost_of_integers_is_small() -> None:
    """Intervals cost at most 0.1 % more bits than the real-valued softmax of the logits."""
    for size in (64, 256, 1024, 8192):
        logits = logits_of(size, 200, size, 512)
        real = logits.astype(np.float64) * np.log(2) / 256
        shifted = real - real.max(-1, keepdims=True)
        probability = np.exp(shifted)
        probability /= probability.sum(-1, keepdims=True)
        prob_bits = default_prob_bits(size)
        freqs = np.diff(rans.cdf(logits, prob_bits), axis=-1)
        ideal = -(probability * np.log2(probability)).sum(-1).mean()
        coded = -(probability * np.log2(freqs / 2.0**prob_bits)).sum(-1).mean()
        assert ideal <= coded <= ideal * 1.001, (size, ideal, coded)


def test_shapes_and_threads() -> None:
    logits = logits_of(3, 12, 50, 400).reshape(3, 4, 50)
    symbols = np.arange(12, dtype=np.int32).reshape(3, 4)
    one = rans.intervals(logits, symbols, 12)
    many = rans.intervals(logits, symbols, 12, threads=7)
    oracle = cdf.intervals(torch.from_numpy(logits), torch.from_numpy(symbols), 12)
    for left, middle, right in zip(one, many, oracle, strict=True):
        assert left.shape == (3, 4)
        assert left.dtype == np.int32
        assert np.array_equal(left, middle)
        assert np.array_equal(left, right.numpy())
    strided = np.asfortranarray(logits)
    assert np.array_equal(rans.cdf(strided, 12), rans.cdf(logits, 12))
    read_only = logits.copy()
    read_only.setflags(write=False)
    assert np.array_equal(rans.cdf(read_only, 12), rans.cdf(logits, 12))
    empty = rans.intervals(np.empty((0, 50), np.int16), np.empty(0, np.int32), 12)
    assert empty[0].shape == (0,)


@pytest.mark.parametrize(("size", "bits"), [(2, 16), (256, 16), (257, 18), (1024, 18), (1025, 20)])
def test_default_prob_bits(size: int, bits: int) -> None:
    assert default_prob_bits(size) == bits


@pytest.mark.parametrize("size", [1, 0, -3, 8193])
def test_impossible_codebooks_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        default_prob_bits(size)
    with pytest.raises(ValueError, match="codebook"):
        check_precision(size, 16)


@pytest.mark.parametrize(
    ("size", "prob_bits", "message"),
    [(64, 7, "prob_bits is 7"), (64, 21, "21"), (129, 8, "twice"), (8193, 20, "8193"), (1, 8, "1")],
)
def test_precision_is_refused_by_every_form(size: int, prob_bits: int, message: str) -> None:
    logits = np.zeros((1, size), np.int16)
    symbols = np.zeros(1, np.int32)
    for call in (
        lambda: cdf.cdf(torch.from_numpy(logits), prob_bits),
        lambda: rans.cdf(logits, prob_bits),
        lambda: rans.intervals(logits, symbols, prob_bits),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_wrong_arguments_are_refused() -> None:
    logits = np.zeros((2, 8), np.int16)
    symbols = np.zeros(2, np.int32)
    for weights, zeros, int16 in (
        (cdf.weights, torch.zeros, torch.int16),
        (plain_weights, np.zeros, np.int16),
    ):
        with pytest.raises(ValueError, match="dtype"):
            weights(zeros(4))
        for shape in ((), (2, 0)):
            with pytest.raises(ValueError, match="the last axis is the codebook"):
                weights(zeros(shape, dtype=int16))
    with pytest.raises(ValueError, match="int16"):
        rans.cdf(logits.astype(np.int32), 12)
    with pytest.raises(ValueError, match="int16"):
        rans.cdf(torch.zeros(2, 8, dtype=torch.float64), 12)
    with pytest.raises(ValueError, match="symbol 8"):
        rans.intervals(logits, symbols + 8, 12)
    with pytest.raises(ValueError, match="symbol -1"):
        rans.intervals(logits, symbols - 1, 12)
    with pytest.raises(ValueError, match="one symbol"):
        rans.intervals(logits, np.zeros(3, np.int32), 12)
    with pytest.raises(ValueError, match="integers"):
        rans.intervals(logits, np.zeros(2), 12)
    with pytest.raises(ValueError, match="threads is 0"):
        rans.cdf(logits, 12, threads=0)
    with pytest.raises(ValueError, match="one symbol"):
        cdf.intervals(torch.from_numpy(logits), torch.zeros(3, dtype=torch.int32), 12)
    with pytest.raises(ValueError, match="dtype"):
        cdf.intervals(torch.from_numpy(logits), torch.zeros(2), 12)
