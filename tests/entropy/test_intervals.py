"""Compiled intervals and searches equal the torch form, with every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from percov2.entropy import rans
from percov2.entropy.cdf import default_prob_bits
from percov2.entropy.torch import cdf

SIZES = (2, 3, 15, 16, 17, 33, 63, 64, 65, 129, 255, 256, 257, 300, 777, 1024, 4097, 8192)


@pytest.fixture(params=rans.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = rans.instruction_set()
    rans.use_instruction_set(request.param)
    yield request.param
    rans.use_instruction_set(before)


def awkward_rows(size: int, seed: int) -> np.ndarray:
    """int16 [10, size]: flat, steep, at both ends of int16, one large among small, random."""
    generator = np.random.default_rng(seed)
    index = np.arange(size)
    one_large = np.full(size, -32768)
    one_large[size // 2] = 32767
    rows = [
        np.zeros(size),
        np.full(size, -32768),
        np.full(size, 32767),
        np.clip(-3 * index, -32768, 0),
        np.clip(32767 - 40 * index, -32768, 32767),
        one_large,
        generator.integers(-32768, 32768, size),
        generator.integers(-2000, 1, size),
        np.rint(generator.standard_normal(size) * 600),
        np.rint(generator.standard_normal(size) * 60),
    ]
    return np.clip(np.stack(rows), -32768, 32767).astype(np.int16)


def precisions(size: int) -> list[int]:
    least = max(8, (2 * size - 1).bit_length())
    return sorted({least, default_prob_bits(size), 20})


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
                decoded = decoder.decode_logits(logits[:, None], prob_bits)
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
    encoder.push(starts, freqs, [6] * 4, prob_bits)
    buffer, offsets = encoder.finish()
    decoder = rans.RansDecoder(buffer, offsets)
    decoded = decoder.decode_logits(logits.view(4, 6, size), prob_bits)
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
        lambda: decoder.decode_logits(logits[None], 16),
        lambda: cdf.round_logits(torch.from_numpy(logits)),
    ):
        with pytest.raises(ValueError, match="NaN"):
            call()
    # The first row was fine, and yet nothing was decoded.
    assert (decoder.states.tolist(), decoder.positions.tolist()) == before
    with pytest.raises(ValueError, match="nothing finite"):
        rans.cdf(np.full((1, 70), -np.inf, np.float32), 16)


def test_instruction_sets_are_named() -> None:
    names = rans.instruction_sets()
    assert names[0] == "scalar"
    assert rans.instruction_set() in names
    for name in ("sse9", ""):
        with pytest.raises(ValueError, match="instruction set"):
            rans.use_instruction_set(name)
