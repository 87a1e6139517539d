"""The coder: bytes equal the oracle's, every stream comes back, hostile streams do no harm."""

from __future__ import annotations

import math
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import independent_coder as reference
from percov2.entropy.cdf import default_prob_bits
from percov2.entropy.rans import RansDecoder, RansEncoder, cdf, default_threads, intervals


def random_logits(seed: int, shape: tuple[int, ...], spread: float = 500) -> np.ndarray:
    wide = np.rint(np.random.default_rng(seed).standard_normal(shape) * spread)
    return np.clip(wide, -32768, 32767).astype(np.int16)


def sample(seed: int, bounds: np.ndarray) -> np.ndarray:
    """Symbols drawn with the probabilities of the tables int32 [..., V + 1]."""
    targets = np.random.default_rng(seed).integers(0, bounds[..., -1])
    return (bounds[..., 1:] <= targets[..., None]).sum(-1).astype(np.int32)


def encode_rows(logits: np.ndarray, symbols: np.ndarray, checks: list[int], bits: int) -> bytes:
    encoder = RansEncoder(checks)
    starts, freqs = intervals(logits, symbols, bits)
    encoder.push(starts.ravel(), freqs.ravel(), [symbols.shape[1]] * len(checks), bits)
    buffer, _ = encoder.finish()
    return buffer.tobytes()


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
        encoder.push([start], [freq], [1], prob_bits)
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


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, list[list[tuple[int, int]]]]]]:
    """Checks, and pushes in the order of pushing: (prob_bits, per stream (start, freq))."""
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


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(1, 3))
def test_mixed_ragged_pushes_equal_the_oracle(
    batch: tuple[list[int], list[tuple[int, list[list[tuple[int, int]]]]]], threads: int
) -> None:
    checks, pushes = batch
    encoder = RansEncoder(checks)
    for prob_bits, rows in pushes:
        flat = [pair for row in rows for pair in row]
        encoder.push(
            np.array([s for s, _ in flat], np.int32),
            np.array([f for _, f in flat], np.int32),
            [len(row) for row in rows],
            prob_bits,
            threads,
        )
    buffer, offsets = encoder.finish()
    quiet = encoder.symbols_before_output
    assert offsets.dtype == np.int64
    assert buffer.dtype == np.uint8
    for stream, data in enumerate(reference.split(buffer, offsets.tolist())):
        symbols = [(s, f, bits) for bits, rows in reversed(pushes) for s, f in rows[stream]]
        assert data == reference.encode(checks[stream], symbols)
        # Read it again, one symbol at a time, comparing states with the oracle.
        slow = reference.Coder(data)
        fast = RansDecoder(data, [0, len(data)])
        met_exhausted = 0
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
        assert quiet[stream] == met_exhausted


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_logits_come_back(data: st.DataObject) -> None:
    prob_bits = data.draw(st.integers(8, 20))
    size = data.draw(st.integers(2, min(600, 1 << (prob_bits - 1))))
    rows, count = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 20))
    seed = data.draw(st.integers(0, 2**31))
    logits = random_logits(seed, (rows, count, size), data.draw(st.sampled_from([0, 300, 9000])))
    symbols = np.random.default_rng(seed).integers(0, size, (rows, count)).astype(np.int32)
    checks = np.random.default_rng(seed).integers(0, 65536, rows).astype(np.uint16)
    starts, freqs = intervals(logits, symbols, prob_bits)
    encoder = RansEncoder(checks)
    encoder.push(starts.ravel(), freqs.ravel(), [count] * rows, prob_bits)
    buffer, offsets = encoder.finish()
    threads = data.draw(st.integers(1, 3))
    by_logits = RansDecoder(buffer, offsets)
    assert np.array_equal(by_logits.decode_logits(logits, prob_bits, threads=threads), symbols)
    assert by_logits.finished(checks).all()
    by_table = RansDecoder(buffer, offsets)
    table = cdf(logits, prob_bits)
    assert np.array_equal(by_table.decode_cdf(table, prob_bits, threads=threads), symbols)
    assert by_table.finished(checks).all()
    # Resumed anywhere, from nothing but states and positions.
    cut = data.draw(st.integers(0, count))
    first = RansDecoder(buffer, offsets)
    head = first.decode_logits(torch.from_numpy(logits[:, :cut].copy()), prob_bits)
    second = RansDecoder(buffer, offsets, first.states, first.positions)
    tail = second.decode_logits(logits[:, cut:], prob_bits)
    assert np.array_equal(np.concatenate([head, tail], axis=1), symbols)
    assert second.finished(checks).all()


@pytest.mark.parametrize("size", [2, 1025, 8192])
def test_large_codebooks(size: int) -> None:
    bits = default_prob_bits(size)
    logits = random_logits(size, (2, 9, size))
    logits[0, 0] = -32768
    logits[0, 0, -1] = 32767
    symbols = sample(1, cdf(logits, bits))
    symbols[0, 0], symbols[1, 0] = size - 1, 0
    data = encode_rows(logits[:1], symbols[:1], [77], bits)
    decoder = RansDecoder(data, [0, len(data)])
    assert np.array_equal(decoder.decode_logits(logits[:1], bits), symbols[:1])
    assert decoder.finished([77]).all()
    slow = reference.Coder(data)
    for row, symbol in zip(cdf(logits, bits)[0].tolist(), symbols[0].tolist(), strict=True):
        assert slow.symbol(row, bits) == symbol


def test_streams_choose_rows() -> None:
    logits = random_logits(4, (3, 5, 16))
    symbols = sample(4, cdf(logits, 12))
    encoder = RansEncoder([1, 2, 3])
    starts, freqs = intervals(logits, symbols, 12)
    encoder.push(starts.ravel(), freqs.ravel(), [5] * 3, 12)
    decoder = RansDecoder(*encoder.finish())
    assert np.array_equal(decoder.decode_logits(logits[[2, 0]], 12, [2, 0]), symbols[[2, 0]])
    assert decoder.finished([1, 2, 3]).tolist() == [True, False, True]
    assert np.array_equal(decoder.decode_logits(logits[[1]], 12, [1]), symbols[[1]])
    assert decoder.finished([1, 2, 3]).all()


def test_batch_and_threads_change_no_byte() -> None:
    logits = random_logits(9, (5, 40, 64))
    symbols = sample(9, cdf(logits, 16))
    starts, freqs = intervals(logits, symbols, 16)
    checks = [5, 4, 3, 2, 1]
    alone = b"".join(
        encode_rows(logits[i : i + 1], symbols[i : i + 1], [checks[i]], 16) for i in range(5)
    )
    for threads in (1, 2, 3, 16):
        encoder = RansEncoder(checks)
        encoder.push(starts.ravel(), freqs.ravel(), [40] * 5, 16, threads)
        assert encoder.finish()[0].tobytes() == alone


@pytest.mark.parametrize(("size", "tokens"), [(64, 64), (256, 256), (1024, 1024)])
def test_overhead_is_below_half_a_byte(size: int, tokens: int) -> None:
    bits = default_prob_bits(size)
    streams = 96
    shared = random_logits(size, (tokens, size))
    bounds = np.broadcast_to(cdf(shared, bits), (streams, tokens, size + 1))
    targets = np.random.default_rng(2).integers(0, 1 << bits, (streams, tokens))
    symbols = np.stack(
        [np.searchsorted(bounds[0, t], targets[:, t], side="right") - 1 for t in range(tokens)], 1
    ).astype(np.int32)
    starts = np.take_along_axis(bounds, symbols[..., None], -1)[..., 0]
    freqs = np.take_along_axis(bounds, symbols[..., None] + 1, -1)[..., 0] - starts
    checks = np.random.default_rng(3).integers(0, 65536, streams)
    encoder = RansEncoder(checks)
    encoder.push(starts.ravel(), freqs.ravel(), [tokens] * streams, bits)
    _, offsets = encoder.finish()
    ideal = -np.log2(freqs / 2.0**bits).sum(-1) / 8
    overhead = (np.diff(offsets) - 2 - ideal).mean()
    assert overhead <= 0.5
    assert overhead > -0.5  # less than the entropy would mean that the sum is wrong


def test_finish_may_be_followed_by_more() -> None:
    encoder = RansEncoder([9])
    encoder.push([3], [5], [1], 8)
    first = encoder.finish()[0].tobytes()
    assert encoder.finish()[0].tobytes() == first
    encoder.push([0], [1], [1], 20)
    assert encoder.finish()[0].tobytes() == reference.encode(9, [(0, 1, 20), (3, 5, 8)])


def test_damage_is_noticed_and_harmless() -> None:
    """Truncations, bit flips and noise: never a crash, accepted about once in 2^16."""
    logits = random_logits(21, (1, 60, 64))
    symbols = sample(21, cdf(logits, 16))
    data = encode_rows(logits, symbols, [0xBEEF], 16)
    generator = np.random.default_rng(22)
    damaged = [data[:cut] for cut in range(len(data))]
    damaged += [data[cut:] for cut in range(1, len(data) + 1)]
    damaged += [b"\0" + data, data + b"\0"]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    damaged += [generator.bytes(int(n)) for n in generator.integers(0, 90, 6000)]
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in damaged])])
    decoder = RansDecoder(b"".join(damaged), offsets)
    got = decoder.decode_logits(np.broadcast_to(logits, (len(damaged), 60, 64)), 16)
    assert got.min() >= 0
    assert got.max() < 64
    assert (decoder.states < 1 << 31).all()
    # About 7,000 tries at 2^-16: five or more acceptances would be a fault, not luck.
    assert decoder.finished([0xBEEF] * len(damaged)).sum() < 5
    # No undamaged stream is refused, and reading on beyond the end stays harmless.
    good = RansDecoder(data, [0, len(data)])
    good.decode_logits(logits, 16)
    assert good.finished([0xBEEF]).all()
    for _ in range(20):
        good.decode_logits(logits, 16)
    assert good.exhausted.all()


def test_acceptance_probability_is_two_to_the_minus_sixteen() -> None:
    """Every check value is taken by the final state of noise about equally often."""
    generator = np.random.default_rng(5)
    count = 60000
    lengths = np.full(count, 12)
    decoder = RansDecoder(generator.bytes(12 * count), np.concatenate([[0], np.cumsum(lengths)]))
    logits = random_logits(6, (1, 9, 32), 100)
    decoder.decode_logits(np.broadcast_to(logits, (count, 9, 32)), 16)
    accepted = sum(int(decoder.finished(np.full(count, check)).sum()) for check in range(400, 465))
    # 65 checks * 60000 tries / 65536 = 60 if all bytes were always used up; never much more.
    assert accepted < 2 * 65 * count / 65536 + 10 * math.sqrt(60)


class TestRefusals:
    """Every wrong argument is a ValueError that names the value, and nothing has happened."""

    @pytest.mark.parametrize(
        ("starts", "freqs", "counts", "bits", "message"),
        [
            ([0], [0], [1], 8, "freq 0"),
            ([-1], [1], [1], 8, "start -1"),
            ([250], [7], [1], 8, "start 250"),
            ([0], [-5], [1], 8, "freq -5"),
            ([2**31 - 1], [2**31 - 1], [1], 20, "2147483647"),
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
        ],
    )
    def test_push(self, starts: list, freqs: list, counts: list, bits: int, message: str) -> None:
        encoder = RansEncoder([300])
        with pytest.raises(ValueError, match=message):
            encoder.push(starts, freqs, counts, bits)
        assert encoder.finish()[0].tobytes() == b"\x01\x2c"

    def test_encoder(self) -> None:
        for checks in ([65536], [-1], [2**40], [1.5]):
            with pytest.raises(ValueError, match="check"):
                RansEncoder(checks)
        with pytest.raises(ValueError, match="threads is 0"):
            RansEncoder([1]).push([], [], [0], 8, 0)

    @pytest.mark.parametrize(
        ("buffer", "offsets", "states", "positions", "message"),
        [
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
        ],
    )
    def test_decoder(
        self, buffer: bytes, offsets: list, states: list, positions: list, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            RansDecoder(buffer, offsets, states, positions)

    def test_decode(self) -> None:
        decoder = RansDecoder(b"abcdefgh", [0, 4, 8])
        before = decoder.states.tolist()
        logits = np.zeros((2, 1, 4), np.int16)
        table = np.array([[[0, 100, 256]]] * 2, np.int32)
        for call, message in [
            (lambda: decoder.decode_logits(logits[0], 16), "axes"),
            (lambda: decoder.decode_logits(logits[:1], 16), "streams has 2"),
            (lambda: decoder.decode_logits(logits, 16, [0, 0]), "twice"),
            (lambda: decoder.decode_logits(logits, 16, [0, 2]), r"streams\[1\] is 2"),
            (lambda: decoder.decode_logits(logits, 16, [-1, 1]), r"streams\[0\] is -1"),
            (lambda: decoder.decode_logits(logits.astype(np.float64), 16), "float64"),
            (lambda: decoder.decode_logits(torch.zeros(2, 1, 4).half(), 16), "float16"),
            (lambda: decoder.decode_logits([[[1, 2]]], 16), "numpy"),
            (lambda: decoder.decode_logits(np.zeros((2, 1, 129), np.int16), 8), "twice"),
            (lambda: decoder.decode_logits(np.zeros((2, 1, 1), np.int16), 8), "1 entries"),
            (lambda: decoder.decode_cdf(table + 1, 8), "increase strictly"),
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
