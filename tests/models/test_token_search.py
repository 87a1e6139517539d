"""The search for better tokens (``--effort``), on the random model."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from percov2.codec import Codec
from percov2.models.tiny.torch import token_search
from percov2.models.tiny.torch.backbone import TinyTorchModel
from percov2.models.tiny.torch.token_search import TokenSearch, tiles
from percov2.models.torch.perceptual import LPIPS
from percov2.models.windows import window_starts
from tools.photos import noise, tensor

photo = partial(noise, block=8)


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 12), st.integers(0, 6), st.data())
def test_tiles_have_the_windows_of_the_whole(tokens, unit, extra, shared, data):
    overlap = unit * shared
    window = overlap + extra
    length = tokens * unit
    parts = tiles(length, window, overlap, unit)
    assert parts[0].start == 0 and parts[-1].stop == length
    stride = window - overlap
    whole = set(window_starts(length, window, stride))
    found = set()
    for part in parts:
        size = part.stop - part.start
        assert size > 0 and part.start % unit == 0 and part.stop % unit == 0
        found |= {part.start + s for s in window_starts(size, window, stride)}
    assert found == whole
    for before, after in pairwise(parts):
        assert before.start < after.start == before.stop - overlap


def distance(model: TinyTorchModel, directions: Tensor, image: Tensor, caption: str) -> float:
    """What the search lowers, at the phase at which it begins."""
    tokens = model.quantizer("fine").nearest(directions)
    painted = model.reconstruct(tokens, "fine", [caption], 1, 1.0, 0)
    lpips = float(LPIPS("alex")(painted, image))
    l1 = float((painted - image).abs().mean())
    return token_search.L1_WEIGHT * l1 + token_search.LPIPS_WEIGHT * lpips


@pytest.mark.parametrize("caption", ["", "a red door"])
def test_a_search_paints_the_picture_better(codec, caption):
    model = codec.model
    image = tensor(photo(64, 48))
    before = model.directions(image, "fine")
    after = TokenSearch(model, "fine", 60)(image, caption)
    assert after.shape == before.shape and after.dtype == torch.float32
    assert torch.allclose(after.norm(dim=-1), torch.ones(1, 3, 4), atol=1e-5)
    assert distance(model, after, image, caption) < 0.98 * distance(model, before, image, caption)
    weights = [p for part in (model.flow, model.autoencoder) for p in part.parameters()]
    assert all(p.grad is None for p in weights)


def test_files_hold_the_tokens_that_were_found(codec):
    model = codec.model
    pictures, captions = [photo(64, 48), photo(64, 48, 1), photo(64, 64)], ["", "a red door", ""]
    files = codec.compress(pictures, caption=captions, effort=3)
    decoded = codec.decode(files)
    for picture, caption, file in zip(pictures, captions, decoded, strict=True):
        directions = TokenSearch(model, "fine", 3)(tensor(picture), caption)
        expected = model.quantizer("fine").nearest(directions)[0].numpy()
        assert np.array_equal(file.tokens, expected)
        assert not np.array_equal(file.tokens, codec.encode_tokens([picture])[0])
    # A slack starts from the directions that were found.
    loose = codec.decode_tokens(codec.compress(pictures[:1], effort=3, slack=0.5))[0]
    assert not np.array_equal(loose, decoded[0].tokens)


def test_tiles_keep_what_earlier_ones_found(codec):
    """Windows of 18 latents overlap by 8: 512 pixels are 64 latents, so tiles at 0 and 30."""
    model = codec.model
    windows = model.window_sides("fine", 8, 64)
    assert (windows, model.config.overlap) == ((16, 18), 8)
    first, _ = tiles(64, 18, 8, 2)
    assert first == slice(0, 38)
    search = TokenSearch(model, "fine", 2)
    image = tensor(photo(512, 64))
    whole = search(image, "")
    text = model.text_encoder([""])
    noise, grain = model.draw_noise(8, 64, 0)
    grain = model.config.grain("fine", 1.0) * grain
    before = model.directions(image, "fine").clone()[:, :, :19]
    free = torch.zeros(1, 4, 19, dtype=torch.bool)
    start = noise[..., :38], grain[..., :38], windows
    found = search._improve(before, free, image[..., :304], text, start)
    assert torch.equal(whole[:, :, :19], found)
    assert not torch.equal(whole[:, :, 19:], model.directions(image, "fine")[:, :, 19:])


def test_refusals(codec, sd3_folder):
    with pytest.raises(ValueError, match=r"32x64 pixels are too few.*47"):
        codec.compress([photo(32, 64)], effort=1)
    with pytest.raises(ValueError, match="only small models"):
        Codec.from_pretrained(sd3_folder).compress([photo(64, 64)], effort=1)
