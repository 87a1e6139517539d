"""The training loop that every stage shares: optimiser, EMA, exact resume, log, progress bar.

A stage is a :class:`TrainingStage`: a module whose ``forward(generator)`` draws its own batch and
returns a loss and figures to log. Accelerate carries precision, devices and processes.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a run.

    Attributes:
        steps: length of the learning-rate schedule; training ends there.
        learning_rate: peak of a linear warm-up followed by a cosine to 2 % of it.
        warmup: warm-up steps.
        weight_decay: AdamW's, on weights of two or more dimensions.
        clip: gradient norm limit.
        ema: decay of the averaged weights that are exported.
        seed: seeds initialisation, batches and noise.
        precision: "no" or "bf16" (autocast).
        checkpoint_seconds: time between checkpoints.
        log_every: steps between CSV lines.
    """

    steps: int
    learning_rate: float = 5e-4
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    precision: str = "no"
    checkpoint_seconds: float = 180.0
    log_every: int = 50


class TrainingStage(nn.Module):
    """One stage of training: networks, data and losses."""

    def forward(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw a batch and return the loss and figures to log.

        Figures are scalars, the same names at every step; NaN where a step has none.
        """
        raise TypeError(f"{type(self).__name__} must define forward")

    def start_step(self, step: int, total: int) -> None:
        """Called before every step (e.g. to switch fake quantization on)."""

    def after_step(self) -> None:
        """Called after every optimiser step (e.g. to move the codebook)."""

    def draw_samples(self, folder: Path, step: int) -> None:
        """Called at every checkpoint, in evaluation mode with averaged weights."""

    def side_state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the stage's own weights (e.g. a discriminator)."""
        return {}

    def load_side_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`side_state` returned; {} from a run that had none."""


class _Averaged:
    """Exponential moving average of parameters; buffers are copied."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self._averaged = {k for k, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in module.state_dict().items():
            if key in self._averaged:
                self.state[key].lerp_(value, 1 - decay)
            else:
                self.state[key].copy_(value)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        live = {k: v.detach().clone() for k, v in module.state_dict().items()}
        module.load_state_dict(self.state)
        try:
            yield
        finally:
            module.load_state_dict(live)


def _mean(values: list[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _learning_rate(config: LoopConfig, step: int) -> float:
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _optimizer(stage: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    trained = [p for p in stage.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


def _save(path: Path, state: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load_averaged(out: Path, stage: nn.Module) -> int:
    """Load a run's averaged weights into ``stage``; returns the step they belong to.

    Raises:
        ValueError: when the folder holds no checkpoint.
    """
    path = out / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"{out} holds no checkpoint.pt; train this stage first")
    state = torch.load(path, map_location="cpu", weights_only=True)
    stage.load_state_dict(state["ema"])
    return int(state["step"])


def train(
    stage: TrainingStage,
    config: LoopConfig,
    out: Path,
    *,
    stop_after_steps: int | None = None,
    stop_after_minutes: float | None = None,
) -> int:
    """Train ``stage`` until ``config.steps``, resuming exactly from ``out/checkpoint.pt``.

    Args:
        stage: networks are trained in place.
        config: settings; must be those of the interrupted run when resuming.
        out: folder for checkpoint.pt, log.csv and sample pictures.
        stop_after_steps: end this call after so many steps (the schedule is unchanged).
        stop_after_minutes: end this call after so much time.

    Returns:
        The number of steps done in total. At the end the stage holds the averaged weights.

    Raises:
        FloatingPointError: when the loss is not finite.
    """
    from accelerate import Accelerator

    out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=config.precision, cpu=not torch.cuda.is_available())
    optimizer = _optimizer(stage, config)
    averaged = _Averaged(stage, config.ema)
    generator = np.random.default_rng([config.seed, accelerator.process_index])
    torch.manual_seed(config.seed + accelerator.process_index)
    step = 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        stage.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged.state = state["ema"]
        generator.bit_generator.state = state["generator"]
        torch.set_rng_state(state["torch_rng"])
        stage.load_side_state(state.get("side", {}))
        step = int(state["step"])
    model, optimizer = accelerator.prepare(stage, optimizer)

    def save() -> None:
        if not accelerator.is_main_process:
            return
        _save(
            checkpoint,
            {
                "model": stage.state_dict(),
                "ema": averaged.state,
                "optimizer": optimizer.state_dict(),
                "side": stage.side_state(),
                "generator": generator.bit_generator.state,
                "torch_rng": torch.get_rng_state(),
                "step": step,
            },
        )
        rng = torch.get_rng_state()
        stage.eval()
        with averaged.applied_to(stage), torch.no_grad():
            stage.draw_samples(out, step)
        stage.train()
        torch.set_rng_state(rng)

    started = saved = time.monotonic()
    last = config.steps if stop_after_steps is None else min(config.steps, step + stop_after_steps)
    stage.train()
    recent: dict[str, list[float]] = {}
    bar = tqdm(total=config.steps, initial=step, desc=out.name, unit="step", mininterval=5.0)
    with open(out / "log.csv", "a", newline="") as log:
        writer = csv.writer(log)
        while step < last:
            stage.start_step(step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(config, step)
            with accelerator.autocast():
                loss, figures = model(generator)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss is {loss.item()} at step {step}; lower the rate")
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(stage.parameters(), config.clip)
            optimizer.step()
            stage.after_step()
            averaged.update(stage, step)
            step += 1
            for key, value in figures.items():
                recent.setdefault(key, []).append(float(value))
            bar.update()
            if step % config.log_every == 0 and accelerator.is_main_process:
                means = {key: _mean(values) for key, values in recent.items()}
                if log.tell() == 0:
                    writer.writerow(["step", "seconds", *means])
                writer.writerow([step, round(time.time()), *(f"{v:.5g}" for v in means.values())])
                log.flush()
                bar.set_postfix({k: f"{v:.3f}" for k, v in means.items()}, refresh=False)
                recent = {}
            now = time.monotonic()
            if now - saved > config.checkpoint_seconds:
                save()
                saved = time.monotonic()
            if stop_after_minutes is not None and now - started > stop_after_minutes * 60:
                break
    save()
    bar.close()
    stage.load_state_dict(averaged.state)
    stage.eval()
    return step
