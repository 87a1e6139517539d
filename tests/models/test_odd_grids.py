"""Tokens of 8 pixels: latent grids with odd sides, which the flow's patches do not divide."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from percov2.codec import Codec
from percov2.models.config import Rate
from percov2.models.tiny.torch.backbone import TinyTorchModel
from percov2.models.tiny.torch.token_search import TokenSearch
from tools import random_model
from tools.photos import noise, tensor


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> Codec:
    """A random model of one rate whose tokens are latent positions."""
    folder = tmp_path_factory.mktemp("odd") / "model"
    rates = (Rate("r125", 8, 256),)
    return Codec(Codec.from_pretrained(random_model.build(folder, rates=rates)).model, None)


@pytest.fixture(scope="module")
def model(fine) -> TinyTorchModel:
    return fine.model


def some_tokens(h: int, w: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([h, w]).integers(0, 256, (1, h, w)))


def paint(model: TinyTorchModel, tokens: Tensor, steps: int = 1) -> Tensor:
    return model.reconstruct(tokens, "r125", ["a red door"] * len(tokens), steps, 1.0, 0)


def test_every_side_paints(model):
    for n in range(1, 41):
        for h, w in ((1, n), (n, 1), (n, n)):
            painted = paint(model, some_tokens(h, w))
            assert painted.shape == (1, 3, 8 * h, 8 * w) and painted.isfinite().all()


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 40), (40, 1), (3, 6), (6, 3), (15, 17), (21, 37)])
def test_a_grid_paints_as_it_does_padded_by_hand(model, h, w):
    tokens = torch.cat([some_tokens(h, w), some_tokens(h, w).flip(1, 2)])
    rows, columns = (torch.arange(n + n % 2).clamp(max=n - 1) for n in (h, w))
    padded = tokens[:, rows][:, :, columns]
    assert padded.shape[1] % 2 == padded.shape[2] % 2 == 0
    for steps in (1, 2):
        expected = paint(model, padded, steps)[..., : 8 * h, : 8 * w]
        # One token is projected to z_hat in another order of additions than four.
        torch.testing.assert_close(paint(model, tokens, steps), expected, rtol=0, atol=1e-5)


def test_every_token_of_an_odd_grid_reaches_the_picture(model):
    tokens = some_tokens(3, 5)
    usual = paint(model, tokens)
    for y, x in product(range(3), range(5)):
        changed = tokens.clone()
        changed[0, y, x] = (changed[0, y, x] + 1) % 256
        here = (..., slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8))
        assert not torch.equal(paint(model, changed)[here], usual[here])


@pytest.mark.parametrize("size", [(1, 1), (8, 320), (320, 8), (65, 40), (7, 9), (56, 72)])
def test_pictures_of_any_size_come_back(fine, size):
    (file,) = fine.compress([noise(*size)])
    (tokens,) = fine.decode_tokens([file])
    assert tokens.shape == (-(-size[1] // 8), -(-size[0] // 8))
    assert fine.decompress([file])[0].size == size


@pytest.mark.parametrize(("h", "w"), [(5, 7), (6, 4)])
def test_painting_once_is_one_step(model, h, w):
    tokens = torch.cat([some_tokens(h, w), some_tokens(h, w).flip(1)])
    noise, grain = model.draw_noise(h, w, 0)
    noises = noise, model.config.grain("r125", 1.0) * grain
    with torch.no_grad():
        text = model.text_encoder(["a red door"] * 2)
        windows = model.window_sides("r125", h, w)
        once = model.paint_once(model.z_hat(tokens, "r125"), text, *noises, windows)
    assert torch.equal(once.clamp(-1, 1), paint(model, tokens))


def test_a_search_takes_odd_grids(fine, model):
    # Windows of 16 latents overlap by 8: 65 latents are tiles at 0, 24 and 48, the last one odd.
    picture = noise(520, 56)
    image = tensor(picture)
    before = model.directions(image, "r125")
    after = TokenSearch(model, "r125", 2)(image, "a red door")
    assert after.shape == before.shape == (1, 7, 65, 8)
    assert bool((after != before).any(-1).all())
    (file,) = fine.compress([picture], caption=["a red door"], effort=2)
    expected = model.quantizer("r125").nearest(after)[0].numpy()
    np.testing.assert_array_equal(fine.decode_tokens([file])[0], expected)
