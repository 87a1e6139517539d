"""Tokens to payload bytes and back, of a frozen model and of uniform ones; golden values."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from percov2.entropy import schedule
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.rans import RansDecoder, RansEncoder
from percov2.entropy.token_coder import TokenCoder
from percov2.entropy.uniform import uniform_model
from tools.executors import FROZEN, coder_of, model_on, same

FINGERPRINT = "31b1e9760d8e6f24faff3d672c253ffc9dbac3cbdae798227705e1b75032cd46"

# SHA-256 of starts, then freqs, int32-LE, in coding order, of `picture(17, 33)`.
GOLDEN_INTERVALS = {
    "qlds12": "63c6eb3242e8dba6a8a67995c088075c5fa38a7de5dca67ec57f789d9050dd11",
    "quincunx": "7d167e3e532b8f9a2e939e8705d571136856d1247485b24b5b7bc2c4df120711",
    "checkerboard": "13c2040d3e5e244ea15b43f5effae4f60497d3bbba6fbfbb7d516416aa1e6c93",
    "var": "bef5fe9eb128984c664b77bbc38e5022f75529d3c2636ca546e9d127baf41815",
    "raster": "da8154bd2d22f216fb938a45d0060579c6d89d6c39450bd078c940815849b5d0",
    "qlds8": "090d324bfee547b2745a992dbaf5bea02eeacd62882f3a1ff615e29fab5adb32",
    "qlds5": "bfbd7602f222125fc770c19d4440061094eed8411ee2038a22b32d2fcd03738f",
}
# Whole payload of `picture(5, 7)`, first state 0x1234.
GOLDEN_PAYLOADS = {
    "qlds12": "135046aec7cc90b8a685bb7a",
    "checkerboard": "050705220c64267f14b2777c52",
    "raster": "7d640231114e972a868ae1",
}


@pytest.fixture(scope="module")
def coder() -> TokenCoder:
    return TokenCoder(IntTransformer.load(FROZEN))


def picture(height: int, width: int) -> torch.Tensor:
    """Smooth tokens 0 ... 15 made of integers only: int32 [1, height, width]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((7 * y - 3 * x).abs() // 4 + y * x // 9).remainder(16).to(torch.int32)[None]


def encode(coder: TokenCoder, tokens: torch.Tensor, name: str, check: int) -> list[bytes]:
    starts, freqs = coder.intervals(tokens, name)
    counts = np.full(len(tokens), starts.shape[1], dtype=np.int64)
    encoder = RansEncoder(np.full(len(tokens), check))
    encoder.encode(starts.reshape(-1), freqs.reshape(-1), counts, coder.prob_bits)
    buffer, offsets = encoder.finish()
    return [buffer[begin:end].tobytes() for begin, end in pairwise(offsets)]


def decoder_of(payloads: list[bytes]) -> RansDecoder:
    offsets = np.cumsum([0] + [len(payload) for payload in payloads])
    return RansDecoder(b"".join(payloads), offsets)


@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_golden_intervals(coder, name):
    starts, freqs = coder.intervals(picture(17, 33), name)
    data = starts.astype("<i4").tobytes() + freqs.astype("<i4").tobytes()
    assert hashlib.sha256(data).hexdigest() == GOLDEN_INTERVALS[name]


@pytest.mark.parametrize("name", sorted(GOLDEN_PAYLOADS))
def test_golden_payloads(coder, name):
    (payload,) = encode(coder, picture(5, 7), name, 0x1234)
    assert payload.hex() == GOLDEN_PAYLOADS[name]
    decoder = decoder_of([bytes.fromhex(GOLDEN_PAYLOADS[name])])
    assert same(coder.decode(decoder, name, 5, 7), picture(5, 7))
    assert decoder.finished([0x1234]).all()


def test_frozen_model_is_unchanged_and_predicts(coder):
    assert coder.model.fingerprint().hex() == FINGERPRINT
    _, freqs = coder.intervals(picture(17, 33), "qlds12")
    assert (coder.prob_bits - np.log2(freqs)).mean() < 3.2  # uniform: 4 bits


@pytest.mark.parametrize("name", schedule.SCHEDULES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (6, 5), (12, 20)])
def test_round_trip_alone_and_in_a_batch(coder, name, shape):
    if name == "raster" and shape == (12, 20):
        shape = (6, 10)
    generator = torch.Generator().manual_seed(shape[1])
    noise = torch.randint(0, 16, (2, *shape), generator=generator).to(torch.int32)
    tokens = torch.cat([noise, picture(*shape)])
    payloads = encode(coder, tokens, name, 777)
    assert payloads == [encode(coder, tokens[i : i + 1], name, 777)[0] for i in range(3)]
    decoder = decoder_of(payloads)
    remaining: list[int] = []
    decoded = coder.decode(decoder, name, *shape, on_stage=remaining.append)
    assert same(decoded, tokens)
    assert decoded.dtype == np.int32
    assert decoder.finished([777, 777, 777]).all()
    sizes = np.bincount(schedule.stages(name, *shape).reshape(-1))[1:]
    assert remaining == list(sizes[::-1].cumsum()[::-1])


def test_logits_in_pieces_give_the_same_intervals_and_tokens(coder, monkeypatch):
    whole = coder.intervals(picture(9, 8), "qlds8")
    monkeypatch.setattr("percov2.entropy.token_coder._LOGITS_AT_ONCE", 16 * 7)
    pieces = coder.intervals(picture(9, 8), "qlds8")
    assert all(np.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))
    decoder = decoder_of(encode(coder, picture(9, 8), "qlds8", 5))
    assert same(coder.decode(decoder, "qlds8", 9, 8), picture(9, 8))
    assert decoder.finished([5]).all()


@pytest.mark.parametrize("sent", [0, 5])
def test_decoding_ends_when_the_caller_says_so(coder, sent):
    decoder = decoder_of([b"\x01\x02"])
    held = np.count_nonzero(schedule.stages("qlds12", 50, 60) <= (sent or 12))

    def refuse(remaining: int) -> None:
        raise ValueError(f"{remaining} tokens cannot be in two bytes")

    with pytest.raises(ValueError, match=f"^{held} tokens"):
        coder.decode(decoder, "qlds12", 50, 60, on_stage=refuse, sent=sent)


def test_lists_of_grids_are_arrays(coder):
    listed = coder.encode([[[1, 2], [3, 4]]], "qlds5", [7]).finish()
    arrays = coder.encode(np.array([[[1, 2], [3, 4]]]), "qlds5", np.array([7])).finish()
    assert listed[0].tobytes() == arrays[0].tobytes()


@pytest.mark.parametrize("executor", ["cpu", "torch"])
def test_no_image_has_no_intervals(coder, executor):
    model = model_on(executor, coder.model.config, coder.model.tensors)
    tokens = torch.zeros(0, 4, 5, dtype=torch.int32)
    starts, freqs = coder_of(model).intervals(tokens, "qlds12")
    assert starts.shape == freqs.shape == (0, 20)


def test_tokens_outside_the_codebook_are_refused(coder):
    with pytest.raises(ValueError, match="codebook has 16"):
        coder.intervals(torch.full((1, 2, 2), 16, dtype=torch.int32), "qlds12")
    with pytest.raises(ValueError, match="unknown schedule"):
        coder.intervals(picture(2, 2), "spiral")
    for grids in ([[1, 2]], picture(2, 2)[0], 7):
        with pytest.raises(ValueError, match=r"they must be \[B, h, w\]"):
            coder.encode(grids, "qlds12", [0])


@pytest.mark.parametrize("bits", range(1, 14))
def test_a_uniform_token_costs_exactly_log2_of_the_codebook(bits: int) -> None:
    coder = TokenCoder(uniform_model(1 << bits))
    tokens = torch.randint(1 << bits, (2, 3, 5), dtype=torch.int32)
    _, freqs = coder.intervals(tokens, "qlds12")
    assert (freqs == 1 << (coder.prob_bits - bits)).all()


@pytest.mark.parametrize("size", [3, 100, 300, 1025])
def test_other_uniform_codebooks_differ_by_one_slot(size: int) -> None:
    coder = TokenCoder(uniform_model(size))
    _, freqs = coder.intervals(torch.arange(size, dtype=torch.int32)[None, None], "qlds5")
    assert freqs.sum() == 1 << coder.prob_bits and freqs.max() - freqs.min() <= 1


@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_uniform_tokens_come_back_and_take_their_bytes(name: str) -> None:
    coder = TokenCoder(uniform_model(256))
    tokens = torch.randint(256, (1, 8, 8), dtype=torch.int32)
    (payload,) = encode(coder, tokens, name, 7)
    assert 64 <= len(payload) <= 67
    assert same(coder.decode(decoder_of([payload]), name, 8, 8), tokens)


def test_a_uniform_model_is_small_and_its_identity_never_changes(tmp_path: Path) -> None:
    uniform_model(256).save(tmp_path)
    fingerprint = IntTransformer.load(tmp_path).fingerprint().hex()
    assert fingerprint.startswith("39118ff62a58af83")  # files depend on these integers
    assert (tmp_path / "model.safetensors").stat().st_size < 12_000


@pytest.mark.parametrize("size", [1, 8193])
def test_impossible_uniform_codebooks_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="codebook_size"):
        uniform_model(size)
