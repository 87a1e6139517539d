"""The GPU of the benchmark: its device, its clock and its trace of launches.

Tests replace the first methods of ``Gpu`` to run interpreted and emulated kernels on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from percov2.bench.timing import Effort, Timing, repeat

__all__ = ["WARM_UP", "Gpu", "launches"]


WARM_UP = 3
"""Number of untimed calls that compile, allocate and raise the clock."""
_COPIED = 2**28
"""Size in bytes of the copy that measures bandwidth."""
_DATA_SHEETS = {"A100": 2.039e12, "H100": 3.35e12, "H200": 4.8e12, "B200": 8.0e12}
"""Memory bandwidth in bytes per second, by the name of the GPU."""


class Gpu:
    """The current CUDA device. Events of its stream measure the times."""

    def __init__(self) -> None:
        self.place = self.find()
        self.properties = self.ask()
        # Writing more than the cache holds makes the cache cold for the next kernel. It also takes
        # long enough for the host to queue the next call.
        size = 8 * getattr(self.properties, "L2_cache_size", 2**26)
        self._flood = torch.empty(size, dtype=torch.uint8, device=self.place)

    def find(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def ask(self) -> Any:
        return torch.cuda.get_device_properties(self.place)

    def mark(self) -> Any:
        """Return an event that marks the current point of the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the seconds between two points of the stream."""
        return float(begin.elapsed_time(end)) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize(self.place)

    def trace(self, work: Callable[[], object]) -> list[str]:
        """Return the names of a call's kernels and copies in order, from torch's profiler."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        work()
        self.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced:
            work()
            self.wait()
        events = [e for e in traced.events() if e.device_type == DeviceType.CUDA]
        return [e.name for e in sorted(events, key=lambda e: e.time_range.start)]

    def time(
        self, work: Callable[[], object], effort: Effort, before: Callable[[], object] | None = None
    ) -> Timing:
        """Return the seconds per call on the device, with cold caches.

        ``before`` runs before every call and is not timed. The host waits only once per
        ``effort.least`` calls, so that the writes to the cache hide the host's own time.
        """

        def once() -> tuple[Any, Any]:
            if before is not None:
                before()
            self._flood.zero_()
            begin = self.mark()
            work()
            return begin, self.mark()

        def several() -> list[float]:
            marks = [once() for _ in range(effort.least)]
            self.wait()
            return [self.seconds(*both) for both in marks]

        for _ in range(WARM_UP):
            once()
        self.wait()
        return repeat(several, effort)

    def bandwidth(self, effort: Effort) -> dict[str, Any]:
        """Measure a copy within the device, and choose the peak bandwidth.

        Both are in bytes read and written per second. If torch reports the memory's clock (in kHz,
        with two transfers per cycle) and bus width (in bits), the peak follows from these.
        Otherwise it is taken from the data sheet or, if that is unknown, from the copy.
        """
        source = torch.zeros(min(_COPIED, self._flood.numel()), dtype=torch.uint8).to(self.place)
        goal = torch.empty_like(source)
        copied = 2 * source.numel() / self.time(lambda: goal.copy_(source), effort).median_s
        name = self.properties.name
        known = [(speed, "its data sheet") for card, speed in _DATA_SHEETS.items() if card in name]
        clock = getattr(self.properties, "memory_clock_rate", None)
        width = getattr(self.properties, "memory_bus_width", None)
        if clock and width:
            known = [(2e3 * clock * width / 8, "the device's memory clock and bus")]
        peak, told = known[0] if known else (copied, "a copy within the device")
        speeds = {"copy_bytes_per_s": copied, "peak_bytes_per_s": peak, "peak_from": told}
        return {"kind": "measurement", "section": "bandwidth", "card": name, **speeds}


def launches(names: Sequence[str]) -> dict[str, Any]:
    """Count the kernels and copies of a trace.

    Returns:
        "kernels": the number of kernels, including memsets and copies within the device.
        "after_transformer": the names of the kernels after the last linear map; empty if there
            are none.
        "to_host" and "to_device": the number of copies to the host and to the device.
    """
    kernels = [n for n in names if not n.startswith(("Memcpy DtoH", "Memcpy HtoD"))]
    maps = [i for i, name in enumerate(kernels) if "int_linear_kernel" in name]
    return {
        "kernels": len(kernels),
        "after_transformer": kernels[maps[-1] + 1 :] if maps else [],
        "to_host": sum(n.startswith("Memcpy DtoH") for n in names),
        "to_device": sum(n.startswith("Memcpy HtoD") for n in names),
    }
