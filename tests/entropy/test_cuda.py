"""Streams that CUDA kernels write and read: the bytes and tokens of the CPU's coder.

Tests of ``device`` run twice: with kernels emulated on the CPU, from tests/native, and on a card.
"""

from __future__ import annotations

import ctypes
import warnings
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from percov2.container import bitstream, tokens_file
from percov2.container.bitstream import BitstreamError, Header
from percov2.container.tokens_file import OpenFile, Tokens
from percov2.entropy import rans, schedule
from percov2.entropy import token_coder as compiled
from percov2.entropy.int_transformer import IntTransformer as CompiledTransformer
from percov2.entropy.torch import cdf, rans_cuda, token_coder
from percov2.entropy.torch.coder_proof import prove_coder
from percov2.entropy.torch.int_transformer import IntTransformer
from percov2.entropy.torch.token_coder import TokenCoder, default_coder
from percov2.entropy.transformer_config import TransformerConfig
from test_codec import certain_model
from tools.emulated_cuda import module, use
from tools.executors import FROZEN, same
from tools.pretended_device import DEVICE, Held, PretendedDevice

prove = prove_coder.__wrapped__


# Streams -----------------------------------------------------------------------------------------


def random_intervals(
    rng: np.random.Generator, shape: tuple[int, int], prob_bits: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    top = 1 << prob_bits
    freqs = rng.integers(1, rng.integers(2, top + 1, shape), dtype=np.int32)
    return rng.integers(0, top - freqs + 1, dtype=np.int32), freqs


def on(device: torch.device, array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def host_streams(
    starts: NDArray[np.int32],
    freqs: NDArray[np.int32],
    checks: NDArray[np.int32],
    prob_bits: int,
    counts: NDArray[np.int32] | None = None,
) -> rans.RansEncoder:
    encoder = rans.RansEncoder(checks)
    size, symbols = starts.shape
    kept = np.full(size, symbols) if counts is None else counts
    mask = np.arange(symbols) < kept[:, None]
    encoder.encode(starts[mask], freqs[mask], kept, prob_bits)
    return encoder


@pytest.mark.parametrize(
    ("size", "symbols", "prob_bits"),
    [(0, 5, 8), (1, 0, 8), (1, 1, 20), (3, 33, 12), (5, 100, 16), (2, 70, 20)],
)
def test_streams_are_those_of_the_cpu_and_the_host_goes_on(
    device: torch.device, size: int, symbols: int, prob_bits: int
) -> None:
    rng = np.random.default_rng(size * 100 + symbols)
    starts, freqs = random_intervals(rng, (size, symbols), prob_bits)
    starts[3:4], freqs[3:4] = 0, 1 << prob_bits  # cost nothing: the state never leaves the check
    checks = rng.integers(0, 65536, size, dtype=np.int32)
    on_top = random_intervals(rng, (size, 9), 12)
    for counts in (None, rng.integers(0, symbols + 1, size, dtype=np.int32)):
        given = [on(device, array) for array in (starts, freqs, checks)]
        lengths = None if counts is None else on(device, counts)
        buffer, offsets, quiet = rans_cuda.encode(*given, prob_bits, lengths).to_host()
        expected = host_streams(starts, freqs, checks, prob_bits, counts)
        assert buffer.tobytes() == expected.finish()[0].tobytes()
        assert offsets.tolist() == expected.finish()[1].tolist()
        assert quiet.tolist() == expected.symbols_before_output.tolist()
        # Tokens on the device, then caption and header on the host.
        resumed = rans.RansEncoder.resumed(buffer, offsets, quiet)
        for encoder in (resumed, expected):
            encoder.encode(on_top[0].ravel(), on_top[1].ravel(), [9] * size, 12)
        assert resumed.symbols_before_output.tolist() == expected.symbols_before_output.tolist()
        for got, wanted in zip(resumed.finish(), expected.finish(), strict=True):
            assert got.tolist() == wanted.tolist()


def test_streams_longer_than_the_first_copy(device: torch.device) -> None:
    """Symbols of probability 2^-16: 2 bytes each."""
    starts = np.arange(40, dtype=np.int32).reshape(2, 20)
    given = starts, np.ones_like(starts), np.array([1, 2], dtype=np.int32)
    encoded = rans_cuda.encode(*(on(device, array) for array in given), 16)
    buffer, offsets, _ = encoded.to_host()
    assert offsets[-1] > encoded.likely
    assert buffer.tobytes() == host_streams(*given, 16).finish()[0].tobytes()


def test_wrong_arguments_of_an_encoding_are_refused(device: torch.device) -> None:
    numbers = torch.zeros(2, 5, dtype=torch.int32, device=device)
    good = {"starts": numbers, "freqs": numbers + 1, "checks": numbers[:, 0].contiguous()}
    good["counts"] = good["checks"] + 5

    def spoilt(name: str, value: int) -> dict[str, torch.Tensor]:
        changed = good[name].clone()
        changed[1, ...] = value
        return {name: changed}

    for change, message in (
        ({"starts": numbers[0]}, r"it must be \[B, n\]"),
        ({"freqs": good["freqs"][:, :4]}, r"freqs is torch.int32 \(2, 4\)"),
        ({"freqs": good["freqs"].long()}, "freqs is torch.int64"),
        ({"prob_bits": 7}, "prob_bits is 7"),
        ({"prob_bits": 21}, "prob_bits is 21"),
        ({"starts": numbers.to("meta")}, "starts is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            rans_cuda.encode(**{"prob_bits": 8, **good, **change})
    # What the device finds wrong is told with the streams.
    for name, value, message in (
        ("freqs", 0, "stream 1: an interval is empty"),
        ("starts", -1, "stream 1: an interval is empty"),
        ("checks", 65536, "stream 1: its check exceeds"),
        ("counts", 6, "stream 1: its count"),
    ):
        encoded = rans_cuda.encode(prob_bits=8, **{**good, **spoilt(name, value)})
        with pytest.raises(ValueError, match=message):
            encoded.to_host()


@pytest.mark.parametrize("codebook", [2, 100, 256, 1000, 1024, 3000, 8192])
def test_symbols_are_those_of_the_cpu(device: torch.device, codebook: int) -> None:
    rng = np.random.default_rng(codebook)
    size, stages = 3, (1, 0, 4, 2)
    prob_bits = 20 if codebook > 1024 else 18
    logits = rng.normal(0, 700, (size, sum(stages), codebook)).astype(np.int16)
    symbols = rng.integers(0, codebook, (size, sum(stages)), dtype=np.int32)
    starts, freqs = rans.intervals(logits, symbols, prob_bits)
    checks = np.array([0, 7, 65535], np.int32)
    encoder = host_streams(starts, freqs, checks, prob_bits)
    buffer, offsets = encoder.finish()
    decoder = rans_cuda.CudaRansDecoder(torch.from_numpy(buffer), torch.from_numpy(offsets), device)
    reference = rans.RansDecoder(buffer, offsets)
    assert decoder.states.tolist() == reference.states.tolist()
    begin = 0
    for count in stages:
        part = np.ascontiguousarray(logits[:, begin : begin + count])
        got = decoder.decode(on(device, part), prob_bits)
        reference.decode(part, prob_bits)
        assert got.tolist() == symbols[:, begin : begin + count].tolist()
        assert decoder.states.tolist() == reference.states.tolist()
        assert decoder.positions.tolist() == reference.positions.tolist()
        assert decoder.exhausted.tolist() == reference.exhausted.tolist()
        begin += count
    assert decoder.finished(torch.from_numpy(checks)).all()
    assert not decoder.finished(torch.from_numpy(checks + 1)).any()


def test_streams_decode_unequal_numbers_of_symbols(device: torch.device) -> None:
    rng = np.random.default_rng(3)
    counts = np.array([4, 0, 1, 7, 7])
    rows = np.concatenate([[0], np.cumsum(counts)])
    logits = rng.normal(0, 700, (1, rows[-1], 40)).astype(np.int16)
    symbols = rng.integers(0, 40, (1, rows[-1]), dtype=np.int32)
    starts, freqs = rans.intervals(logits, symbols, 16)
    encoder = rans.RansEncoder(range(5))
    encoder.encode(starts.ravel(), freqs.ravel(), counts, 16)
    buffer, offsets = encoder.finish()
    decoder = rans_cuda.CudaRansDecoder(torch.from_numpy(buffer), torch.from_numpy(offsets), device)
    found = decoder.decode_rows(on(device, logits), on(device, rows), 16)
    assert found.tolist() == symbols.tolist()
    assert decoder.finished(range(5)).all()
    for wrong, message in (
        (rows[1:], "rows is torch.int64"),
        (rows.astype(np.int32), "rows is torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.decode_rows(on(device, logits), on(device, wrong), 16)
    with pytest.raises(ValueError, match=r"logits is torch.int16 \(2, 1, 40\)"):
        decoder.decode_rows(on(device, np.zeros((2, 1, 40), np.int16)), on(device, rows), 16)
    rows[-1] += 1
    decoder.decode_rows(on(device, logits), on(device, rows), 16)
    with pytest.raises(ValueError, match="stream 4: its rows are not among"):
        _ = decoder.exhausted


def test_a_decoder_resumes(device: torch.device) -> None:
    rng = np.random.default_rng(5)
    buffer = rng.integers(0, 256, 60, dtype=np.uint8)
    offsets = np.array([0, 20, 20, 60])
    states = np.array([5, 1 << 30, 1 << 20], np.int32)
    positions = np.array([3, 0, 40])
    logits = rng.normal(0, 700, (3, 8, 40)).astype(np.int16)
    streams, resumed = (
        map(torch.from_numpy, pair) for pair in ((buffer, offsets), (states, positions))
    )
    decoder = rans_cuda.CudaRansDecoder(*streams, device, *resumed)
    reference = rans.RansDecoder(buffer, offsets, states.astype(np.uint32), positions)
    got = decoder.decode(on(device, logits), 16)
    assert got.tolist() == reference.decode(logits, 16).tolist()
    assert decoder.states.tolist() == reference.states.tolist()
    assert states.tolist() == [5, 1 << 30, 1 << 20]


def test_zero_bytes_in_front_are_no_stream(device: torch.device) -> None:
    decoder = rans_cuda.CudaRansDecoder(
        torch.tensor([0, 7, 7], dtype=torch.uint8), torch.tensor([0, 2, 3, 3]), device
    )
    assert decoder.states.tolist() == [7, 7, 0]
    checks = torch.tensor([7, 7, 0], dtype=torch.int32)
    assert decoder.finished(checks).tolist() == [False, True, True]


def test_a_decoder_refuses(device: torch.device) -> None:
    buffer, offsets = torch.zeros(4, dtype=torch.uint8), torch.tensor([0, 5])
    with pytest.raises(ValueError, match="stream 0: it does not lie in the buffer"):
        _ = rans_cuda.CudaRansDecoder(buffer, offsets, device).exhausted
    one = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="both or neither"):
        rans_cuda.CudaRansDecoder(buffer, offsets, device, states=one)
    within = torch.tensor([0, 4])
    resumed = rans_cuda.CudaRansDecoder(buffer, within, device, one, torch.tensor([5]))
    with pytest.raises(ValueError, match="stream 0: its position is not in the stream"):
        resumed.finished(one)
    decoder = rans_cuda.CudaRansDecoder(buffer, within, device)
    for shape, prob_bits, message in (
        ((2, 1, 8), 12, "logits is"),
        ((1, 8), 12, r"must be \[B, n, V\]"),
        ((1, 1, 1), 12, "the codebook's size is 1"),
        ((1, 1, 200), 8, "too few for a codebook of 200"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.decode(torch.zeros(shape, dtype=torch.int16, device=device), prob_bits)


def test_resuming_an_encoder_checks_the_streams() -> None:
    for buffer, offsets, quiet, message in (
        ([0, 1], [0, 2], [0], "begins with a zero byte"),
        ([1, 1], [0, 3], [0], "an offset is 3"),
        ([1, 1], [1, 0], [0], "an offset is 0"),
        ([1, 1], [0, 2], [0, 0], "offsets has 2 numbers for 2 streams"),
        ([1, 1], [0, 2], [-1], r"quiet\[0\] is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            rans.RansEncoder.resumed(buffer, offsets, quiet)


class Pretended:
    """A tensor on the CPU that says it lies on a CUDA device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, stream: int) -> object:
        assert stream == -1
        capsule = self.tensor.__dlpack__()
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        pointer = address(capsule, b"dltensor")
        ctypes.c_int32.from_address(pointer + 8).value = 2  # DLTensor.device.device_type
        return capsule


@pytest.mark.skipif(not rans.cuda_built(), reason="built without CUDA")
def test_a_build_with_cuda_works_without_a_card() -> None:
    if rans.cuda_devices():
        pytest.skip("there is a card")
    scratch, head, most = rans.cuda_encode_sizes(1, 1)
    square = Pretended(torch.zeros(1, 1, dtype=torch.int32))
    line = Pretended(torch.zeros(1, dtype=torch.int32))
    memory = [Pretended(torch.zeros(n, dtype=torch.uint8)) for n in (scratch, head + most)]
    with pytest.raises(RuntimeError, match="no CUDA device can be used: "):
        rans.cuda_encode(square, square, None, line, 8, *memory, 0)
    with pytest.raises(ValueError, match="starts is not on a CUDA device"):
        rans.cuda_encode(torch.zeros(1, 1, dtype=torch.int32), *[line] * 3, 8, *memory, 0)


def test_a_build_without_cuda_says_so(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, module(request, "absent_cuda"))
    assert not rans.cuda_built()
    numbers = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"built without CUDA.*PERCOV2_CUDA=ON"):
        rans_cuda.encode(numbers, numbers, numbers[0], 8)
    with pytest.raises(RuntimeError, match="built without CUDA"):
        rans_cuda.CudaRansDecoder(torch.zeros(1, dtype=torch.uint8), torch.tensor([0, 1]), "cpu")
    with pytest.raises(RuntimeError, match="built without CUDA"):
        rans.cuda_devices()


# The proof before the first use -------------------------------------------------------------------


@pytest.mark.parametrize("codebook", [2, 50, 256])
def test_kernels_that_agree_pass(device, codebook):
    prove(device, codebook, True)


def test_wrong_bytes_are_noticed(device, monkeypatch):
    encode = rans.cuda_encode
    monkeypatch.setattr(
        rans, "cuda_encode", lambda s, freqs, *rest: encode(s, torch.ones_like(freqs), *rest)
    )
    with pytest.raises(RuntimeError, match="coder='cpu'"):
        prove(device, 16, True)
    prove(device, 16, False)


def test_wrong_symbols_are_noticed(device, monkeypatch):
    decode = rans_cuda.CudaRansDecoder.decode
    monkeypatch.setattr(
        rans_cuda.CudaRansDecoder,
        "decode",
        lambda decoder, *given: decode(decoder, *given).flip(0),
    )
    with pytest.raises(RuntimeError, match="coder='cpu'"):
        prove(device, 16, True)


def test_wrong_intervals_are_noticed(monkeypatch):
    quantize = cdf.marked_intervals

    def shifted(*given):
        intervals = quantize(*given)
        intervals[0, 4, 69] ^= 1
        return intervals

    prove(torch.device("cpu"), 16, False)
    monkeypatch.setattr(cdf, "marked_intervals", shifted)
    with pytest.raises(RuntimeError, match="load the model on the CPU"):
        prove(torch.device("cpu"), 16, False)


@pytest.mark.parametrize(
    ("place", "coder", "trial"),
    [("cuda:1", "cuda", True), ("cuda:1", "cpu", False), ("cpu", "cpu", None)],
)
def test_coders_on_cards_are_tried(monkeypatch, place, coder, trial):
    trials = []
    monkeypatch.setattr(token_coder, "prove_coder", lambda *given: trials.append(given))
    device = torch.device(place)
    TokenCoder(SimpleNamespace(device=device, config=TransformerConfig(codebook_size=50)), coder)
    assert trials == ([] if trial is None else [(device, 50, trial)])


# Files -------------------------------------------------------------------------------------------


@pytest.fixture
def coder(device: torch.device) -> TokenCoder:
    """A coder on ``device``: on a card as it comes, else with the emulated kernels."""
    model = IntTransformer.load(FROZEN, device=device)
    return TokenCoder(model, None if device.type == "cuda" else "cuda")


@pytest.fixture(scope="module")
def cpu_coder() -> compiled.TokenCoder:
    return compiled.TokenCoder(CompiledTransformer.load(FROZEN))


def maps() -> list[Tokens]:
    """Noise and plain maps of several sizes."""
    rng = np.random.default_rng(1)
    noise = [rng.integers(0, 16, shape, np.int32) for shape in ((5, 7), (5, 7), (1, 1), (9, 12))]
    return [*noise, np.zeros((9, 12), np.int32), np.full((5, 7), 3, np.int32)]


def headers(grids: list[Tokens], name: str) -> list[Header]:
    return [
        Header(
            model_id=0xA5,
            height=16 * grid.shape[0],
            width=16 * grid.shape[1],
            schedule=schedule.SCHEDULES.index(name),
        )
        for grid in grids
    ]


def opened(files: list[bytes], grids: list[Tokens]) -> list[OpenFile]:
    return [
        OpenFile(data, bitstream.read(data), (grid.shape[0], grid.shape[1]), f"file {i}: ")
        for i, (data, grid) in enumerate(zip(files, grids, strict=True))
    ]


@pytest.mark.parametrize("name", ["qlds12", "checkerboard", "raster"])
def test_files_are_those_of_the_cpu(coder, cpu_coder, name):
    assert (coder.coder_name, cpu_coder.coder_name) == ("cuda", "cpu")
    grids = maps()
    files = tokens_file.pack(coder, headers(grids, name), grids)
    assert files == tokens_file.pack(cpu_coder, headers(grids, name), grids)
    assert files[3:4] == tokens_file.pack(coder, headers(grids[3:4], name), grids[3:4])
    for reader in (coder, cpu_coder):
        decoded = tokens_file.unpack(reader, opened(files, grids))
        assert all(np.array_equal(a, b) for a, b in zip(decoded, grids, strict=True))


def test_plain_maps_are_written_again_without_the_dense_promise(coder):
    certain = IntTransformer(certain_model().config, certain_model().tensors, coder.model.device)
    sure = TokenCoder(certain, coder.coder_name)
    grids = [np.zeros((60, 60), np.int32), np.full((60, 60), 255, np.int32)]
    files = tokens_file.pack(sure, headers(grids, "qlds12"), grids)
    assert [bitstream.read(file).header.dense for file in files] == [False, True]
    assert files == tokens_file.pack(
        compiled.TokenCoder(certain_model()), headers(grids, "qlds12"), grids
    )
    decoded = tokens_file.unpack(sure, opened(files, grids))
    assert all(np.array_equal(a, b) for a, b in zip(decoded, grids, strict=True))


def test_damaged_files_are_refused_as_on_the_cpu(coder, cpu_coder):
    grids = maps()
    files = tokens_file.pack(cpu_coder, headers(grids, "qlds5"), grids)
    for i, cut in ((0, 1), (0, 4), (3, 2), (3, 25), (3, 40)):
        damaged = [files[i][:-cut], files[i][:-cut] + bytes([files[i][-cut] ^ 64])]
        for data in damaged:
            messages = []
            for reader in (coder, cpu_coder):
                with pytest.raises(BitstreamError) as caught:
                    tokens_file.unpack(reader, opened([files[i], data], [grids[i]] * 2))
                messages.append(str(caught.value))
            assert messages[0] == messages[1]
            assert messages[0].startswith("file 1: ")


def test_parts_and_cut_files_are_drawn_as_on_the_cpu(coder, cpu_coder):
    grids = [grid for grid in maps()[:4] if grid.size > 1]  # plain ones have no bytes to lose
    heads = [replace(h, stages_sent=3, seed=9) for h in headers(grids, "qlds5")]
    files = tokens_file.pack(cpu_coder, heads, grids)
    assert tokens_file.pack(coder, heads, grids) == files
    expected = tokens_file.unpack(cpu_coder, opened(files, grids))
    for one, two in zip(expected, tokens_file.unpack(coder, opened(files, grids)), strict=True):
        np.testing.assert_array_equal(one, two)
    whole = tokens_file.pack(cpu_coder, headers(grids, "qlds5"), grids)
    cut = [file[:-2] for file in files] + [file[: len(file) // 2 + 4] for file in whole]
    read = [tokens_file.unpack_cut(one, opened(cut, grids * 2)) for one in (cpu_coder, coder)]
    for (tokens, stages), (others, taken) in zip(*read, strict=True):
        np.testing.assert_array_equal(tokens, others)
        assert stages == taken
    assert len({stages for _, stages in read[0]}) > 1


@pytest.fixture
def joining(coder: TokenCoder, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The coder codes unequal grids together; the result counts its calls of each kind."""
    calls: Counter[str] = Counter()
    assert coder.joins == (coder.model.device.type == "cuda")
    monkeypatch.setattr(coder, "joins", True)

    def count(name: str) -> None:
        call = getattr(coder, name)

        def counted(*given: Any, **how: Any) -> Any:
            calls[name] += 1
            return call(*given, **how)

        monkeypatch.setattr(coder, name, counted)

    for name in ("code", "code_joined", "decode", "decode_joined"):
        count(name)
    return calls


def mixed() -> tuple[list[Tokens], list[Header]]:
    """Maps of several sizes in several schedules, two of which are alike."""
    grids = maps()
    names = ("qlds12", "raster", "qlds12", "checkerboard", "var", "raster")
    return grids, [headers([grid], name)[0] for grid, name in zip(grids, names, strict=True)]


def test_unequal_files_are_those_of_the_cpu(coder, cpu_coder, joining):
    grids, heads = mixed()
    expected = tokens_file.pack(cpu_coder, heads, grids)
    for order in (range(6), (3, 5, 0, 2, 4, 1), (2, 0), (1, 5)):  # the last two are alike
        chosen = [grids[i] for i in order]
        files = tokens_file.pack(coder, [heads[i] for i in order], chosen)
        assert files == [expected[i] for i in order]
        decoded = tokens_file.unpack(coder, opened(files, chosen))
        assert all(np.array_equal(a, b) for a, b in zip(decoded, chosen, strict=True))
    assert joining == {"code_joined": 3, "decode_joined": 3, "code": 1, "decode": 1}


def test_unequal_parts_are_those_of_the_cpu(coder, cpu_coder, joining):
    """Files of all stages and of a part, whose other tokens are drawn, and files within bytes."""
    grids = [grid for grid in maps() if grid.size > 1]
    whole = headers(grids, "qlds5")
    heads = [replace(h, stages_sent=i, seed=9 - i) if i else h for i, h in enumerate(whole)]
    files = tokens_file.pack(coder, heads, grids)
    assert files == tokens_file.pack(cpu_coder, heads, grids)
    for one, two in zip(
        tokens_file.unpack(coder, opened(files, grids)),
        tokens_file.unpack(cpu_coder, opened(files, grids)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)
    within = [
        tokens_file.write_within(tokens_file.encode(one, whole, grids), 30, seed=4)
        for one in (coder, cpu_coder)
    ]
    assert within[0] == within[1]
    assert joining == {"code_joined": 2, "decode_joined": 1}


def test_a_damaged_file_among_unequal_ones_is_refused_as_on_the_cpu(coder, cpu_coder, joining):
    grids, heads = mixed()
    files = tokens_file.pack(cpu_coder, heads, grids)
    for i, cut in ((0, 1), (0, 4), (3, 2), (3, 25), (3, 40)):
        for data in (files[i][:-cut], files[i][:-cut] + bytes([files[i][-cut] ^ 64])):
            damaged = [*files[:i], data, *files[i + 1 :]]
            messages = []
            for reader in (coder, cpu_coder):
                with pytest.raises(BitstreamError) as caught:
                    tokens_file.unpack(reader, opened(damaged, grids))
                messages.append(str(caught.value))
            assert messages[0] == messages[1]
            assert messages[0].startswith(f"file {i}: ")
            read = [
                tokens_file.unpack_cut(one, opened([*files[1:3], data], [*grids[1:3], grids[i]]))
                for one in (coder, cpu_coder)
                if data == files[i][:-cut]
            ]
            for (tokens, stages), (others, taken) in zip(*read or ([], []), strict=True):
                np.testing.assert_array_equal(tokens, others)
                assert stages == taken
    assert joining["decode_joined"] == 15


def test_batches_of_unequal_grids_have_bounded_size(coder, cpu_coder, joining, monkeypatch):
    monkeypatch.setattr(type(coder), "tokens_at_once", property(lambda self: 80))
    grids, heads = mixed()  # 1, 35, 35 | 35 | 108 | 108
    assert tokens_file.pack(coder, heads, grids) == tokens_file.pack(cpu_coder, heads, grids)
    assert joining == {"code_joined": 1, "code": 3}


@pytest.mark.parametrize("wrong", [-1, 16])
def test_wrong_tokens_are_refused(coder, wrong):
    tokens = torch.zeros(2, 3, 4, dtype=torch.int32)
    tokens[1, 2, 3] = wrong
    with pytest.raises(ValueError, match=rf"{wrong}.*codebook has 16"):
        coder.encode(tokens.to(coder.model.device), "qlds5", [1, 2])


@pytest.mark.parametrize("wrong", [-1, 65536])
def test_wrong_checks_are_refused(coder, cpu_coder, wrong):
    for one in (coder, cpu_coder):
        with pytest.raises(ValueError, match="check"):
            one.encode(torch.zeros(2, 3, 4, dtype=torch.int32), "qlds5", [1, wrong])


def test_the_host_waits_once_for_the_bytes(request, monkeypatch, cpu_coder):
    """On a pretended device that runs the emulated kernels: one copy back, and no other wait."""
    kernels = module(request, "emulated_cuda")
    calls: list[str] = []

    def on_the_device(name):
        def call(*arguments):
            calls.append(name)
            given = [a.held if isinstance(a, Held) else a for a in arguments]
            return getattr(kernels, name)(*given)

        return call

    for name in ("cuda_encode", "cuda_decode"):
        monkeypatch.setattr(rans, name, on_the_device(name))
    monkeypatch.setattr(rans, "cuda_encode_sizes", kernels.cuda_encode_sizes)
    monkeypatch.setattr(rans_cuda, "DEVICE_TYPE", DEVICE.type)
    tokens = torch.from_numpy(np.random.default_rng(2).integers(0, 16, (6, 9, 12), np.int32))
    expected = cpu_coder.encode(tokens, "qlds12", range(6)).finish()
    with PretendedDevice() as device:
        coder = TokenCoder(IntTransformer.load(FROZEN, device=DEVICE, executor="torch"), "cuda")
        cdf.weights(torch.zeros(1, 2, dtype=torch.int16).to(DEVICE))  # its table is uploaded once
        device.forget()
        one_pass = token_coder.one_pass_residual

        def passed(*arguments):
            residual = one_pass(*arguments)
            device.uploads.append("after the pass")
            return residual

        monkeypatch.setattr(token_coder, "one_pass_residual", passed)
        encoder = coder.encode(tokens, "qlds12", range(6))
        assert device.waits == []
        assert len(device.downloads) == 1
        assert calls == ["cuda_encode"]
        # CUDA may finish what is queued before it takes pageable memory.
        assert device.uploads[-1] == "after the pass"
        buffer, offsets = encoder.finish()
        assert np.array_equal(buffer, expected[0]) and np.array_equal(offsets, expected[1])
        decoder = coder.decoder(buffer, offsets)
        device.forget()
        decoded = coder.decode(decoder, "qlds12", 9, 12)
        assert device.waits == []
        assert device.downloads == [(6, 9, 12)]
        assert same(decoded, tokens)
        assert decoder.finished(range(6)).all()
        assert len(device.downloads) == 2


def test_the_host_waits_once_for_the_bytes_of_unequal_grids(request, monkeypatch, cpu_coder):
    kernels = module(request, "emulated_cuda")

    def on_the_device(name):
        def call(*arguments):
            return getattr(kernels, name)(
                *(a.held if isinstance(a, Held) else a for a in arguments)
            )

        return call

    for name in ("cuda_encode", "cuda_decode"):
        monkeypatch.setattr(rans, name, on_the_device(name))
    monkeypatch.setattr(rans, "cuda_encode_sizes", kernels.cuda_encode_sizes)
    monkeypatch.setattr(rans_cuda, "DEVICE_TYPE", DEVICE.type)
    with PretendedDevice() as device:
        coder = TokenCoder(IntTransformer.load(FROZEN, device=DEVICE, executor="torch"), "cuda")
        cdf.weights(torch.zeros(1, 2, dtype=torch.int16).to(DEVICE))  # its table is uploaded once
        for count in (2, 5):
            grids = [np.full((3 + i, 9 - i), i, np.int32) for i in range(count)]
            names, shapes = ["qlds5"] * count, [grid.shape for grid in grids]
            streams = [cpu_coder.encode(g[None], "qlds5", [7]).finish()[0] for g in grids]
            device.forget()
            encoder = coder.code_joined(grids, names).encode([7] * count)
            assert device.waits == []
            assert len(device.downloads) == 1
            buffer, offsets = encoder.finish()
            assert buffer.tobytes() == b"".join(stream.tobytes() for stream in streams)
            decoder = coder.decoder(buffer, offsets)
            device.forget()
            found = coder.decode_joined(decoder, names, shapes)
            assert device.waits == []
            assert device.downloads == [(sum(grid.size for grid in grids),)]
            assert all(same(a, b) for a, b in zip(found, grids, strict=True))


@pytest.mark.parametrize(
    ("built", "devices", "capability", "reason"),
    [
        (True, ("A Card",), (8, 0), None),
        (True, ("A Card",), (7, 5), "Old Card is older"),
        (True, (), (7, 5), "newer than the driver"),
        (False, (), (7, 5), "built without CUDA"),
    ],
)
def test_the_choice_of_a_coder_is_visible(monkeypatch, built, devices, capability, reason):
    monkeypatch.setattr(rans, "cuda_built", lambda: built)
    monkeypatch.setattr(rans, "cuda_devices", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert default_coder(torch.device("cpu")) == "cpu"
        assert not told
        assert default_coder(torch.device("cuda", 0)) == ("cpu" if reason else "cuda")
    assert [reason in str(one.message) for one in told] == ([True] if reason else [])
    assert all(one.category is RuntimeWarning for one in told)


def test_an_unknown_coder_is_refused():
    with pytest.raises(ValueError, match="'gpu'; it must be one of"):
        TokenCoder(IntTransformer.load(FROZEN), "gpu")


def test_a_coder_of_the_cpu_reads_with_the_cpu(cpu_coder):
    assert isinstance(cpu_coder.decoder(b"\x07", np.array([0, 1])), rans.RansDecoder)
    assert cpu_coder.tokens_at_once == compiled._TOKENS_AT_ONCE


def test_batches_on_a_card_shrink_as_models_grow():
    coder = TokenCoder.__new__(TokenCoder)
    at_once = []
    for sizes in ({}, {"layers": 64}, {"dim": 1024, "heads": 16, "head_dim": 64, "layers": 24}):
        config = TransformerConfig(codebook_size=8192, **sizes)
        coder.model = SimpleNamespace(device=torch.device("cuda", 0), config=config)
        at_once.append(coder.tokens_at_once)
    assert at_once[0] == 2**18 > at_once[1] > at_once[2] > 2**15
