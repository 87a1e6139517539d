"""Interleaved lanes: bytes equal the oracle's, every stream comes back, damage is noticed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference_lanes as reference
from percov2.entropy.lanes import LaneDecoder, LaneEncoder
from percov2.entropy.rans import cdf, intervals

LANES = [1, 2, 3, 4, 7, 8, 16, 63, 64]


def encode(lanes: int, check: int, symbols: list[reference.Interval]) -> bytes:
    """One push per run of equal precision, as long as possible."""
    encoder = LaneEncoder(lanes, check)
    cuts = [0, *(i for i in range(1, len(symbols)) if symbols[i][2] != symbols[i - 1][2])]
    for first, last in reversed(list(pairwise([*cuts, len(symbols)]))):
        part = np.array(symbols[first:last], np.int32).reshape(-1, 3)
        starts, freqs, bits = np.ascontiguousarray(part.T)
        encoder.push(starts, freqs, int(bits[0]) if part.size else 8)
    return encoder.finish().tobytes()


def table(symbol: reference.Interval) -> list[int]:
    start, freq, prob_bits = symbol
    return sorted({0, start, start + freq, 1 << prob_bits})


GOLDEN = [
    # lanes, check, (start, freq, prob_bits) in decoding order, stream
    (1, 0, [], "00800000"),
    (3, 0xABCD, [], "00800000008000000080abcd"),
    (1, 0xABCD, [(0, 1024, 12), (3072, 512, 12), (100, 1, 12), (2048, 2048, 12)], "0202b1b064cd"),
    (
        2,
        0xABCD,
        [(0, 1024, 12), (3072, 512, 12), (100, 1, 12), (2048, 2048, 12)],
        "20000064080addcd00",
    ),
    (2, 7, [(0, 1, 20)] * 3, "008000000800000000000000000007"),
    (
        4,
        0xFFFF,
        [(i * 97 % 4000, 1 + i % 96, 12) for i in range(14)],
        "3800100013a6806208dd00c40555012587ea48ab0c6bd43394f8000000ff",
    ),
    (
        3,
        0x5A5A,
        [(255, 1, 8), (0, 1, 16), (65535, 1, 16), ((1 << 20) - 1, 1, 20)] * 3,
        "080fffff080f0000080fffffffffff0000ffffffffff0000ffffff000000005a5a",
    ),
    (5, 9, [(0, 1 << 8, 8)] * 7, "0080000000800009008000000080000000800000"),
]


@pytest.mark.parametrize(("lanes", "check", "symbols", "stream"), GOLDEN)
def test_golden_streams(
    lanes: int, check: int, symbols: list[reference.Interval], stream: str
) -> None:
    assert reference.encode(lanes, check, symbols).hex() == stream
    assert encode(lanes, check, symbols).hex() == stream


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, int, list[reference.Interval]]:
    """Lanes, check, and symbols with a few changes of precision."""
    symbols = []
    for _ in range(draw(st.integers(0, 4))):
        prob_bits = draw(st.integers(8, 20))
        edge = (1 << prob_bits) - 1
        start = st.one_of(st.sampled_from([0, edge]), st.integers(0, edge))
        pair = start.flatmap(
            lambda s, m=edge: st.tuples(
                st.just(s), st.one_of(st.sampled_from([1, m + 1 - s]), st.integers(1, m + 1 - s))
            )
        )
        symbols += [(s, f, prob_bits) for s, f in draw(st.lists(pair, max_size=40))]
    return draw(st.integers(1, 64)), draw(st.integers(0, 0xFFFF)), symbols


@settings(max_examples=150, deadline=None)
@given(streams())
def test_streams_equal_the_oracle_and_come_back(
    stream: tuple[int, int, list[reference.Interval]],
) -> None:
    lanes, check, symbols = stream
    data = encode(lanes, check, symbols)
    assert data == reference.encode(lanes, check, symbols)
    slow, fast = reference.Decoder(data, lanes), LaneDecoder(data, lanes)
    for symbol in symbols:
        bounds = table(symbol)
        index = bounds.index(symbol[0])
        assert slow.decode(bounds, symbol[2]) == index
        assert fast.decode_cdf(np.array([bounds], np.int32), symbol[2]).tolist() == [index]
        assert fast.finished(check) == slow.finished(check)
    assert slow.finished(check)
    assert fast.finished(check)
    assert not fast.finished(check ^ 1)


def random_logits(seed: int, shape: tuple[int, ...], spread: float = 500) -> np.ndarray:
    wide = np.rint(np.random.default_rng(seed).standard_normal(shape) * spread)
    return np.clip(wide, -32768, 32767).astype(np.int16)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_logits_come_back_in_any_pieces(data: st.DataObject) -> None:
    prob_bits = data.draw(st.integers(8, 20))
    size = data.draw(st.integers(2, min(600, 1 << (prob_bits - 1))))
    count = data.draw(st.integers(0, 80))
    lanes = data.draw(st.sampled_from(LANES))
    seed = data.draw(st.integers(0, 2**31))
    logits = random_logits(seed, (count, size), data.draw(st.sampled_from([0, 300, 9000])))
    symbols = np.random.default_rng(seed).integers(0, size, count).astype(np.int32)
    starts, freqs = intervals(logits, symbols, prob_bits)
    whole, parts = LaneEncoder(lanes, 5), LaneEncoder(lanes, 5)
    whole.push(starts, freqs, prob_bits)
    cut = data.draw(st.integers(0, count))
    parts.push(starts[cut:], freqs[cut:], prob_bits)
    parts.push(starts[:cut], freqs[:cut], prob_bits)
    stream = whole.finish()
    assert stream.tobytes() == parts.finish().tobytes()
    assert stream.dtype == np.uint8
    by_logits, by_table = LaneDecoder(stream, lanes), LaneDecoder(stream.tobytes(), lanes)
    head = by_logits.decode_logits(torch.from_numpy(logits[:cut]), prob_bits)
    tail = by_logits.decode_logits(logits[cut:], prob_bits)
    assert np.array_equal(np.concatenate([head, tail]), symbols)
    assert by_logits.finished(5)
    assert np.array_equal(by_table.decode_cdf(cdf(logits, prob_bits), prob_bits), symbols)
    assert by_table.finished(5)


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_damage_is_noticed_and_harmless(lanes: int) -> None:
    """Every truncation and bit flip, bytes added, noise: refused at once or not finished."""
    logits = random_logits(21, (90, 64))
    bounds = cdf(logits, 16).tolist()
    targets = np.random.default_rng(20).integers(0, 1 << 16, 90)
    symbols = np.array(
        [np.searchsorted(b, t, "right") - 1 for b, t in zip(bounds, targets, strict=True)]
    )
    starts, freqs = intervals(logits, symbols, 16)
    encoder = LaneEncoder(lanes, 0xBEEF)
    encoder.push(starts, freqs, 16)
    data = encoder.finish().tobytes()
    generator = np.random.default_rng(22)
    damaged = [data[:cut] for cut in range(len(data))] + [data[cut:] for cut in range(1, 9)]
    damaged += [data + b"\0", data + data, b"\0" + data]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    damaged += [generator.bytes(int(n)) for n in generator.integers(0, 120, 500)]
    accepted = 0
    for stream in damaged:
        try:
            slow = reference.Decoder(stream, lanes)
        except ValueError:
            with pytest.raises(ValueError, match=r"bytes; the states of|begins with state"):
                LaneDecoder(stream, lanes)
            continue
        fast = LaneDecoder(stream, lanes)
        expected = [slow.decode(row, 16) for row in bounds]
        assert fast.decode_logits(logits, 16).tolist() == expected
        assert fast.finished(0xBEEF) == slow.finished(0xBEEF)
        accepted += fast.finished(0xBEEF)
        fast.decode_logits(logits, 16)  # far beyond the end
        assert not fast.finished(0xBEEF)
    # Each of the lanes has to hit one of 2^31 states, so not one of 2,500 tries should.
    assert accepted == 0


def test_a_missing_zero_byte_is_missed() -> None:
    """A zero is read in its place, so all states come out right; the stream is cut all the same."""
    symbols = [(0, 1024, 12), (3072, 512, 12), (100, 1, 12), (2048, 2048, 12)]
    whole = encode(2, 0xABCD, symbols)
    assert whole[-1] == 0
    for data, finished in ((whole, True), (whole[:-1], False)):
        slow, fast = reference.Decoder(data, 2), LaneDecoder(data, 2)
        for symbol in symbols:
            index = table(symbol).index(symbol[0])
            assert slow.decode(table(symbol), 12) == index
            assert fast.decode_cdf(np.array([table(symbol)], np.int32), 12).tolist() == [index]
        assert slow.finished(0xABCD) == finished
        assert fast.finished(0xABCD) == finished


def test_one_bad_table_among_many_decodes_nothing() -> None:
    tables = cdf(random_logits(3, (50, 16)), 12)
    symbols = np.arange(50, dtype=np.int32) % 16
    starts = np.take_along_axis(tables, symbols[:, None], 1)[:, 0]
    freqs = np.take_along_axis(tables, symbols[:, None] + 1, 1)[:, 0] - starts
    encoder = LaneEncoder(3, 1)
    encoder.push(starts, freqs, 12)
    decoder = LaneDecoder(encoder.finish(), 3)
    bad = tables.copy()
    bad[40, 7] = bad[40, 8]
    with pytest.raises(ValueError, match="cdf row 40"):
        decoder.decode_cdf(bad, 12)
    assert np.array_equal(decoder.decode_cdf(tables, 12), symbols)
    assert decoder.finished(1)


@pytest.mark.parametrize(("lanes", "share"), [(1, 0.00002), (4, 0.00005), (16, 0.0001)])
def test_a_long_stream_costs_its_entropy(lanes: int, share: float) -> None:
    """A million symbols, really decoded: at most 0.01 % above the ideal with 16 lanes."""
    count, size, bits = 1 << 20, 64, 16
    row = cdf(random_logits(8, (1, size)), bits)
    targets = np.random.default_rng(9).integers(0, 1 << bits, count)
    symbols = (np.searchsorted(row[0], targets, "right") - 1).astype(np.int32)
    starts, freqs = row[0][symbols], np.diff(row[0])[symbols]
    encoder = LaneEncoder(lanes, 0x1234)
    encoder.push(starts, freqs, bits)
    stream = encoder.finish()
    ideal = -np.log2(freqs / 2.0**bits).sum() / 8
    assert 0 < len(stream) - ideal < share * ideal
    decoder = LaneDecoder(stream, lanes)
    tables = np.repeat(row, 4096, axis=0)
    for first in range(0, count, 4096):
        got = decoder.decode_cdf(tables, bits)
        assert np.array_equal(got, symbols[first : first + 4096])
    assert decoder.finished(0x1234)


@pytest.mark.parametrize("lanes", [1, 8, 64])
def test_a_lane_costs_four_bytes_at_most(lanes: int) -> None:
    """The average over many short streams, beyond the entropy of their symbols."""
    above = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        freqs = generator.integers(1, 3000, 256).astype(np.int32)
        encoder = LaneEncoder(lanes, int(generator.integers(65536)))
        encoder.push(generator.integers(0, 60000, 256).astype(np.int32), freqs, 16)
        above.append(len(encoder.finish()) + np.log2(freqs / 65536).sum() / 8)
    assert 3 * lanes < np.mean(above) < 4 * lanes


class TestRefusals:
    """Every wrong argument is a ValueError that names the value, and nothing has happened."""

    @pytest.mark.parametrize(("lanes", "check"), [(0, 0), (-1, 0), (65, 0), (1, -1), (1, 65536)])
    def test_encoder(self, lanes: int, check: int) -> None:
        with pytest.raises(ValueError, match=f"lanes is {lanes}|check {check}"):
            LaneEncoder(lanes, check)

    def test_push(self) -> None:
        encoder = LaneEncoder(2, 300)
        one = np.ones(1, np.int32)
        for starts, freqs, bits, message in [
            (one, 0 * one, 8, "freq 0"),
            (-one, one, 8, "start -1"),
            (250 * one, 7 * one, 8, "start 250"),
            (one, one, 7, "prob_bits is 7"),
            (one, one, 21, "prob_bits is 21"),
            (one, np.ones(2, np.int32), 8, "freqs has 2"),
            (one[None], one, 8, "starts has 2 axes"),
            (one.astype(np.int64), one, 8, "starts has element type 'l'"),
            (np.ones(4, np.int32)[::2], np.ones(2, np.int32), 8, "starts is not C-contiguous"),
        ]:
            with pytest.raises(ValueError, match=message):
                encoder.push(starts, freqs, bits)
        assert encoder.finish().tobytes().hex() == "00800000" + "0080012c"

    def test_decoder(self) -> None:
        stream = LaneEncoder(2, 300).finish()
        for data, lanes, message in [
            (stream, 0, "lanes is 0"),
            (stream, 65, "lanes is 65"),
            (stream, 3, "8 bytes; the states of 3 lanes alone take 12"),
            (b"", 1, "0 bytes"),
            (b"\x00\x7f\xff\xff", 1, "lane 0 begins with state 8388607"),
            (b"\x00\x80\x00\x00\x80\x00\x00\x00", 2, "lane 1 begins with state 2147483648"),
            (stream.astype(np.int16), 2, "stream has element type 'h'"),
        ]:
            with pytest.raises(ValueError, match=message):
                LaneDecoder(data, lanes)
        decoder = LaneDecoder(stream, 2)
        good = np.array([[0, 100, 256]], np.int32)
        for call, message in [
            (lambda: decoder.decode_logits(np.zeros((1, 1), np.int16), 8), "1 entries"),
            (lambda: decoder.decode_logits(np.zeros((1, 200), np.int16), 8), "200 entries"),
            (lambda: decoder.decode_logits(np.zeros((1, 1, 4), np.int16), 8), "3 axes"),
            (lambda: decoder.decode_logits(np.zeros((1, 4), np.int32), 8), "int16"),
            (lambda: decoder.decode_cdf(good + 1, 8), "increase strictly"),
            (lambda: decoder.decode_cdf(good, 9), "512"),
            (lambda: decoder.decode_cdf(good, 21), "prob_bits is 21"),
            (lambda: decoder.decode_cdf(np.zeros((1, 0), np.int32), 8), "at least 2"),
            (lambda: decoder.decode_cdf(np.zeros((1, 1), np.int32), 8), "at least 2"),
            (lambda: decoder.finished(65536), "check 65536"),
        ]:
            with pytest.raises(ValueError, match=message):
                call()
        assert decoder.finished(300)
        assert decoder.decode_cdf(np.repeat(good, 3, axis=0), 8).shape == (3,)
