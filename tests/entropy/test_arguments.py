"""Arrays, tensors and numbers of any kind either mean what they say or are refused by name."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

from percov2.entropy import (
    IntTransformer,
    RansDecoder,
    RansEncoder,
    StagedDecoder,
    SymbolDecoder,
    SymbolEncoder,
    TokenCoder,
    TransformerConfig,
    decode,
    default_prob_bits,
    encode,
    rans,
    stages,
)
from tools.executors import coder_of, model_on

LOGITS = np.random.default_rng(0).integers(-1500, 0, (2, 5, 16)).astype(np.int16)
SYMBOLS = np.random.default_rng(1).integers(0, 16, (2, 5))
STREAMS = encode(LOGITS, SYMBOLS)
SMALL = TransformerConfig(codebook_size=16, dim=8, heads=2, head_dim=4, layers=1, hidden=8)
TOKENS = np.random.default_rng(2).integers(0, 16, (2, 4, 6), np.int32)


@pytest.fixture(scope="module")
def coder() -> TokenCoder:
    return TokenCoder(IntTransformer.random(SMALL, seed=0))


def same(one: tuple, other: tuple) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def freed(values: object, left: int = 0) -> torch.Tensor:
    """A tensor that claims values beyond its storage, as FSDP and others leave it."""
    tensor = torch.as_tensor(values).clone()
    tensor.untyped_storage().resize_(left)
    return tensor


def traced(values: object) -> torch.Tensor:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return mode.from_tensor(torch.as_tensor(values))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize(
    "hollow",
    [
        freed,
        lambda values: freed(values, 4),
        traced,
        lambda values: torch.as_tensor(values).to("meta"),
        lambda values: torch.as_tensor(values).to_sparse(),
        lambda values: torch.nested.nested_tensor(list(torch.as_tensor(values))),
    ],
    ids=["freed", "partly freed", "fake", "meta", "sparse", "nested"],
)
def test_a_tensor_without_its_values_is_refused_everywhere(hollow, coder) -> None:
    tables = rans.cdf(LOGITS, 16)
    for call in (
        lambda: encode(hollow(LOGITS), SYMBOLS),
        lambda: encode(LOGITS, hollow(SYMBOLS)),
        lambda: decode(STREAMS, hollow(LOGITS)),
        lambda: rans.cdf(hollow(LOGITS), 16),
        lambda: RansDecoder(b"abcd", [0, 2, 4]).decode_cdf(hollow(tables), 16),
        lambda: RansDecoder(b"abcd", [0, 2, 4]).finished(hollow(SYMBOLS)),
        lambda: RansDecoder(hollow(SYMBOLS), [0, 2, 4]),
        lambda: RansEncoder(hollow(SYMBOLS)),
        lambda: coder.intervals(hollow(TOKENS), "qlds8"),
        lambda: coder.choose(hollow(TOKENS[..., None]), np.ones((2, 4, 6, 1), bool), "qlds8"),
    ):
        with pytest.raises(ValueError, match=r"without (dense )?data"):
            call()


def test_a_tensor_inside_a_transform_of_torch_is_refused() -> None:
    def coded(logits: torch.Tensor) -> torch.Tensor:
        with pytest.raises(ValueError, match="without data"):
            encode(logits, SYMBOLS)
        return logits

    torch.vmap(coded)(torch.from_numpy(LOGITS)[None])


def test_negated_and_conjugate_views_are_their_values() -> None:
    plain = torch.from_numpy(LOGITS).float() / 100
    negated = torch._neg_view(plain)
    assert encode(negated, SYMBOLS) == encode(-plain, SYMBOLS) != encode(plain, SYMBOLS)
    assert np.array_equal(decode(encode(-plain, SYMBOLS), negated), SYMBOLS)
    imaginary = torch.complex(torch.zeros(2, 5, 16), plain).conj().imag
    assert encode(imaginary, SYMBOLS) == encode(-plain, SYMBOLS)
    symbols = torch.from_numpy(SYMBOLS)
    assert encode(LOGITS, torch._neg_view(-symbols)) == STREAMS
    tables = torch.from_numpy(rans.cdf(LOGITS, 16))
    decoder = RansDecoder(b"".join(STREAMS), [0, *np.cumsum([len(one) for one in STREAMS])])
    assert np.array_equal(decoder.decode_cdf(torch._neg_view(-tables), 16), SYMBOLS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool])
def test_tensors_of_no_integers_are_refused_as_symbols(dtype) -> None:
    with pytest.raises(ValueError, match=f"symbols has dtype (torch.)?{str(dtype)[6:]}"):
        encode(LOGITS, torch.from_numpy(SYMBOLS).to(dtype))


def test_masked_elements_are_refused(coder) -> None:
    assert encode(np.ma.masked_array(LOGITS), np.ma.masked_array(SYMBOLS)) == STREAMS
    for call in (
        lambda: encode(np.ma.masked_array(LOGITS, LOGITS < -700), SYMBOLS),
        lambda: encode(LOGITS, np.ma.masked_array(SYMBOLS, SYMBOLS > 7)),
        lambda: coder.intervals(np.ma.masked_array(TOKENS, TOKENS > 7), "qlds8"),
    ):
        with pytest.raises(ValueError, match="masked"):
            call()


@pytest.mark.parametrize("dtype", ["u1", "i1", ">i4", ">u2", "<u4", "u8", "i8"])
def test_tokens_may_have_any_dtype_of_integers(dtype, coder) -> None:
    expected = coder.intervals(TOKENS, "qlds8")
    assert same(coder.intervals(TOKENS.astype(dtype), "qlds8"), expected)
    other = coder_of(model_on("torch", SMALL, coder.model.tensors))
    assert same(other.intervals(TOKENS.astype(dtype), "qlds8"), expected)
    allowed = np.ones((2, 4, 6, 1), bool)
    assert np.array_equal(coder.choose(TOKENS.astype(dtype)[..., None], allowed, "qlds8"), TOKENS)
    assert encode(LOGITS, SYMBOLS.astype(dtype)) == STREAMS


def test_tokens_that_are_no_integers_or_too_large_are_refused(coder) -> None:
    for wrong in (TOKENS.astype(np.float64), TOKENS > 3, TOKENS.astype(object)):
        with pytest.raises(ValueError, match="must be integers"):
            coder.intervals(wrong, "qlds8")
    for wrong in (TOKENS.astype(np.int64) + 2**32, np.full((1, 2, 2), 2**63, np.uint64)):
        with pytest.raises(ValueError, match="the codebook has 16 entries"):
            coder.intervals(wrong, "qlds8")


def test_integers_beyond_64_bits_are_out_of_range_and_not_floats() -> None:
    with pytest.raises(ValueError, match="offsets ranges from 0 to 9223372036854775808"):
        RansDecoder(b"ab", [0, 2**63])
    with pytest.raises(ValueError, match=r"symbols ranges from 10+ to"):
        encode(LOGITS, [[10**30] * 5] * 2)


def test_a_stage_map_holds_integers(coder) -> None:
    order = stages("qlds8", 4, 6)
    expected = coder.intervals(TOKENS, "qlds8")
    for good in (order.astype(">i4"), order.astype(np.uint64), order.tolist()):
        assert same(coder.intervals(TOKENS, good), expected)
    for wrong in (order * 1.0, None, b"qlds8", np.ones((4, 6), bool), [["qlds8"]]):
        with pytest.raises(ValueError, match="give a schedule's name or a stage map of integers"):
            coder.intervals(TOKENS, wrong)
        with pytest.raises(ValueError, match="stage map"):
            StagedDecoder(coder.model, wrong, 1)


def test_sides_of_a_grid_are_whole_numbers() -> None:
    assert np.array_equal(stages("qlds8", np.int64(4), np.uint8(6)), stages("qlds8", 4, 6))
    for height, width in ((4.0, 6), (4, "6"), (True, 6), (None, 6)):
        with pytest.raises(ValueError, match="whole number"):
            stages("qlds8", height, width)


# Numbers -----------------------------------------------------------------------------------------

NO_WHOLE_NUMBERS = (16.0, "16", True, np.float64(16), np.array([16]), np.bool_(True), 2**40, 10**30)


@pytest.mark.parametrize("wrong", NO_WHOLE_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["prob_bits", "threads"])
def test_numbers_that_are_not_whole_or_out_of_range_are_refused_by_name(name, wrong) -> None:
    decoder = RansDecoder(b"".join(STREAMS), [0, *np.cumsum([len(one) for one in STREAMS])])
    flat = LOGITS.reshape(10, 16), SYMBOLS.reshape(10)
    for call in (
        lambda **given: encode(LOGITS, SYMBOLS, **given),
        lambda **given: decode(STREAMS, LOGITS, **given),
        lambda **given: SymbolEncoder(2, **given),
        lambda **given: SymbolDecoder(STREAMS, **given),
        lambda **given: rans.intervals(*flat, **{"prob_bits": 16, **given}),
        lambda **given: rans.cdf(LOGITS, **{"prob_bits": 16, **given}),
        lambda **given: decoder.decode(LOGITS, **{"prob_bits": 16, **given}),
        lambda **given: decoder.decode_cdf(rans.cdf(LOGITS, 16), **{"prob_bits": 16, **given}),
        lambda **given: RansEncoder([1]).encode([0], [1], [1], **{"prob_bits": 16, **given}),
    ):
        with pytest.raises(ValueError, match=rf"^{name} is .*a whole number from \d+ to \d+$"):
            call(**{name: wrong})


def test_integers_of_numpy_are_whole_numbers() -> None:
    bits, one = np.uint8(16), np.int64(1)
    assert encode(LOGITS, SYMBOLS, bits, one) == STREAMS
    assert np.array_equal(decode(STREAMS, LOGITS, bits, one), SYMBOLS)
    assert len(SymbolEncoder(np.int16(2), bits, one).finish()) == 2
    assert default_prob_bits(np.int64(256)) == 16
    sizes = {name: np.int64(value) for name, value in SMALL.__dict__.items()}
    assert TransformerConfig(**sizes) == SMALL
    assert all(type(value) is int for value in TransformerConfig(**sizes).__dict__.values())


@pytest.mark.parametrize("wrong", [0, -1, 1.0, "1", None, True, float("inf"), 2**40], ids=repr)
def test_batches_that_are_no_whole_numbers_are_refused(wrong, coder) -> None:
    for call in (
        SymbolEncoder,
        lambda batch: StagedDecoder(coder.model, stages("var", 2, 2), batch),
    ):
        with pytest.raises(ValueError, match=r"^batch is .*a whole number from 1 to"):
            call(wrong)


def test_a_batch_beyond_the_memory_is_named(coder) -> None:
    with pytest.raises(MemoryError, match="batch is 2147483647"):
        StagedDecoder(coder.model, stages("qlds8", 1000, 1000), batch=2**31 - 1)


@pytest.mark.parametrize("wrong", [-1, 2**48, 1.5, True, None], ids=repr)
def test_seeds_of_random_models_are_whole_numbers(wrong) -> None:
    with pytest.raises(ValueError, match=r"^seed is .*a whole number from 0 to"):
        IntTransformer.random(SMALL, wrong)


def test_trusted_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="trusted is 'no'"):
        RansDecoder(b"ab", [0, 2]).decode_cdf(rans.cdf(LOGITS[:1], 16), 16, trusted="no")


@pytest.mark.parametrize(
    ("asked", "found"), [("²", 5), ("9" * 30, 1024), ("9" * 9999, 1024), ("2000", 1024), ("٣", 3)]
)
def test_a_strange_number_of_threads_in_the_environment_is_no_error(monkeypatch, asked, found):
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(5), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert rans.default_threads() == found


# Sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.int16, np.float32, torch.int16])
def test_broadcast_grids_beyond_the_memory_are_refused_at_once(kind) -> None:
    if kind is torch.int16:
        grid = torch.zeros(1, 1, 4, dtype=kind).expand(2, 2**42, 4)
    else:
        grid = np.broadcast_to(kind(0), (2, 2**42, 4))
    for call in (
        lambda: decode(STREAMS, grid),
        lambda: encode(grid, np.broadcast_to(0, (2, 2**42))),
        lambda: rans.intervals(grid, np.broadcast_to(0, (2, 2**42)), 16),
    ):
        with pytest.raises(MemoryError):
            call()


@pytest.mark.parametrize("size", [2**30, 2**40])
def test_a_broadcast_codebook_is_refused_before_it_is_copied(size) -> None:
    for wide in (
        np.broadcast_to(np.int16(0), (1, 1, size)),
        torch.zeros(1, 1, 1, dtype=torch.int16).expand(1, 1, size),
    ):
        for call in (
            lambda wide=wide: encode(wide, [[3]], prob_bits=20),
            lambda wide=wide: decode([b"ab"], wide, prob_bits=20),
            lambda wide=wide: rans.cdf(wide, 20),
        ):
            with pytest.raises(ValueError, match=f"the codebook has {size} entries"):
                call()


# Streams -----------------------------------------------------------------------------------------


def test_streams_are_bytes_of_any_kind_and_of_no_other_element_size() -> None:
    for kind in (bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)):
        assert np.array_equal(decode([kind(data) for data in STREAMS], LOGITS), SYMBOLS)
    wide = np.arange(4, dtype=np.int32)
    for wrong in (wide, memoryview(wide), memoryview(STREAMS[0])[::2], "ab", 1, [b"a"]):
        with pytest.raises(ValueError, match=r"stream 1 .*bytes"):
            SymbolDecoder([STREAMS[0], wrong])
    with pytest.raises(ValueError, match=r"buffer .*bytes"):
        RansDecoder(memoryview(wide), [0, 4])
    for wrong in (None, 5, "ab", {b"ab": 1}, iter([b"ab"]), b"ab"):
        with pytest.raises(ValueError, match="give a list of at least one byte string"):
            SymbolDecoder(wrong)


@pytest.mark.parametrize("wrong", [5, iter([1, 2]), "ab", [1], np.int64(3)])
def test_checks_are_one_number_for_each_stream(wrong) -> None:
    with pytest.raises(ValueError, match="check"):
        encode(LOGITS, SYMBOLS, checks=wrong)


def test_objects_that_only_resemble_arrays_are_refused_as_logits() -> None:
    class Lender:
        shape = LOGITS.shape

        def __dlpack__(self, **options: object) -> object:
            return LOGITS.__dlpack__()

    for wrong in (Lender(), LOGITS.tolist(), memoryview(LOGITS), None):
        with pytest.raises(ValueError, match="give a numpy array or a tensor as logits, not a"):
            encode(wrong, SYMBOLS)
