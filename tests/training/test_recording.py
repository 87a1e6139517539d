"""Recorded steps equal ordinary steps, and no step waits for the device."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from percov2.photos import PhotoCrops
from percov2.training import loop
from percov2.training.commands import autoencoder_stage
from percov2.training.loop import LoopConfig, train
from percov2.training.optimizers import adamw, make_recordable, restore, set_learning_rate
from percov2.training.recording import Figures, RecordedSteps
from percov2.training.stage import Draw
from percov2.training.stage1 import CodecStage
from tools.rate_runs import ALEX, ALL, FEATURES, PIXELS, config_text, moved, snapshot, stage_of


class Toy:
    """A step that moves a weight, in one of two ways."""

    def __init__(self) -> None:
        self.weight = torch.zeros(3)
        self.constant = torch.tensor(7.0, device="meta")
        self.done = 0

    def step(self, draw: Draw) -> Figures:
        self.done += 1
        x = draw.tensors["x"]
        self.weight += x if draw.kind == "plus" else -2 * x
        return {"loss": self.weight.sum(), "constant": self.constant, "x": x.mean()}

    def record(self, work: Callable[[], Figures]) -> tuple[Figures, Callable[[], None]]:
        """Like a CUDA graph: recording does nothing, and results always lie at one place."""
        kept = self.weight.clone()
        places = work()
        self.weight.copy_(kept)

        def repeat() -> None:
            for name, value in work().items():
                if not value.is_meta:
                    places[name].copy_(value)

        return places, repeat


def test_repeated_steps_do_what_usual_ones_do():
    usual, toy = Toy(), Toy()
    recorded = RecordedSteps(toy.step, toy.record)
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[Figures, Figures]] = []
    for i in range(24):
        kind = ("plus", "minus")[i % 3 == 0]
        draw = Draw(kind, {"x": torch.randn(3, generator=generator)})
        kept.append((usual.step(draw), recorded(Draw(kind, {"x": draw.tensors["x"].clone()}))))
        assert torch.equal(toy.weight, usual.weight)
    for expected, figures in kept:  # later steps leave the figures of earlier ones alone
        assert list(figures) == list(expected) and figures["constant"].is_meta
        assert float(figures["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-5)
        assert float(figures["x"]) == pytest.approx(float(expected["x"]), abs=1e-6)


def test_every_kind_and_shape_is_recorded_for_itself():
    recordings = []
    toy = Toy()

    def record(work: Callable[[], Figures]) -> tuple[Figures, Callable[[], None]]:
        recordings.append(work)
        return toy.record(work)

    recorded = RecordedSteps(toy.step, record)
    for count, expected in ((1, 0), (1, 0), (1, 1), (3, 1), (3, 1), (3, 2), (1, 2), (3, 2)):
        recorded(Draw("plus", {"x": torch.ones(count)}))
        assert len(recordings) == expected
    recorded(Draw("minus", {"x": torch.ones(3)}))
    assert len(recordings) == 2


def on_meta(module: torch.nn.Module) -> None:
    """Move a module to the meta device, in place; nothing can be read back from there."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                moved = torch.nn.Parameter(value.to("meta"), requires_grad=value.requires_grad)
                part._parameters[name] = moved
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = buffer.to("meta")


def meta_stage(folder: Path, photos: Path) -> CodecStage:
    losses = PIXELS + "\n" + FEATURES.removeprefix(ALEX) + "\nvgg = { weight = 1.0 }"
    text = config_text(ALL, "frozen_tokens = true\ndial = {}", losses=losses)
    stage, _ = stage_of(folder, photos, text)
    assert stage.recordable and set(stage.adversaries) == {"pixels", "features"}
    on_meta(stage)
    for adversary in stage.adversaries.values():
        on_meta(adversary.network)
        adversary.optimizer = adamw(adversary.network.parameters(), 1e-3, (0.5, 0.9), 0.0)
    stage._learnt = {name: torch.zeros((), device="meta") for name in stage.adversaries}
    return stage


def test_a_step_of_the_joint_phase_reads_nothing_back(photo_cache, tmp_path, monkeypatch):
    # The cast of the discriminator asks for the device type, of which meta is none.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda device, *rest, **named: autocast("cpu", *rest, **named)
    )
    stage = meta_stage(tmp_path, photo_cache)
    optimizer = adamw(stage.parameters(), 1e-3, (0.9, 0.98), 0.0)
    stage.start_step(5, 6)
    for rate in ALL:
        monkeypatch.setattr("percov2.training.stage1.draw_rate", lambda *_, rate=rate: rate)
        draw = stage.draw(np.random.default_rng(0))
        assert draw.kind[0] == rate and draw.kind[3] == ("alex", "vgg", "pixels", "features")
        there = Draw(draw.kind, {k: v.to("meta") for k, v in draw.tensors.items()})
        loss, figures = stage.compute(there)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        optimizer.step()
        stage.after_step()
        assert loss.is_meta
        own = {k for k, v in figures.items() if v.is_meta}
        shared = {"adversarial_pixels", "discriminator_features"}
        assert {f"l1_{rate}", f"lpips_{rate}", *shared} <= own


def test_only_what_can_be_recorded_is(photo_cache, tmp_path):
    assert not stage_of(tmp_path, photo_cache, config_text(["r031"]))[0].recordable
    text = config_text(["r031"], "frozen_tokens = true", losses=FEATURES)
    stage, _ = stage_of(tmp_path, photo_cache, text)
    assert stage.recordable
    first, _ = autoencoder_stage(tmp_path / "config.toml", PhotoCrops(photo_cache))
    with pytest.raises(ValueError, match="AutoencoderStage cannot be recorded"):
        train(first, LoopConfig(steps=1, record=True), tmp_path / "first")
    with pytest.raises(ValueError, match="accumulate = 2"):
        LoopConfig(steps=1, record=True, accumulate=2)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            train(stage, LoopConfig(steps=1, record=True), tmp_path / "run")


def stepped(optimizer: torch.optim.Optimizer, weight: Tensor) -> Tensor:
    for _ in range(2):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    return weight.detach().clone()


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], ids=["cpu", "cuda"]
)
def test_optimizers_go_on_with_and_without_recording(device):
    start = torch.tensor([1.0, -2.0], device=device)
    recorded = (False,) if device == "cpu" else (False, True)  # only CUDA devices record

    def made(weight: Tensor, rate: float, record: bool) -> torch.optim.Optimizer:
        optimizer = adamw([weight], rate, (0.9, 0.98), 0.1)
        if record:
            make_recordable(optimizer, weight.device)
        return optimizer

    weight = start.clone().requires_grad_()
    optimizer = made(weight, 0.1, False)
    stepped(optimizer, weight)
    set_learning_rate(optimizer, 0.3)
    expected = stepped(optimizer, weight)
    for before, after in itertools.product(recorded, recorded):
        weight = start.clone().requires_grad_()
        first = made(weight, 0.1, before)
        stepped(first, weight)
        second = made(weight, 0.3, after)
        restore(second, first.state_dict())  # but not its learning rate
        assert torch.allclose(stepped(second, weight), expected, atol=1e-6)


def test_a_loss_that_is_not_finite_is_noticed():
    run: Any = SimpleNamespace(losses=[torch.tensor(1.0), torch.tensor(2.0)], step=2)
    loop._Run.check(run)
    assert run.losses == []
    run.losses = [torch.tensor(1.0), torch.tensor(torch.inf)]
    with pytest.raises(FloatingPointError, match="2 steps before 2"):
        loop._Run.check(run)


@pytest.mark.cuda
def test_recorded_training_learns_and_resumes(photo_cache, tmp_path):
    text = config_text(["r031", "r010"], "frozen_tokens = true", 60, PIXELS)
    text = text.replace("log_every = 2", "log_every = 10, record = true")
    stage, settings = stage_of(tmp_path, photo_cache, text)
    assert settings.record
    before = snapshot(stage)
    train(stage, settings, tmp_path / "run", stop_after_steps=30)
    stage, settings = stage_of(tmp_path, photo_cache, text)
    assert train(stage, settings, tmp_path / "run") == 60
    after = {k: v.cpu() for k, v in stage.state_dict().items()}
    learnt = moved(before, after)
    assert any(k.startswith("flow.") for k in learnt)
    assert not {k for k in learnt if "hyper_encoder" in k or "codebook" in k}
    with open(tmp_path / "run" / "log.csv") as log:
        rows = list(csv.DictReader(log))
    losses = [float(row["l1_r031"]) for row in rows]
    assert len(rows) == 6 and np.isfinite(losses).all() and len(set(losses)) == 6
    assert losses[-1] < losses[0]
    learnt = [float(row["discriminator_pixels"]) for row in rows[1:]]
    assert np.isfinite(learnt).all() and len(set(learnt)) == 5


@pytest.mark.cuda
def test_a_recorded_step_is_the_usual_one(photo_cache, tmp_path):
    # Without noise, shifts and dropout nothing is random but the crops.
    plain = "frozen_tokens = true\naligned = 1.0\none_step = 1.0\ncaption_dropout = 0.0\n"
    text = config_text(["r031"], plain, 12).replace("log_every = 2", "log_every = 1")
    kept: list[Tensor] = []
    for record in ("false", "true"):
        own = text.replace("log_every = 1,", f"log_every = 1, record = {record},")
        stage, settings = stage_of(tmp_path, photo_cache, own)
        assert settings.record == (record == "true")
        with torch.no_grad():  # the noise has no say
            stage.flow.pos_embed.proj.weight[:, :16] = 0
        stage.flow.pos_embed.proj.requires_grad_(False)
        trained = [p for p in stage.parameters() if p.requires_grad]
        start = torch.cat([p.detach().flatten() for p in trained])
        train(stage, settings, tmp_path / record)
        kept.append(torch.cat([p.detach().flatten().cpu() for p in trained]) - start)
    usual, repeated = kept
    # Adam makes as much of rounding as of anything where a gradient is next to nothing.
    assert float((repeated - usual).norm()) < 0.05 * float(usual.norm())
