"""Integer logits to intervals: torch and compiled forms, with every instruction set."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from oracles import independent_model as reference
from percov2 import _native
from percov2.entropy import rans
from percov2.entropy.cdf import WEIGHT_TABLE, check_precision, default_prob_bits
from percov2.entropy.cdf import weights as plain_weights
from percov2.entropy.torch import cdf

SIZES = (2, 3, 15, 16, 17, 33, 63, 64, 65, 129, 255, 256, 257, 300, 777, 1024, 1025, 4097, 8192)


def awkward_rows(size: int, seed: int) -> np.ndarray:
    """int16 [11, size]: flat, steep, at both ends of int16, one large among small, random."""
    generator = np.random.default_rng(seed)
    index = np.arange(size)
    one_large = np.full((2, size), -32768)
    one_large[[0, 1], [size // 2, size - 1]] = 32767
    rows = [
        np.zeros(size),
        np.full(size, -32768),
        np.full(size, 32767),
        np.clip(-3 * index, -32768, 0),
        np.clip(32767 - 40 * index, -32768, 32767),
        *one_large,
        generator.integers(-32768, 32768, size),
        generator.integers(-2000, 1, size),
        np.rint(generator.standard_normal(size) * 600),
        np.rint(generator.standard_normal(size) * 60),
    ]
    return np.clip(np.stack(rows), -32768, 32767).astype(np.int16)


def precisions(size: int) -> list[int]:
    least = max(8, (2 * size - 1).bit_length())
    return sorted({least, default_prob_bits(size), 20})


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


@pytest.mark.parametrize("size", SIZES)
def test_torch_tables_equal_the_oracle(size: int) -> None:
    logits = awkward_rows(size, size + 7)
    symbols = np.random.default_rng(size).integers(0, size, len(logits))
    for prob_bits in precisions(size):
        bounds = cdf.cdf(torch.from_numpy(logits), prob_bits)
        assert bounds.dtype == torch.int32
        for row, found in zip(logits.tolist(), bounds.tolist(), strict=True):
            assert found == reference.intervals(row, prob_bits)[0]
        assert (bounds[:, 0] == 0).all() and (bounds[:, -1] == 1 << prob_bits).all()
        assert (bounds.diff() >= 1).all()
        rows = torch.from_numpy(logits), torch.from_numpy(symbols)
        starts, freqs = cdf.intervals(*rows, prob_bits)
        assert torch.equal(starts, bounds[range(len(symbols)), symbols])
        assert torch.equal(starts + freqs, bounds[range(len(symbols)), symbols + 1])


@pytest.mark.parametrize("size", SIZES)
def test_intervals_tables_and_searches(instruction_set: str, size: int) -> None:
    logits = awkward_rows(size, size)
    generator = np.random.default_rng(size + 1)
    for prob_bits in precisions(size):
        bounds = cdf.cdf(torch.from_numpy(logits), prob_bits).numpy()
        assert np.array_equal(rans.cdf(logits, prob_bits), bounds)
        for symbol in {0, size - 1, size // 2, *generator.integers(0, size, 6).tolist()}:
            symbols = np.full(len(logits), symbol, np.int32)
            starts, freqs = rans.intervals(logits, symbols, prob_bits)
            assert np.array_equal(starts, bounds[:, symbol])
            assert np.array_equal(freqs, bounds[:, symbol + 1] - bounds[:, symbol])
            # The first and the last number of an interval name its symbol, the next one another.
            for slots, found in (
                (starts, symbol),
                (starts + freqs - 1, symbol),
                (np.minimum(starts + freqs, (1 << prob_bits) - 1), min(symbol + 1, size - 1)),
            ):
                count = len(logits)
                decoder = rans.RansDecoder(b"", [0] * (count + 1), slots, [0] * count)
                decoded = decoder.decode(logits[:, None], prob_bits)
                assert decoded[:, 0].tolist() == [found] * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 7, 16, 31, 33, 64, 300, 1025])
def test_float_logits_are_rounded_alike(
    instruction_set: str, size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(24, size, generator=generator) * torch.logspace(-3, 4, 24)[:, None]
    logits[3, ::2] = -torch.inf
    logits[4] += 3e7
    logits[5, 0], logits[5, 1:] = 3e38, -3e38
    logits[6] = torch.arange(size) / 738.66  # near halves
    logits = logits.to(dtype)
    rounded = cdf.round_logits(logits)
    assert rounded.dtype == torch.int16
    assert rounded.amax(1).eq(0).all()
    prob_bits = default_prob_bits(size)
    symbols = torch.randint(0, size, (24,), generator=generator).to(torch.int32)
    wanted = cdf.intervals(rounded, symbols, prob_bits)
    starts, freqs = rans.intervals(logits, symbols, prob_bits)
    assert np.array_equal(starts, wanted[0].numpy())
    assert np.array_equal(freqs, wanted[1].numpy())
    assert np.array_equal(rans.cdf(logits, prob_bits), cdf.cdf(rounded, prob_bits).numpy())

    encoder = rans.RansEncoder([9] * 4)
    encoder.encode(starts, freqs, [6] * 4, prob_bits)
    buffer, offsets = encoder.finish()
    decoder = rans.RansDecoder(buffer, offsets)
    decoded = decoder.decode(logits.view(4, 6, size), prob_bits)
    assert np.array_equal(decoded.reshape(-1), symbols.numpy())
    assert decoder.finished([9] * 4).all()


def test_rounding_equals_its_definition() -> None:
    logits = torch.tensor([[0.0, -0.5, 1.0, -88.0, -89.0, -torch.inf]])
    steps = [(x - 1.0) * 256 / np.log(2) for x in (0.0, -0.5, 1.0, -88.0)]
    wanted = [*np.rint(steps).astype(int).tolist(), -32768, -32768]
    wanted[3] = max(wanted[3], -32768)
    assert cdf.round_logits(logits)[0].tolist() == wanted


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 15, 16, 40, 69])
def test_float_logits_that_are_no_distribution(instruction_set: str, bad: float, at: int) -> None:
    logits = np.zeros((3, 70), np.float32)
    logits[1, at] = bad
    decoder = rans.RansDecoder(b"abcdefghijkl", [0, 12])
    before = decoder.states.tolist(), decoder.positions.tolist()
    for call in (
        lambda: rans.intervals(logits, [0, 0, 0], 16),
        lambda: rans.cdf(logits, 16),
        lambda: decoder.decode(logits[None], 16),
        lambda: cdf.round_logits(torch.from_numpy(logits)),
    ):
        with pytest.raises(ValueError, match="NaN"):
            call()
    # The first row was fine, and yet nothing was decoded.
    assert (decoder.states.tolist(), decoder.positions.tolist()) == before
    with pytest.raises(ValueError, match="nothing finite"):
        rans.cdf(np.full((1, 70), -np.inf, np.float32), 16)


def test_cost_of_integers_is_small() -> None:
    """Intervals cost at most 0.1 % more bits than the real-valued softmax of the logits."""
    for size in (64, 256, 1024, 8192):
        generator = np.random.default_rng(size)
        logits = np.rint(generator.standard_normal((200, size)) * 512).astype(np.int16)
        real = torch.from_numpy(logits * np.log(2) / 256).double()
        probability, prob_bits = real.softmax(-1).numpy(), default_prob_bits(size)
        freqs = np.diff(rans.cdf(logits, prob_bits), axis=-1)
        ideal = -(probability * np.log2(probability)).sum(-1).mean()
        coded = -(probability * np.log2(freqs / 2.0**prob_bits)).sum(-1).mean()
        assert ideal <= coded <= ideal * 1.001, (size, ideal, coded)


def test_shapes_and_threads() -> None:
    logits = awkward_rows(50, 3)[:, None].repeat(4, 1)[-3:]
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
    read_only = np.broadcast_to(logits[0], logits.shape)
    assert np.array_equal(rans.cdf(read_only, 12), rans.cdf(read_only.copy(), 12))
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
    logits, symbols = np.zeros((2, 8), np.int16), np.zeros(2, np.int32)
    tensor = torch.from_numpy(logits)
    for call, message in (
        (lambda: cdf.weights(torch.zeros(4)), "dtype"),
        (lambda: plain_weights(np.zeros(4)), "dtype"),
        (lambda: cdf.weights(tensor[:, :0]), "the last axis is the codebook"),
        (lambda: plain_weights(logits[:, :0]), "the last axis is the codebook"),
        (lambda: plain_weights(np.int16(0)), "the last axis is the codebook"),
        (lambda: rans.cdf(logits.astype(np.int32), 12), "int16"),
        (lambda: rans.cdf(torch.zeros(2, 8, dtype=torch.float64), 12), "int16"),
        (lambda: rans.intervals(logits, symbols + 8, 12), "symbol 8"),
        (lambda: rans.intervals(logits, symbols - 1, 12), "symbol -1"),
        (lambda: rans.intervals(logits, np.zeros(3, np.int32), 12), "one symbol"),
        (lambda: rans.intervals(logits, np.zeros(2), 12), "integers"),
        (lambda: rans.cdf(logits, 12, threads=0), "threads is 0"),
        (lambda: cdf.intervals(tensor, torch.zeros(3, dtype=torch.int32), 12), "one symbol"),
        (lambda: cdf.intervals(tensor, torch.zeros(2), 12), "dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_instruction_sets_are_named() -> None:
    names = rans.instruction_sets()
    assert names[0] == "scalar"
    assert rans.instruction_set() in names
    for name in ("sse9", ""):
        with pytest.raises(ValueError, match="instruction set"):
            rans.use_instruction_set(name)
