"""Explicit hierarchical VAR: scales, residual codebooks, their tokens, coding and training."""

from __future__ import annotations

import json
import shutil
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from oracles import independent_model
from percov2.codec import Codec
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.torch.direct import int_direct_logits
from percov2.entropy.torch.scales import scale_plan, scale_shapes
from percov2.entropy.transformer_config import TransformerConfig
from percov2.evaluation.study.coders import DirectCoder, TokenMap
from percov2.evaluation.study.schedules import STUDY_SCHEDULES
from percov2.photos import PhotoCrops, is_held_out
from percov2.training.commands import run_tokens
from percov2.training.loop import LoopConfig
from percov2.training.stage2 import EntropyConfig, TokenMaps, train_entropy
from percov2.training.study.multiscale import (
    PhotoDirections,
    ScaleMaps,
    ScaleQuantizer,
    k_means,
    mean_cosines,
    photo_directions,
    same_tokens,
)
from tools.command_line import failure, run
from tools.executors import random_on
from tools.photos import store_photos
from tools.random_model import with_entropy

SIZE = 16
"""Codes of each scale of the small models here."""


@pytest.fixture(scope="module")
def model() -> IntTransformer:
    sizes = TransformerConfig(5 * SIZE, dim=16, heads=2, head_dim=8, layers=2, hidden=32)
    return random_on("torch", sizes, 1)


def random_tokens(height: int, width: int, seed: int = 0) -> np.ndarray:
    count = sum(h * w for h, w in scale_shapes(height, width))
    return np.random.default_rng(seed).integers(0, SIZE, count).astype(np.int32)


def slow_cells(height: int, width: int) -> list[dict]:
    """Every token: its scale 1 .. S, its cell, the middle of it, and the cell over it."""
    shapes = [(height, width)]
    while shapes[0] != (1, 1):
        shapes.insert(0, ((shapes[0][0] + 1) // 2, (shapes[0][1] + 1) // 2))
    cells = []
    for g, (down, across) in enumerate(shapes, 1):
        for y, x in np.ndindex(down, across):
            over = None
            if g > 1:
                h, w = shapes[g - 2]
                over = (g - 1, int(y / down * h + 1e-9), int(x / across * w + 1e-9))
            middle = (int((y + 0.5) * height / down), int((x + 0.5) * width / across))
            cells.append({"cell": (g, y, x), "over": over, "middle": middle})
    return cells


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (3, 3), (8, 5), (8, 8), (13, 7)])
def test_scales_are_what_they_should_be(height, width):
    cells = slow_cells(height, width)
    plan = scale_plan(height, width, SIZE)
    where = {cell["cell"]: i for i, cell in enumerate(cells)}
    assert plan.stage.tolist() == [cell["cell"][0] for cell in cells]
    assert np.array_equal(plan.entries.key_stage, plan.stage)
    assert np.array_equal(plan.entries.reads, plan.stage)
    middles = list(zip(plan.entries.row.tolist(), plan.entries.column.tolist(), strict=True))
    assert middles == [cell["middle"] for cell in cells]
    assert plan.source.tolist() == [where.get(cell["over"], -1) for cell in cells]
    assert plan.first.tolist() == [(cell["cell"][0] - 1) * SIZE for cell in cells]
    # Every token is over some cell of the next scale: nothing is lost on the way.
    finest = plan.stage == plan.stage.max()
    assert set(plan.source[plan.source >= 0]) == set(np.flatnonzero(~finest))


def test_logits_equal_the_oracle(model, tmp_path):
    height, width = 3, 5
    tokens = random_tokens(height, width)
    cells = slow_cells(height, width)
    plan = scale_plan(height, width, SIZE)
    where = {cell["cell"]: i for i, cell in enumerate(cells)}
    model.save(tmp_path)
    plain = independent_model.Grid(independent_model.read_model(tmp_path), height, width)

    def payload(cell: dict) -> list[int]:
        if cell["over"] is None:
            return plain.payload(cell["middle"], "embedding.query")
        token = int(tokens[where[cell["over"]]]) + (cell["cell"][0] - 2) * SIZE
        return plain.payload(cell["middle"], "embedding.token", token)

    expected: list[list[int]] = []
    for _, scale in groupby(cells, key=lambda cell: cell["cell"][0]):
        found = list(scale)
        middles = [cell["middle"] for cell in found]
        expected += plain.run([payload(c) for c in found], middles, keep=True, answer=True)
    logits = int_direct_logits(model, plan.entries, plan.payload(tokens), (height, width))
    assert np.array_equal(logits.numpy(), expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 3), (8, 5), (13, 7)])
def test_maps_are_decoded_as_they_were(model, height, width):
    coder = DirectCoder(model, lambda h, w: scale_plan(h, w, SIZE), SIZE)
    tokens = TokenMap((height, width), random_tokens(height, width))
    payload = coder.encode(tokens)
    assert np.array_equal(coder.decode(payload, (height, width)), tokens.tokens)
    bits = coder.stage_bits(tokens)
    assert [len(part) for part in bits] == [h * w for h, w in scale_shapes(height, width)]
    assert abs(len(payload) - (sum(part.sum() for part in bits) + 16) / 8) < 1.5


def test_k_means_finds_clusters():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    vectors = (centres[torch.arange(300) % 3] + 0.1 * torch.randn(300, 2))[torch.randperm(300)]
    means = k_means(vectors, 3, seed=2)
    assert float(torch.cdist(centres, means).min(1).values.max()) < 0.1
    with pytest.raises(ValueError, match="300 vectors for 301 codes"):
        k_means(vectors, 301, seed=0)


def smooth_directions(count: int, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    grids = []
    for i in range(count):
        coarse = torch.randn(1, 3, 2, 2)
        fine = torch.nn.functional.interpolate(coarse, (4 + i % 2, 5), mode="bicubic")
        fine = fine + 0.2 * torch.randn_like(fine)
        grids.append(torch.nn.functional.normalize(fine[0].permute(1, 2, 0), dim=-1))
    return grids


def test_tokens_are_the_nearest_codes_of_what_is_left():
    torch.manual_seed(3)
    quantizer = ScaleQuantizer(torch.randn(2, SIZE, 3))
    grid = torch.nn.functional.normalize(torch.randn(2, 2, 3), dim=-1)
    tokens = quantizer.tokens(grid)
    books = quantizer.codebooks.numpy()
    vectors = grid.reshape(4, 3).numpy()
    first = int(np.square(books[0] - vectors.mean(0)).sum(1).argmin())
    left = vectors - books[0][first]  # one cell says the same everywhere
    others = [int(np.square(books[1] - v).sum(1).argmin()) for v in left]
    assert tokens.tolist() == [first, *others]
    total = books[0][first] + books[1][others]
    expected = total / np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(quantizer.restored(tokens, (2, 2)).reshape(4, 3), expected, 1e-5)
    with pytest.raises(ValueError, match="grid of 3x3 has 3 scales; the training photos had 2"):
        quantizer.tokens(torch.randn(3, 3, 3))


def test_fitted_scales_describe_unseen_directions_better_than_fewer_scales():
    quantizer = ScaleQuantizer.fit(smooth_directions(60, 0), SIZE)
    assert tuple(quantizer.codebooks.shape) == (4, SIZE, 3)
    cosines = []
    for scales in range(1, 5):
        books = quantizer.codebooks.clone()
        books[scales:] = 0
        part = ScaleQuantizer(books)
        unseen = smooth_directions(20, 1)
        restored = [part.restored(part.tokens(g), (g.shape[0], g.shape[1])) for g in unseen]
        values = [(g * r).sum(-1).mean() for g, r in zip(unseen, restored, strict=True)]
        cosines.append(float(torch.stack(values).mean()))
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.7 < 0.95 < cosines[3]


@pytest.fixture(scope="module")
def photos() -> PhotoDirections:
    return PhotoDirections(smooth_directions(40, 0), [i % 4 == 3 for i in range(40)])


def test_codebooks_are_fitted_once(photos, tmp_path):
    path = tmp_path / "run" / "codebooks.npy"
    first = ScaleQuantizer.stored(path, photos, SIZE)
    trained_on = [g for g, held in zip(photos.directions, photos.held_out, strict=True) if not held]
    assert torch.equal(first.codebooks, ScaleQuantizer.fit(trained_on, SIZE).codebooks)
    np.save(path, np.zeros((4, SIZE, 3), np.float32))
    assert not ScaleQuantizer.stored(path, photos, SIZE).codebooks.any()


def test_draws_are_whole_maps_of_one_shape(photos):
    quantizer = ScaleQuantizer.fit(photos.directions, SIZE)
    maps = ScaleMaps(quantizer, photos)
    assert len(maps.held_out) == 10
    assert {k: len(v) for k, v in maps.maps.items()} == {(4, 5): 20, (5, 5): 10}
    assert np.array_equal(maps.held_out[1][1], quantizer.tokens(photos.directions[7]))
    assert maps.counts().sum() == sum(tokens.size for tokens in maps.maps.values())
    shapes = set()
    for seed in range(20):
        batch, targets, weights = maps.draw(np.random.default_rng(seed), 200)
        shape = (4, 5) if targets.shape[1] == len(scale_plan(4, 5, SIZE).stage) else (5, 5)
        shapes.add(shape)
        plan = scale_plan(*shape, SIZE)
        assert len(targets) == round(200 / len(plan.stage))
        tokens = targets.numpy() - plan.first
        for row, payload in zip(tokens, batch.payload.numpy(), strict=True):
            assert any(np.array_equal(row, known) for known in maps.maps[shape])
            assert np.array_equal(payload, plan.payload(row))
        assert float(weights.sum()) == pytest.approx(1)
        assert torch.equal(batch.rows[0], torch.from_numpy(16 * plan.entries.row // shape[0]))
        assert torch.equal(batch.columns[0], torch.from_numpy(16 * plan.entries.column // 5))
    assert len(shapes) == 2


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Photos as `percov2 train data` stores them, more of them than a scale has codes (64)."""
    sizes = [((32, 50), (48, 32))[i % 2] for i in range(90)]
    return store_photos(tmp_path_factory.mktemp("photos"), sizes, 2)


@pytest.fixture(scope="module")
def maps(cache, random_model) -> Path:
    run_tokens(random_model, cache, cache / "maps.npz", "fine")
    return cache / "maps.npz"


def test_directions_are_those_of_the_token_maps_and_of_no_others(
    cache, maps, random_model, tmp_path
):
    model = Codec.from_pretrained(random_model).model
    photos = photo_directions(model, "fine", cache)
    assert photos.held_out == [is_held_out(f"pic-{i}") for i in range(90)]
    codebook = model.quantizer("fine").codebook
    cosines = []
    with np.load(maps) as stored:
        for i, grid in enumerate(photos.directions):
            tokens = stored[f"tokens_{i}"]
            assert np.array_equal((grid @ codebook.T).argmax(-1), tokens)
            if photos.held_out[i]:
                cosines.append((grid * codebook[torch.from_numpy(tokens).long()]).sum(-1))
    quantizer = ScaleQuantizer.stored(tmp_path / "codebooks.npy", photos, 64)
    single, several = mean_cosines(model, "fine", quantizer, photos)
    assert single == pytest.approx(float(torch.cat([c.flatten() for c in cosines]).mean()))
    assert 0.5 < several < 1
    held_out = TokenMaps(maps).held_out
    assert same_tokens(model, "fine", photos, held_out) == 1.0
    assert same_tokens(model, "fine", photos, held_out[1:]) == 0.0
    # The pictures that random weights see are much alike; random directions are not.
    others = [torch.randn(d.shape, generator=torch.manual_seed(0)) for d in photos.directions]
    assert same_tokens(model, "fine", PhotoDirections(others, photos.held_out), held_out) < 0.2


def test_the_command_compares_explicit_var(
    cache, maps, random_model, tmp_path, capsys, monkeypatch
):
    sizes = {"dim": 16, "heads": 2, "head_dim": 8, "layers": 1, "hidden": 16}
    config = EntropyConfig(model=sizes, shapes=((2, 3),), tokens_per_step=120)
    loop = LoopConfig(steps=4, learning_rate=4e-3, warmup=2, ema=0.9)
    train_entropy(config, loop, maps, tmp_path / "shared", schedules=())
    folder = with_entropy(random_model, tmp_path / "shared", tmp_path / "model")
    few = {"var": STUDY_SCHEDULES["var"]}
    monkeypatch.setattr("percov2.evaluation.study.comparison.STUDY_SCHEDULES", few)
    out = tmp_path / "out"
    command = ("eval", "entropy", "--data", maps, "--model", folder)
    command += ("--rate", "fine", "--out", out, "--entropy-run", tmp_path / "shared")
    command += ("--baselines", "multiscale")
    assert "multiscale needs --photos" in failure(capsys, *command)
    assert run(*command, "--photos", cache) == 0
    row = json.loads((out / "report.json").read_text())["methods"][-1]
    count = len(TokenMaps(maps).held_out)
    assert (row["name"], row["weights"], row["maps"]) == ("explicit_var", "own", count)
    # 2x3 and 3x2 tokens: 1 x 1, then 1 x 2 or 2 x 1, then all of them.
    assert row["stage_tokens"] == [count, 2 * count, 6 * count]
    assert (out / "schedule_explicit_var.png").is_file()
    assert "mean cosine with the hyper-latents' directions is 0." in (out / "report.md").read_text()

    whole = PhotoCrops.__init__

    def without_some(self: PhotoCrops, *arguments: object) -> None:
        whole(self, *arguments)
        self.photos = self.photos[1:-10]

    monkeypatch.setattr(PhotoCrops, "__init__", without_some)
    shutil.rmtree(out)
    AcceleratorState._reset_state(True)
    assert run(*command, "--photos", cache) == 2
    assert "other photos than the token maps" in capsys.readouterr().err
