"""Runs that start from other runs, and the parts that they keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from percov2.models.tiny.backbone import CodecModel
from percov2.training.commands import codec_stage, run_codec, run_export
from percov2.training.data import PhotoCrops
from percov2.training.loop import train
from percov2.training.warm_start import start_from
from tools.rate_runs import ALL, config_text, written


def legacy(run: Path) -> None:
    """Rename a run of one rate to the names that runs had before there were several."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["ema"] = {k.removeprefix("rates.r031."): v for k, v in state["ema"].items()}
    torch.save(state, run / "checkpoint.pt")


@pytest.mark.parametrize("old_names", [False, True])
def test_warm_start_loads_what_it_says(old_names, photo_cache, tmp_path):
    data = PhotoCrops(photo_cache)
    first, loop = codec_stage(written(tmp_path, config_text(["r031"], steps=3)), data)
    train(first, loop, tmp_path / "first")
    if old_names:
        legacy(tmp_path / "first")
    stage, _ = codec_stage(written(tmp_path, config_text(ALL)), data)
    fresh = {k: v.clone() for k, v in stage.state_dict().items()}
    origins = start_from(stage, tmp_path / "first")
    state, known = stage.state_dict(), first.state_dict()
    assert all(torch.equal(state[k], v) for k, v in known.items())
    assert any(not torch.equal(fresh[k], v) for k, v in known.items())
    assert origins["r031"] == "from r031"
    for name in ("r010", "r002"):
        assert origins[name].startswith("from r031, except for new ")
        new = origins[name].split("new: ")[1].split(", ")
        assert set(new) == {"quantizer.codebook", "quantizer.usage"}
        kept = {
            k for k in state if k.startswith(f"rates.{name}.") and torch.equal(state[k], fresh[k])
        }
        untouched = {k.removeprefix(f"rates.{name}.") for k in kept}
        assert set(new) <= untouched


def test_a_new_rate_starts_as_its_donor_on_coarser_latents(photo_cache, tmp_path):
    data = PhotoCrops(photo_cache)
    first, loop = codec_stage(written(tmp_path, config_text(["r031"], steps=1)), data)
    train(first, loop, tmp_path / "first")
    stage, _ = codec_stage(written(tmp_path, config_text(ALL)), data)
    start_from(stage, tmp_path / "first")
    r031, r010, r002 = (stage.rates[name].hyper_encoder for name in ALL)
    with torch.no_grad():
        # Constant in blocks of 4, so that averaging over 2x2 latents loses nothing in r002's first
        # layer: there it is the donor's first layer on the halved grid.
        coarse = torch.randn(1, 16, 6, 6)
        fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert torch.allclose(r002.body[0](fine), r031.body[0](coarse), atol=1e-5)
        features = torch.randn(1, 8, 6, 6)
        fine = features.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert torch.allclose(r010.body[4](fine), r031.body[4](features), atol=1e-5)


def test_frozen_tokens_stay_while_pictures_learn(photo_cache, tmp_path):
    data = PhotoCrops(photo_cache)
    text = config_text(["r031", "r010"], "frozen_tokens = true")
    stage, loop = codec_stage(written(tmp_path, text), data)
    before = {k: v.clone() for k, v in stage.state_dict().items()}
    train(stage, loop, tmp_path / "run")
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
    learns = ("autoencoder.decoder", "flow.", "text_encoder.")
    ours = {k for k in moved if not k.startswith(learns)}
    assert ours == {
        f"rates.{n}.quantizer.project_out.{k}" for n in ("r031", "r010") for k in ("weight", "bias")
    }
    assert all(any(k.startswith(part) for k in moved) for part in learns)
    rate = stage._rate("r031")
    latents = torch.randn(2, 16, 6, 6)
    quantized = rate(latents)
    tokens = rate.quantizer.tokens(rate.hyper_encoder(latents))
    assert torch.equal(quantized.tokens, tokens)
    assert torch.equal(quantized.z_hat, rate.quantizer.lookup(tokens))


def test_a_kept_codebook_stays_while_its_hyper_encoder_learns(photo_cache, tmp_path):
    text = config_text(["r031", "r010"])
    text = text.replace("[codec.rates.r031]", "[codec.rates.r031]\ncodebook_decay = 1.0")
    stage, loop = codec_stage(written(tmp_path, text), PhotoCrops(photo_cache))
    before = {k: v.clone() for k, v in stage.state_dict().items()}
    train(stage, loop, tmp_path / "run")
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert "rates.r010.quantizer.codebook" in moved
    assert "rates.r031.quantizer.codebook" not in moved
    assert "rates.r031.quantizer.project_in.weight" in moved
    assert any(k.startswith("rates.r031.hyper_encoder") for k in moved)


def test_warm_start_refusals(photo_cache, tmp_path):
    data = PhotoCrops(photo_cache)
    stage, loop = codec_stage(written(tmp_path, config_text(["r031"], steps=1)), data)
    with pytest.raises(ValueError, match="codec run or of a model"):
        start_from(stage, tmp_path)
    train(stage, loop, tmp_path / "first")
    wide = config_text(["r031"]).replace("widths = [8, 16]", "widths = [8, 24]")
    other, _ = codec_stage(written(tmp_path, wide), data)
    with pytest.raises(ValueError, match="does not fit"):
        start_from(other, tmp_path / "first")
    state = torch.load(tmp_path / "first" / "checkpoint.pt", weights_only=True)
    state["ema"] = {k: v for k, v in state["ema"].items() if k.startswith("autoencoder")}
    torch.save(state, tmp_path / "first" / "checkpoint.pt")
    with pytest.raises(ValueError, match="another phase"):
        start_from(stage, tmp_path / "first")


def test_a_grown_decoder_starts_as_the_one_it_grew_from(photo_cache, tmp_path):
    data = PhotoCrops(photo_cache)
    text = config_text(["r031"])
    first, loop = codec_stage(written(tmp_path, text), data)
    train(first, loop, tmp_path / "first")
    grown = text.replace("widths = [8, 16]", "widths = [8, 16], decoder_blocks = [4, 6]")
    stage, _ = codec_stage(written(tmp_path, grown), data)
    start_from(stage, tmp_path / "first")
    latents = torch.randn(2, 16, 4, 5)
    with torch.no_grad():
        expected = first.autoencoder.decode(latents)
        assert torch.allclose(stage.autoencoder.decode(latents), expected, atol=1e-6)
    assert len(stage.autoencoder.state_dict()) == len(first.autoencoder.state_dict()) + 4 * 4
    train(stage, loop, tmp_path / "grown")
    last = {k: v for k, v in stage.autoencoder.decoder.state_dict().items() if "conv2" in k}
    assert len(last) == 20 and all(value.any() for value in last.values())


def test_a_smaller_decoder_learns_from_the_one_before(photo_cache, tmp_path):
    data = PhotoCrops(photo_cache)
    text = config_text(["r031"])
    config = written(tmp_path, text)
    first, loop = codec_stage(config, data)
    train(first, loop, tmp_path / "first")
    run_export(config, photo_cache, tmp_path / "first", tmp_path / "model")
    smaller = text.replace(
        "widths = [8, 16]", "widths = [8, 16], decoder_widths = [4, 16], decoder_blocks = [2, 1]"
    )
    smaller = smaller.replace("[codec]", "[codec]\ndistil = 1.0\nfrozen_tokens = true")
    smaller = smaller.replace("steps = 6", "steps = 20").replace("= 1e-3", "= 1e-2")
    config = written(tmp_path, smaller)
    with pytest.raises(ValueError, match="the teacher"):
        run_codec(config, photo_cache, tmp_path / "run", start_from=tmp_path / "first")
    stage, _ = codec_stage(config, data)
    origins = start_from(stage, tmp_path / "model")
    assert origins["decoder"].startswith("from the run, except for ")
    teacher = CodecModel(tmp_path / "model").autoencoder
    kept = [f"decoder.{i}" for i in (0, 1, 2)]  # the first layer and two blocks at 1/8
    state = stage.autoencoder.state_dict()
    same = {k for k, v in teacher.state_dict().items() if k in state and torch.equal(state[k], v)}
    assert {k for k in state if k.startswith((*kept, "encoder."))} <= same
    run_codec(config, photo_cache, tmp_path / "run", start_from=tmp_path / "model")
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    moved = {k for k, v in after.items() if not torch.equal(v, stage.state_dict()[k])}
    assert moved and all(key.startswith("autoencoder.decoder.") for key in moved)
    assert not any(key.startswith("teacher.") for key in after)
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    column = log[0].split(",").index("distil_r031")
    distances = [float(line.split(",")[column]) for line in log[1:]]
    assert 0 < distances[-1] < distances[0]
