"""Units of a data set on a Ray cluster."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from percov2.datasets.recoding import Recoder
from percov2.datasets.units import Unit
from percov2.extras import require

__all__ = ["run_ray"]

_ATTEMPTS = 3
"""Number of workers that may die on a unit."""


def run_ray(
    units: Sequence[Unit],
    settings: dict[str, Any],
    address: str | None = None,
    workers: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Recode units on a Ray cluster; yield their records in any order.

    Each worker is a process with a codec. It has the CPUs of ``settings["jobs"]``, 1 by default,
    and a GPU if ``settings["device"]`` is "cuda". A worker that dies is replaced, and its unit is
    recoded again, up to three times.

    Args:
        units: the units.
        settings: arguments of ``Recoder`` by name; they travel to the workers.
        address: address of a running cluster; None for the one of this process or its environment
            or, without one, a new one on this machine.
        workers: number of workers; None for as many as the cluster has room for.

    Raises:
        MissingExtra: Ray is not installed.
        ConnectionError: there is no cluster at the address.
        ValueError: the cluster has no room for a worker, or as for ``Recoder``.
    """
    require("ray", "engine ray", "ray")
    import ray

    if not ray.is_initialized():
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address=address, include_dashboard=False, **quiet)
    cpus, gpus = settings.get("jobs") or 1, int(settings.get("device") == "cuda")
    available = ray.cluster_resources()
    room = int(available.get("CPU", 0) // cpus)
    if gpus:
        room = min(room, int(available.get("GPU", 0)))
    if room < 1:
        raise ValueError(
            f"a worker needs {cpus} CPUs and {gpus} GPUs; the cluster has "
            f"{available.get('CPU', 0):g} and {available.get('GPU', 0):g}"
        )
    count = max(1, min(workers or room, room, len(units)))
    kind = ray.remote(num_cpus=cpus, num_gpus=gpus, scheduling_strategy="SPREAD")(_RayWorker)
    waiting = deque((unit, 1) for unit in units)
    free = [kind.remote(settings) for _ in range(count)]
    busy: dict[Any, tuple[Any, Unit, int]] = {}
    try:
        while waiting or busy:
            while waiting and free:
                worker, (unit, attempt) = free.pop(), waiting.popleft()
                busy[worker.recode.remote(unit)] = worker, unit, attempt
            (done, *_), _ = ray.wait(list(busy))
            worker, unit, attempt = busy.pop(done)
            try:
                record: dict[str, Any] = ray.get(done)
            except ray.exceptions.RayActorError:
                free.append(kind.remote(settings))
                if attempt < _ATTEMPTS:
                    waiting.append((unit, attempt + 1))
                    continue
                names = [one.name for one in unit.sources]
                error = f"{attempt} workers died on it; they may need more memory"
                record = {"sources": names, "target": unit.target, "faults": [], "error": error}
            else:
                free.append(worker)
            if "fatal" in record:
                raise ValueError(record["fatal"])
            yield record
    finally:
        for worker in [*free, *(one for one, *_ in busy.values())]:
            ray.kill(worker)


class _RayWorker:
    """A ``Recoder`` in a process of Ray."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    @cached_property
    def _recode(self) -> Recoder:
        return Recoder(**self._settings)

    def recode(self, unit: Unit) -> dict[str, Any]:
        """Return the record of a unit, or {"fatal": message} for wrong settings."""
        try:
            return self._recode(unit)
        except (ValueError, ImportError) as error:
            return {"fatal": str(error)}
