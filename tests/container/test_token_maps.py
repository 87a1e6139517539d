"""The data of stage 2: token maps of photos, and settings per rate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from percov2.codec import Codec
from percov2.photos import PhotoCrops
from percov2.training import commands
from percov2.training.commands import run_entropy, run_tokens
from tools.photos import store_photos


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Three photos of unlike sizes, as `percov2 train data` stores them."""
    return store_photos(tmp_path / "photos", [(64, 96), (96, 64), (72, 80)], 8)


def test_token_maps_have_views_of_training_photos(
    cache: Path, random_model: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(commands, "is_held_out", lambda key: key == "pic-1")
    run_tokens(random_model, cache, tmp_path / "maps.npz", views=3)
    codec = Codec.from_pretrained(random_model)
    with np.load(tmp_path / "maps.npz") as stored:
        assert stored["held_out"].tolist() == [False] * 3 + [True] + [False] * 3
        maps = [stored[f"tokens_{i}"] for i in range(7)]
    photos = PhotoCrops(cache, "all")
    for first, photo in zip((0, 3, 4), photos.photos, strict=True):
        pixels = photos.pixels(photo)
        whole = Image.fromarray(pixels[: photo.height // 16 * 16, : photo.width // 16 * 16])
        assert np.array_equal(maps[first], codec.encode_tokens([whole])[0])
    # Each further view is a shifted, perhaps mirrored, cut of its photo.
    for i, photo in ((1, 0), (2, 0), (5, 2), (6, 2)):
        pixels = photos.pixels(photos.photos[photo])
        rows, columns = (16 * n for n in maps[i].shape)
        cuts = [
            pixels[top : top + rows, left : left + columns][:, ::direction]
            for top in range(min(16, pixels.shape[0] - rows + 1))
            for left in range(min(16, pixels.shape[1] - columns + 1))
            for direction in (1, -1)
        ]
        cuts = [cut for cut in cuts if cut.shape[:2] == (rows, columns)]
        options = codec.encode_tokens([Image.fromarray(cut) for cut in cuts])
        assert any(np.array_equal(maps[i], option) for option in options)


def test_small_photos_are_counted_and_views_checked(
    cache: Path, random_model: Path, tmp_path: Path, capsys
) -> None:
    entries = json.loads((cache / "photos.json").read_text())
    entries[1][2:4] = [15, 64]
    entries[2][2:4] = [16, 17]  # one token, which every view must keep
    (cache / "photos.json").write_text(json.dumps(entries))
    run_tokens(random_model, cache, tmp_path / "maps.npz", views=4)
    assert "1 photos are smaller than a token of 16 pixels" in capsys.readouterr().out
    with np.load(tmp_path / "maps.npz") as stored:
        maps = [stored[name] for name in stored.files if name.startswith("tokens_")]
    assert len(maps) == 8 and [m.shape for m in maps[4:]] == [(1, 1)] * 4
    with pytest.raises(ValueError, match="views must be at least 1, not 0"):
        run_tokens(random_model, cache, tmp_path / "maps.npz", views=0)


def test_entropy_settings_of_a_rate_replace_the_common_ones(tmp_path: Path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(commands, "train_entropy", lambda *given, **_: seen.append(given[:2]))
    config = tmp_path / "config.toml"
    config.write_text(
        """
[entropy]
tokens_per_step = 64
loop = { steps = 7, learning_rate = 0.5 }
[entropy.rates.r002]
tokens_per_step = 32
loop = { steps = 9 }
""",
    )
    run_entropy(config, tmp_path, tmp_path)
    run_entropy(config, tmp_path, tmp_path, "r002")
    assert [entropy.tokens_per_step for entropy, _ in seen] == [64, 32]
    assert [(loop.steps, loop.learning_rate) for _, loop in seen] == [(7, 0.5), (9, 0.5)]
    with pytest.raises(ValueError, match=r"no \[entropy.rates.r010\]; it has \['r002'\]"):
        run_entropy(config, tmp_path, tmp_path, "r010")
