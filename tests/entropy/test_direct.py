"""Baselines with one entry per token: the re-reading masked model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from oracles import independent_model
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.schedule import stages
from percov2.entropy.torch.direct import (
    UNKNOWN,
    DirectBatch,
    direct_logits,
    int_direct_logits,
    masked_plan,
)
from percov2.entropy.torch.export import export
from percov2.entropy.torch.quantization import LOGIT_SCALE
from percov2.entropy.torch.transformer import Crop, TokenTransformer, TransformerConfig, crop_batch
from percov2.evaluation.study.coders import DirectCoder, token_map
from percov2.training.study.direct_stage import masked_examples
from tools.executors import FROZEN, load_on, model_on, same

SIZES = TransformerConfig(codebook_size=16, dim=32, heads=2, head_dim=16, layers=2, hidden=64)


@pytest.fixture(scope="module")
def model() -> IntTransformer:
    return load_on("torch", FROZEN)


def grid(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((np.abs(7 * y - 3 * x) // 4 + y * x // 9) % 16).astype(np.int32)


def plain_logits(tokens: np.ndarray, known: np.ndarray) -> list[list[int]]:
    """One entry per token, known or not, that sees all of them: in plain Python."""
    plain = independent_model.Grid(independent_model.read_model(FROZEN), *tokens.shape)
    places = [(int(y), int(x)) for y, x in np.ndindex(*tokens.shape)]
    entries = [
        plain.payload(place, "embedding.token", int(tokens[place]))
        if known[place]
        else plain.payload(place, "embedding.query")
        for place in places
    ]
    return plain.run(entries, places, keep=True, answer=True)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 4), (2, 19)])
def test_logits_equal_the_oracle(model: IntTransformer, height: int, width: int) -> None:
    tokens = grid(height, width)
    known = (np.arange(tokens.size) % 3 == 1).reshape(tokens.shape)
    expected = np.array(plain_logits(tokens, known))
    plan = masked_plan(np.ones_like(tokens))
    payload = plan.payload(np.where(known, tokens, UNKNOWN).reshape(-1))
    logits = int_direct_logits(model, plan.entries, payload, (height, width))
    assert logits.dtype == torch.int16
    assert np.array_equal(logits.numpy(), expected)


def test_another_executor_is_refused() -> None:
    plan = masked_plan(np.ones((2, 2), np.int32))
    with pytest.raises(ValueError, match="executor 'cpu' runs the model; it must be 'torch'"):
        int_direct_logits(IntTransformer.load(FROZEN), plan.entries, np.zeros(4, np.int64), (2, 2))


@pytest.mark.parametrize("name", ["checkerboard", "qlds12", "var"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (3, 20)])
def test_maps_are_decoded_as_they_were(
    model: IntTransformer, name: str, height: int, width: int
) -> None:
    coder = DirectCoder(model, lambda h, w: masked_plan(stages(name, h, w)), 16)
    tokens = token_map(grid(height, width))
    payload = coder.encode(tokens)
    assert np.array_equal(coder.decode(payload, (height, width)), tokens.tokens)
    bits = coder.stage_bits(tokens)
    assert [len(part) for part in bits] == np.bincount(stages(name, height, width).flat)[
        1:
    ].tolist()
    assert abs(len(payload) - (sum(part.sum() for part in bits) + 16) / 8) < 1.5
    with pytest.raises(ValueError, match="does not match"):
        coder.decode(bytes([payload[0] ^ 1]) + payload[1:], (height, width))


def crops() -> list[Crop]:
    return [Crop(grid(9, 11) * (i + 1) % 16, stages("var", 9, 11), i, 3 - i) for i in range(4)]


def test_examples_are_masked_crops() -> None:
    batch = crop_batch(crops(), 5, 6)
    random = np.random.default_rng(0)
    shares = []
    for _ in range(100):
        example = masked_examples(random, batch)
        assert same(example.targets, batch.tokens.flatten(1))
        unknown = example.batch.payload == UNKNOWN
        assert same(example.weights > 0, unknown)
        assert same(example.batch.payload[~unknown], example.targets[~unknown])
        # Every crop counts as much as every other.
        assert torch.allclose(example.weights.sum(1), torch.full((4,), 0.25))
        assert all(len(row[row > 0].unique()) == 1 for row in example.weights)
        shares += unknown.float().mean(1).tolist()
    counts = np.histogram(shares, 5, (0, 1))[0]
    assert counts.min() > 50 and min(shares) < 0.05 and max(shares) == 1
    for name, axis in (("rows", 0), ("columns", 1)):
        placed = getattr(example.batch, name).view(4, 5, 6)
        expected = getattr(batch, name)
        assert same(placed.select(2 - axis, 0), expected)
        assert same(placed.select(2 - axis, 3), expected)


def test_integer_form_equals_the_rounded_form() -> None:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    model = TokenTransformer(SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    model.observing = True
    whole = crop_batch(
        [Crop(grid(8, 9) * i % 16, np.ones((8, 9), np.int32)) for i in range(6)], 8, 9
    )
    losses = []
    for step in range(40):
        model.quantized = step >= 25
        example = masked_examples(random, whole)
        nats = functional.cross_entropy(
            direct_logits(model, example.batch).flatten(0, 1),
            example.targets.flatten(),
            reduction="none",
        )
        loss = (nats * example.weights.flatten()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    model.observing = False
    integer = model_on("torch", SIZES, export(model).tensors)
    batch = example.batch
    one = DirectBatch(
        batch.entries,
        *(part[2:3] for part in (batch.payload, batch.rows, batch.columns, batch.sizes)),
    )
    with torch.no_grad():
        rounded = direct_logits(model, one)[0] / LOGIT_SCALE
    logits = int_direct_logits(integer, batch.entries, batch.payload[2].numpy(), (8, 9)).float()
    assert float((logits - rounded).abs().mean()) < 0.02 * float(logits.std())
