"""Tokens drawn as the model says, and tokens chosen with the rate in mind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from oracles import independent_model as reference
from percov2.codec import Codec
from percov2.entropy import cdf, sampling, schedule, token_coder
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.staging import one_pass_logits
from percov2.entropy.token_coder import TokenCoder
from percov2.entropy.torch import sampling as on_device
from percov2.entropy.transformer_config import TransformerConfig
from percov2.entropy.uniform import uniform_model
from tools.executors import coder_of, model_on, same


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_oracle_gives_the_known_answers_of_random123(counter, key, expected) -> None:
    assert reference.philox(counter, key) == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1))
@example(0, 0)
def test_philox_is_the_oracles(key: int, counter: int) -> None:
    found = sampling.philox(key, np.array([counter], dtype=np.int64))[0].tolist()
    words = (counter % 2**32, counter // 2**32, 0, 0), (key % 2**32, key // 2**32)
    assert tuple(found) == reference.philox(*words)


@settings(max_examples=60)
@given(
    st.integers(2, 40),
    st.integers(0, sampling.MAX_SEED),
    st.integers(0, 2**24),
    st.integers(0, 2**32),
    st.sampled_from([8, 300, 3000, 32767]),
)
def test_draws_are_the_oracles(size: int, seed: int, place: int, data: int, spread: int) -> None:
    generator = np.random.default_rng(data)
    logits = generator.integers(-spread, spread + 1, (2, 3, size), dtype=np.int16)
    places = np.array([place, 0, place + 1], dtype=np.int64)
    drawn = sampling.draw(logits, places, seed)
    assert drawn.dtype == np.int32
    there = on_device.draw(torch.from_numpy(logits), places, seed)
    assert there.dtype == torch.int32 and np.array_equal(there.numpy(), drawn)
    for row, found in zip(logits, drawn.tolist(), strict=True):
        assert found == [
            reference.draw(one.tolist(), seed, int(at)) for one, at in zip(row, places, strict=True)
        ]


def test_the_largest_codebook_needs_every_bit_of_the_product() -> None:
    logits = np.zeros((1, 64, cdf.MAX_CODEBOOK), np.int16)
    drawn = sampling.draw(logits, np.arange(64), seed=9)[0].tolist()
    expected = [reference.draw([0] * cdf.MAX_CODEBOOK, 9, place) for place in range(64)]
    assert drawn == expected
    assert on_device.draw(torch.from_numpy(logits), np.arange(64), 9)[0].tolist() == expected
    assert max(drawn) > 2**12  # the whole codebook is in reach


def test_a_target_on_a_bound_belongs_to_the_symbol_above() -> None:
    logits = np.zeros((1, 1, 2), np.int16)
    half = np.array([[1 << 31, 0, 0, 0]], np.uint32)  # half of the total: the first symbol's bound
    below = np.array([[(1 << 31) - 1, (1 << 32) - 1, 0, 0]], np.uint32)
    for words, token in ((half, 1), (below, 0)):
        assert sampling._drawn(logits, words).tolist() == [[token]]
        assert on_device._drawn(torch.from_numpy(logits), words).tolist() == [[token]]


def test_draws_follow_the_sharpened_distribution() -> None:
    count = 40_000
    logits = np.tile(np.array([0, -256, -512, -4000], np.int16), (1, count, 1))
    drawn = sampling.draw(logits, np.arange(count), seed=3)
    weights = 2.0 ** (-np.array([0.0, 1.0, 2.0]) * sampling.SHARPNESS / 256)
    shares = np.bincount(drawn[0], minlength=4) / count
    assert shares[3] == 0  # 2^-15 of the largest is below the floor of 2^-10
    # Five standard deviations of a share, at most sqrt(1/4 / count).
    assert np.abs(shares[:3] - weights / weights.sum()).max() < 2.5 / count**0.5


def test_places_of_a_batch_draw_alike_and_seeds_differ() -> None:
    logits = np.zeros((2, 50, 64), np.int16)
    first = sampling.draw(logits, np.arange(50), seed=1)
    assert np.array_equal(first[0], first[1])
    assert np.array_equal(
        sampling.draw(logits[:1, 10:20], np.arange(10, 20), 1)[0], first[0, 10:20]
    )
    assert not np.array_equal(sampling.draw(logits, np.arange(50), seed=2), first)


def test_draws_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).integers(-900, 900, (3, 50, 16), np.int16)
    whole = sampling.draw(logits, np.arange(50), seed=1)
    for at_once in (1, 7 * 3 * 16):
        monkeypatch.setattr(sampling, "AT_ONCE", at_once)
        assert np.array_equal(sampling.draw(logits, np.arange(50), seed=1), whole)
    assert sampling.draw(logits[:, :0], np.arange(0), seed=1).shape == (3, 0)


def test_wrong_draws_are_refused() -> None:
    logits = np.zeros((1, 2, 2), np.int16)
    for call, message in (
        (lambda: sampling.draw(logits, np.arange(2), -1), "seed of a draw"),
        (lambda: sampling.draw(logits, np.arange(2), sampling.MAX_SEED + 1), "seed of a draw"),
        (lambda: sampling.draw(logits, np.arange(3), 0), r"must be \[B, n, V\] for \[n\]"),
        (lambda: sampling.philox(2**64, np.arange(1)), "key"),
        (lambda: sampling.philox(0, np.array([-1])), "counter"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


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


def test_wrong_choices_are_refused() -> None:
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
