"""Pictures of different sizes in one batch of the encoders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from percov2 import BackboneOptions
from percov2.models.backbone import open_backbone
from percov2.models.tiny.torch import backbone
from percov2.models.tiny.torch.autoencoder import PatchAutoencoder
from percov2.models.torch.borders import own_borders

SIZES = [(64, 128), (192, 64), (128, 128), (64, 64)]


def padded(pictures: list[torch.Tensor]) -> torch.Tensor:
    height, width = (max(one.shape[axis] for one in pictures) for axis in (1, 2))
    batch = torch.zeros(len(pictures), 3, height + 64, width + 64)
    for place, picture in zip(batch, pictures, strict=True):
        place[:, : picture.shape[1], : picture.shape[2]] = picture
    return batch


@pytest.mark.parametrize("rate", ["r031", "r010", "r002"])
def test_a_batch_of_sizes_gives_the_latents_of_each_alone(rate):
    """The stated tolerance is 1e-4 of the latents' scale, which is about 1."""
    model = open_backbone("tiny", options=BackboneOptions(runtime="torch"))
    random = np.random.default_rng(0)
    pictures = [
        torch.from_numpy(random.uniform(-1, 1, (3, *size)).astype(np.float32)) for size in SIZES
    ]
    side = model.config.rate(rate).token_side
    hyper_encoder, batch = model.hyper_encoder(rate), padded(pictures)
    with torch.inference_mode():
        with own_borders(model.autoencoder.encoder, SIZES, 8):
            latents = model.autoencoder.encode(batch)
        small = [(height // 8, width // 8) for height, width in SIZES]
        with own_borders(hyper_encoder, small, side // 8):
            together = hyper_encoder(latents)
        plain = hyper_encoder(model.autoencoder.encode(batch))
        differs = False
        for i, picture in enumerate(pictures):
            (alone,) = model.hyper_latents(picture[None], rate)
            height, width = alone.shape[-2:]
            own = together[i, :, :height, :width]
            assert (own - alone[0]).abs().max() < 1e-4
            assert not together[i, :, height:].any() and not together[i, :, :, width:].any()
            differs |= bool((plain[i, :, :height, :width] - alone[0]).abs().max() > 1e-2)
        assert differs  # without the masks, the padding is seen
    with pytest.raises(ValueError, match="multiples of 8"), own_borders(hyper_encoder, [(4, 8)], 8):
        pass


def random_pictures(seed: int, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    sizes = 64 * random.integers(1, 5, (count, 2))
    return [random.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def tokens_in_every_company(model, rate: str) -> list[np.ndarray]:
    """Tokens of pictures of mixed sizes, which must not depend on their company."""
    pictures = random_pictures(1, 7)
    together = model.encode_pictures(pictures, rate)
    order = np.random.default_rng(2).permutation(len(pictures))
    shuffled = model.encode_pictures([pictures[i] for i in order], rate)
    for i, place in enumerate(order):
        np.testing.assert_array_equal(shuffled[i], together[place])
        (alone,) = model.encode_pictures([pictures[place]], rate)
        np.testing.assert_array_equal(alone, together[place])
    return together


@pytest.mark.parametrize("rate", ["r031", "r002"])
def test_batches_of_mixed_sizes_give_the_same_tokens_in_every_company(rate, monkeypatch):
    model = open_backbone("tiny", options=BackboneOptions(runtime="torch"))
    plain = model.encode_pictures(random_pictures(1, 7), rate)
    monkeypatch.setattr(backbone, "_PIXELS_AT_ONCE", 1 << 18)
    model.__dict__["mixes_sizes"] = True  # as on a GPU
    found = tokens_in_every_company(model, rate)
    places = sum(one.size for one in plain)
    same = sum(int((a == b).sum()) for a, b in zip(found, plain, strict=True))
    assert same >= 0.99 * places  # batches of other shapes round differently


def test_a_device_whose_batches_depend_on_their_company_is_found_out(monkeypatch):
    model = open_backbone("tiny", options=BackboneOptions(runtime="torch"))
    assert model.mixes_sizes is False  # the CPU encodes one picture at a time
    del model.__dict__["mixes_sizes"]
    monkeypatch.setattr(backbone, "_PIXELS_AT_ONCE", 1 << 16)
    model.device = torch.device("cpu:0")  # a name that is not "cpu"
    assert model.mixes_sizes is True
    del model.__dict__["mixes_sizes"]
    real = type(model)._in_bucket

    def dependent(self, pictures, rate, bucket):
        return [tokens + len(pictures) for tokens in real(self, pictures, rate, bucket)]

    monkeypatch.setattr(type(model), "_in_bucket", dependent)
    with pytest.warns(backbone.BatchWarning, match="one at a time"):
        assert model.mixes_sizes is False


@pytest.mark.cuda
@pytest.mark.parametrize("rate", ["r031", "r010", "r002"])
def test_a_card_gives_the_same_tokens_in_every_company(rate):
    model = open_backbone("tiny", "cuda")
    assert model.mixes_sizes
    tokens_in_every_company(model, rate)


def test_pictures_are_painted_in_batches_off_the_cpu(random_model, monkeypatch):
    plain = open_backbone(random_model, options=BackboneOptions(runtime="torch"))
    model = open_backbone(random_model, options=BackboneOptions(runtime="torch"))
    model.device = torch.device("cpu:0")  # a name that is not "cpu"
    sizes: list[int] = []
    decode = PatchAutoencoder.decode
    monkeypatch.setattr(
        PatchAutoencoder, "decode", lambda self, x: sizes.append(len(x)) or decode(self, x)
    )
    tokens = np.random.default_rng(2).integers(0, 64, (3, 4, 5))
    arguments = (tokens, "fine", ["", "a dog", ""], 1, 1.0, 0)
    painted, expected = model.reconstruct(*arguments), plain.reconstruct(*arguments)
    assert sizes == [3, 1, 1, 1]
    np.testing.assert_allclose(painted, expected, atol=1e-4)
