"""Recorded passes of staged decoding. A recorder on the CPU repeats work as a CUDA graph does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from percov2.entropy import schedule
from percov2.entropy.int_transformer import random_tensors
from percov2.entropy.torch import executor, int_transformer, recorded
from percov2.entropy.torch.int_transformer import to_tensors
from percov2.entropy.transformer_config import TransformerConfig
from tools.compiled_kernels import needs_triton
from tools.executors import random_on, same, staged_logits

CONFIG = TransformerConfig(codebook_size=16, dim=8, heads=1, head_dim=8, layers=2, hidden=8)
CPU = torch.device("cpu")


class Tape:
    """A recorder whose replay computes into the tensor of the recording, and counts."""

    def __init__(self, wrong: int = 0) -> None:
        self.recorded, self.replayed, self._wrong = 0, 0, wrong

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        result = torch.empty_like(work())
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            result.copy_(work() + self._wrong)

        return replay, result


class Replaying(executor.Executor):
    """The executor in torch, with recordings as ``triton_executor`` has them."""

    tape = Tape()

    def replay(self) -> None:
        self._recordings = recorded.Recordings(lambda: self.tape)

    def staged(self, stages: np.ndarray, batch: int) -> Any:
        make = partial(super().staged, stages, batch)
        if not hasattr(self, "_recordings"):
            return make()
        return self._recordings.staged((stages.tobytes(), batch), make)


def executor_with(tape: Tape) -> Replaying:
    made = Replaying(CONFIG, to_tensors(random_tensors(CONFIG, 3)), CPU)
    made.tape = tape
    made.replay()
    return made


def decode(passes: Any, tokens: torch.Tensor, stages: np.ndarray) -> torch.Tensor:
    """The residuals of all stages, and the tokens are checked."""
    coding, found = schedule.order(stages), []
    for stage in range(1, int(stages.max()) + 1):
        found.append(passes.residual().clone())
        places = torch.from_numpy(coding[stages.reshape(-1)[coding] == stage])
        passes.accept(tokens.flatten(1)[:, places])
    assert torch.equal(passes.tokens().long(), tokens)
    return torch.cat(found, 1)


def test_replayed_stages_equal_the_pass_over_everything() -> None:
    tape = Tape()
    made, stages = executor_with(tape), schedule.stages("qlds5", 5, 6)
    for seed in range(4):
        tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (2, 5, 6)))
        assert same(decode(made.staged(stages, 2), tokens, stages), made.encode(tokens, stages))
    assert (tape.recorded, tape.replayed) == (5, 15)  # five stages; all decodes but the first


def test_a_recording_serves_one_decode_at_a_time() -> None:
    tape = Tape()
    made, stages = executor_with(tape), schedule.stages("checkerboard", 3, 4)
    grids = [torch.full((1, 3, 4), value) for value in (3, 9)]
    made.staged(stages, 1)
    both = [made.staged(stages, 1) for _ in grids]
    first = both[0].residual().clone()
    for passes, tokens in zip(both[::-1], grids[::-1], strict=True):
        assert same(decode(passes, tokens, stages), made.encode(tokens, stages))
    assert same(first, made.encode(grids[0], stages)[:, : first.shape[1]])
    assert (tape.recorded, tape.replayed) == (2, 3)
    del passes, both
    unfinished = made.staged(stages, 1)
    unfinished.residual()
    unfinished.accept(torch.full((1, 6), 5))
    del unfinished
    assert not made.staged(stages, 1).tokens().any()
    assert tape.recorded == 2


def test_few_recordings_are_kept() -> None:
    tape = Tape()
    made = executor_with(tape)
    every = [schedule.stages("raster", 1, width) for width in range(1, 7)]
    for _ in range(2):
        for stages in every:
            made.staged(stages, 1).residual()
    assert tape.recorded == 6
    made.staged(every[-1], 1).residual()
    assert tape.recorded == 6
    made.staged(every[0], 1).residual()
    assert tape.recorded == 7


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_device_without_graphs_says_so(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, wrong: int
) -> None:
    monkeypatch.setattr(
        int_transformer, "_executor", lambda *_: SimpleNamespace(Executor=Replaying)
    )
    monkeypatch.setattr(Replaying, "tape", Tape(wrong))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    assert int_transformer._replays.__wrapped__("triton", CPU) == (not wrong)
    said = [str(one.message) for one in recwarn if "CUDA graphs" in str(one.message)]
    assert len(said) == wrong and all("Some Card" in text and "differ" in text for text in said)


@pytest.mark.cuda
@needs_triton
def test_a_card_replays_graphs() -> None:
    device = torch.device("cuda", 0)
    model, oracle = random_on("triton", CONFIG, 3, device), random_on("torch", CONFIG, 3)
    assert model.executor._recordings is not None
    for stages in (schedule.stages("qlds12", 16, 16), schedule.stages("checkerboard", 9, 5)):
        for seed in range(4):
            random = np.random.default_rng(seed)
            tokens = torch.from_numpy(random.integers(0, 16, (3, *stages.shape), np.int32))
            expected = staged_logits(oracle, tokens, stages)
            assert same(staged_logits(model, tokens, stages), expected)
    kept = model.executor._recordings._kept.values()
    assert [len(one.stages) for one in kept if one] == [12, 2]
