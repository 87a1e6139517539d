"""Choices of likely tokens, against the same choices from one-pass logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from percov2.codec import Codec
from percov2.entropy import schedule, token_coder
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.staging import one_pass_logits
from percov2.entropy.token_coder import TokenCoder
from percov2.entropy.transformer_config import TransformerConfig
from percov2.entropy.uniform import uniform_model
from tools.executors import coder_of, model_on, same

CODES = 16
MODEL = IntTransformer.random(
    TransformerConfig(CODES, dim=16, heads=1, head_dim=16, layers=1, hidden=16), seed=3
)
CODER = TokenCoder(MODEL)
PLACED = coder_of(model_on("torch", MODEL.config, MODEL.tensors))


def some_candidates(seed: int, shape: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    """Unlike candidates of every place, and which of them are allowed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand((*shape, CODES), generator=generator).argsort(-1)
    allowed = torch.rand((*shape, count), generator=generator) < 0.6
    allowed[..., 0] = True
    return drawn[..., :count].to(torch.int32), allowed


def plain_choice(candidates: Tensor, allowed: Tensor, name: str) -> NDArray[np.int32]:
    """Stage by stage and place by place, with logits of a whole pass each time."""
    batch, height, width, count = candidates.shape
    stages = schedule.stages(name, height, width)
    tokens = np.zeros((batch, height, width), np.int32)
    coding = schedule.order(stages).tolist()
    for stage in range(1, int(stages.max()) + 1):
        logits = one_pass_logits(MODEL, tokens, stages)
        for b in range(batch):
            for i, place in enumerate(coding):
                y, x = divmod(place, width)
                if stages[y, x] != stage:
                    continue
                best = None
                for k in range(count):
                    token = int(candidates[b, y, x, k])
                    if allowed[b, y, x, k] and (
                        best is None or logits[b, i, token] > logits[b, i, best]
                    ):
                        best = token
                assert best is not None
                tokens[b, y, x] = best
    return tokens


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 2),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from(["qlds12", "checkerboard", "raster", "quincunx"]),
)
def test_choice_is_that_of_a_plain_walk(seed, batch, height, width, count, name) -> None:
    candidates, allowed = some_candidates(seed, (batch, height, width), count)
    chosen = CODER.choose(candidates, allowed, name)
    assert chosen.dtype == np.int32
    assert np.array_equal(chosen, plain_choice(candidates, allowed, name))
    assert same(PLACED.choose(candidates, allowed, name), chosen)


def test_the_first_allowed_of_equally_likely_candidates_is_chosen() -> None:
    model = uniform_model(CODES)
    candidates = np.tile(np.array([5, 9, 2, 7], np.int32), (1, 2, 3, 1))
    allowed = np.ones(candidates.shape, bool)
    for executor in ("cpu", "torch"):
        coder = coder_of(model_on(executor, model.config, model.tensors))
        assert same(coder.choose(candidates, allowed, "qlds12"), candidates[..., 0].copy())


def test_freedom_saves_bits() -> None:
    candidates, _ = some_candidates(0, (4, 8, 8), CODES)
    bits = []
    for free in (1, 2, 4, 16):
        allowed = (torch.arange(CODES) < free).expand(candidates.shape)
        tokens = CODER.choose(candidates, allowed, "qlds12")
        assert free > 1 or same(tokens, candidates[..., 0])
        _, freqs = CODER.intervals(tokens, "qlds12")
        bits.append(float((CODER.prob_bits - np.log2(freqs)).sum()))
    assert bits == sorted(bits, reverse=True) and bits[-1] < 0.8 * bits[0]


def test_refusals() -> None:
    candidates = torch.zeros(1, 2, 2, 3, dtype=torch.int32)
    allowed = torch.ones(1, 2, 2, 3, dtype=torch.bool)
    for given_as, name, message in (
        ((candidates, allowed[..., :2]), "qlds12", "allowed"),
        ((candidates, ~allowed), "qlds12", "first candidate"),
        ((candidates, allowed), "nonsense", "nonsense"),
        ((candidates + CODES, allowed), "qlds12", "tokens range from 16 to 16"),
    ):
        with pytest.raises(ValueError, match=message):
            CODER.choose(*given_as, name)


def test_a_codec_with_slack_takes_near_codes_that_cost_less(codec: Codec) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    photo = Image.fromarray(pixels).resize((320, 256))
    [nearest] = codec.encode_tokens([photo])
    [plain] = codec.compress([photo])
    [file] = codec.compress([photo], slack=0.2)
    [tokens] = codec.decode_tokens([file])
    assert len(file) < len(plain)
    assert 0 < (tokens != nearest).sum() < nearest.size
    images = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    rate = codec.config.default_rate
    directions = codec.model.directions(images, rate)
    options, similarities = codec.model.quantizer(rate).candidates(directions, 16)
    assert np.array_equal(options[0, ..., 0].numpy(), nearest)
    assert (similarities.diff(dim=-1) <= 0).all()
    ours = options == torch.from_numpy(tokens)[None, ..., None]
    assert ours.any(-1).all()
    lost = similarities[..., 0] - (similarities * ours).sum(-1)
    assert float(lost.max()) <= 0.2 + 1e-6
    for slack in (3, -0.1, float("nan")):
        with pytest.raises(ValueError, match="slack"):
            codec.compress([photo], slack=slack)
    # A codebook of fewer codes than there are candidates.
    directions = codec.model.directions(images, "coarse")
    few, _ = codec.model.quantizer("coarse").candidates(directions, 10**6)
    size = codec.config.rate("coarse").codebook_size
    assert few.shape[-1] == size
    assert (few.sort(-1).values == torch.arange(size)).all()


def test_logits_in_pieces_choose_the_same(monkeypatch) -> None:
    candidates, allowed = some_candidates(0, (2, 6, 7), CODES)
    whole = CODER.choose(candidates, allowed, "checkerboard")
    monkeypatch.setattr(token_coder, "_LOGITS_AT_ONCE", 2 * CODES * 3)
    assert same(CODER.choose(candidates, allowed, "checkerboard"), whole)
