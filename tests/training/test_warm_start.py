"""Runs that start from other runs, rates added to a trained model, and the parts that stay."""

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
from percov2.models.tiny.torch.autoencoder import ResidualBlock
from percov2.models.tiny.torch.backbone import TinyTorchModel
from percov2.photos import CropPlan, PhotoCrops
from percov2.training import checkpoint
from percov2.training.commands import codec_stage, run_codec, run_entropy, run_export, run_tokens
from percov2.training.loop import train
from percov2.training.rates import RateConfig, RateNetworks
from percov2.training.warm_start import start_from
from tools.photos import store_photos
from tools.rate_runs import ALL, config_text, entropies, moved, snapshot, stage_of, trained, written


@pytest.mark.parametrize("old_names", [False, True])
def test_warm_start_loads_what_it_says(old_names, first, photo_cache, tmp_path):
    run = shutil.copytree(first[1], tmp_path / "first")
    if old_names:  # of runs of one rate, before there were several
        state = checkpoint.read(run / "checkpoint.pt")
        state["ema"] = {k.removeprefix("rates.r031."): v for k, v in state["ema"].items()}
        checkpoint.write(run / "checkpoint.pt", state)
    stage, _ = stage_of(tmp_path, photo_cache, config_text(ALL))
    fresh = snapshot(stage)
    origins = start_from(stage, run)
    state, known = stage.state_dict(), first[0].state_dict()
    assert not moved(state, known) and moved(fresh, known)
    assert origins["r031"] == "from r031"
    for name in ("r010", "r002"):
        said, new = origins[name].split("new ")
        assert said == "from r031, except for "
        assert set(new.split(", ")) == {"quantizer.codebook", "quantizer.usage"}
        changed = moved(fresh, state)
        assert not {f"rates.{name}.{part}" for part in new.split(", ")} & changed


def test_a_new_rate_starts_as_its_donor_on_coarser_latents(first, photo_cache, tmp_path):
    stage, _ = stage_of(tmp_path, photo_cache, config_text(ALL))
    start_from(stage, first[1])
    r031, r010, r002 = (stage.rates[name].hyper_encoder for name in ALL)
    # Constant in blocks of 4, so that averaging over 2x2 latents loses nothing in r002's first
    # layer: there it is the donor's first layer on the halved grid.
    for coarser, layer, channels in ((r002, 0, 16), (r010, 4, 8)):
        coarse = torch.randn(1, channels, 6, 6)
        fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
        with torch.no_grad():
            expected = r031.body[layer](coarse)
            assert torch.allclose(coarser.body[layer](fine), expected, atol=1e-5)


def test_frozen_tokens_stay_while_pictures_learn(photo_cache, tmp_path):
    stage, loop = stage_of(
        tmp_path, photo_cache, config_text(["r031", "r010"], "frozen_tokens = true")
    )
    before = snapshot(stage)
    train(stage, loop, tmp_path / "run")
    learnt = moved(before, checkpoint.read(tmp_path / "run" / "checkpoint.pt")["model"])
    learns = ("autoencoder.decoder", "flow.", "text_encoder.")
    assert {k for k in learnt if not k.startswith(learns)} == {
        f"rates.{n}.quantizer.project_out.{k}" for n in ("r031", "r010") for k in ("weight", "bias")
    }
    assert all(any(k.startswith(part) for k in learnt) for part in learns)
    rate = stage._rate("r031")
    latents = torch.randn(2, 16, 6, 6)
    quantized = rate(latents)
    tokens = rate.quantizer.tokens(rate.hyper_encoder(latents))
    assert torch.equal(quantized.tokens, tokens)
    assert torch.equal(quantized.z_hat, rate.quantizer.lookup(tokens))


def test_a_kept_codebook_stays_while_its_hyper_encoder_learns(photo_cache, tmp_path):
    text = config_text(["r031", "r010"])
    text = text.replace("[codec.rates.r031]", "[codec.rates.r031]\ncodebook_decay = 1.0")
    stage, loop = stage_of(tmp_path, photo_cache, text)
    before = snapshot(stage)
    train(stage, loop, tmp_path / "run")
    learnt = moved(before, checkpoint.read(tmp_path / "run" / "checkpoint.pt")["model"])
    assert "rates.r010.quantizer.codebook" in learnt
    assert "rates.r031.quantizer.codebook" not in learnt
    assert "rates.r031.quantizer.project_in.weight" in learnt
    assert any(k.startswith("rates.r031.hyper_encoder") for k in learnt)
    # Nothing of the encoder of pictures learns in this phase.
    assert not any(k.startswith("autoencoder.encoder") for k in learnt)


def test_warm_start_refusals(first, photo_cache, tmp_path):
    text = config_text(["r031"])
    stage, _ = stage_of(tmp_path, photo_cache, text)
    with pytest.raises(ValueError, match="codec run or of a model"):
        start_from(stage, tmp_path)
    wide = text.replace("widths = [8, 16]", "widths = [8, 24]")
    with pytest.raises(ValueError, match="does not match"):
        start_from(stage_of(tmp_path, photo_cache, wide)[0], first[1])
    run = shutil.copytree(first[1], tmp_path / "first")
    state = checkpoint.read(run / "checkpoint.pt")
    state["ema"] = {k: v for k, v in state["ema"].items() if k.startswith("autoencoder")}
    checkpoint.write(run / "checkpoint.pt", state)
    with pytest.raises(ValueError, match="another phase"):
        start_from(stage, run)


def test_a_grown_decoder_starts_as_the_one_it_grew_from(first, photo_cache, tmp_path):
    grown = config_text(["r031"])
    grown = grown.replace("widths = [8, 16]", "widths = [8, 16], decoder_blocks = [4, 6]")
    stage, loop = stage_of(tmp_path, photo_cache, grown)
    start_from(stage, first[1])
    latents, before = torch.randn(2, 16, 4, 5), first[0].autoencoder
    with torch.no_grad():
        expected = before.decode(latents)
        assert torch.allclose(stage.autoencoder.decode(latents), expected, atol=1e-6)
    assert len(stage.autoencoder.state_dict()) == len(before.state_dict()) + 4 * 4
    train(stage, loop, tmp_path / "grown")
    last = {k: v for k, v in stage.autoencoder.decoder.state_dict().items() if "conv2" in k}
    assert len(last) == 20 and all(value.any() for value in last.values())


def test_a_shallower_decoder_keeps_the_blocks_that_change_most(first, photo_cache, tmp_path):
    run = shutil.copytree(first[1], tmp_path / "first")
    stored = checkpoint.read(run / "checkpoint.pt")
    decoder, weak = first[0].autoencoder.decoder, []
    blocks = [i for i, layer in enumerate(decoder) if isinstance(layer, ResidualBlock)]
    for index in (blocks[0], blocks[4]):  # the first of three at 1/8, the second at 1/4
        weak += [f"autoencoder.decoder.{index}.conv2.{name}" for name in ("weight", "bias")]
    for key in weak:
        stored["ema"][key] = torch.zeros_like(stored["ema"][key])
    checkpoint.write(run / "checkpoint.pt", stored)
    smaller = config_text(["r031"])
    smaller = smaller.replace("widths = [8, 16]", "widths = [8, 16], decoder_blocks = [2, 2]")
    whole, cut = (
        stage_of(tmp_path, photo_cache, text)[0] for text in (config_text(["r031"]), smaller)
    )
    start_from(whole, run)
    assert "decoder" not in start_from(cut, run)
    latents = torch.randn(2, 16, 4, 5)
    with torch.no_grad():
        expected = whole.autoencoder.decode(latents)
        assert expected.std() > 0.01
        assert torch.equal(cut.autoencoder.decode(latents), expected)


def test_a_smaller_decoder_learns_from_the_one_before(first, photo_cache, tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    run_export(first[1].parent / "config.toml", photo_cache, first[1], model)
    smaller = config_text(["r031"], "distil = 1.0\nfrozen_tokens = true", steps=20).replace(
        "widths = [8, 16]", "widths = [8, 16], decoder_widths = [4, 16], decoder_blocks = [2, 1]"
    )
    config = written(tmp_path, smaller.replace("= 1e-3", "= 1e-2"))
    with pytest.raises(ValueError, match="the teacher"):
        run_codec(config, photo_cache, run, start_from=first[1])
    stage, _ = codec_stage(config, PhotoCrops(photo_cache))
    origins = start_from(stage, model)
    assert origins["decoder"].startswith("from the run, except for ")
    teacher = TinyTorchModel(model).autoencoder
    kept = [f"decoder.{i}" for i in (0, 1, 2)]  # the first layer and two blocks at 1/8
    state = stage.autoencoder.state_dict()
    same = {k for k, v in teacher.state_dict().items() if k in state and torch.equal(state[k], v)}
    assert {k for k in state if k.startswith((*kept, "encoder."))} <= same
    run_codec(config, photo_cache, run, start_from=model)
    after = checkpoint.read(run / "checkpoint.pt")["model"]
    learnt = moved(stage.state_dict(), after)
    assert learnt and all(key.startswith("autoencoder.decoder.") for key in learnt)
    assert not any(key.startswith("teacher.") for key in after)
    log = (run / "log.csv").read_text().splitlines()
    column = log[0].split(",").index("distil_r031")
    distances = [float(line.split(",")[column]) for line in log[1:]]
    assert 0 < distances[-1] < distances[0]


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
    entropy = entropies(folder, ALL)
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
    entropy = entropies(tmp_path, ["r125"])
    with pytest.raises(ValueError, match="is no entropy model: it has no config"):
        run_export(longer / "config.toml", photo_cache, longer / "run", model, [f"r125={tmp_path}"])
    assert contents(model) == before
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
    run_export(config, photo_cache, tmp_path / "run", model, entropies(tmp_path, ["r125"]))
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
