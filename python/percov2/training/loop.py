"""The training loop of all stages: optimiser, averaged weights, exact resume, log, progress bar.

A stage is a :class:`stage.TrainingStage`. Accelerate handles precision, devices and processes.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from percov2.stored_files import one_line
from percov2.training import checkpoint
from percov2.training.averaging import AveragedWeights
from percov2.training.optimizers import adamw, make_recordable, restore, set_learning_rate
from percov2.training.ranges import MOST_STEPS, check_above_0, check_ranges
from percov2.training.recording import CudaRecorder, RecordedSteps
from percov2.training.stage import Draw, Figures, Place, TrainingStage, append_row, keep_rows

__all__ = ["LoopConfig", "leave_processes", "load_averaged", "train"]


_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, MOST_STEPS),
    "learning_rate": (0.0, 1e6),
    "warmup": (0, MOST_STEPS),
    "weight_decay": (0.0, 1e6),
    "beta2": (0.0, 0.999999),
    "ema": (0.0, 1.0),
    "seed": (0, 2**63 - 1),
    "accumulate": (1, 65536),
    "checkpoint_seconds": (0.0, math.inf),
    "log_every": (1, MOST_STEPS),
}
"""Ranges of a run's settings."""


@dataclass(frozen=True)
class LoopConfig:
    """The settings of a run.

    Raises:
        ValueError: the schedule or precision is unknown, a number is outside its range, or
            ``record`` is True with more than one pass per step.
    """

    steps: int  # length of the run and of its learning-rate schedule
    minutes: float = math.inf  # length in minutes, if that comes first
    learning_rate: float = 5e-4  # peak, after a linear warm-up
    warmup: int = 200  # steps of the warm-up
    schedule: str = "cosine"  # falls to 2 % of the peak after the warm-up; "constant" stays
    weight_decay: float = 0.01  # AdamW's decay of weights with two or more dimensions
    beta2: float = 0.98  # AdamW's decay of squared gradients
    clip: float = 1.0  # limit of the gradient norm
    ema: float = 0.999  # decay of the averaged weights
    seed: int = 0  # seed of initialisation, batches and noise
    precision: str = "no"  # or "bf16" (autocast)
    accumulate: int = 1  # forward passes per step
    checkpoint_seconds: float = 180.0  # time between checkpoints
    log_every: int = 50  # steps between CSV lines
    # Repeat recorded steps on a GPU (``recording``), which is faster for steps of many small
    # kernels. It needs a ``recordable`` stage and a single process.
    record: bool = False

    def __post_init__(self) -> None:
        # fp16 would need a loss scale, which checkpoints do not hold.
        known = {"schedule": ("cosine", "constant"), "precision": ("no", "bf16")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, not {getattr(self, name)!r}")
        check_ranges(self, **_RANGES)
        check_above_0(self, "minutes", "clip")
        if self.record and self.accumulate > 1:
            raise ValueError(f"recorded steps have one pass, not accumulate = {self.accumulate}")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yield a list that the first Ctrl-C or SIGTERM fills. A second signal acts as usual."""
    noticed: list[int] = []
    before: dict[int, Any] = {}

    def restore_handlers() -> None:
        while before:
            signal.signal(*before.popitem())

    def notice(number: int, _: object) -> None:
        noticed.append(number)
        restore_handlers()

    if threading.current_thread() is threading.main_thread():  # others cannot handle signals
        before.update({n: signal.signal(n, notice) for n in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield noticed
    finally:
        restore_handlers()


def _mean(values: list[float]) -> float:
    """Return the mean of the values that are not NaN, or NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _learning_rate(config: LoopConfig, step: int, minutes: float) -> float:
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    progress = max(progress, min(1.0, minutes / config.minutes))
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _optimizer(stage: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    trained = [p for p in stage.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return adamw(groups, config.learning_rate, (0.9, config.beta2), 0.0)


def _check_recordable(stage: TrainingStage, on_cpu: bool, processes: int) -> None:
    kind = type(stage).__name__
    if not stage.recordable:
        raise ValueError(f"steps of this {kind} cannot be recorded; set record to false")
    if processes > 1:
        raise ValueError(f"record = true needs a single process, not {processes}")
    if on_cpu:
        raise ValueError("record = true needs a CUDA device; set record to false")


def load_averaged(out: Path, stage: TrainingStage) -> int:
    """Load a run's averaged weights into ``stage``. Return their step.

    Raises ValueError if there is no checkpoint or if it does not match.
    """
    path = out / "checkpoint.pt"
    if not checkpoint.is_present(path):
        raise ValueError(f"{out} contains no checkpoint.pt; train this stage first")
    state = checkpoint.read(path)
    checkpoint.restore(stage, state["ema"], stage.stored_keys(), path)
    return int(state["step"])


class _Run:
    """The state of a run in this process."""

    def __init__(self, stage: TrainingStage, config: LoopConfig, out: Path) -> None:
        from accelerate import Accelerator

        on_cpu = not torch.cuda.is_available()
        self.accelerator = whole = Accelerator(mixed_precision=config.precision, cpu=on_cpu)
        if whole.distributed_type.endswith(("FSDP", "DEEPSPEED", "MEGATRON_LM")):
            kind = whole.distributed_type.value
            raise ValueError(f"{kind} is not supported; every process holds the whole model")
        self.stage, self.config, self.out = stage, config, out
        self.path = out / "checkpoint.pt"
        if config.record:
            _check_recordable(stage, on_cpu, whole.num_processes)
        index, count = whole.process_index, whole.num_processes
        self.draws_of = (0, 1) if stage.whole_batches else (index, count)
        self.generator = np.random.default_rng([config.seed, self.draws_of[0]])
        torch.manual_seed(config.seed + self.draws_of[0])
        self.model, self.optimizer = whole.prepare(stage, _optimizer(stage, config))
        place = Place(whole.device, index, count, config.accumulate, config.seed, config.record)
        if config.record:
            make_recordable(self.optimizer, place.device)
        stage.start_run(place)
        self.keys = stage.stored_keys()
        self.averaged = AveragedWeights(stage, config.ema, self.keys)
        self.recorded = RecordedSteps(self._whole_step, CudaRecorder()) if config.record else None
        self.losses: list[Tensor] = []
        self.step, self.earlier, self.started = 0, 0.0, time.monotonic()
        if checkpoint.is_present(self.path):
            self._restore()

    def _restore(self) -> None:
        state = checkpoint.read(self.path)
        if missing := {"model", "optimizer", "generator", "torch_rng"} - state.keys():
            raise ValueError(
                f"{self.path} lacks {sorted(missing)}, so the run cannot go on; start another run "
                "from it (--start-from)"
            )
        checkpoint.check_names(state["ema"], self.keys, self.path)
        if self.stage.whole_batches:
            state.pop("other_processes", None)
        process, processes = self.draws_of
        try:
            checkpoint.restore(self.stage, state["model"], self.keys, self.path)
            restore(self.optimizer, state["optimizer"])
            self.averaged.load(state["ema"])
            checkpoint.restore_draws(state, self.generator, process, processes, self.path)
            self.stage.load_side_state(state.get("side", {}))
            self.step, self.earlier = state["step"], float(state.get("minutes", 0.0))
        except (TypeError, LookupError, AttributeError, RuntimeError, ValueError) as error:
            if str(self.path) in str(error):
                raise
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ValueError(f"{self.path} does not match this run ({reason})") from error

    @property
    def minutes(self) -> float:
        """Return the minutes of training so far, including earlier calls."""
        return self.earlier + (time.monotonic() - self.started) / 60

    def save(self) -> None:
        """Write a checkpoint and samples (collective)."""
        self.check()
        draws = checkpoint.gather_draws(self.generator)
        side = self.stage.side_state()
        if self.accelerator.is_main_process:
            state = {
                "model": checkpoint.kept(self.stage, self.keys),
                "ema": self.averaged.state,
                "optimizer": self.optimizer.state_dict(),
                "side": side,
                **draws[0],
                "other_processes": draws[1:],
                "step": self.step,
                "minutes": self.minutes,
            }
            checkpoint.write(self.path, state)
            rng = torch.get_rng_state()
            self.stage.eval()
            with self.averaged.applied_to(self.stage), torch.no_grad():
                self.stage.draw_samples(self.out, self.step)
            self.stage.train()
            torch.set_rng_state(rng)
        self.accelerator.wait_for_everyone()

    def do_step(self) -> Figures:
        """Do an optimiser step. Return the figures of its last forward pass."""
        self.stage.start_step(self.step, self.config.steps)
        set_learning_rate(self.optimizer, _learning_rate(self.config, self.step, self.minutes))
        if self.recorded is None:
            figures = self._step_by_passes()
        else:
            figures = self.recorded(self.stage.draw(self.generator))
            self.losses.append(figures.pop("loss"))
        self.averaged.update(self.stage, self.step)
        self.step += 1
        return figures

    def _whole_step(self, draw: Draw) -> Figures:
        """Do a step that may be recorded. Return its figures and its loss."""
        allowed = self.config.precision == "bf16"
        # Without the cache of casts, which would outlive the recording.
        with torch.autocast("cuda", torch.bfloat16, enabled=allowed, cache_enabled=False):
            loss, figures = self.stage.compute(draw)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.stage.parameters(), self.config.clip)
        self.optimizer.step()
        self.stage.after_step()
        return {"loss": loss.detach(), **figures}

    def check(self) -> None:
        """Raise FloatingPointError if a loss since the last call was not finite."""
        losses, self.losses = self.losses, []
        if losses and not torch.isfinite(torch.stack(losses)).all():
            where = f"in the {len(losses)} steps before {self.step}"
            raise FloatingPointError(f"a loss was not finite {where}; lower the learning rate")

    def _step_by_passes(self) -> Figures:
        """Do a step of one or more passes, without averaging. Return the last pass's figures."""
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(self.config.accumulate):
            last = part == self.config.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss, figures = self.model(self.generator)
                if not torch.isfinite(loss):
                    found = f"loss is {loss.item()} at step {self.step}"
                    raise FloatingPointError(f"{found}; lower the learning rate")
                self.accelerator.backward(loss / self.config.accumulate)
        self.accelerator.clip_grad_norm_(self.stage.parameters(), self.config.clip)
        self.optimizer.step()
        self.stage.after_step()
        return figures

    def agreed(self, *wishes: bool) -> list[bool]:
        """Return, for each wish, True if at least one process has it (collective)."""
        if self.accelerator.num_processes == 1:
            return list(wishes)
        own = torch.tensor(wishes, dtype=torch.int32, device=self.accelerator.device)
        return (self.accelerator.reduce(own, "sum") > 0).tolist()

    def means(self, recent: dict[str, list[Tensor]]) -> dict[str, float]:
        """Return the means of the figures over steps and processes (collective)."""
        self.check()
        own = {key: _mean([float(v) for v in values]) for key, values in recent.items()}
        rows = torch.tensor([list(own.values())], device=self.accelerator.device)
        columns = self.accelerator.gather(rows).T.tolist()
        return {key: _mean(values) for key, values in zip(own, columns, strict=True)}


def train(
    stage: TrainingStage,
    config: LoopConfig,
    out: Path,
    *,
    stop_after_steps: int | None = None,
    stop_after_minutes: float | None = None,
) -> int:
    """Train ``stage`` until ``config.steps``, resuming from ``out/checkpoint.pt``.

    A resumed run is exact on a CPU. On a GPU, batches and noise are the same, but sums may differ.
    Ctrl-C or SIGTERM ends the call after the current step, with a checkpoint.

    Args:
        stage: stage to train in place. At the end it holds the averaged weights.
        config: settings, which must be the same for all calls of a run.
        out: folder for checkpoint.pt, log.csv and sample pictures.
        stop_after_steps: largest number of steps of this call; None sets no limit. The schedule
            does not depend on it.
        stop_after_minutes: largest duration of this call in minutes; None sets no limit.

    Returns:
        The total number of steps done.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError: ``out`` holds a run of other networks or of another number of processes, or a
            folder in the place of a file; ``stop_after_minutes`` is negative.
    """
    # The default stream does not allow recording.
    recording = config.record and torch.cuda.is_available()
    minutes = math.inf if stop_after_minutes is None else stop_after_minutes
    if not minutes >= 0:
        raise ValueError(f"the time to stop after must be at least 0 minutes, not {minutes}")
    with torch.cuda.stream(torch.cuda.Stream()) if recording else nullcontext():
        step = _train(stage, config, out, stop_after_steps, minutes)
    if recording:
        torch.cuda.synchronize()
    return step


def _train(
    stage: TrainingStage, config: LoopConfig, out: Path, most_steps: int | None, minutes: float
) -> int:
    """Train on the current stream."""
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(stage, config, out)
    main = run.accelerator.is_main_process
    if main:
        keep_rows(out / "log.csv", run.step)
        for table in stage.tables:
            if (out / table).exists():
                keep_rows(out / table, run.step)
    started = saved = time.monotonic()
    last = config.steps if most_steps is None else min(config.steps, run.step + most_steps)
    stage.train()
    recent: dict[str, list[Tensor]] = {}
    look = {"desc": out.name, "unit": "step", "mininterval": 5.0, "disable": not main}
    bar = tqdm(total=config.steps, initial=run.step, **look)
    with _stop_signals() as noticed:
        while run.step < last:
            # Values are read only for a log line, because reading waits for the device.
            for key, value in run.do_step().items():
                recent.setdefault(key, []).append(value)
            bar.update()
            if run.step % config.log_every == 0:
                means = run.means(recent)
                recent = {}
                if main:
                    figures = {key: f"{value:.5g}" for key, value in means.items()}
                    row = {"step": run.step, "seconds": round(time.time()), **figures}
                    append_row(out / "log.csv", row)
                    bar.set_postfix({k: f"{v:.3f}" for k, v in means.items()}, refresh=False)
            now = time.monotonic()
            late = now - started > minutes * 60 or run.minutes >= config.minutes
            wishes = late or bool(noticed), now - saved > config.checkpoint_seconds
            stop, due = run.agreed(*wishes)
            if stop:
                break
            if due:
                run.save()
                saved = time.monotonic()
    run.save()
    bar.close()
    stage.load_state_dict(run.averaged.state, strict=False)
    stage.eval()
    return run.step


def leave_processes() -> None:
    """Leave the group of processes, if there is one (collective).

    Call this after the last run: otherwise the communication threads of a process may abort when it
    exits. Do not call it after an error, because it waits for all processes.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
