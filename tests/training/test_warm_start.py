"""Runs that start from other runs, and the parts that they keep."""

from __future__ import annotations

import shutil

import pytest
import torch

from percov2.models.tiny.backbone import CodecModel
from percov2.photos import PhotoCrops
from percov2.training import checkpoint
from percov2.training.commands import codec_stage, run_codec, run_export
from percov2.training.loop import train
from percov2.training.warm_start import start_from
from tools.rate_runs import ALL, config_text, moved, snapshot, stage_of, written


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
    with pytest.raises(ValueError, match="does not fit"):
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
    teacher = CodecModel(model).autoencoder
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
