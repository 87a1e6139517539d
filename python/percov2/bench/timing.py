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
"""JSON object of a report."""


@dataclass(frozen=True)
class Effort:
    """Repetition of a call: for ``seconds``, but ``least`` to ``most`` times."""

    seconds: float
    least: int
    most: int


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and best of ``runs`` calls."""

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
    """Collect times, one or several per call of ``take``, for the given effort."""
    times: list[float] = []
    while len(times) < effort.least or (len(times) < effort.most and sum(times) < effort.seconds):
        times += take()
    return Timing(statistics.median(times), min(times), len(times))


def measure(work: Callable[[], object], effort: Effort) -> Timing:
    """Time ``work`` after one untimed call, without the garbage collector."""

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
