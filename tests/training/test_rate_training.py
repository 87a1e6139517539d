"""Several rates in one run, resuming, and the exported folder."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from percov2.codec import Codec
from percov2.models.config import Rate
from percov2.photos import CropPlan, PhotoCrops
from percov2.training import checkpoint
from percov2.training.commands import codec_stage, run_codec, run_export
from percov2.training.loop import load_averaged, train
from percov2.training.losses import View, draw_view
from percov2.training.rates import RateConfig, build_rates, draw_rate
from percov2.training.stage1 import CodecConfig
from percov2.training.warm_start import start_from
from tools.executors import equal
from tools.photos import store_photos
from tools.rate_runs import (
    ALEX,
    ALL,
    FEATURES,
    PIXELS,
    config_text,
    entropies,
    moved,
    snapshot,
    stage_of,
    trained,
    written,
)


@pytest.mark.parametrize(
    ("losses", "extra"),
    [(PIXELS, ""), (FEATURES + "\nmse = { weight = 1.0 }", "dial = {}")],
    ids=["pixels", "features and dial"],
)
def test_killed_and_resumed_equals_uninterrupted(losses, extra, photo_cache, tmp_path):
    text = config_text(ALL, extra, losses=losses)
    once, often = tmp_path / "once", tmp_path / "often"
    once.mkdir(), often.mkdir()
    stage = trained(once, photo_cache, text)
    # The second interruption falls between two steps on which the discriminator learns.
    for steps in (1, 3, 6):
        trained(often, photo_cache, text, steps)
    once, often = (checkpoint.read(home / "run" / "checkpoint.pt") for home in (once, often))
    assert once["step"] == 6
    for part in ("model", "ema", "side"):
        assert equal(once[part], often[part]), part
    assert not any(key.startswith("perceptual.") for key in {**once["model"], **once["ema"]})
    used = {"pixels", "features"} & set(losses.split())
    assert set(once["side"]) == set(stage.adversaries) == used
    for ours in once["side"].values():
        assert {int(state["step"]) for state in ours["optimizer"]["state"].values()} == {4}


def test_a_step_trains_one_rate_and_logs_under_its_name(photo_cache, tmp_path):
    stage, loop = stage_of(tmp_path, photo_cache, config_text(ALL))
    generator = np.random.default_rng(3)
    seen = set()
    for _ in range(12):
        expected = np.random.default_rng()
        expected.bit_generator.state = generator.bit_generator.state
        name = draw_rate(stage.config.rates, expected)
        stage.zero_grad(set_to_none=True)
        loss, figures = stage(generator)
        loss.backward()
        trained = {
            rate
            for rate, networks in stage.rates.items()
            if any(p.grad is not None for p in networks.parameters())
        }
        known = {k for k, v in figures.items() if not math.isnan(float(v))}
        assert trained == {name}
        assert known == {f"{k}_{name}" for k in ("l1", "lpips", "latent", "vq", "spread", "codes")}
        before = snapshot(stage)
        stage.after_step()
        own = {f"rates.{name}.quantizer.{part}" for part in ("codebook", "usage")}
        assert moved(before, stage.state_dict()) == own
        seen.add(name)
    assert seen == set(ALL)
    train(stage, loop, tmp_path / "run")
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert len(lines) == 4
    assert {f"lpips_{name}" for name in ALL} <= set(lines[0].split(","))
    assert Image.open(tmp_path / "run" / "samples.png").size == (6 * 64, 4 * 64)


def test_shares_of_the_steps():
    configs = {"a": RateConfig(share=5), "b": RateConfig(share=3), "c": RateConfig(share=2)}
    generator = np.random.default_rng(0)
    drawn = [draw_rate(configs, generator) for _ in range(4000)]
    for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
        assert abs(drawn.count(name) / 4000 - share) < 0.03
    state = generator.bit_generator.state
    assert draw_rate({"a": configs["a"]}, generator) == "a"
    assert generator.bit_generator.state == state


def test_rates_that_do_not_fit_are_refused(photo_cache, tmp_path):
    small = {"hyper_encoder": {"channels": 8, "hyper_channels": 8, "stride": 8}}
    with pytest.raises(ValueError, match="at least one rate"):
        build_rates({})
    with pytest.raises(ValueError, match="positive"):
        build_rates({"a": RateConfig(share=0.0)})
    with pytest.raises(ValueError, match=r"\[96\].*token side"):
        build_rates({"a": RateConfig(**small, crops=CropPlan((64, 96), (1, 1)))})
    for name, wrong in (("coarse", 1.1), ("coarse", -0.1), ("aligned", 2.0)):
        with pytest.raises(ValueError, match=f"{name} must be 0 to 1"):
            RateConfig(**{name: wrong})
    for sides, coarse, least in (((46, 64), 0.0, 47), ((78,), 0.25, 79)):
        plan = CropPlan(sides, (1,) * len(sides))
        with pytest.raises(ValueError, match=f"at least {least} pixels"):
            RateConfig(crops=plan, coarse=coarse)
    one = {**small, "crops": CropPlan((64,), (1,))}
    unequal = {str(c): RateConfig(**one, quantizer={"output_channels": c}) for c in (4, 8)}
    with pytest.raises(ValueError, match="output_channels"):
        build_rates(unequal)
    with pytest.raises(ValueError, match="one count per side"):
        CropPlan((64, 96), (1,))
    config = written(tmp_path, config_text(["r031"]))
    for runs in ({}, {"autoencoder_run": tmp_path, "start_from": tmp_path}):
        with pytest.raises(ValueError, match="either"):
            run_codec(config, photo_cache, tmp_path / "out", **runs)


def test_a_rate_has_losses_and_views_of_its_own(tmp_path, monkeypatch):
    photos = store_photos(tmp_path / "photos", [(96, 96)], 8)
    losses = ALEX + "\nvgg = { weight = 1.0, from_step = 4 }"
    text = config_text(["r031", "r010"], "aligned = 0.125\nwindow = 48", losses=losses)
    text = text.replace("sides = [64]", "sides = [96]")
    own = "[codec.rates.r010]\naligned = 0.0\ncoarse = 0.75\nlosses = { alex = { weight = 0.25 } }"
    text = text.replace("[codec.rates.r010]", own)
    stage, _ = stage_of(tmp_path, photos, text)
    shares = set()

    def drawn(*given: float) -> View:
        shares.add(given)
        return draw_view(*given)

    monkeypatch.setattr("percov2.training.stage1.draw_view", drawn)
    generator = np.random.default_rng(0)
    for step, vgg in ((3, ()), (4, (1.0,))):
        stage.start_step(step, 6)
        found = set()
        for _ in range(12):
            draw = stage.draw(generator)
            weights = draw.tensors["weights"].tolist()
            found.add((draw.kind[0], tuple(round(weight, 6) for weight in weights)))
        assert found == {("r031", (0.8, *vgg)), ("r010", (0.25, *vgg))}
    assert shares == {(48, 0.125, 0.0, 48), (96, 0.0, 0.75, 48)}


def test_a_dial_starts_as_the_model_without_one_and_learns(photo_cache, tmp_path):
    plain, _ = stage_of(tmp_path, photo_cache, config_text(["r031"]))
    text = config_text(["r031"], "dial = {}", losses=ALEX + "\nmse = { weight = 2.0 }")
    stage, loop = stage_of(tmp_path, photo_cache, text)
    shared = {k: v for k, v in plain.state_dict().items() if not k.startswith("perceptual.")}
    stage.load_state_dict(shared, strict=False)
    words = stage.text_encoder(["a red door"] * 3)
    assert torch.equal(stage._conditioning(words, torch.tensor([0.0, 0.3, 1.0]))[1], words[1])
    train(stage, loop, tmp_path / "run")
    offsets = stage.dial(torch.tensor([0.0, 1.0]))
    assert not torch.equal(offsets[0], offsets[1])


def test_realism_is_drawn_with_both_ends():
    torch.manual_seed(0)
    config = CodecConfig(dial={}, realism_ends=(0.2, 0.5))
    drawn = config.draw_realism(10000)
    assert abs(float((drawn == 0).float().mean()) - 0.2) < 0.02
    assert abs(float((drawn == 1).float().mean()) - 0.5) < 0.02
    between = drawn[(drawn > 0) & (drawn < 1)]
    assert abs(float(between.mean()) - 0.5) < 0.02 and between.min() < 0.02 < 0.98 < between.max()
    assert (CodecConfig(dial=None).draw_realism(5) == 1).all()
    ends = CodecConfig(dial={}, realism_ends=(0.5, 0.5)).draw_realism(100)
    assert set(ends.tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="at most 1"):
        CodecConfig(realism_ends=(0.6, 0.5))


def test_sources_change_how_often_photos_are_drawn(photo_cache, tmp_path):
    data = PhotoCrops(photo_cache)
    first = data.photos[0].key
    alone = {photo.key: 0.0 for photo in data.photos if not photo.key.startswith(first)}
    text = config_text(["r031"])
    table = ", ".join(f'"{key}" = {factor}' for key, factor in alone.items())
    text = text.replace("[codec]", f"[codec]\nsources = {{ {table} }}")
    stage, _ = stage_of(tmp_path, photo_cache, text)
    images, _ = stage.data.batch(np.random.default_rng(0), 8, 48)
    pixels = torch.from_numpy(data.pixels(data.photos[0]).copy()).float() / 127.5 - 1
    known = {tuple(p) for p in pixels.reshape(-1, 3).tolist()}
    assert all(tuple(p) in known for p in images.permute(0, 2, 3, 1).reshape(-1, 3).tolist())
    assert data._factors.all()  # the original is as it was
    for wrong in ({"nothing": 1.0}, {first: -1.0}):
        with pytest.raises(ValueError, match="prefixes of photos' keys"):
            data.weighing(wrong)
    with pytest.raises(ValueError, match="no photo"):
        data.weighing({photo.key: 0.0 for photo in data.photos})


def test_export_of_three_rates_compresses_and_restores(first, photo_cache, tmp_path):
    text = config_text(ALL, steps=4)
    text = text.replace("[codec.rates.r002]", "[codec.rates.r002]\nsteps = 2")
    config, run, model = written(tmp_path, text), tmp_path / "run", tmp_path / "model"
    run_codec(config, photo_cache, run, start_from=first[1])
    entropy = entropies(tmp_path, ALL)
    # Two exports into one folder: entropy models come when their tokens are frozen.
    run_export(config, photo_cache, run, model, [str(tmp_path / "r031")])
    assert len((model / "model_id").read_text().splitlines()) == 1
    run_export(config, photo_cache, run, model, entropy[1:])
    codec = Codec.from_pretrained(model)
    rates = (Rate("r031", 16, 16), Rate("r010", 32, 32), Rate("r002", 64, 16, steps=2))
    assert codec.config.rates == rates and codec.config.default_rate == "r031"
    lines = (model / "model_id").read_text().splitlines()
    assert lines == [f"{codec.model_id(name):04x} {name}" for name in ALL]
    data = PhotoCrops(photo_cache)
    photo = Image.fromarray(data.pixels(data.photos[2]))
    for rate in rates:
        [file] = codec.compress([photo], rate=rate.name, caption=["a red door"])
        [tokens] = codec.decode_tokens([file])
        assert tokens.shape == (-(-72 // rate.token_side), -(-80 // rate.token_side))
        assert np.array_equal(tokens, codec.encode_tokens([photo], rate=rate.name)[0])
        [restored] = codec.decompress([file])
        assert restored.size == photo.size
    # The folder is enough to train on; it holds rounded weights.
    again, _ = codec_stage(config, data)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1.0)
    assert set(start_from(again, model).values()) == {f"from {n}" for n in ALL}
    load_averaged(run, stage := codec_stage(config, data)[0])
    for key, value in stage.state_dict().items():
        if not key.startswith("perceptual."):
            assert torch.allclose(again.state_dict()[key], value, rtol=0.02, atol=0.02), key
    with pytest.raises(ValueError, match="r999"):
        run_export(config, photo_cache, run, model, ["r999=x"])
