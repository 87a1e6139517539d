"""A card as the benchmark sees it: where tensors go, a clock, what it was asked to do.

Tests replace ``Gpu`` by one whose kernels are interpreted and emulated on the CPU; everything else
of the benchmark is the same there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from percov2.bench.gpu_cards import CARDS, WARP, Card
from percov2.bench.timing import Effort, Timing

WARM_UP = 3
"""Calls that do not count: they compile, allocate, and raise the clock."""
_COPIED = 2**28
"""Bytes of the copy by which bandwidth is measured."""
_BLOCKS = {86: 16, 87: 16, 89: 24, 120: 24, 121: 24}
"""Capability -> blocks on a multiprocessor; 32 on all others from 8.0 on."""


class Gpu:
    """The current CUDA device. Times are those of its stream, by events."""

    def __init__(self) -> None:
        self.place = self.find()
        self.properties = self.ask()
        # Overwriting more than the cache holds leaves nothing there that a kernel could find, and
        # takes long enough for the host to queue the next call meanwhile.
        size = 8 * getattr(self.properties, "L2_cache_size", 2**26)
        self._flood = torch.empty(size, dtype=torch.uint8, device=self.place)

    # What tests replace ---------------------------------------------------------------------------

    def find(self) -> torch.device:
        """Where tensors go."""
        return torch.device("cuda", torch.cuda.current_device())

    def ask(self) -> Any:
        """What torch tells of the device."""
        return torch.cuda.get_device_properties(self.place)

    def mark(self) -> Any:
        """A point in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two points that the device has passed."""
        return float(begin.elapsed_time(end)) / 1e3

    def wait(self) -> None:
        """Until the device has done everything."""
        torch.cuda.synchronize(self.place)

    def trace(self, work: Callable[[], object]) -> list[str]:
        """Names of all kernels and copies of a call, in order, as torch's profiler saw them."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        work()
        self.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced:
            work()
            self.wait()
        events = [e for e in traced.events() if e.device_type == DeviceType.CUDA]
        return [e.name for e in sorted(events, key=lambda e: e.time_range.start)]

    # What it is made of ---------------------------------------------------------------------------

    def time(
        self, work: Callable[[], object], effort: Effort, before: Callable[[], object] | None = None
    ) -> Timing:
        """Seconds of the device per call, with cold caches.

        ``before`` is queued ahead of every call and not timed. The host is ahead of the device: it
        waits after every ``effort.least`` calls only, so its own time is hidden by the flood.
        """
        for _ in range(WARM_UP):
            self._once(work, before)
        self.wait()
        times: list[float] = []
        while len(times) < effort.least or (
            len(times) < effort.most and sum(times) < effort.seconds
        ):
            marks = [self._once(work, before) for _ in range(effort.least)]
            self.wait()
            times += [self.seconds(begin, end) for begin, end in marks]
        return Timing(statistics.median(times), min(times), len(times))

    def _once(
        self, work: Callable[[], object], before: Callable[[], object] | None
    ) -> tuple[Any, Any]:
        if before is not None:
            before()
        self._flood.zero_()
        begin = self.mark()
        work()
        return begin, self.mark()

    def copy_bandwidth(self, effort: Effort) -> float:
        """Bytes per second of a copy within the device: what it reads and what it writes."""
        source = torch.zeros(min(_COPIED, self._flood.numel()), dtype=torch.uint8).to(self.place)
        goal = torch.empty_like(source)
        return 2 * source.numel() / self.time(lambda: goal.copy_(source), effort).median_s

    def card(self) -> Card:
        """The device as a Card, from what it tells of itself, else from data sheets.

        What neither tells is infinite, and so limits no prediction.
        """
        told = self.properties
        known = next((card for card in CARDS if card.name.split()[0] in told.name), None)
        capability = 10 * told.major + told.minor
        clock = getattr(told, "clock_rate", None)
        peak = self.told_bandwidth()
        return Card(
            told.name,
            capability,
            told.multi_processor_count,
            1e3 * clock if clock else known.clock_hz if known else math.inf,
            peak or (known.bandwidth if known else math.inf),
            known.int8_ops if known else math.inf,
            told.max_threads_per_multi_processor // WARP,
            _BLOCKS.get(capability, 32),
            told.regs_per_multiprocessor,
            told.shared_memory_per_multiprocessor,
        )

    def told_bandwidth(self) -> float | None:
        """Bytes per second by the memory's clock (kHz, two transfers a cycle) and bus (bits)."""
        clock = getattr(self.properties, "memory_clock_rate", None)
        width = getattr(self.properties, "memory_bus_width", None)
        return 2e3 * clock * width / 8 if clock and width else None


def launches(names: Sequence[str]) -> dict[str, Any]:
    """What a trace amounts to.

    Returns "kernels" (how many ran; memory that is set or copied within the device counts as one),
    "after_transformer" (names of those after the last linear map, if there is one), "to_host" and
    "to_device" (copies).
    """
    kernels = [n for n in names if not n.startswith(("Memcpy DtoH", "Memcpy HtoD"))]
    maps = [i for i, name in enumerate(kernels) if "int_linear_kernel" in name]
    return {
        "kernels": len(kernels),
        "after_transformer": kernels[maps[-1] + 1 :] if maps else [],
        "to_host": sum(n.startswith("Memcpy DtoH") for n in names),
        "to_device": sum(n.startswith("Memcpy HtoD") for n in names),
    }
