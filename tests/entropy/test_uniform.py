"""The uniform entropy model: exact cost, round trips, and a fixed identity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from percov2.entropy import SCHEDULES, IntTransformer, RansDecoder, RansEncoder, TokenCoder
from percov2.entropy.uniform import uniform_model
from tools.executors import same


@pytest.mark.parametrize("bits", range(1, 14))
def test_a_token_costs_exactly_log2_of_the_codebook(bits: int) -> None:
    coder = TokenCoder(uniform_model(1 << bits))
    tokens = torch.randint(1 << bits, (2, 3, 5), dtype=torch.int32)
    _, freqs = coder.intervals(tokens, "qlds12")
    assert (freqs == 1 << (coder.prob_bits - bits)).all()


@pytest.mark.parametrize("size", [3, 100, 300, 1025])
def test_other_codebooks_differ_by_one_slot(size: int) -> None:
    coder = TokenCoder(uniform_model(size))
    _, freqs = coder.intervals(torch.arange(size, dtype=torch.int32)[None, None], "qlds5")
    assert freqs.sum() == 1 << coder.prob_bits and freqs.max() - freqs.min() <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_come_back_and_take_their_bytes(schedule: str) -> None:
    coder = TokenCoder(uniform_model(256))
    tokens = torch.randint(256, (1, 8, 8), dtype=torch.int32)
    starts, freqs = coder.intervals(tokens, schedule)
    encoder = RansEncoder([7])
    encoder.encode(starts.ravel(), freqs.ravel(), [64], coder.prob_bits)
    data, offsets = encoder.finish()
    assert 64 <= len(data) <= 67
    assert same(coder.decode(RansDecoder(data, offsets), schedule, 8, 8), tokens)


def test_it_is_small_and_its_identity_never_changes(tmp_path: Path) -> None:
    uniform_model(256).save(tmp_path)
    fingerprint = IntTransformer.load(tmp_path).fingerprint().hex()
    assert fingerprint.startswith("39118ff62a58af83")  # files depend on these integers
    assert (tmp_path / "model.safetensors").stat().st_size < 12_000


@pytest.mark.parametrize("size", [1, 8193])
def test_impossible_codebooks_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="codebook_size"):
        uniform_model(size)
