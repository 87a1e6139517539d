"""Streams that are encoded side by side: every batch gives the oracle's bytes, stream by stream."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import independent_coder as reference
from percov2.entropy.rans import RansEncoder

Rows = list[list[tuple[int, int]]]  # per stream (start, freq)

KINDS = ["any", "rare", "certain", "nearly certain", "even", "mixed"]


def random_rows(seed: int, counts: list[int], prob_bits: int, kind: str) -> Rows:
    """Intervals of one kind; the rarest emit three bytes, the certain ones none."""
    generator = np.random.default_rng(seed)
    top = 1 << prob_bits

    def pair() -> tuple[int, int]:
        chosen = kind if kind != "mixed" else KINDS[generator.integers(5)]
        if chosen == "rare":
            return int(generator.integers(top)), 1
        if chosen == "certain":
            return 0, top
        if chosen == "nearly certain":
            start = int(generator.integers(2))
            return start, top - 1
        if chosen == "even":
            return int(generator.integers(16)) * (top >> 4), top >> 4
        start = int(generator.integers(top))
        return start, int(generator.integers(1, top - start + 1))

    return [[pair() for _ in range(count)] for count in counts]


def push(encoder: RansEncoder, rows: Rows, prob_bits: int, threads: int = 1) -> None:
    flat = np.array([pair for row in rows for pair in row], np.int32).reshape(-1, 2)
    starts, freqs = np.ascontiguousarray(flat.T)
    encoder.push(starts, freqs, [len(row) for row in rows], prob_bits, threads)


def quiet_symbols(check: int, symbols: list[reference.Interval]) -> int:
    """How many symbols a decoder meets in an exhausted stream, counted by decoding."""
    decoder = reference.Coder(reference.encode(check, symbols))
    met = 0
    for start, freq, bits in symbols:
        met += decoder.exhausted
        decoder.symbol(sorted({0, start, start + freq, 1 << bits}), bits)
    return met


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batches_equal_the_oracle(batch: int, kind: str) -> None:
    generator = np.random.default_rng([batch, KINDS.index(kind)])
    checks = generator.integers(0, 65536, batch)
    checks[0] = 0
    pushes = []
    for prob_bits in generator.permutation([8, 12, 16, 17, 20])[:2].tolist():
        counts = generator.choice([0, 1, 2, 30, 63, 64, 65, 100], batch).tolist()
        pushes.append((prob_bits, random_rows(batch, counts, prob_bits, kind)))
    expected = [
        [(s, f, bits) for bits, rows in reversed(pushes) for s, f in rows[stream]]
        for stream in range(batch)
    ]
    for threads in (1, 2, 3):
        encoder = RansEncoder(checks)
        for prob_bits, rows in pushes:
            push(encoder, rows, prob_bits, threads)
        streams = reference.split(*(part.tolist() for part in encoder.finish()))
        for stream, data in enumerate(streams):
            assert data == reference.encode(int(checks[stream]), expected[stream])
    quiet = [quiet_symbols(int(c), s) for c, s in zip(checks, expected, strict=True)]
    assert encoder.symbols_before_output.tolist() == quiet


@pytest.mark.parametrize("prob_bits", range(8, 21))
def test_every_precision(prob_bits: int) -> None:
    rows = random_rows(prob_bits, [70, 66, 1, 0, 68, 80, 64, 90, 65, 3], prob_bits, "mixed")
    encoder = RansEncoder(range(10))
    push(encoder, rows, prob_bits)
    for check, data in enumerate(reference.split(*(p.tolist() for p in encoder.finish()))):
        assert data == reference.encode(check, [(s, f, prob_bits) for s, f in rows[check]])


@pytest.mark.parametrize("kind", ["rare", "mixed"])
def test_long_streams_among_short_ones(kind: str) -> None:
    """Longer than any block of the encoder, with neighbours that end at other times."""
    counts = [2500, 3, 1024, 1025, 0, 1023, 2049, 5, 1, 2048]
    rows = random_rows(1, counts, 20, kind)
    encoder = RansEncoder(range(10))
    push(encoder, rows, 20, threads=2)
    push(encoder, rows[::-1], 20)
    streams = reference.split(*(part.tolist() for part in encoder.finish()))
    for check, data in enumerate(streams):
        symbols = [(s, f, 20) for s, f in rows[9 - check] + rows[check]]
        assert data == reference.encode(check, symbols)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(8, 20),
    st.lists(st.integers(0, 40), max_size=12),
    st.sampled_from(KINDS),
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.data(),
)
def test_cutting_a_push_changes_no_byte(
    prob_bits: int, counts: list[int], kind: str, seed: int, threads: int, data: st.DataObject
) -> None:
    rows = random_rows(seed, counts, prob_bits, kind)
    cuts = [data.draw(st.integers(0, count)) for count in counts]
    whole, parts = RansEncoder([7] * len(rows)), RansEncoder([7] * len(rows))
    push(whole, rows, prob_bits, threads)
    push(parts, [row[cut:] for row, cut in zip(rows, cuts, strict=True)], prob_bits)
    push(parts, [row[:cut] for row, cut in zip(rows, cuts, strict=True)], prob_bits)
    assert whole.finish()[0].tobytes() == parts.finish()[0].tobytes()
    assert np.array_equal(whole.symbols_before_output, parts.symbols_before_output)
    for row, stream in zip(rows, reference.split(*whole.finish()), strict=True):
        assert stream == reference.encode(7, [(s, f, prob_bits) for s, f in row])


GOLDEN_OFFSETS = [0, 8, 12, 26, 31, 69, 79, 90, 96, 99]
GOLDEN_BATCH = (
    "084000000000707a0800000206500003f0c3e1410758dc14cb571800000426144000059188f76fa8226d1fb4f2"
    "54dc87fb6f0d89bc47b755c10474f90c8148c40b67ca5eaa11c00019d1e947ad63730260000f224aaa236cdd31"
    "29600029aa13800010"
)


def test_golden_batch() -> None:
    """Nine streams of 0 to 40 symbols in one push, then a second precision on top."""
    counts = [5, 0, 12, 1, 40, 7, 7, 3, 0]
    rows = [
        [(97 * (b + i) % 4000, 1 + (31 * i + b) % 96) for i in range(n)]
        for b, n in enumerate(counts)
    ]
    encoder = RansEncoder([257 * b for b in range(9)])
    push(encoder, rows, 12)
    push(encoder, [[(b, 1 << b)] for b in range(9)], 20)
    buffer, offsets = encoder.finish()
    assert offsets.tolist() == GOLDEN_OFFSETS
    assert buffer.tobytes().hex() == GOLDEN_BATCH


def edges(prob_bits: int) -> list[int]:
    top = 1 << prob_bits
    return [-(2**31), -(2**31) + 1, -top - 1, -top, -1, 0, 1, top - 1, top, top + 1, 2**31 - 1]


@pytest.mark.parametrize("prob_bits", [8, 16, 20])
def test_exactly_the_invalid_intervals_are_refused(prob_bits: int) -> None:
    """One bad interval, wherever it is: named in the message, and nothing was pushed."""
    for start in edges(prob_bits):
        for freq in edges(prob_bits):
            starts, freqs = np.zeros(37, np.int32), np.ones(37, np.int32)
            place = (start + 3 * freq) % 37
            starts[place], freqs[place] = start, freq
            encoder = RansEncoder([1, 2])
            if start >= 0 and freq >= 1 and start + freq <= 1 << prob_bits:
                encoder.push(starts, freqs, [20, 17], prob_bits)
                continue
            with pytest.raises(
                ValueError, match=rf"interval {place} \(start {start}, freq {freq}\)"
            ):
                encoder.push(starts, freqs, [20, 17], prob_bits)
            assert encoder.finish()[0].tobytes() == b"\1\2"
            assert encoder.symbols_before_output.tolist() == [0, 0]
