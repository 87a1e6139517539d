"""``percov2 compress`` and ``decompress`` with ``--engine``: data sets, unit by unit."""

from __future__ import annotations

import argparse
import contextlib
import time
from typing import Any

from tqdm import tqdm

from percov2.cli.faults import about, naming, say
from percov2.cli.models import backbone_options
from percov2.options import DecodeOptions, EncodeOptions

__all__ = ["recode"]


def recode(arguments: argparse.Namespace, options: EncodeOptions | DecodeOptions) -> int:
    """Run a command over shards, tables and folders; return its exit status.

    It is 0 if everything is done, 1 if some pictures or shards failed, 2 if nothing could be done.
    """
    from percov2.datasets.engines import run_ray
    from percov2.datasets.recoding import Recoder
    from percov2.datasets.units import plan_units
    from percov2.images import ENDINGS

    compressing = isinstance(options, EncodeOptions)
    command = "compress" if compressing else "decompress"
    with about(command):
        if arguments.output is None:
            raise ValueError("--engine needs -o FOLDER")
        for flag in ("skip_existing", "report", "caption", "captioner"):
            if getattr(arguments, flag, None):
                raise ValueError(f"--engine does not accept --{flag.replace('_', '-')}")
        endings = ENDINGS if compressing else (".pcv2",)
        units, faults = plan_units(arguments.inputs, arguments.output, endings, arguments.recursive)
    settings: dict[str, Any] = {
        "options": options,
        "model": arguments.model,
        "device": arguments.device,
        "backbone": backbone_options(arguments),
        "column": arguments.column,
        "jobs": arguments.jobs,
        "batch_size": arguments.batch_size,
    }
    for name, message in faults:
        say(f"percov2: {name}: {message}")
    begin, totals = time.monotonic(), {"pictures": 0, "bytes": 0, "skipped": 0, "copied": 0}
    failed, before = len(faults), 0
    with about(command), contextlib.ExitStack() as stack:
        if arguments.engine == "ray":
            records = run_ray(units, settings, arguments.address)
        else:
            recode_unit = Recoder(**settings)
            stack.enter_context(naming(recode_unit.current_input))
            records = map(recode_unit, units)
        bar = stack.enter_context(tqdm(total=len(units), unit="shard", disable=None))
        for record in records:
            before += record.get("finished_before", False)
            source = record["sources"][0]
            if "error" in record:
                say(f"percov2: {source}: {record['error']}")
                failed += 1
            for key, message in record["faults"]:
                place = key if key in record["sources"] else f"{source}: {key}"
                say(f"percov2: {place}: {message}")
                failed += 1
            for name in totals:
                totals[name] += record.get(name, 0)
            bar.update()
    seconds = time.monotonic() - begin
    text = f"{totals['pictures']} pictures, {totals['bytes']} bytes, {len(units)} units"
    text += f", {totals['pictures'] / max(seconds, 1e-9):.2f} pictures/s" if not before else ""
    others = {
        "units finished before": before,
        "files skipped": totals["skipped"],
        f"samples without a {'picture' if compressing else '.pcv2 file'} copied": totals["copied"],
        "failed": failed,
    }
    say(text + "".join(f", {count} {what}" for what, count in others.items() if count))
    if not failed:
        return 0
    return 1 if any(totals.values()) else 2
