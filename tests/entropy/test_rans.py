"""The coder: bytes equal the oracle's, every stream comes back, hostile streams do no harm."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import independent_coder as reference
from percov2 import _native
from percov2.entropy.cdf import default_prob_bits
from percov2.entropy.rans import RansDecoder, RansEncoder, cdf, default_threads, intervals

Rows = list[list[tuple[int, int]]]  # per stream (start, freq)
Pushes = list[tuple[int, Rows]]  # prob_bits, in the order of pushing
KINDS = ["any", "rare", "certain", "nearly certain", "even", "mixed"]


def random_logits(seed: int, shape: tuple[int, ...], spread: float = 500) -> np.ndarray:
    wide = np.rint(np.random.default_rng(seed).standard_normal(shape) * spread)
    return np.clip(wide, -32768, 32767).astype(np.int16)


def sample(seed: int, bounds: np.ndarray) -> np.ndarray:
    """Symbols drawn with the probabilities of the tables int32 [..., V + 1]."""
    targets = np.random.default_rng(seed).integers(0, bounds[..., -1])
    return (bounds[..., 1:] <= targets[..., None]).sum(-1).astype(np.int32)


def encoded(logits: np.ndarray, symbols: np.ndarray, checks: object, bits: int) -> tuple:
    encoder = RansEncoder(checks)
    starts, freqs = intervals(logits, symbols, bits)
    encoder.encode(starts.ravel(), freqs.ravel(), [symbols.shape[1]] * len(symbols), bits)
    return encoder.finish()


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
    encoder.encode(starts, freqs, [len(row) for row in rows], prob_bits, threads)


def said(stream: int, pushes: Pushes) -> list[reference.Interval]:
    """What the decoder of a stream meets."""
    return [(s, f, bits) for bits, rows in reversed(pushes) for s, f in rows[stream]]


def assert_oracle(encoder: RansEncoder, checks: list[int], pushes: Pushes) -> None:
    streams = reference.split(*(part.tolist() for part in encoder.finish()))
    for b, data in enumerate(streams):
        assert data == reference.encode(checks[b], said(b, pushes))


def quiet_symbols(check: int, symbols: list[reference.Interval]) -> int:
    """How many symbols a decoder meets in an exhausted stream, counted by decoding."""
    decoder = reference.Coder(reference.encode(check, symbols))
    met = 0
    for start, freq, bits in symbols:
        met += decoder.exhausted
        decoder.symbol(sorted({0, start, start + freq, 1 << bits}), bits)
    return met


GOLDEN = [
    # check, (start, freq, prob_bits) in decoding order, stream
    (0, [], ""),
    (1, [], "01"),
    (0xABCD, [], "abcd"),
    (0, [(0, 1 << 8, 8)], ""),
    (0, [(7, 3, 12)], "07"),
    (0x1234, [(0, 1, 20)], "0120000034"),
    # The state meets its limit and its lower bound exactly.
    (2048, [(5, 1, 20)], "80000500"),
    (2053, [(0, 1, 20)], "80000005"),
    (7, [(0, 1, 20), (0, 1, 20)], "070000000000"),
    (
        0xFFFF,
        [(i * 97 % 4000, 1 + i % 96, 12) for i in range(12)],
        "08f600006250c4248881e747aa096ad12e",
    ),
    (
        0x5A5A,
        [(255, 1, 8), (0, 1, 16), (65535, 1, 16), ((1 << 20) - 1, 1, 20)] * 3,
        "05af00ff00ffffffffff00ff00ffffffff00ff00ffffffff5a",
    ),
]


@pytest.mark.parametrize(("check", "symbols", "stream"), GOLDEN)
def test_golden_streams(check: int, symbols: list[reference.Interval], stream: str) -> None:
    assert reference.encode(check, symbols).hex() == stream
    encoder = RansEncoder([check])
    for start, freq, prob_bits in reversed(symbols):
        encoder.encode([start], [freq], [1], prob_bits)
    data = encoder.finish()[0].tobytes()
    assert data.hex() == stream
    decoder, slow = RansDecoder(data, [0, len(data)]), reference.Coder(data)
    for start, freq, prob_bits in symbols:
        bounds = sorted({0, start, start + freq, 1 << prob_bits})
        symbol = bounds.index(start)
        table = np.array(bounds, np.int32)[None, None]
        assert decoder.decode_cdf(table, prob_bits).tolist() == [[symbol]]
        assert slow.symbol(bounds, prob_bits) == symbol
    assert decoder.finished([check]).all()
    assert slow.finished(check)


def test_each_stream_has_one_form() -> None:
    """A zero byte in front would decode to the same symbols; it is refused."""
    for check, data in ((0, b""), (1, b"\1"), (0xABCD, b"\xab\xcd")):
        assert RansDecoder(data, [0, len(data)]).finished([check]).all()
        longer = b"\0" + data
        assert not RansDecoder(longer, [0, len(longer)]).finished([check]).any()
        assert not reference.Coder(longer).finished(check)


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


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], Pushes]:
    checks = draw(st.lists(st.integers(0, 0xFFFF), max_size=4))
    pushes = []
    for _ in range(draw(st.integers(0, 4))):
        prob_bits = draw(st.integers(8, 20))
        edge = (1 << prob_bits) - 1
        start = st.one_of(st.sampled_from([0, edge]), st.integers(0, edge))
        pair = start.flatmap(
            lambda s, m=edge: st.tuples(
                st.just(s), st.one_of(st.sampled_from([1, m + 1 - s]), st.integers(1, m + 1 - s))
            )
        )
        pushes.append((prob_bits, [draw(st.lists(pair, max_size=12)) for _ in checks]))
    return checks, pushes


@settings(max_examples=70, deadline=None)
@given(batches(), st.integers(1, 3))
def test_mixed_ragged_pushes_equal_the_oracle(
    batch: tuple[list[int], Pushes], threads: int
) -> None:
    checks, pushes = batch
    encoder = RansEncoder(checks)
    for i, (prob_bits, rows) in enumerate(pushes):
        push(encoder, rows, prob_bits, threads)
        assert_oracle(encoder, checks, pushes[: i + 1])  # more may follow all the same
    buffer, offsets = encoder.finish()
    assert (buffer.dtype, offsets.dtype) == (np.uint8, np.int64)
    for stream, data in enumerate(reference.split(buffer, offsets.tolist())):
        # Read it again, one symbol at a time, comparing states with the oracle.
        slow, fast = reference.Coder(data), RansDecoder(data, [0, len(data)])
        symbols, met_exhausted = said(stream, pushes), 0
        for start, freq, bits in symbols:
            bounds = sorted({0, start, start + freq, 1 << bits})
            met_exhausted += slow.exhausted
            assert fast.exhausted.tolist() == [slow.exhausted]
            symbol = slow.symbol(bounds, bits)
            assert bounds[symbol] == start
            got = fast.decode_cdf(np.array(bounds, np.int32)[None, None], bits)
            assert got.tolist() == [[symbol]]
            assert (fast.states[0], fast.positions[0]) == (slow.x, slow.position)
        assert fast.finished([checks[stream]]).tolist() == [True]
        assert fast.finished([checks[stream] ^ 1]).tolist() == [False]
        assert encoder.symbols_before_output[stream] == met_exhausted


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batches_equal_the_oracle(batch: int, kind: str) -> None:
    generator = np.random.default_rng([batch, KINDS.index(kind)])
    checks = generator.integers(0, 65536, batch).tolist()
    checks[0] = 0
    pushes = []
    for prob_bits in generator.permutation(range(8, 21))[:2].tolist():
        counts = generator.choice([0, 1, 2, 30, 63, 64, 65, 100], batch).tolist()
        pushes.append((prob_bits, random_rows(batch, counts, prob_bits, kind)))
    streams = []
    for threads in (1, 2, 3, 16):
        encoder = RansEncoder(checks)
        for prob_bits, rows in pushes:
            push(encoder, rows, prob_bits, threads)
        streams.append([part.tobytes() for part in encoder.finish()])
    assert streams == streams[:1] * 4
    assert_oracle(encoder, checks, pushes)
    quiet = [quiet_symbols(check, said(b, pushes)) for b, check in enumerate(checks)]
    assert encoder.symbols_before_output.tolist() == quiet


@pytest.mark.parametrize("kind", ["rare", "mixed"])
def test_long_streams_among_short_ones(kind: str) -> None:
    """Longer than any block of the encoder, with neighbours that end at other times."""
    counts = [2500, 3, 1024, 1025, 0, 1023, 2049, 5, 1, 2048]
    rows = random_rows(1, counts, 20, kind)
    encoder = RansEncoder(range(10))
    push(encoder, rows, 20, threads=2)
    push(encoder, rows[::-1], 20)
    assert_oracle(encoder, list(range(10)), [(20, rows), (20, rows[::-1])])


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_logits_come_back(data: st.DataObject) -> None:
    prob_bits = data.draw(st.integers(8, 20))
    size = data.draw(st.integers(2, min(600, 1 << (prob_bits - 1))))
    rows, count = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 20))
    seed, threads = data.draw(st.integers(0, 2**31)), data.draw(st.integers(1, 3))
    logits = random_logits(seed, (rows, count, size), data.draw(st.sampled_from([0, 300, 9000])))
    symbols = np.random.default_rng(seed).integers(0, size, (rows, count)).astype(np.int32)
    checks = np.random.default_rng(seed).integers(0, 65536, rows).astype(np.uint16)
    streams = encoded(logits, symbols, checks, prob_bits)
    by_logits, by_table, first = (RansDecoder(*streams) for _ in range(3))
    assert np.array_equal(by_logits.decode(logits, prob_bits, threads=threads), symbols)
    assert by_logits.finished(checks).all()
    table = cdf(logits, prob_bits)
    assert np.array_equal(by_table.decode_cdf(table, prob_bits, threads=threads), symbols)
    trusting = RansDecoder(*streams)
    found = trusting.decode_cdf(table, prob_bits, threads=threads, trusted=True)
    assert np.array_equal(found, symbols)
    assert np.array_equal(trusting.states, by_table.states)
    assert by_table.finished(checks).all()
    # Resumed anywhere, from nothing but states and positions.
    cut = data.draw(st.integers(0, count))
    head = first.decode(torch.from_numpy(logits[:, :cut].copy()), prob_bits)
    second = RansDecoder(*streams, first.states, first.positions)
    tail = second.decode(logits[:, cut:], prob_bits)
    assert np.array_equal(np.concatenate([head, tail], axis=1), symbols)
    assert second.finished(checks).all()


def test_streams_choose_rows() -> None:
    logits = random_logits(4, (3, 5, 16))
    symbols = sample(4, cdf(logits, 12))
    decoder = RansDecoder(*encoded(logits, symbols, [1, 2, 3], 12))
    assert np.array_equal(decoder.decode(logits[[2, 0]], 12, [2, 0]), symbols[[2, 0]])
    assert decoder.finished([1, 2, 3]).tolist() == [True, False, True]
    assert np.array_equal(decoder.decode(logits[[1]], 12, [1]), symbols[[1]])
    assert decoder.finished([1, 2, 3]).all()


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_overhead_is_below_half_a_byte(size: int) -> None:
    """Mean bytes of streams of ``size`` symbols, beyond their information and the check."""
    bits, streams = default_prob_bits(size), 96
    bounds = cdf(random_logits(size, (size, size)), bits)
    targets = np.random.default_rng(2).integers(0, 1 << bits, (streams, size))
    symbols = np.stack(
        [np.searchsorted(row, targets[:, t], side="right") - 1 for t, row in enumerate(bounds)], 1
    )
    starts = bounds[np.arange(size), symbols]
    freqs = bounds[np.arange(size), symbols + 1] - starts
    encoder = RansEncoder(np.random.default_rng(3).integers(0, 65536, streams))
    encoder.encode(starts.ravel(), freqs.ravel(), [size] * streams, bits)
    _, offsets = encoder.finish()
    ideal = -np.log2(freqs / 2.0**bits).sum(-1) / 8
    # Less than the entropy would mean that the sum is wrong.
    assert -0.5 < (np.diff(offsets) - 2 - ideal).mean() <= 0.5


def test_damage_is_noticed_and_harmless() -> None:
    """Truncations, bit flips and noise: never a crash, accepted about once in 2^16."""
    logits = random_logits(21, (1, 60, 64))
    data = encoded(logits, sample(21, cdf(logits, 16)), [0xBEEF], 16)[0].tobytes()
    generator = np.random.default_rng(22)
    damaged = [data[:cut] for cut in range(len(data))]
    damaged += [data[cut:] for cut in range(1, len(data) + 1)]
    damaged += [b"\0" + data, data + b"\0"]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    damaged += [generator.bytes(int(n)) for n in generator.integers(0, 90, 6000)]
    decoder = RansDecoder(b"".join(damaged), np.cumsum([0, *map(len, damaged)]))
    got = decoder.decode(np.broadcast_to(logits, (len(damaged), 60, 64)), 16)
    assert got.min() >= 0 and got.max() < 64
    assert (decoder.states < 1 << 31).all()
    # About 7,000 tries at 2^-16: five or more acceptances would be a fault, not luck.
    assert decoder.finished([0xBEEF] * len(damaged)).sum() < 5
    # Reading on beyond the end of an undamaged stream stays harmless.
    good = RansDecoder(data, [0, len(data)])
    for _ in range(20):
        good.decode(logits, 16)
    assert good.exhausted.all()


def test_acceptance_probability_is_two_to_the_minus_sixteen() -> None:
    """Every check value is taken by the final state of noise about equally often."""
    generator = np.random.default_rng(5)
    count = 60000
    decoder = RansDecoder(generator.bytes(12 * count), 12 * np.arange(count + 1))
    logits = random_logits(6, (1, 9, 32), 100)
    decoder.decode(np.broadcast_to(logits, (count, 9, 32)), 16)
    accepted = sum(int(decoder.finished(np.full(count, check)).sum()) for check in range(400, 465))
    # 65 checks * 60000 tries / 65536 = 60 if all bytes were always used up; never much more.
    assert accepted < 2 * 65 * count / 65536 + 10 * math.sqrt(60)


def at_odd_byte(array: np.ndarray) -> np.ndarray:
    """The same numbers, one byte beyond a boundary, as in a mapped file."""
    return np.frombuffer(b" " + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_arrays_need_not_be_aligned(dtype: type) -> None:
    logits = (np.arange(2 * 9 * 40) * 37 % 911).reshape(2, 9, 40).astype(dtype)
    symbols = np.arange(18, dtype=np.int32).reshape(2, 9)
    expected = intervals(logits, symbols, 12)
    odd, odd_symbols = at_odd_byte(logits), at_odd_byte(symbols)
    assert not odd.flags.aligned and not odd_symbols.flags.aligned
    raw = bytearray(b" " + logits.tobytes())
    tensor = torch.frombuffer(raw, dtype=torch.from_numpy(logits).dtype, offset=1)
    assert tensor.data_ptr() % logits.itemsize
    for unaligned in (odd, tensor.view(2, 9, 40)):
        assert np.array_equal(intervals(unaligned, odd_symbols, 12), expected)
        encoder = RansEncoder([1, 2])
        encoder.encode(*(at_odd_byte(part.ravel()) for part in expected), [9, 9], 12)
        decoder = RansDecoder(*encoder.finish())
        assert np.array_equal(decoder.decode(unaligned, 12), symbols)
    with pytest.raises(ValueError, match="multiple of its element size"):
        _native.intervals(
            tensor.view(18, 40), logits.dtype.name, torch.zeros(18, dtype=torch.int32), 12, 1
        )


def test_one_coder_in_several_threads() -> None:
    script = """
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from percov2.entropy.rans import RansDecoder, RansEncoder
count, calls = 5000, 24
starts, freqs = np.tile(np.array([0, 100, 7], np.int32), count), np.full(3 * count, 3, np.int32)
shared, alone = RansEncoder([5]), RansEncoder([5])
with ThreadPoolExecutor(4) as pool:
    for done in [pool.submit(shared.encode, starts, freqs, [3 * count], 12) for _ in range(calls)]:
        done.result()
for _ in range(calls):
    alone.encode(starts, freqs, [3 * count], 12)
stream, offsets = shared.finish()
assert stream.tobytes() == alone.finish()[0].tobytes()
tables = np.tile(np.arange(0, 4097, 16, dtype=np.int32), (1, count, 1))
one, several = RansDecoder(stream, offsets), RansDecoder(stream, offsets)
expected = sorted(one.decode_cdf(tables, 12).tobytes() for _ in range(calls))
with ThreadPoolExecutor(4) as pool:
    given = [pool.submit(several.decode_cdf, tables, 12) for _ in range(calls)]
assert sorted(part.result().tobytes() for part in given) == expected
assert several.states == one.states and several.positions == one.positions
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


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
                encoder.encode(starts, freqs, [20, 17], prob_bits)
                continue
            with pytest.raises(
                ValueError, match=rf"interval {place} \(start {start}, freq {freq}\)"
            ):
                encoder.encode(starts, freqs, [20, 17], prob_bits)
            assert encoder.finish()[0].tobytes() == b"\1\2"
            assert encoder.symbols_before_output.tolist() == [0, 0]


# Every wrong argument is a ValueError that names the value, and nothing has happened.


def test_wrong_symbols_are_refused() -> None:
    encoder = RansEncoder([300])
    for starts, freqs, counts, bits, message in (
        ([2**33], [1], [1], 8, "8589934592"),
        ([0.5], [1], [1], 8, "float64"),
        ([0], [1, 1], [1], 8, "freqs has 2"),
        ([0], [1], [2], 8, r"counts\[0\] is 2"),
        ([0], [1], [0], 8, "sum to 0"),
        ([0], [1], [-1], 8, r"counts\[0\] is -1"),
        ([0], [1], [2**63 - 1], 8, "9223372036854775807"),
        ([0], [1], [1, 0], 8, "counts has 2"),
        ([0], [1], [1], 7, "prob_bits is 7"),
        ([0], [1], [1], 21, "prob_bits is 21"),
        ([[0]], [[1]], [1], 8, "axes"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.encode(starts, freqs, counts, bits)
    with pytest.raises(ValueError, match="threads is 0"):
        encoder.encode([], [], [0], 8, 0)
    assert encoder.finish()[0].tobytes() == b"\x01\x2c"
    for checks in ([65536], [-1], [2**40], [1.5]):
        with pytest.raises(ValueError, match="check"):
            RansEncoder(checks)


def test_wrong_streams_are_refused() -> None:
    for *given_as, message in (
        (b"ab", [], None, None, "offsets is empty"),
        (b"ab", [0, 3], None, None, r"offsets\[1\] is 3"),
        (b"ab", [-1, 2], None, None, r"offsets\[0\] is -1"),
        (b"ab", [2, 1], None, None, r"offsets\[1\] is 1"),
        (b"ab", [0, 2], [1], None, "both or neither"),
        (b"ab", [0, 2], None, [0], "both or neither"),
        (b"ab", [0, 2], [2**31], [0], "2147483648"),
        (b"ab", [0, 2], [1], [3], r"positions\[0\] is 3"),
        (b"ab", [0, 2], [1], [-1], r"positions\[0\] is -1"),
        (b"ab", [0, 2], [1, 1], [0, 0], "for 1 streams"),
        (b"ab", [0, 2], [], [], "0 numbers"),
        ([256], [0, 1], None, None, "buffer ranges"),
    ):
        with pytest.raises(ValueError, match=message):
            RansDecoder(*given_as)

    def test_decode(self) -> None:
        decoder = RansDecoder(b"abcdefgh", [0, 4, 8])
        before = decoder.states.tolist()
        logits = np.zeros((2, 1, 4), np.int16)
        table = np.array([[[0, 100, 256]]] * 2, np.int32)
        for call, message in [
            (lambda: decoder.decode(logits[0], 16), "axes"),
            (lambda: decoder.decode(logits[:1], 16), "streams has 2"),
            (lambda: decoder.decode(logits, 16, [0, 0]), "twice"),
            (lambda: decoder.decode(logits, 16, [0, 2]), r"streams\[1\] is 2"),
            (lambda: decoder.decode(logits, 16, [-1, 1]), r"streams\[0\] is -1"),
            (lambda: decoder.decode(logits.astype(np.float64), 16), "float64"),
            (lambda: decoder.decode(torch.zeros(2, 1, 4).half(), 16), "float16"),
            (lambda: decoder.decode([[[1, 2]]], 16), "numpy"),
            (lambda: decoder.decode(np.zeros((2, 1, 129), np.int16), 8), "twice"),
            (lambda: decoder.decode(np.zeros((2, 1, 1), np.int16), 8), "1 entries"),
            (lambda: decoder.decode_cdf(table + 1, 8), "increase strictly"),
            (lambda: decoder.decode_cdf(table + 1, 8, trusted=True), "increase strictly"),
            (lambda: decoder.decode_cdf(table * 0, 8, trusted=True), "increase strictly"),
            (lambda: decoder.decode_cdf(-table, 8, trusted=True), "increase strictly"),
            (lambda: decoder.decode_cdf(table, 9), "512"),
            (lambda: decoder.decode_cdf(table[..., ::-1], 8), "increase strictly"),
            (lambda: decoder.decode_cdf(table[..., :0], 8), "at least 2"),
            (lambda: decoder.decode_cdf(table[..., :1], 8), "at least 2"),
            (lambda: decoder.decode_cdf(table, 8, threads=-1), "threads is -1"),
            (lambda: decoder.finished([1]), "checks has 1"),
        ]:
            with pytest.raises(ValueError, match=message):
                call()
        assert decoder.states.tolist() == before
        assert decoder.decode_cdf(table, 8).shape == (2, 1)


@pytest.mark.parametrize("asked", ["3", "0", "", "all"])
def test_threads_without_torch_are_those_asked_for_or_the_cores(monkeypatch, asked) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(5), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert default_threads() == {"3": 3, "0": 1}.get(asked, 5)
