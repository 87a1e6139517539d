"""Wall times of repeated calls.

The peers' interpreter also runs this file, so it imports only the standard library.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Effort", "Record", "Timing", "measure", "repeat"]

Record = dict[str, Any]
"""A JSON object of a report."""


@dataclass(frozen=True)
class Effort:
    """The repetitions of a call: for ``seconds``, but between ``least`` and ``most`` times."""

    seconds: float
    least: int
    most: int


@dataclass(frozen=True)
class Timing:
    """The seconds per call: the median and the best of ``runs`` calls."""

    median_s: float
    best_s: float
    runs: int

    def rate(self, symbols: int) -> Record:
        """Return the timing with its median throughput in million symbols per second."""
        return {**asdict(self), "msym_per_s": symbols / self.median_s / 1e6}

    def per_image(self, images: int) -> Record:
        """Return the timing with the median milliseconds per image."""
        return {**asdict(self), "ms_per_image": self.median_s / images * 1e3}


def repeat(take: Callable[[], list[float]], effort: Effort) -> Timing:
    """Collect times for the given effort. Each call of ``take`` returns one or more times."""
    times: list[float] = []
    while len(times) < effort.least or (len(times) < effort.most and sum(times) < effort.seconds):
        times += take()
    return Timing(statistics.median(times), min(times), len(times))


def measure(work: Callable[[], object], effort: Effort) -> Timing:
    """Time ``work`` after one untimed call, with the garbage collector switched off."""

    def once() -> list[float]:
        started = time.perf_counter()
        work()
        return [time.perf_counter() - started]

    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        work()
        return repeat(once, effort)
    finally:
        if collects:
            gc.enable()
