"""Runs over several inputs: progress, a line per fault, a report and the exit status."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from percov2.batching import Outcome, current_item, in_order
from percov2.cli.faults import Fault, about, naming, reason, say
from percov2.cli.operands import Plan, Task, is_done, shown
from percov2.models.backbone import available_cores

__all__ = ["run_many"]

_FAULTS = (ValueError, OSError, MemoryError)


def run_many(
    plan: Plan,
    arguments: argparse.Namespace,
    start: Callable[[Sequence[Task]], Iterator[Outcome[Any]]],
    finish: Callable[[Task, Any], dict[str, Any]],
) -> int:
    """Run tasks and return the exit status: 0 all done, 1 some failed, 2 nothing done.

    Args:
        plan: the tasks.
        arguments: a command line with the flags of ``operands.add_many``.
        start: a function from tasks to their outcomes, in order.
        finish: a function from a task and its outcome's value to facts for the report. It writes
            the result. It runs in threads.
    """
    skipped: list[Task] = []
    tasks: list[Task] = []
    for one in plan.tasks:
        done = arguments.skip_existing and is_done(one, plan.compressing)
        (skipped if done else tasks).append(one)
    begin, records = time.monotonic(), _Records(len(plan.tasks) + len(plan.faults))
    stored: dict[int, dict[str, Any]] = {}

    def add(record: dict[str, Any]) -> None:
        records.count(record)
        report(record)

    with _report(arguments.report) as report, naming(lambda: _source(tasks)):
        for name, message in plan.faults:
            add({"input": name, "output": None, "error": message})
        for task in skipped:
            add({"input": task.source, "output": task.target, "skipped": True})

        def store(outcome: Outcome[Any]) -> dict[str, Any]:
            task: Task = outcome.input
            record: dict[str, Any] = {"input": task.source, "output": task.target}
            if outcome.error is not None:
                return record | {"error": reason(task.source, outcome.error)}
            try:
                record |= finish(task, outcome.value)
            except _FAULTS as error:
                record |= {"error": f"{shown(task.target)}: {reason(task.target, error)}"}
            stored[id(record)] = record
            return record

        jobs = arguments.jobs or available_cores()
        try:
            with tqdm(total=len(tasks), unit="picture", disable=None) as bar:
                outcomes = start(tasks) if tasks else ()
                with contextlib.closing(in_order(store, outcomes, jobs, 2 * jobs)) as made:
                    for record in made:
                        stored.pop(id(record), None)
                        add(record)
                        bar.update()
        finally:  # an interrupted run has stored more than it has counted
            for record in stored.values():
                records.count(record)
            say(records.summary(time.monotonic() - begin, plan.ignored))
            for record in stored.values():
                report(record)
    return records.status()


def _source(tasks: Sequence[Task]) -> str | None:
    index = current_item()
    return None if index is None else tasks[index].source


class _Records:
    """Counts of a run over ``total`` inputs."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done, self.failed, self.skipped = 0, 0, 0
        self.bytes, self.pixels = 0, 0

    def count(self, record: dict[str, Any]) -> None:
        """Count a record, and say its error."""
        if "error" in record:
            self.failed += 1
            say(f"percov2: {record['input']}: {record['error']}")
        elif "skipped" in record:
            self.skipped += 1
        else:
            self.done += 1
            self.bytes += record["bytes"]
            self.pixels += record["width"] * record["height"] if "bpp" in record else 0

    def summary(self, seconds: float, ignored: int) -> str:
        """Return one line about the run."""
        bpp = f", {8 * self.bytes / self.pixels:.4f} bpp" if self.pixels else ""
        text = f"{self.done} of {self.total} pictures, {self.bytes} bytes{bpp}"
        text += f", {self.done / max(seconds, 1e-9):.2f} pictures/s"
        others = {"failed": self.failed, "skipped": self.skipped, "other files ignored": ignored}
        return text + "".join(f", {count} {what}" for what, count in others.items() if count)

    def status(self) -> int:
        """Return the exit status."""
        if not self.failed:
            return 0
        return 1 if self.done or self.skipped else 2


@contextlib.contextmanager
def _report(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open a report, for a function that writes a record.

    Raises:
        Fault: the file is no report, or it cannot be written.
    """
    if path is None:
        yield lambda _: None
        return
    with about(path):
        if path.is_file() and path.stat().st_size:
            with open(path, "rb") as present:
                if present.read(10) != b'{"input": ':
                    raise Fault(f"{path}: it exists and is no report, so it is not replaced")
        stream = open(path, "w", encoding="utf-8")  # noqa: SIM115

    def write(record: dict[str, Any]) -> None:
        with about(path):
            stream.write(json.dumps(record) + "\n")

    try:
        yield write
    finally:
        with about(path):
            stream.close()
