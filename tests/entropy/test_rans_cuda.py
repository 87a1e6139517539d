"""percov2.entropy.torch.rans_cuda against percov2.entropy.rans.

Every test runs twice: with kernels emulated on the CPU, from tests/native, and on a card.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from percov2.entropy import rans
from percov2.entropy.torch import rans_cuda
from tools.emulated_cuda import module, use


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
def test_streams_are_those_of_the_cpu(
    device: torch.device, size: int, symbols: int, prob_bits: int
) -> None:
    rng = np.random.default_rng(size * 100 + symbols)
    starts, freqs = random_intervals(rng, (size, symbols), prob_bits)
    checks = rng.integers(0, 65536, size, dtype=np.int32)
    for counts in (None, rng.integers(0, symbols + 1, size, dtype=np.int32)):
        encoded = rans_cuda.encode(
            on(device, starts),
            on(device, freqs),
            on(device, checks),
            prob_bits,
            None if counts is None else on(device, counts),
        )
        buffer, offsets, quiet = encoded.to_host()
        expected = host_streams(starts, freqs, checks, prob_bits, counts)
        assert buffer.tobytes() == expected.finish()[0].tobytes()
        assert offsets.tolist() == expected.finish()[1].tolist()
        assert quiet.tolist() == expected.symbols_before_output.tolist()


def test_streams_longer_than_the_first_copy(device: torch.device) -> None:
    """Symbols of probability 2^-16: 2 bytes each."""
    starts = np.arange(40, dtype=np.int32).reshape(2, 20)
    freqs = np.ones_like(starts)
    checks = np.array([1, 2], dtype=np.int32)
    encoded = rans_cuda.encode(on(device, starts), on(device, freqs), on(device, checks), 16)
    buffer, offsets, _ = encoded.to_host()
    assert offsets[-1] > encoded.likely
    expected = host_streams(starts, freqs, checks, 16).finish()
    assert buffer.tobytes() == expected[0].tobytes()


def test_the_host_goes_on(device: torch.device) -> None:
    """Tokens on the device, then caption and header on the host."""
    rng = np.random.default_rng(3)
    starts, freqs = random_intervals(rng, (4, 50), 16)
    freqs[3] = 1 << 16  # costs nothing: the state never leaves the check
    starts[3] = 0
    checks = rng.integers(0, 65536, 4, dtype=np.int32)
    on_top = random_intervals(rng, (4, 9), 12)
    encoded = rans_cuda.encode(on(device, starts), on(device, freqs), on(device, checks), 16)
    resumed = rans.RansEncoder.resumed(*encoded.to_host())
    expected = host_streams(starts, freqs, checks, 16)
    assert resumed.symbols_before_output.tolist() == expected.symbols_before_output.tolist()
    for encoder in (resumed, expected):
        encoder.encode(on_top[0].ravel(), on_top[1].ravel(), [9] * 4, 12)
    assert resumed.symbols_before_output.tolist() == expected.symbols_before_output.tolist()
    for got, wanted in zip(resumed.finish(), expected.finish(), strict=True):
        assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freqs": 0}, "stream 1: an interval is empty"),
        ({"starts": -1}, "stream 1: an interval is empty"),
        ({"checks": 65536}, "stream 1: its check does not fit"),
        ({"counts": 6}, "stream 1: its count"),
    ],
)
def test_what_the_device_finds_wrong(
    device: torch.device, change: dict[str, int], message: str
) -> None:
    given = {
        "starts": np.zeros((2, 5), np.int32),
        "freqs": np.ones((2, 5), np.int32),
        "checks": np.zeros(2, np.int32),
        "counts": np.full(2, 5, np.int32),
    }
    for name, value in change.items():
        given[name][1, ...] = value
    tensors = {name: on(device, array) for name, array in given.items()}
    encoded = rans_cuda.encode(prob_bits=8, **tensors)
    with pytest.raises(ValueError, match=message):
        encoded.to_host()


def test_what_the_host_finds_wrong(device: torch.device) -> None:
    starts = torch.zeros(2, 5, dtype=torch.int32, device=device)
    freqs, checks = torch.ones_like(starts), torch.zeros(2, dtype=torch.int32, device=device)
    for arguments, message in (
        ((starts[0], freqs, checks, 8), r"it must be \[B, n\]"),
        ((starts, freqs[:, :4], checks, 8), r"freqs is torch.int32 \(2, 4\)"),
        ((starts, freqs.long(), checks, 8), "freqs is torch.int64"),
        ((starts, freqs, checks, 7), "prob_bits is 7"),
        ((starts, freqs, checks, 21), "prob_bits is 21"),
    ):
        with pytest.raises(ValueError, match=message):
            rans_cuda.encode(*arguments)
    elsewhere = torch.empty_like(starts, device="meta")
    with pytest.raises(ValueError, match="starts is on meta"):
        rans_cuda.encode(elsewhere, freqs, checks, 8)


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


def test_a_decoder_resumes(device: torch.device) -> None:
    rng = np.random.default_rng(5)
    buffer = rng.integers(0, 256, 60, dtype=np.uint8)
    offsets = np.array([0, 20, 20, 60])
    states = np.array([5, 1 << 30, 1 << 20], np.int32)
    positions = np.array([3, 0, 40])
    logits = rng.normal(0, 700, (3, 8, 40)).astype(np.int16)
    decoder = rans_cuda.CudaRansDecoder(
        torch.from_numpy(buffer),
        torch.from_numpy(offsets),
        device,
        torch.from_numpy(states),
        torch.from_numpy(positions),
    )
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
    assert decoder.finished(torch.tensor([7, 7, 0], dtype=torch.int32)).tolist() == [
        False,
        True,
        True,
    ]


def test_a_decoder_refuses(device: torch.device) -> None:
    buffer, offsets = torch.zeros(4, dtype=torch.uint8), torch.tensor([0, 5])
    with pytest.raises(ValueError, match="stream 0: it does not lie in the buffer"):
        _ = rans_cuda.CudaRansDecoder(buffer, offsets, device).exhausted
    one = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="both or neither"):
        rans_cuda.CudaRansDecoder(buffer, offsets, device, states=one)
    resumed = rans_cuda.CudaRansDecoder(
        buffer, torch.tensor([0, 4]), device, one, torch.tensor([5])
    )
    with pytest.raises(ValueError, match="stream 0: its position is not in the stream"):
        resumed.finished(one)
    decoder = rans_cuda.CudaRansDecoder(buffer, torch.tensor([0, 4]), device)
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
