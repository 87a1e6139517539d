"""Streams of a user's model: steps of any size give the same bytes, and damage is noticed."""

from __future__ import annotations

from binascii import crc_hqx

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import independent_coder as reference
from percov2.entropy import SymbolDecoder, SymbolEncoder, decode, encode, rans
from percov2.entropy.torch import cdf

LOGITS = np.random.default_rng(0).integers(-900, 900, (3, 25, 40)).astype(np.int16)
SYMBOLS = np.random.default_rng(1).integers(0, 40, (3, 25))
GOLDEN = ["10290397f529", "08ef4ce5fa666b"]


def pieces(data: st.DataObject, length: int) -> list[slice]:
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6)))
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 12), st.integers(2, 300), st.integers(10, 20), st.data())
def test_any_steps_write_and_read_the_same_streams(batch, count, size, bits, data):
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = random.integers(-2000, 2000, (batch, count, size)).astype(np.int16)
    symbols = random.integers(0, size, (batch, count)).astype(np.int32)
    encoder = SymbolEncoder(batch, bits)
    for part in pieces(data, count):
        encoder.encode(logits[:, part], symbols[:, part])
    streams = encoder.finish()
    assert streams == encode(logits, symbols, bits, threads=2) == encoder.finish()
    for b in range(batch):
        starts, freqs = cdf.intervals(
            torch.from_numpy(logits[b]), torch.from_numpy(symbols[b]), bits
        )
        triples = [(s, f, bits) for s, f in zip(starts.tolist(), freqs.tolist(), strict=True)]
        assert streams[b] == reference.encode(
            crc_hqx(symbols[b].astype("<i4").tobytes(), 0xFFFF), triples
        )
    decoder = SymbolDecoder(streams, bits)
    read = [decoder.decode(logits[:, part]) for part in pieces(data, count)]
    decoder.finish()
    assert np.array_equal(np.concatenate(read, axis=1), symbols)


def test_golden_streams():
    logits = (np.arange(2 * 6 * 17).reshape(2, 6, 17) ** 2 % 1801).astype(np.int16)
    streams = encode(logits, [[0, 16, 3, 3, 9, 1], [5, 5, 5, 5, 5, 5]])
    assert [stream.hex() for stream in streams] == GOLDEN


@pytest.mark.parametrize("bits", [None, 20])
def test_codebooks_may_change_from_step_to_step(bits):
    random = np.random.default_rng(3)
    steps = []
    for size in (2, 3000, 3, 256, 257, 300, 8192):
        logits = random.integers(-999, 999, (2, 3, size)).astype(np.int16)
        steps.append((torch.from_numpy(logits), torch.from_numpy(random.integers(0, size, (2, 3)))))
    encoder = SymbolEncoder(2, bits)
    for step in steps:
        encoder.encode(*step)
    decoder = SymbolDecoder(encoder.finish(), bits)
    for logits, symbols in steps:
        assert np.array_equal(decoder.decode(logits), symbols)
    decoder.finish()


def test_damage_is_noticed():
    streams, missed = encode(LOGITS, SYMBOLS), 0
    for cut in range(len(streams[1])):
        with pytest.raises(ValueError, match="stream 1 of 3"):
            decode([streams[0], streams[1][:cut], streams[2]], LOGITS)
    assert len(streams[1]) > 12
    for bit in range(8 * len(streams[1])):
        broken = bytearray(streams[1])
        broken[bit // 8] ^= 1 << bit % 8
        try:
            decode([streams[0], bytes(broken), streams[2]], LOGITS)
            missed += 1
        except ValueError:
            pass
    assert missed <= 1  # a 16-bit check misses one in 65,536


@pytest.mark.parametrize("count", [0, 7, 24])
def test_symbols_that_were_not_read_are_noticed(count):
    decoder = SymbolDecoder(encode(LOGITS, SYMBOLS))
    decoder.decode(LOGITS[:, :count])
    with pytest.raises(ValueError, match="stream 0 of 3"):
        decoder.finish()


def test_other_bytes_and_other_logits_are_noticed():
    streams, changed = encode(LOGITS, SYMBOLS), LOGITS.copy()
    changed[0, 3, SYMBOLS[0, 3]] += 300
    with pytest.raises(ValueError, match="stream 2 of 3 has bytes left"):
        decode([*streams[:2], streams[2] + b"\0\0"], LOGITS)
    with pytest.raises(ValueError, match="stream 0 of 3"):
        decode(streams, changed)


def test_own_checks_replace_that_of_the_symbols():
    streams = encode(LOGITS, SYMBOLS, checks=[1, 2, 3])
    assert np.array_equal(decode(streams, LOGITS, checks=[1, 2, 3]), SYMBOLS)
    with pytest.raises(ValueError, match="stream 1 of 3"):
        decode(streams, LOGITS, checks=[1, 7, 3])
    for wrong in ([1, 2], [1, 2, 65536]):
        with pytest.raises(ValueError, match="check"):
            encode(LOGITS, SYMBOLS, checks=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_logits_are_coded_as_their_rounding(dtype):
    logits = torch.from_numpy(LOGITS).to(torch.float32).div(300).to(dtype).requires_grad_()
    streams = encode(logits, SYMBOLS)
    assert streams == encode(cdf.round_logits(logits), SYMBOLS)
    assert np.array_equal(decode(streams, logits), SYMBOLS)
    with pytest.raises(ValueError, match="NaN"):
        encode(logits.detach().index_fill(2, torch.tensor([3]), float("nan")), SYMBOLS)


def test_wrong_use_is_refused_and_leaves_no_trace():
    encoder = SymbolEncoder(3)
    encoder.encode(LOGITS, SYMBOLS)
    for logits, symbols in (
        (LOGITS[:2], SYMBOLS[:2]),
        (LOGITS, SYMBOLS[:, :3]),
        (LOGITS, SYMBOLS + 40),
        (LOGITS, SYMBOLS.astype(np.float32)),
        (LOGITS.astype(np.int64), SYMBOLS),
        (LOGITS[0], SYMBOLS),
        (LOGITS.tolist(), SYMBOLS),
    ):
        with pytest.raises(ValueError, match=r"symbol|logits"):
            encoder.encode(logits, symbols)
    assert encoder.finish() == encode(LOGITS, SYMBOLS)
    decoder = SymbolDecoder(encoder.finish())
    for wrong in (LOGITS[:2], LOGITS[0], LOGITS.astype(np.int64)):
        with pytest.raises(ValueError, match=r"streams|logits"):
            decoder.decode(wrong)
    assert np.array_equal(decoder.decode(LOGITS), SYMBOLS)
    decoder.finish()
    with pytest.raises(ValueError, match="batch is 0"):
        SymbolEncoder(0)
    for streams in ([], b"one"):
        with pytest.raises(ValueError, match="list"):
            SymbolDecoder(streams)
    with pytest.raises(ValueError, match="prob_bits is 9"):
        encode(np.zeros((1, 1, 300), np.int16), [[5]], prob_bits=9)


def test_symbols_are_of_the_kind_of_the_logits() -> None:
    streams = encode(torch.from_numpy(LOGITS), torch.from_numpy(SYMBOLS))
    assert streams == encode(LOGITS, SYMBOLS)
    found = decode(streams, torch.from_numpy(LOGITS))
    assert isinstance(found, torch.Tensor) and np.array_equal(found.numpy(), SYMBOLS)
    assert isinstance(decode(streams, LOGITS), np.ndarray)


def test_tensors_without_data_and_foreign_byte_orders():
    """A tensor that is only traced has no memory behind its address."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(1, 2, 8)
    for logits in (fake, torch.zeros(1, 2, 8, device="meta"), torch.zeros(1, 2, 8).to_sparse()):
        with pytest.raises(ValueError, match=r"without (dense )?data"):
            encode(logits, [[0, 0]])
    swapped = LOGITS.astype(LOGITS.dtype.newbyteorder())
    assert encode(swapped, SYMBOLS) == encode(LOGITS, SYMBOLS)
    assert encode(LOGITS, SYMBOLS.astype(">i4")) == encode(LOGITS, SYMBOLS)


@pytest.mark.parametrize("kind", ["row", "stream", "transposed", "tensor"])
def test_broadcast_logits_are_coded_in_parts(kind, monkeypatch):
    """A broadcast row may stand for gigabytes, so it is never copied as a whole."""
    generator = np.random.default_rng(0)
    row = generator.standard_normal(64).astype(np.float32)
    views = {
        "row": np.broadcast_to(row, (3, 100, 64)),
        "stream": np.broadcast_to(generator.standard_normal((100, 64)), (3, 100, 64)),
        "transposed": generator.standard_normal((64, 100, 3)).transpose(2, 1, 0),
        "tensor": torch.from_numpy(row).expand(3, 100, 64),
    }
    logits = views[kind] if kind == "tensor" else views[kind].astype(np.float32, copy=False)
    symbols = generator.integers(0, 64, (3, 100), np.int32)
    whole = np.ascontiguousarray(np.asarray(logits))
    expected = encode(whole, symbols)
    sizes = []
    borrowed = rans._borrowed_logits

    def watched(values):
        sizes.append(values.shape[-2])
        return borrowed(values)

    monkeypatch.setattr(rans, "_MOST_COPIED", 3 * 64 * 4 * 7)
    monkeypatch.setattr(rans, "_borrowed_logits", watched)
    assert encode(logits, symbols) == expected
    assert np.array_equal(np.asarray(decode(expected, logits)), symbols)
    assert max(sizes) <= 7 and min(sizes) == 100 % 7
    decoder = rans.RansDecoder(b"".join(expected), np.cumsum([0, *map(len, expected)]))
    before = decoder.states
    for wrong in (np.nan, np.inf):
        bad = np.broadcast_to(row, (3, 100, 64)).transpose(1, 0, 2).copy().transpose(1, 0, 2)
        bad[2, 99, 5] = wrong
        with pytest.raises(ValueError, match=r"holds NaN or \+inf"):
            decoder.decode(bad, 16)
        assert np.array_equal(decoder.states, before)
