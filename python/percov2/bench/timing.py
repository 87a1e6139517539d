"""Wall times of repeated calls: the median and the best."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How long a call is repeated: for ``seconds``, ``least`` to ``most`` times."""

    seconds: float
    least: int
    most: int


QUICK = Effort(0.05, 3, 10)
FULL = Effort(0.5, 5, 200)


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and best of ``runs`` calls."""

    median_s: float
    best_s: float
    runs: int


def measure(work: Callable[[], object], effort: Effort) -> Timing:
    """Time ``work`` after one call that does not count.

    The garbage collector waits meanwhile, as it does in ``timeit``.
    """
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        work()
        times: list[float] = []
        while len(times) < effort.least or (
            len(times) < effort.most and sum(times) < effort.seconds
        ):
            times.append(_once(work))
    finally:
        if collects:
            gc.enable()
    return Timing(statistics.median(times), min(times), len(times))


def _once(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
