"""Training steps as CUDA graphs: a step is recorded once and then repeated.

A step of the joint phase launches thousands of small kernels, most of which end before the next
launch. A recorded step takes only one launch, plus a few launches for its inputs.

The first steps of every kind run as usual, so that optimisers can allocate their moments and
libraries their workspaces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from percov2.training.stage import Draw, Figures

__all__ = ["CudaRecorder", "Figures", "RecordedSteps", "Recorder"]

Recorder = Callable[[Callable[[], Figures]], tuple[Figures, Callable[[], None]]]
"""A function that records work without running it.

It returns the tensors of the results, and a function that replays the work.
"""

_AS_USUAL = 2
"""Number of steps of each kind that run as usual before one is recorded."""


class CudaRecorder:
    """A :data:`Recorder` on the current CUDA stream, which must not be the default stream."""

    def __init__(self) -> None:
        # All graphs share one pool. A step may overwrite the figures and gradients of another, so
        # figures are cloned at once, and gradients are not read between steps.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Figures]) -> tuple[Figures, Callable[[], None]]:
        """Record ``work``, which must not wait for the device."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
            results = work()
        return results, graph.replay


@dataclass(frozen=True)
class _Recorded:
    """A recorded step. ``values`` holds, in order, the figures that are None in ``constants``."""

    inputs: dict[str, Tensor]
    repeat: Callable[[], None]
    constants: dict[str, Tensor | None]
    values: Tensor


class RecordedSteps:
    """A function object that does steps and repeats recorded steps.

    ``step`` does a whole step: forward, backward and optimiser. It returns scalar figures. Figures
    that are not constant must be on the device of the draw's tensors.
    """

    def __init__(self, step: Callable[[Draw], Figures], recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recorded] = {}

    def __call__(self, draw: Draw) -> Figures:
        """Do a step and return its figures."""
        shapes = tuple((name, tuple(value.shape)) for name, value in draw.tensors.items())
        kind = draw.kind, shapes
        if kind not in self._recorded:
            self._seen[kind] += 1
            if self._seen[kind] <= _AS_USUAL:
                return self._step(draw)
            self._recorded[kind] = self._record(draw)
        recorded = self._recorded[kind]
        for name, value in draw.tensors.items():
            recorded.inputs[name].copy_(value)
        recorded.repeat()
        values = iter(recorded.values.clone())
        return {k: next(values) if v is None else v for k, v in recorded.constants.items()}

    def _record(self, draw: Draw) -> _Recorded:
        inputs = {name: value.clone() for name, value in draw.tensors.items()}
        devices = {value.device for value in inputs.values()}

        def work() -> Figures:
            figures = self._step(Draw(draw.kind, inputs))
            moving = [value.float() for value in figures.values() if value.device in devices]
            return {**figures, "": torch.stack(moving)}

        results, repeat = self._recorder(work)
        constants = {k: None if v.device in devices else v for k, v in results.items() if k}
        return _Recorded(inputs, repeat, constants, results[""])
