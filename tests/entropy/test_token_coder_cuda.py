"""Files written and read by CUDA kernels have the bytes and tokens of the CPU's coder."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from percov2.container import bitstream, tokens_file
from percov2.container.bitstream import BitstreamError, Header
from percov2.container.tokens_file import OpenFile, Tokens
from percov2.entropy import rans, schedule
from percov2.entropy import token_coder as compiled
from percov2.entropy.int_transformer import IntTransformer as CompiledTransformer
from percov2.entropy.rans import RansDecoder
from percov2.entropy.torch import cdf, rans_cuda, token_coder
from percov2.entropy.torch.int_transformer import IntTransformer
from percov2.entropy.torch.token_coder import TokenCoder, default_coder
from percov2.entropy.transformer_config import TransformerConfig
from test_codec import certain_model
from tools import emulated_cuda
from tools.executors import FROZEN, same
from tools.pretended_device import DEVICE, Held, PretendedDevice


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


@pytest.mark.parametrize("wrong", [-1, 16])
def test_wrong_tokens_are_refused(coder, wrong):
    tokens = torch.zeros(2, 3, 4, dtype=torch.int32)
    tokens[1, 2, 3] = wrong
    with pytest.raises(ValueError, match=rf"{wrong}.*codebook has 16"):
        coder.encoder(tokens.to(coder.model.device), "qlds5", [1, 2])


@pytest.mark.parametrize("wrong", [-1, 65536])
def test_wrong_checks_are_refused(coder, cpu_coder, wrong):
    for one in (coder, cpu_coder):
        with pytest.raises(ValueError, match="check"):
            one.encoder(torch.zeros(2, 3, 4, dtype=torch.int32), "qlds5", [1, wrong])


def test_the_host_waits_once_for_the_bytes(request, monkeypatch, cpu_coder):
    """On a pretended device that runs the emulated kernels: one copy back, and no other wait."""
    kernels = emulated_cuda.module(request, "emulated_cuda")
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
    expected = cpu_coder.encoder(tokens, "qlds12", range(6)).finish()
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
        encoder = coder.encoder(tokens, "qlds12", range(6))
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
    assert isinstance(cpu_coder.decoder(b"\x07", np.array([0, 1])), RansDecoder)
    assert cpu_coder.tokens_at_once == compiled._TOKENS_AT_ONCE


def test_batches_on_a_card_shrink_as_models_grow():
    coder = TokenCoder.__new__(TokenCoder)
    at_once = []
    for sizes in ({}, {"layers": 64}, {"dim": 1024, "heads": 16, "head_dim": 64, "layers": 24}):
        config = TransformerConfig(codebook_size=8192, **sizes)
        coder.model = SimpleNamespace(device=torch.device("cuda", 0), config=config)
        at_once.append(coder.tokens_at_once)
    assert at_once[0] == 2**18 > at_once[1] > at_once[2] > 2**15
