"""The trial of a coder on a device: a coder that differs from the CPU's is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from percov2.entropy import rans
from percov2.entropy.torch import cdf, rans_cuda, token_coder
from percov2.entropy.torch.coder_proof import prove_coder
from percov2.entropy.torch.token_coder import TokenCoder
from percov2.entropy.transformer_config import TransformerConfig

prove = prove_coder.__wrapped__


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
    decode = rans_cuda.CudaRansDecoder.decode_logits
    monkeypatch.setattr(
        rans_cuda.CudaRansDecoder,
        "decode_logits",
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
