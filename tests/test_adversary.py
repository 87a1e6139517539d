"""The discriminator: its force, what it learns, and where it is felt."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from percov2.models.perceptual import LPIPS
from percov2.training.adversary import Adversary, AdversaryConfig, FeatureDiscriminator
from percov2.training.commands import codec_stage
from percov2.training.data import PhotoCrops
from percov2.training.loop import train
from percov2.training.stage1 import CodecStage
from rate_runs import ADVERSARY, config_text, written

FEATURES = AdversaryConfig(
    weight=0.5, from_step=10, warmup=9, learning_rate=1e-3, network="features", widths=(4, 8, 8)
)


def test_the_force_of_the_adversary_is_fixed_and_rises() -> None:
    torch.manual_seed(0)
    config = AdversaryConfig(weight=0.5, from_step=10, warmup=9, widths=(4, 4, 8))
    adversary = Adversary(config)
    assert adversary.weight(9) == 0
    assert adversary.weight(10) == pytest.approx(0.05)
    assert adversary.weight(19) == adversary.weight(500) == pytest.approx(0.5)
    images = torch.rand(2, 3, 64, 64)
    for step, factor in itertools.product((10, 30), (1.0, 0.25)):
        for scale in (1e-3, 1.0):
            rebuilt = (torch.randn(2, 3, 64, 64) * scale).requires_grad_()
            adversary.loss(rebuilt, images, factor * adversary.weight(step)).backward()
            assert rebuilt.grad is not None
            force = float(rebuilt.grad.square().mean().sqrt()) * rebuilt.numel()
            assert force == pytest.approx(factor * adversary.weight(step), rel=1e-3)


def test_the_discriminator_learns_to_tell_and_only_when_it_has_a_batch() -> None:
    torch.manual_seed(0)
    adversary = Adversary(AdversaryConfig(weight=1.0, learning_rate=1e-3, widths=(8, 8, 16)))
    assert adversary.learn() is None
    losses = []
    for _ in range(60):
        real = torch.rand(4, 3, 32, 32).round() * 2 - 1
        fake = torch.zeros(4, 3, 32, 32) + 0.1 * torch.randn(4, 3, 32, 32)
        adversary.loss(fake, real, adversary.weight(0))
        loss = adversary.learn()
        assert loss is not None and adversary.learn() is None
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]


def test_the_discriminator_of_features_keeps_the_force_and_learns() -> None:
    torch.manual_seed(0)
    adversary = Adversary(FEATURES)
    losses = []
    for step in range(40):
        real = torch.rand(2, 3, 96, 96).round() * 2 - 1
        fake = (0.3 * torch.randn(2, 3, 96, 96)).requires_grad_()
        adversary.loss(fake, real, adversary.weight(step)).backward()
        assert fake.grad is not None
        force = float(fake.grad.square().mean().sqrt()) * fake.numel()
        assert force == pytest.approx(adversary.weight(step), rel=1e-3)
        loss = adversary.learn()
        assert loss is not None and adversary.learn() is None
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]


def test_the_discriminator_of_features_neither_stores_nor_trains_alexnet() -> None:
    torch.manual_seed(0)
    adversary = Adversary(FEATURES)
    alexnet = LPIPS("alex").state_dict()
    names = set(adversary.state_dict()["network"])
    assert names and all(name.startswith("heads.") for name in names)
    photos = torch.rand(2, 3, 96, 96)
    adversary.loss(torch.zeros_like(photos), photos, adversary.weight(20))
    adversary.learn()
    kept = adversary.network._alexnet[0].state_dict()
    assert all(torch.equal(kept[name], alexnet[name]) for name in alexnet)
    other = Adversary(FEATURES)
    other.load_state_dict(adversary.state_dict())
    loaded = other.network.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in adversary.network.state_dict().items())


def test_the_discriminator_of_features_takes_alexnet_along() -> None:
    network = FeatureDiscriminator(4).to("meta")
    assert all(view.is_meta for view in network.view(torch.zeros(2, 3, 64, 64, device="meta")))


def test_unknown_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="'vgg'"):
        AdversaryConfig(network="vgg")


def gradients(stage: CodecStage, step: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    stage.zero_grad(set_to_none=True)
    stage.start_step(step, 100)
    stage(np.random.default_rng(0))[0].backward()
    return {k: p.grad.clone() for k, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reach", ["all", "decoder"])
def test_where_the_adversarial_loss_reaches(reach: str, photo_cache: Path, tmp_path: Path) -> None:
    text = config_text(["r031"], ADVERSARY.format(reach))
    stage, _ = codec_stage(written(tmp_path, text), PhotoCrops(photo_cache))
    before = gradients(stage, 1)
    # Half way through the warm-up, so that the force is known to be neither 0 nor full.
    after = gradients(stage, 3)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    own = "[codec.rates.r031]\nadversarial = 0.0"
    text = text.replace("[codec.rates.r031]", own)
    spared, _ = codec_stage(written(tmp_path, text), PhotoCrops(photo_cache))
    spared.load_state_dict(stage.state_dict())
    unfelt = gradients(spared, 3)
    assert all(torch.equal(before[k], unfelt[k]) for k in before)
    assert any(k.startswith("autoencoder.decoder") for k in changed)
    outside = {k for k in changed if not k.startswith("autoencoder.decoder")}
    assert any(k.startswith("rates.r031.hyper_encoder") for k in outside) == (reach == "all")
    assert bool(outside) == (reach == "all")


def test_a_run_s_discriminator_may_learn_faster_but_be_no_other(
    photo_cache: Path, tmp_path: Path
) -> None:
    data, text = PhotoCrops(photo_cache), ADVERSARY.format("all")
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


def test_a_discriminator_may_join_a_run_late(photo_cache: Path, tmp_path: Path) -> None:
    data = PhotoCrops(photo_cache)
    stage, loop = codec_stage(written(tmp_path, config_text(["r031"])), data)
    train(stage, loop, tmp_path / "run", stop_after_steps=3)
    text = config_text(["r031"], ADVERSARY.format("all"))
    stage, loop = codec_stage(written(tmp_path, text), data)
    assert train(stage, loop, tmp_path / "run") == 6
    assert stage.adversary is not None
    steps = {int(s["step"]) for s in stage.adversary.optimizer.state_dict()["state"].values()}
    assert steps == {3}
