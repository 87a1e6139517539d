"""Encoding waits for a device once, for its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from percov2.container import tokens_file
from percov2.container.bitstream import Header
from percov2.entropy import schedule, token_coder
from percov2.entropy.torch import cdf
from percov2.entropy.torch.token_coder import TokenCoder
from percov2.entropy.transformer_config import TransformerConfig
from tools.executors import random_on
from tools.pretended_device import DEVICE, PretendedDevice

UPLOADS = 5  # tokens, coding order (model and coder), plan of the contents, plan of the queries


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    with PretendedDevice() as mode:
        cdf.weights(torch.zeros(1, 2, dtype=torch.int16).to(DEVICE))  # its table is uploaded once
        mode.forget()
        yield mode


def build(place: torch.device | str, layers: int = 2) -> TokenCoder:
    config = TransformerConfig(
        codebook_size=40, dim=16, heads=2, head_dim=8, layers=layers, hidden=24
    )
    return TokenCoder(random_on("torch", config, 3, place))


@pytest.fixture(scope="module")
def coder() -> TokenCoder:
    """A coder whose model lies on the pretended device."""
    with PretendedDevice():
        return build(DEVICE)


@pytest.fixture(scope="module")
def cpu_coder() -> TokenCoder:
    return build("cpu")


def tokens_of(batch: int, height: int, width: int, size: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, size, (batch, height, width), generator=generator).to(torch.int32)


def assert_no_waste(device: PretendedDevice, tokens: torch.Tensor) -> None:
    batch, height, width = tokens.shape
    assert device.waits == []
    assert device.downloads == [(2, batch, height * width)]
    assert len(device.uploads) == UPLOADS


@pytest.mark.parametrize("name", [name for name in schedule.SCHEDULES if name != "raster"])
def test_a_batch_is_one_copy_and_no_wait(device, coder, cpu_coder, name):
    tokens = tokens_of(3, 12, 20)
    starts, freqs = coder.intervals(tokens, name)
    assert_no_waste(device, tokens)
    expected = cpu_coder.intervals(tokens, name)
    assert np.array_equal(starts, expected[0]) and np.array_equal(freqs, expected[1])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("at_once", [40 * 200, 2**21])
def test_the_count_does_not_grow(device, monkeypatch, batch, at_once):
    monkeypatch.setattr(token_coder, "_LOGITS_AT_ONCE", at_once)
    coder = build(DEVICE, layers=batch)
    device.forget()
    tokens = tokens_of(batch, 17, 40)  # wider than a window: several blocks of entries
    coder.intervals(tokens, "qlds12")
    assert_no_waste(device, tokens)


def test_tokens_may_be_there_and_plans_too_large_to_keep(device, coder, cpu_coder, monkeypatch):
    tokens = tokens_of(2, 6, 5)
    starts, _ = coder.intervals(tokens.to(DEVICE, non_blocking=True), "qlds8")
    assert_no_waste(device, tokens)
    assert np.array_equal(starts, cpu_coder.intervals(tokens, "qlds8")[0])
    device.forget()
    monkeypatch.setattr("percov2.entropy.torch.blocks.KEPT_PAIRS", 0)
    tokens = tokens_of(1, 9, 9)
    coder.intervals(tokens, "checkerboard")
    assert_no_waste(device, tokens)


@pytest.mark.parametrize("wrong", [-1, 40, -(2**31)])
@pytest.mark.parametrize("placed", [False, True])
def test_wrong_tokens_are_refused_after_the_copy(device, coder, wrong, placed):
    tokens = tokens_of(2, 3, 3)
    tokens[1, 2, 2] = wrong
    with pytest.raises(ValueError, match=rf"{wrong}.*codebook has 40"):
        coder.intervals(tokens.to(DEVICE) if placed else tokens, "var")


def test_files_are_written_with_one_copy_for_each_batch(device, coder, cpu_coder):
    shapes = [(3, 4), (3, 4), (5, 2), (3, 4)]
    maps = [tokens_of(i + 1, *shape)[0].numpy() for i, shape in enumerate(shapes)]
    headers = [Header(model_id=7, height=16 * h, width=16 * w) for h, w in shapes]
    files = tokens_file.pack(coder, headers, maps)
    assert device.waits == []
    assert device.downloads == [(2, 3, 12), (2, 1, 10)]
    assert files == tokens_file.pack(cpu_coder, headers, maps)


WASTE: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x.sum()),
    "if": lambda x: bool((x > 3).any()),
    "cpu": lambda x: x.cpu(),
    "copy_": lambda x: torch.empty(8, dtype=torch.int32).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 3],
    "put by mask": lambda x: x.index_put_((x > 3,), x.new_zeros(())),
    "masked_select": lambda x: x.masked_select(x > 3),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.bincount(),
    "repeat": lambda x: x.repeat_interleave(x),
    "equal": lambda x: torch.equal(x, x + 1),
    "upload": lambda x: torch.zeros(3).to(x.device),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WASTE)
def test_the_pretended_device_notices(device, name, inference):
    with torch.inference_mode(inference):
        tensor = torch.arange(8, dtype=torch.int32).to(DEVICE, non_blocking=True)
        device.forget()
        WASTE[name](tensor)
    assert device.waits or device.downloads


def test_the_pretended_device_refuses_what_a_device_refuses(device):
    tensor = torch.arange(8, device=DEVICE)
    with pytest.raises(RuntimeError, match="mixes"):
        tensor + torch.arange(8)
    with pytest.raises(RuntimeError, match="unseen"):
        tensor + torch.tensor([1], device=DEVICE)
    with pytest.raises(RuntimeError, match="numpy"):
        tensor.numpy()
    with pytest.raises(RuntimeError, match="tolist"):
        tensor.tolist()
    assert device.waits == device.downloads == []
