"""The discriminators: their weight, their training and their effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from percov2.training.adversary import (
    Adversary,
    AdversaryConfig,
    FeatureDiscriminator,
    PixelDiscriminator,
    with_force,
)
from percov2.training.stage1 import CodecStage
from tools.rate_runs import FEATURES, PIXELS, config_text, moved, stage_of, trained


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_the_force_is_fixed_and_proportional_to_realism(scale):
    torch.manual_seed(0)
    adversary = Adversary(PixelDiscriminator((4, 4, 8)), 2e-4)
    images = torch.rand(3, 3, 64, 64)
    realism = torch.tensor([1.0, 0.25, 0.0])
    rebuilt = (torch.randn(3, 3, 64, 64) * scale).requires_grad_()

    def gradient(realism: torch.Tensor) -> torch.Tensor:
        felt = with_force(rebuilt, torch.tensor(0.5), realism)
        (found,) = torch.autograd.grad(adversary.loss([felt], [images], realism).mean(), rebuilt)
        return found

    whole = gradient(torch.ones(3))
    assert float(whole.square().mean().sqrt()) * rebuilt.numel() == pytest.approx(0.5, rel=1e-3)
    assert torch.allclose(gradient(realism), whole * realism.view(3, 1, 1, 1), rtol=1e-4)


@pytest.mark.parametrize(
    ("network", "halves"),
    [(lambda: PixelDiscriminator((8, 8, 16)), 1), (lambda: FeatureDiscriminator((3, 3), 8), 2)],
    ids=["pixels", "features"],
)
def test_a_discriminator_learns_to_tell_and_only_when_it_has_a_batch(network, halves):
    def views(images: torch.Tensor) -> list[torch.Tensor]:
        return [images, images[..., ::2, ::2]][:halves]  # the second are made-up features

    torch.manual_seed(0)
    adversary = Adversary(network(), 1e-3)
    assert adversary.learn() is None
    losses = []
    for _ in range(60):
        real = torch.rand(4, 3, 32, 32).round() * 2 - 1
        fake = torch.zeros(4, 3, 32, 32) + 0.1 * torch.randn(4, 3, 32, 32)
        adversary.loss(views(fake), views(real), torch.ones(4))
        losses.append(float(adversary.learn()))
        assert adversary.learn() is None
    assert losses[-1] < 0.6 * losses[0]
    scores = adversary.loss(views(torch.cat([fake, real])), views(real), torch.ones(8))
    assert scores.shape == (8,) and scores[:4].min() > scores[4:].max()


def test_a_discriminator_ignores_pictures_without_realism():
    learnt = []
    for other in (0.0, 5.0):
        torch.manual_seed(0)
        adversary = Adversary(PixelDiscriminator((4, 4, 8)), 1e-3)
        real, fake = torch.rand(2, 2, 3, 32, 32)
        fake[1] = other
        adversary.loss([fake], [real], torch.tensor([1.0, 0.0]))
        learnt.append(float(adversary.learn()))
    assert learnt[0] == pytest.approx(learnt[1])


def test_settings_out_of_range_are_refused():
    for wrong in ({"learning_rate": 0.0}, {"pixel_widths": (0, 4, 8)}, {"feature_width": 0}):
        with pytest.raises(ValueError, match="positive"):
            AdversaryConfig(**wrong)


def gradients(stage: CodecStage, step: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    stage.zero_grad(set_to_none=True)
    stage.start_step(step, 100)
    stage(np.random.default_rng(0))[0].backward()
    return {k: p.grad.clone() for k, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("losses", [PIXELS, FEATURES], ids=["pixels", "features"])
def test_a_discriminator_is_felt_by_everything_from_its_step_on(losses, photo_cache, tmp_path):
    text = config_text(["r031"], losses=losses)
    stage, _ = stage_of(tmp_path, photo_cache, text)
    # Half way through the warm-up, so that the force is known to be neither 0 nor full.
    before, after = gradients(stage, 1), gradients(stage, 3)
    changed = moved(before, after)
    for part in ("autoencoder.decoder", "flow", "text_encoder", "rates.r031.hyper_encoder"):
        assert any(key.startswith(part) for key in changed), part
    assert not any(key.startswith("perceptual") for key in before)
    without = losses.splitlines()[-1].split(" ")[0] + " = { weight = 0.0 }"
    own = f"[codec.rates.r031]\nlosses = {{ {without} }}"
    text = text.replace("[codec.rates.r031]", own)
    spared, _ = stage_of(tmp_path, photo_cache, text)
    spared.load_state_dict(stage.state_dict(), strict=False)
    assert not moved(gradients(spared, 3), before)


def test_a_run_s_discriminator_may_learn_faster_but_be_no_other(photo_cache, tmp_path):
    text = config_text(["r031"], losses=PIXELS)
    trained(tmp_path, photo_cache, text, 4)
    faster = text.replace("feature_width = 4", "learning_rate = 0.125")
    stage = trained(tmp_path, photo_cache, faster, 1)
    assert [g["lr"] for g in stage.adversaries["pixels"].optimizer.param_groups] == [0.125]
    with pytest.raises(ValueError, match="other widths"):
        trained(tmp_path, photo_cache, text.replace("[4, 4, 8]", "[4, 8, 8]"))


def test_a_discriminator_may_join_a_run_late(photo_cache, tmp_path):
    trained(tmp_path, photo_cache, config_text(["r031"]), 3)
    stage = trained(tmp_path, photo_cache, config_text(["r031"], losses=PIXELS))
    state = stage.adversaries["pixels"].optimizer.state_dict()["state"]
    assert {int(s["step"]) for s in state.values()} == {3}
