"""Staged decoding as CUDA graphs: one replay per stage instead of about sixty launches.

Grids of one size, schedule and batch size pass the same kernels in the same memory. The second
decode of such grids records the passes, and later ones replay them.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from percov2.entropy.torch.executor import Staged

__all__ = ["Recorder", "Recordings", "graph_recorder"]

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""A function that records the work of a function on the device, and returns a function that repeats
this work, and the tensor where the result then is."""

_MOST_KEYS = 256
_MOST_RECORDINGS = 4


def graph_recorder(device: torch.device) -> Recorder:
    """Return a recorder of CUDA graphs, which share their memory for intermediate results."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
            result = work()
        return graph.replay, result

    return record


class Recordings:
    """The passes of the grids that were decoded lately, recorded from the second time on.

    Args:
        recorder: a function that makes the recorder of one recording.
    """

    def __init__(self, recorder: Callable[[], Recorder]) -> None:
        self._recorder = recorder
        self._kept: OrderedDict[Hashable, _Recording | None] = OrderedDict()
        self._lock = threading.Lock()

    def staged(self, key: Hashable, make: Callable[[], Staged]) -> Any:
        """Return the passes of a decode; equal keys have equal sizes, schedules and streams.

        The result has the methods of ``Staged``. ``make`` returns new passes. They are used as they
        are the first time, and while another decode uses the recording.
        """
        with self._lock:
            if key not in self._kept:
                self._kept[key] = None
                if len(self._kept) > _MOST_KEYS:
                    self._kept.popitem(last=False)
                return make()
            recording = self._kept.pop(key) or _Recording(make(), self._recorder())
            self._kept[key] = recording
            recorded = [other for other, one in self._kept.items() if one is not None]
            for other in recorded[:-_MOST_RECORDINGS]:
                self._kept[other] = None
            turn = recording.turn()
        return make() if turn is None else turn


class _Recording:
    """The memory and the recorded stages of the passes of one key."""

    def __init__(self, staged: Staged, record: Recorder) -> None:
        self.staged, self.record = staged, record
        # The plans are kept because the recorded kernels read them.
        self.stages: dict[int, tuple[Callable[[], None], Tensor, Any]] = {}
        self._user: Callable[[], Any] = lambda: None

    def turn(self) -> _Turn | None:
        """Begin a decode; None while another decode goes on."""
        if self._user() is not None:
            return None
        self.staged.begin()
        turn = _Turn(self)
        self._user = weakref.ref(turn)
        return turn


class _Turn:
    """One decode with a recording, with the methods of ``Staged``."""

    def __init__(self, recording: _Recording) -> None:
        self._recording = recording
        self.accept, self.tokens = recording.staged.accept, recording.staged.tokens

    def residual(self) -> Tensor:
        """Return the residual of the next stage, as ``Staged``; valid until the next decode."""
        recording, staged = self._recording, self._recording.staged
        if staged.stage not in recording.stages:
            plans = staged.plans(staged.stage)
            work = partial(staged.through_stage, staged.stage, plans)
            work()  # compiles kernels and makes biases, which a graph cannot
            recording.stages[staged.stage] = (*recording.record(work), plans)
        replay, residual, _ = recording.stages[staged.stage]
        replay()
        return residual
