"""Units of a data set on a Ray cluster."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from percov2.datasets.recoding import Recoder
from percov2.datasets.units import Unit
from percov2.extras import require
from percov2.places import Found

__all__ = ["run_ray"]


def run_ray(
    units: Sequence[Unit],
    settings: dict[str, Any],
    address: str | None = None,
    workers: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Recode units on a Ray cluster; yield their records in any order.

    Each worker is a process with a codec. It has the CPUs of ``settings["jobs"]``, 1 by default,
    and a GPU if ``settings["device"]`` is "cuda". A worker that dies is replaced, and its units are
    recoded again.

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
    import ray.data

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
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"unit": json.dumps(unit)} for unit in units]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _RayWorker,
        fn_constructor_args=[settings],
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    for row in data.iter_rows():
        record: dict[str, Any] = json.loads(row["record"])
        if "fatal" in record:
            raise ValueError(record["fatal"])
        yield record


class _RayWorker:
    """A ``Recoder`` in a process of Ray."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    @cached_property
    def _recode(self) -> Recoder:
        return Recoder(**self._settings)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        kind, sources, target, record = json.loads(row["unit"])
        unit = Unit(kind, [Found(*one) for one in sources], target, record)
        try:
            return {"record": json.dumps(self._recode(unit))}
        except (ValueError, ImportError) as error:  # Ray would try it again
            return {"record": json.dumps({"fatal": str(error)})}
