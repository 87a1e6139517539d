"""A new rate with 8-pixel tokens for a trained model: its start, and the unchanged rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from percov2.codec import Codec
from percov2.photos import CropPlan, PhotoCrops
from percov2.training import checkpoint
from percov2.training.commands import run_codec, run_entropy, run_export, run_tokens
from percov2.training.rates import RateConfig, RateNetworks
from percov2.training.warm_start import start_from
from tools.photo_store import store_photos
from tools.rate_runs import (
    ALL,
    config_text,
    entropy_models,
    moved,
    snapshot,
    stage_of,
    trained,
    written,
)

ENTROPY = """
[entropy]
model = { dim = 16, heads = 1, head_dim = 16, layers = 1, hidden = 16 }
shapes = [[4, 4]]
tokens_per_step = 64
loop = { steps = 4, warmup = 1 }

[entropy.rates.r125]
shapes = [[7, 8], [5, 5]]
"""


def frozen_text(steps: int = 3) -> str:
    """Four rates, of which the three of the model stay as they are."""
    text = config_text([*ALL, "r125"], steps=steps) + ENTROPY
    for name in ALL:
        text = text.replace(f"[codec.rates.{name}]", f"[codec.rates.{name}]\nfrozen_tokens = true")
    return text.replace("share = 0.25", "share = 3.0")


@pytest.fixture(scope="module")
def finished(photo_cache, tmp_path_factory) -> Path:
    """A model folder of three rates; the run lies beside it."""
    folder = tmp_path_factory.mktemp("finished")
    trained(folder, photo_cache, config_text(ALL, steps=2))
    entropy = entropy_models(folder, ALL)
    run_export(folder / "config.toml", photo_cache, folder / "run", folder / "model", entropy)
    return folder / "model"


@pytest.fixture(scope="module")
def longer(finished, photo_cache, tmp_path_factory) -> Path:
    """A run that adds the fourth rate, and its configuration."""
    folder = tmp_path_factory.mktemp("longer")
    config = written(folder, frozen_text())
    run_codec(config, photo_cache, folder / "run", start_from=finished)
    return folder


@pytest.fixture
def model(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "model")


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def photo_of(cache: Path, index: int) -> Image.Image:
    data = PhotoCrops(cache)
    return Image.fromarray(data.pixels(data.photos[index]))


def test_a_finer_rate_starts_as_its_donor_on_constant_latents(finished, photo_cache, tmp_path):
    stage, _ = stage_of(tmp_path, photo_cache, config_text([*ALL, "r125"]))
    origins = start_from(stage, finished.parent / "run")
    assert origins["r125"] == "from r031, except for new quantizer.codebook, quantizer.usage"
    donor, heir = stage._rate("r031").hyper_encoder, stage._rate("r125").hyper_encoder
    weights = donor.state_dict()
    for name, value in heir.state_dict().items():
        if value.shape == weights[name].shape:
            assert torch.equal(value, weights[name]), name
        else:
            torch.testing.assert_close(value[..., 0, 0], weights[name].sum((2, 3)))
    features = torch.randn(1, 8, 1, 1)
    with torch.no_grad():
        coarse = donor.body[9](features.expand(1, 8, 12, 12))[..., 1:-1, 1:-1]
        fine = heir.body[9](features)
    torch.testing.assert_close(coarse, fine.expand_as(coarse), rtol=1e-4, atol=1e-5)


def test_export_adds_a_rate_and_leaves_the_others_byte_for_byte(
    finished, longer, model, photo_cache, tmp_path
):
    before = contents(model)
    picture = photo_of(photo_cache, 2)
    files = [Codec.from_pretrained(model).compress([picture], rate=name)[0] for name in ALL]
    tokens = Codec.from_pretrained(model).decode_tokens(files)
    entropy = entropy_models(tmp_path, ["r125"])
    run_export(longer / "config.toml", photo_cache, longer / "run", model, entropy)

    after = contents(model)
    for name in ALL:
        for path in [path for path in before if path.startswith(f"{name}/")]:
            # The projection of codes to z_hat belongs to painting, and learns.
            assert after[path] == before[path] or path == f"{name}/quantizer/model.safetensors"
    stored, fresh = (
        load_file(folder / "autoencoder/model.safetensors") for folder in (finished, model)
    )
    assert not any(name.startswith("encoder.") for name in moved(fresh, stored))
    assert moved(fresh, stored)
    assert after["model_id"].startswith(before["model_id"])
    assert after["flow/model.safetensors"] != before["flow/model.safetensors"]
    codec = Codec.from_pretrained(model)
    assert [rate.name for rate in codec.config.rates] == [*ALL, "r125"]
    assert codec.config.default_rate == "r031"
    for one, expected in zip(codec.decode_tokens(files), tokens, strict=True):
        np.testing.assert_array_equal(one, expected)
    assert [codec.compress([picture], rate=name)[0] for name in ALL] == files
    (fine,) = codec.compress([picture], rate="r125")
    (decoded,) = codec.decode([fine])
    assert (decoded.header.rate, decoded.tokens.shape) == (3, (9, 10))
    assert codec.decompress([fine])[0].size == picture.size


def test_export_keeps_rates_that_the_run_does_not_have(finished, model, photo_cache, tmp_path):
    config = written(tmp_path, config_text(["r125", "r010"], steps=2))
    run_codec(config, photo_cache, tmp_path / "run", start_from=model)
    run_export(config, photo_cache, tmp_path / "run", model, entropy_models(tmp_path, ["r125"]))
    stored = json.loads((model / "config.json").read_text())
    assert [rate["name"] for rate in stored["rates"]] == [*ALL, "r125"]
    assert stored["default_rate"] == "r031"
    before, after = contents(finished), contents(model)
    for path in before:
        if path.startswith(("r031/", "r002/")):
            assert after[path] == before[path], path
    names = [line.split()[1] for line in after["model_id"].decode().splitlines()]
    assert names == [*ALL, "r125"]


def test_rates_freeze_their_tokens_one_by_one(photo_cache, tmp_path):
    before = snapshot(stage_of(tmp_path, photo_cache, frozen_text(8))[0])
    trained(tmp_path, photo_cache, frozen_text(8))
    stored = checkpoint.read(tmp_path / "run" / "checkpoint.pt")
    for part in ("model", "ema"):
        learnt = moved(before, stored[part])
        inside = {k for k in learnt if k.startswith("rates.") and ".project_out." not in k}
        assert {key.split(".")[1] for key in inside} == {"r125"}
        assert any(key.startswith("flow.") for key in learnt)


def test_export_again_writes_the_same_bytes(finished, model, photo_cache):
    home = finished.parent
    run_export(home / "config.toml", photo_cache, home / "run", model)
    assert contents(model) == contents(finished)


def test_crops_have_whole_patches_of_the_flow():
    fine = {"channels": 8, "hyper_channels": 8, "stride": 1}
    with pytest.raises(ValueError, match=r"\[56\].*16 pixels"):
        RateNetworks(RateConfig(hyper_encoder=fine, crops=CropPlan((56, 64), (1, 1))))
    RateNetworks(RateConfig(hyper_encoder=fine, crops=CropPlan((48, 64), (1, 1))))


def test_tokens_and_entropy_model_of_the_added_rate(longer, model, photo_cache, tmp_path):
    config = longer / "config.toml"
    run_export(config, photo_cache, longer / "run", model)
    photos = store_photos(tmp_path / "photos", [(64, 80)] * 40, 8)
    run_tokens(model, photos, tmp_path / "r125.npz", "r125", views=2)
    stored = np.load(tmp_path / "r125.npz")
    assert stored["tokens_0"].shape[0] in (7, 8) and int(stored["codebook_size"]) == 16
    run_entropy(config, tmp_path / "r125.npz", tmp_path / "entropy", "r125")
    argument = f"r125={tmp_path / 'entropy' / 'entropy'}"
    run_export(config, photo_cache, longer / "run", model, [argument])
    codec = Codec.from_pretrained(model)
    (file,) = codec.compress([photo_of(photos, 0)], rate="r125")
    np.testing.assert_array_equal(
        codec.decode_tokens([file])[0], codec.encode_tokens([photo_of(photos, 0)], "r125")[0]
    )
