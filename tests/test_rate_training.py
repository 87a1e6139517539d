"""Several rates in one run, a discriminator beside it, warm starts, and the exported folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from percov2.codec import Codec
from percov2.entropy.int_transformer import IntTransformer, TransformerConfig
from percov2.training.adversary import Adversary, AdversaryConfig
from percov2.training.commands import codec_stage, run_codec, run_export
from percov2.training.data import CropPlan, PhotoCrops
from percov2.training.loop import load_averaged, train
from percov2.training.rates import RateConfig, build_rates, draw_rate
from percov2.training.stage1 import CodecStage
from percov2.training.warm_start import start_from
from tiny_flow import TINY_FLOW

RATES = {"r031": (2, 16, 48), "r010": (4, 32, 64), "r002": (8, 16, 64)}
"""Rate -> stride, codes, crop side."""


def config_text(rates: list[str], adversary: str = "", steps: int = 6) -> str:
    tables = "".join(
        f"""
[codec.rates.{name}]
share = {1.0 / (i + 1)}
hyper_encoder = {{ channels = 8, hyper_channels = 8, stride = {RATES[name][0]} }}
quantizer = {{ hyper_channels = 8, codebook_size = {RATES[name][1]}, code_dim = 4,
               output_channels = 4 }}
crops = {{ sides = [{RATES[name][2]}], counts = [2] }}
""".replace(",\n              ", ",")
        for i, name in enumerate(rates)
    )
    return f"""
[autoencoder]
autoencoder = {{ widths = [8, 16] }}
crops = {{ sides = [48], counts = [2] }}
loop = {{ steps = 2, warmup = 1, log_every = 1 }}

[codec]
text_encoder = {{ buckets = 32, dim = 8, length = 4 }}
loop = {{ steps = {steps}, warmup = 1, log_every = 2, learning_rate = 1e-3 }}
{adversary}
{tables}
{TINY_FLOW}"""


ALL = list(RATES)
ADVERSARY = (
    "adversary = {{ weight = 0.5, from_step = 2, warmup = 2, reach = '{}', widths = [4, 4, 8] }}"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    entries, pixels, offset = [], [], 0
    for i, (height, width) in enumerate([(64, 96), (96, 64), (72, 80)]):
        photo = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        photo = photo.repeat(8, 0).repeat(8, 1)
        entries.append([f"pic-{i}", offset, height, width, ["a red door"] if i else []])
        pixels.append(photo.tobytes())
        offset += photo.size
    (folder / "photos.bin").write_bytes(b"".join(pixels))
    (folder / "photos.json").write_text(json.dumps(entries))
    return folder


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("reach", "network"), [("", ""), ("all", "pixels"), ("decoder", "pixels"), ("all", "features")]
)
def test_killed_and_resumed_equals_uninterrupted(
    reach: str, network: str, cache: Path, tmp_path: Path
) -> None:
    adversary = ADVERSARY.format(reach) if reach else ""
    if network == "features":
        features = adversary.replace("weight", 'network = "features", weight')
        adversary = f"texture_weight = 0.3\n{features}"
    config, data = written(tmp_path, config_text(ALL, adversary)), PhotoCrops(cache)
    stage, loop = codec_stage(config, data)
    assert train(stage, loop, tmp_path / "once") == 6
    # The second interruption falls between two steps on which the discriminator learns.
    for steps in (1, 3, 6):
        resumed, loop = codec_stage(config, data)
        train(resumed, loop, tmp_path / "often", stop_after_steps=steps)
    once, often = (
        torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("once", "often")
    )
    for part in ("model", "ema"):
        assert equal(once[part], often[part]), part
    if reach:
        ours, theirs = once["side"]["adversary"], often["side"]["adversary"]
        assert equal(ours["network"], theirs["network"])
        for key, state in ours["optimizer"]["state"].items():
            assert equal(state, theirs["optimizer"]["state"][key])
            assert int(state["step"]) == 4
    else:
        assert once["side"] == {}


def test_a_step_trains_one_rate_and_logs_under_its_name(cache: Path, tmp_path: Path) -> None:
    config, data = written(tmp_path, config_text(ALL)), PhotoCrops(cache)
    stage, loop = codec_stage(config, data)
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
        before = {k: v.clone() for k, v in stage.state_dict().items()}
        stage.after_step()
        moved = {k for k, v in stage.state_dict().items() if not torch.equal(v, before[k])}
        assert moved == {f"rates.{name}.quantizer.{part}" for part in ("codebook", "usage")}
        seen.add(name)
    assert seen == set(ALL)
    train(stage, loop, tmp_path / "run")
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert len(lines) == 4
    assert {f"lpips_{name}" for name in ALL} <= set(lines[0].split(","))
    samples = Image.open(tmp_path / "run" / "samples.png")
    assert samples.size == (6 * 64, 4 * 64)


def test_shares_of_the_steps() -> None:
    configs = {"a": RateConfig(share=5), "b": RateConfig(share=3), "c": RateConfig(share=2)}
    generator = np.random.default_rng(0)
    drawn = [draw_rate(configs, generator) for _ in range(4000)]
    for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
        assert abs(drawn.count(name) / 4000 - share) < 0.03
    state = generator.bit_generator.state
    assert draw_rate({"a": configs["a"]}, generator) == "a"
    assert generator.bit_generator.state == state


def test_rates_that_do_not_fit_are_refused(cache: Path, tmp_path: Path) -> None:
    small = {"hyper_encoder": {"channels": 8, "hyper_channels": 8, "stride": 8}}
    with pytest.raises(ValueError, match="at least one rate"):
        build_rates({})
    with pytest.raises(ValueError, match="positive"):
        build_rates({"a": RateConfig(share=0.0)})
    with pytest.raises(ValueError, match=r"\[96\].*token side"):
        build_rates({"a": RateConfig(**small, crops=CropPlan((64, 96), (1, 1)))})
    one = {**small, "crops": CropPlan((64,), (1,))}
    unequal = {str(c): RateConfig(**one, quantizer={"output_channels": c}) for c in (4, 8)}
    with pytest.raises(ValueError, match="output_channels"):
        build_rates(unequal)
    with pytest.raises(ValueError, match="one count per side"):
        CropPlan((64, 96), (1,))
    with pytest.raises(ValueError, match="reach"):
        AdversaryConfig(reach="flow")
    with pytest.raises(ValueError, match="negative"):
        AdversaryConfig(weight=-1.0)
    config = written(tmp_path, config_text(["r031"]))
    for runs in ({}, {"autoencoder_run": tmp_path, "start_from": tmp_path}):
        with pytest.raises(ValueError, match="either"):
            run_codec(config, cache, tmp_path / "out", **runs)


def gradients(stage: CodecStage, step: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    stage.zero_grad(set_to_none=True)
    stage.start_step(step, 100)
    stage(np.random.default_rng(0))[0].backward()
    return {k: p.grad.clone() for k, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reach", ["all", "decoder"])
def test_where_the_adversarial_loss_reaches(reach: str, cache: Path, tmp_path: Path) -> None:
    text = config_text(["r031"], ADVERSARY.format(reach))
    stage, _ = codec_stage(written(tmp_path, text), PhotoCrops(cache))
    before = gradients(stage, 1)
    # Half way through the warm-up, so that the force is known to be neither 0 nor full.
    after = gradients(stage, 3)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert any(k.startswith("autoencoder.decoder") for k in changed)
    outside = {k for k in changed if not k.startswith("autoencoder.decoder")}
    assert any(k.startswith("rates.r031.hyper_encoder") for k in outside) == (reach == "all")
    assert bool(outside) == (reach == "all")


def test_the_force_of_the_adversary_is_fixed_and_rises() -> None:
    torch.manual_seed(0)
    config = AdversaryConfig(weight=0.5, from_step=10, warmup=9, widths=(4, 4, 8))
    adversary = Adversary(config)
    assert adversary.weight(9) == 0
    assert adversary.weight(10) == pytest.approx(0.05)
    assert adversary.weight(19) == adversary.weight(500) == pytest.approx(0.5)
    images = torch.rand(2, 3, 64, 64)
    for step in (10, 30):
        for scale in (1e-3, 1.0):
            rebuilt = (torch.randn(2, 3, 64, 64) * scale).requires_grad_()
            adversary.loss(rebuilt, images, step).backward()
            assert rebuilt.grad is not None
            force = float(rebuilt.grad.square().mean().sqrt()) * rebuilt.numel()
            assert force == pytest.approx(adversary.weight(step), rel=1e-3)


def test_the_discriminator_learns_to_tell_and_only_when_it_has_a_batch() -> None:
    torch.manual_seed(0)
    adversary = Adversary(AdversaryConfig(weight=1.0, learning_rate=1e-3, widths=(8, 8, 16)))
    assert adversary.learn() is None
    losses = []
    for _ in range(60):
        real = torch.rand(4, 3, 32, 32).round() * 2 - 1
        fake = torch.zeros(4, 3, 32, 32) + 0.1 * torch.randn(4, 3, 32, 32)
        adversary.loss(fake, real, 0)
        loss = adversary.learn()
        assert loss is not None and adversary.learn() is None
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]


def legacy(run: Path) -> None:
    """Rename a run of one rate to the names that runs had before there were several."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["ema"] = {k.removeprefix("rates.r031."): v for k, v in state["ema"].items()}
    torch.save(state, run / "checkpoint.pt")


@pytest.mark.parametrize("old_names", [False, True])
def test_warm_start_loads_what_it_says(old_names: bool, cache: Path, tmp_path: Path) -> None:
    data = PhotoCrops(cache)
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
        assert origins[name].startswith("from r031, but new: ")
        new = origins[name].split("new: ")[1].split(", ")
        assert set(new) == {"quantizer.codebook", "quantizer.usage"}
        kept = {
            k for k in state if k.startswith(f"rates.{name}.") and torch.equal(state[k], fresh[k])
        }
        untouched = {k.removeprefix(f"rates.{name}.") for k in kept}
        assert set(new) <= untouched


def test_a_new_rate_starts_as_its_donor_on_coarser_latents(cache: Path, tmp_path: Path) -> None:
    data = PhotoCrops(cache)
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


def test_frozen_tokens_stay_while_pictures_learn(cache: Path, tmp_path: Path) -> None:
    data = PhotoCrops(cache)
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


def test_a_kept_codebook_stays_while_its_hyper_encoder_learns(cache: Path, tmp_path: Path) -> None:
    text = config_text(["r031", "r010"])
    text = text.replace("[codec.rates.r031]", "[codec.rates.r031]\ncodebook_decay = 1.0")
    stage, loop = codec_stage(written(tmp_path, text), PhotoCrops(cache))
    before = {k: v.clone() for k, v in stage.state_dict().items()}
    train(stage, loop, tmp_path / "run")
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert "rates.r010.quantizer.codebook" in moved
    assert "rates.r031.quantizer.codebook" not in moved
    assert "rates.r031.quantizer.project_in.weight" in moved
    assert any(k.startswith("rates.r031.hyper_encoder") for k in moved)


def test_a_rate_has_loss_weights_of_its_own(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = config_text(["r031", "r010"])
    own = "[codec.rates.r010]\nlpips_weight = 0.25\naligned = 0.0"
    text = text.replace("[codec.rates.r010]", own)
    stage, _ = codec_stage(written(tmp_path, text), PhotoCrops(cache))
    seen, loss = set(), stage.loss.forward

    def noted(images: Tensor, references: Tensor, *weights: float | None) -> object:
        seen.add(weights)
        return loss(images, references, *weights)

    monkeypatch.setattr(stage.loss, "forward", noted)
    generator = np.random.default_rng(0)
    for _ in range(12):
        stage(generator)
    assert seen == {(None, None), (0.25, 0.0)}


def test_warm_start_refusals(cache: Path, tmp_path: Path) -> None:
    data = PhotoCrops(cache)
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


def test_a_run_s_discriminator_may_learn_faster_but_be_no_other(
    cache: Path, tmp_path: Path
) -> None:
    data, text = PhotoCrops(cache), ADVERSARY.format("all")
    stage, loop = codec_stage(written(tmp_path, config_text(["r031"], text)), data)
    train(stage, loop, tmp_path / "run", stop_after_steps=4)
    faster = text.replace("weight = 0.5", "weight = 0.5, learning_rate = 0.125")
    stage, loop = codec_stage(written(tmp_path, config_text(["r031"], faster)), data)
    train(stage, loop, tmp_path / "run", stop_after_steps=1)
    assert stage.adversary is not None
    assert [g["lr"] for g in stage.adversary.optimizer.param_groups] == [0.125]
    other = text.replace("widths = [4, 4, 8]", "widths = [4, 8, 8]")
    stage, loop = codec_stage(written(tmp_path, config_text(["r031"], other)), data)
    with pytest.raises(ValueError, match=r"none of network 'pixels' with widths \(4, 8, 8\)"):
        train(stage, loop, tmp_path / "run")


def test_a_discriminator_may_join_a_run_late(cache: Path, tmp_path: Path) -> None:
    data = PhotoCrops(cache)
    stage, loop = codec_stage(written(tmp_path, config_text(["r031"])), data)
    train(stage, loop, tmp_path / "run", stop_after_steps=3)
    text = config_text(["r031"], ADVERSARY.format("all"))
    stage, loop = codec_stage(written(tmp_path, text), data)
    assert train(stage, loop, tmp_path / "run") == 6
    assert stage.adversary is not None
    steps = {int(s["step"]) for s in stage.adversary.optimizer.state_dict()["state"].values()}
    assert steps == {3}


def test_export_of_three_rates_compresses_and_restores(cache: Path, tmp_path: Path) -> None:
    data = PhotoCrops(cache)
    config = written(tmp_path, config_text(["r031"], steps=2))
    stage, loop = codec_stage(config, data)
    train(stage, loop, tmp_path / "first")
    config = written(tmp_path, config_text(ALL, steps=4))
    run_codec(config, cache, tmp_path / "run", start_from=tmp_path / "first")
    entropy = []
    for i, (name, (_, codes, _)) in enumerate(RATES.items()):
        sizes = TransformerConfig(codes, dim=16, heads=1, head_dim=16, layers=1, hidden=16)
        IntTransformer.random(sizes, seed=i).save(tmp_path / name)
        entropy.append(f"{name}={tmp_path / name}")
    # Two exports into one folder: entropy models come when their tokens are frozen.
    run_export(config, cache, tmp_path / "run", tmp_path / "model", [str(tmp_path / "r031")])
    assert len((tmp_path / "model" / "model_id").read_text().splitlines()) == 1
    run_export(config, cache, tmp_path / "run", tmp_path / "model", entropy[1:])
    codec = Codec.from_pretrained(tmp_path / "model")
    assert [(r.name, r.token_side, r.codebook_size) for r in codec.config.rates] == [
        ("r031", 16, 16),
        ("r010", 32, 32),
        ("r002", 64, 16),
    ]
    assert codec.config.default_rate == "r031"
    lines = (tmp_path / "model" / "model_id").read_text().splitlines()
    assert lines == [f"{codec.model_id(name):04x} {name}" for name in ALL]
    photo = Image.fromarray(data.pixels(data.photos[2]))
    for name, (stride, _, _) in RATES.items():
        [file] = codec.compress([photo], rate=name, captions=["a red door"])
        [tokens] = codec.decode_tokens([file])
        side = 8 * stride
        assert tokens.shape == (-(-72 // side), -(-80 // side))
        assert np.array_equal(tokens, codec.encode_tokens([photo], rate=name)[0])
        [restored] = codec.decompress([file])
        assert restored.size == photo.size
    # The folder is enough to train on; it holds rounded weights.
    again, _ = codec_stage(config, data)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1.0)
    assert set(start_from(again, tmp_path / "model").values()) == {f"from {n}" for n in ALL}
    load_averaged(tmp_path / "run", stage := codec_stage(config, data)[0])
    for key, value in stage.state_dict().items():
        if not key.startswith("loss."):
            assert torch.allclose(again.state_dict()[key], value, rtol=0.02, atol=0.02), key
    with pytest.raises(ValueError, match="r999"):
        run_export(config, cache, tmp_path / "run", tmp_path / "model", ["r999=x"])
