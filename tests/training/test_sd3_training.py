"""Training on a tiny random Stable Diffusion 3: losses, exact resume, and export to a folder."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image

from percov2.codec import Codec
from percov2.models.sd3.flow import open_flow
from percov2.models.torch.flow import upsample_z_hat
from percov2.training import checkpoint
from percov2.training.commands import run_entropy
from percov2.training.loop import load_averaged, train
from percov2.training.lora import LowRankLinear, add_low_rank
from percov2.training.sd3 import commands
from percov2.training.sd3.networks import SD3Networks
from percov2.training.sd3.pictures import Pictures
from percov2.training.sd3.stage import SD3Stage, _draw, shifted
from percov2.training.settings import build_config, read_section
from percov2.training.shards import CropFeed, Sample, ShardStreams
from percov2.training.stage2 import EntropyConfig, EntropyStage, TokenMaps
from tools.executors import equal
from tools.photos import noise
from tools.sd3_training import build, write_config

PROMPT = torch.randn(1, 9, 32), torch.randn(1, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    build(folder := tmp_path_factory.mktemp("sd3"))
    return folder


def make_stage(config: Path, shards: Path, pictures: Pictures | None = None) -> SD3Stage:
    settings, loop = commands.sd3_config(config)
    torch.manual_seed(loop.seed)
    networks = SD3Networks(settings, loop.precision, Path())
    return SD3Stage(networks, sorted(shards.glob("*.tar")), loop.seed, pictures)


def test_the_loss_is_what_plain_statements_say(folder, tmp_path):
    config = write_config(tmp_path / "c.toml", folder / "base", vq_weight="0.5")
    stage = make_stage(config, folder / "shards")
    torch.nn.init.normal_(stage.networks.flow.pos_embed.proj.weight, std=0.2)
    loss, figures = stage(np.random.default_rng(0))

    shards = sorted((folder / "shards").glob("*.tar"))
    samples = CropFeed(ShardStreams(shards, 4, 32, 48, 0)).take()
    vae = AutoencoderKL.from_pretrained(folder / "base", subfolder="vae").eval()
    errors, commitments, distances = [], [], []
    network = stage.frozen._lpips
    for sample in samples:
        drawn = _draw(sample, 0.3, 32)
        t = 3 * drawn.time / (1 + 2 * drawn.time)
        image = torch.from_numpy(sample.pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents = (vae.encode(image).latent_dist.mean - 0.0609) * 1.5305
            quantized = stage.networks.quantizer(stage.networks.hyper_encoder(latents))
            noisy = (1 - t) * latents + t * drawn.noise
            text = stage.frozen.text([drawn.caption])
            velocity = stage.networks.flow(
                torch.cat([noisy, upsample_z_hat(quantized.z_hat, 4, 4)], 1),
                *text,
                torch.tensor([1000 * t]),
            ).sample
            errors.append((velocity - (drawn.noise - latents)).square().mean())
            clean = noisy - t * velocity
            decoded = vae.decode(clean / 1.5305 + 0.0609).sample
            pair = network.features(decoded), network.features(image)
            distances.append(network.distance(*pair).mean())
            commitments.append(quantized.loss)
    flow, vq, lpips = (float(torch.stack(x).mean()) for x in (errors, commitments, distances))
    assert float(figures["flow"]) == pytest.approx(flow, rel=1e-4)
    assert float(figures["lpips"]) == pytest.approx(lpips, rel=1e-3)
    assert loss.item() == pytest.approx(flow + 0.5 * vq + 0.5 * lpips, rel=1e-4)


def test_lpips_reaches_the_latents_through_the_decoder(folder, tmp_path):
    config = write_config(tmp_path / "c.toml", folder / "base")
    frozen = make_stage(config, folder / "shards").frozen
    latents = torch.randn(1, 16, 4, 4, requires_grad=True)
    frozen.lpips(latents, torch.rand(1, 3, 32, 32) * 2 - 1).backward()
    assert float(latents.grad.abs().max()) > 0
    assert all(p.grad is None for p in frozen.base.autoencoder().parameters())


def test_what_chance_decides_about_samples():
    def drawn(dropout: float) -> list:
        generators = (np.random.default_rng([7, i]) for i in range(3000))
        return [_draw(Sample(np.zeros(0), "words", g), dropout, 16) for g in generators]

    some = drawn(0.1)
    logits = np.array([math.log(d.time / (1 - d.time)) for d in some])
    assert abs(logits.mean()) < 0.06 and abs(logits.std() - 1) < 0.04
    assert 0.08 < np.mean([d.caption == "" for d in some]) < 0.12
    noise = torch.stack([d.noise for d in some[:500]])
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    assert all(d.caption for d in drawn(0.0)[:50]) and not any(d.caption for d in drawn(1.0)[:50])
    t = torch.tensor([0.0, 0.5, 1.0])
    assert shifted(t, 3.0).tolist() == [0.0, 0.75, 1.0] and torch.equal(shifted(t, 1.0), t)


@pytest.mark.parametrize("trained", ["full", "lora", "patch_embedding"])
def test_only_the_chosen_part_learns_and_it_starts_as_the_base(trained, folder, tmp_path):
    config = write_config(tmp_path / "c.toml", folder / "base", trained)
    stage = make_stage(config, folder / "shards")
    flow = stage.networks.flow
    base = SD3Transformer2DModel.from_pretrained(folder / "base", subfolder="transformer")
    noisy, z_hat = torch.randn(1, 16, 4, 4), torch.randn(1, 8, 2, 2)
    t = torch.tensor([0.3])
    with torch.no_grad():
        expected = base(noisy, *PROMPT, t * 1000).sample
        assert torch.equal(stage.networks.velocity(noisy, z_hat, t, PROMPT), expected)
    loss, _ = stage(np.random.default_rng(0))
    loss.backward()
    learning = {n for n, p in flow.named_parameters() if p.grad is not None}
    assert learning == {n for n, p in flow.named_parameters() if p.requires_grad}
    own = {"pos_embed.proj.weight", "pos_embed.proj.bias"}
    if trained == "full":
        assert learning == {n for n, _ in flow.named_parameters()}
    elif trained == "lora":
        assert own < learning and all("lora_" in n for n in learning - own)
    else:
        assert learning == own
    assert set(stage.stored_keys()) >= {f"networks.flow.{n}" for n in learning}
    assert (len(stage.stored_keys()) < len(stage.state_dict())) or trained == "full"


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_stage_1_killed_and_resumed_equals_uninterrupted(trained, folder, tmp_path, monkeypatch):
    path = write_config(tmp_path / "c.toml", folder / "base", trained, 2)
    loop = dataclasses.replace(commands.sd3_config(path)[1], checkpoint_seconds=0.0)
    stage = make_stage(path, folder / "shards")
    assert train(stage, loop, tmp_path / "once") == 4

    cut = make_stage(path, folder / "shards")
    forward, calls = SD3Stage.forward, []

    def dies(self: SD3Stage, generator: np.random.Generator) -> object:
        calls.append(1)
        result = forward(self, generator)
        if len(calls) == 6:  # in the middle of the third step
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(SD3Stage, "forward", dies)
        with pytest.raises(KeyboardInterrupt):
            train(cut, loop, tmp_path / "twice")
    assert checkpoint.read(tmp_path / "twice" / "checkpoint.pt")["step"] == 2
    resumed = make_stage(path, folder / "shards")
    with torch.no_grad():
        for parameter in resumed.networks.hyper_encoder.parameters():
            parameter.zero_()  # all of it must come from the checkpoint
    assert train(resumed, loop, tmp_path / "twice") == 4
    once, twice = (checkpoint.read(tmp_path / n / "checkpoint.pt") for n in ("once", "twice"))
    for key in ("model", "ema", "optimizer", "side", "generator", "step"):
        assert equal(once[key], twice[key]), key
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in stage.state_dict().items())
    assert not equal(once["model"], once["ema"])


def test_stage_2_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    (tmp_path / "tokens").mkdir()
    for part in range(2):  # a folder, as `shard-tokens` writes it
        maps = {f"tokens_{i}": random.integers(0, 16, (3, 4)).astype(np.uint16) for i in range(8)}
        held_out = np.arange(8) == 3
        np.savez(tmp_path / "tokens" / f"{part}.npz", codebook_size=16, held_out=held_out, **maps)
    path = write_config(tmp_path / "c.toml", tmp_path, round_from="0.5", shapes="[[2, 3]]")
    table = read_section(path, "entropy")
    loop = build_config(commands.LoopConfig, {**table.pop("loop"), "checkpoint_seconds": 0.0})

    def stage() -> EntropyStage:
        torch.manual_seed(3)
        return EntropyStage(build_config(EntropyConfig, table), TokenMaps(tmp_path / "tokens"))

    whole = stage()
    assert len(whole.data.maps) == 14 and len(whole.data.held_out) == 2
    assert train(whole, loop, tmp_path / "once") == 4
    forward = EntropyStage.forward

    def dies(self: EntropyStage, generator: np.random.Generator) -> object:
        result = forward(self, generator)
        if self.transformer.quantized:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(EntropyStage, "forward", dies)
        with pytest.raises(KeyboardInterrupt):
            train(stage(), loop, tmp_path / "twice")
    assert train(stage(), loop, tmp_path / "twice") == 4
    once, twice = (checkpoint.read(tmp_path / n / "checkpoint.pt") for n in ("once", "twice"))
    assert all(equal(once[key], twice[key]) for key in once.keys() - {"minutes"})


def test_low_rank_updates_are_the_base_plus_a_product():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 5)})})
    names = add_low_rank(model, ("to_q",), 2, 3.0)
    layer = model.get_submodule("a.to_q")
    assert names == ["a.to_q"] and isinstance(layer, LowRankLinear)
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), layer.base(x))
    torch.nn.init.normal_(layer.lora_up)
    merged = layer.base.weight + 1.5 * layer.lora_up @ layer.lora_down
    assert torch.allclose(layer(x), x @ merged.T + layer.base.bias, atol=1e-5)
    for layers, rank, word in ((("to_k",), 2, "to_k"), (("to_q",), 0, "lora_rank")):
        with pytest.raises(ValueError, match=word):
            add_low_rank(torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2)}), layers, rank, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": '{ name = "../r", token_side = 16, codebook_size = 16 }'}, "must be that of a"),
        ({"rate": '{ name = "r", token_side = 16, codebook_size = 9000 }'}, "codebook_size of r"),
        ({"rate": '{ name = "r", token_side = 16 }'}, "missing .*'codebook_size'"),
        ({"batch": '"four"'}, "setting batch must be a whole number, not 'four'"),
        ({"ema": '0.5\nprecision = "fp16"'}, "precision must be one of .* not 'fp16'"),
        ({"log_every": "0"}, "log_every must be 1 to"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(changes, message, tmp_path):
    path = write_config(tmp_path / "c.toml", tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        commands.sd3_config(path)


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_from_a_run_to_files(trained, folder, tmp_path):
    path = write_config(tmp_path / "c.toml", folder / "base", trained, steps="2", ema="0.01")
    (tmp_path / "pictures").mkdir()
    photo = noise(60, 40, seed=5)
    photo.save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a door")
    run, out = tmp_path / "run", tmp_path / "model"
    commands.run_sd3(path, folder / "shards", run, tmp_path / "pictures")
    with Image.open(run / "samples" / "0000002.png") as picture:
        assert picture.size == (32, 96)
    assert (run / "validation.csv").read_text().startswith("step,flow\n2,")

    commands.run_sd3_export(path, run, out, None)
    stage = make_stage(path, folder / "shards")
    load_averaged(run, stage)
    stored = open_flow(out / "r0508" / "flow", str(folder / "base"), torch.float32)
    inputs = torch.randn(1, 24, 4, 4), *PROMPT, torch.tensor([300.0])
    with torch.no_grad():
        expected, got = (flow(*inputs).sample for flow in (stage.networks.flow, stored))
        assert torch.allclose(got, expected, atol=2e-3)
        base = SD3Transformer2DModel.from_pretrained(folder / "base", subfolder="transformer")
        assert not torch.allclose(base(inputs[0][:, :16], *inputs[1:]).sample, expected, atol=2e-3)
    assert (out / "r0508" / "flow" / "config.json").is_file() == (trained == "full")

    codec = Codec.from_pretrained(out)
    data = codec.compress([photo], caption=["a door"])[0]
    assert codec.decompress([data], steps=1)[0].size == photo.size
    if trained == "full":
        return
    # Stage 2 on the folder's own tokens, and the folder with its entropy model.
    tokens = tmp_path / "tokens"
    commands.run_shard_tokens(out, folder / "shards", tokens, longest=48)
    names = sorted(p.name for p in tokens.iterdir())
    assert names == ["photos-1.npz", "photos-2.npz"]
    run_entropy(path, tokens, tmp_path / "entropy")
    commands.run_sd3_export(path, run, out, [str(tmp_path / "entropy" / "entropy")])
    trained_codec = Codec.from_pretrained(out)
    assert trained_codec.model_id("r0508") != codec.model_id("r0508")
    again = trained_codec.compress([photo])[0]
    assert np.array_equal(
        trained_codec.decode_tokens([again])[0], codec.encode_tokens([photo], "r0508")[0]
    )


def test_a_folder_takes_further_rates_of_the_same_base(folder, tmp_path):
    path = write_config(tmp_path / "a.toml", folder / "base", "patch_embedding", steps="1")
    with path.open("a") as file:
        file.write(
            "\n[sd3.recipes.r0020]\nlpips_weight = 0.0\n"
            'rate = { name = "r0020", token_side = 32, codebook_size = 16 }\n'
        )
    out = tmp_path / "model"
    stale = out / "r0508" / "flow" / "config.json"  # of a whole transformer
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    for recipe in (None, "r0020", None):
        run = tmp_path / (recipe or "r0508")
        commands.run_sd3(path, folder / "shards", run, recipe=recipe)
        commands.run_sd3_export(path, run, out, recipe=recipe)
    codec = Codec.from_pretrained(out)
    assert [rate.name for rate in codec.config.rates] == ["r0508", "r0020"]
    assert len((out / "model_id").read_text().splitlines()) == 2
    assert not stale.exists()
    rate = '{ name = "r0508", token_side = 16, codebook_size = 32 }'
    other = write_config(tmp_path / "c.toml", folder / "base", "patch_embedding", rate=rate)
    with pytest.raises(ValueError, match="does not match"):
        commands.run_sd3_export(other, tmp_path / "r0508", out, None)
