"""Markdown tables of a report, aligned for the terminal, and a description of the machine."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from percov2 import __version__
from percov2.bench.timing import Record
from percov2.entropy import rans
from percov2.machine import processor

__all__ = ["Table", "environment", "number", "page", "tables"]


def environment() -> Record:
    """Return the versions and the machine as JSON values.

    ``load`` is the mean load over the last minute.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "percov2": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "instruction_set": rans.instruction_set(),
        "instruction_sets": list(rans.instruction_sets()),
        "cuda_kernels": rans.cuda_state(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
    }


def _rate(*ways: str) -> Callable[[Record], float | None]:
    """Return a getter of the throughput, in Msym/s, of the first of ``ways`` in a record."""

    def found(record: Record) -> float | None:
        timing = next(record[way] for way in ways if way in record)
        return timing and timing["msym_per_s"]

    return found


_CODERS = "coder | given | V = codebook | images x tokens | encode | decode"
TABLES = {
    "summary": ("Summary", " = name | value | goal | met"),
    "coder": ("Coder only (million symbols per second)", _CODERS),
    "logits": ("From logits (million symbols per second)", _CODERS),
    "overhead": (
        "Bytes per image above the ideal, beyond the check",
        "coder | V = codebook | images x tokens | ideal, B = ideal_bytes_per_image"
        " | written, B = bytes_per_image | check, B = check_bytes | above, B = above_ideal"
        " | ± error = above_ideal_error | above, %",
    ),
    "long": (
        "Long streams",
        "symbols | V = codebook | prob_bits | bytes"
        " | above intervals, % = percent_above_intervals | above ideal, % = percent_above_ideal",
    ),
    "model": (
        "Whole entropy model",
        "what | schedule | tokens | images | threads | ms per image = ms_per_image",
    ),
    "attention": (
        "Attention of one layer, one thread",
        "coder | schedule | tokens | images | entries x keys | ms per image = ms_per_image",
    ),
    "memory": (
        "Peak memory of the process",
        "what | tokens | images | peak, MB = peak_mb | of that for the batch, MB = extra_mb",
    ),
    "cold": ("A fresh process", "step | ms"),
    "phases": (
        "Pictures per second, each phase alone and all at once",
        "direction | pictures = set | number = pictures | phase | threads | ms per picture"
        " | pictures/s = pictures_per_s | time / time of the networks",
    ),
    "measured": (
        "Measured, after every result was compared with the CPU's",
        "kernel | case | launches | µs | Msym/s | GB/s | of peak, % | CPU engine, Msym/s"
        " | unfused torch, Msym/s",
    ),
    "paths": (
        "Whole coding, random weights, wall time",
        "what | case | coder = who | Msym/s | ms | kernels | copies to the host | from the host",
    ),
}
"""The title and the columns ("header" or "header = key") of each section, in the page's order."""
VALUES: dict[str, Callable[[Record], Any]] = {
    "goal": lambda r: f"{'>=' if r['at_least'] else '<='} {number(r['goal'])}",
    "met": lambda r: "yes" if r["met"] else "no",
    "images x tokens": lambda r: f"{r['images']} x {r['tokens']}",
    "encode": _rate("encode"),
    "decode": _rate("decode"),
    "above, %": lambda r: 100 * r["above_ideal"] / r["ideal_bytes_per_image"],
    "tokens": lambda r: f"{r['grid']}x{r['grid']}",
    "entries x keys": lambda r: f"{r['entries']} x {r['keys']}",
    "kernel": lambda r: f"`{r['kernel']}`",
    "µs": lambda r: 1e6 * r["gpu"]["median_s"],
    "Msym/s": _rate("gpu", "wall"),
    "GB/s": lambda r: r["bytes_per_s"] / 1e9,
    "of peak, %": lambda r: 100 * r["share_of_peak"],
    "CPU engine, Msym/s": _rate("cpu"),
    "unfused torch, Msym/s": _rate("unfused"),
    "ms": lambda r: 1e3 * (r["wall"]["median_s"] if "wall" in r else r["s"]),
    "ms per picture": lambda r: 1e3 * r["s"] / r["pictures"],
    "time / time of the networks": lambda r: r.get("of_networks"),
    "kernels": lambda r: r["launches"] and r["launches"]["kernels"],
    "copies to the host": lambda r: r["launches"] and r["launches"]["to_host"],
    "from the host": lambda r: r["launches"] and r["launches"]["to_device"],
}
"""Functions that compute a record's value in a column without a key."""


@dataclass(frozen=True)
class Table:
    """A table of texts and numbers with a title."""

    title: str
    header: list[str]
    rows: list[list[Any]]

    def markdown(self) -> str:
        """Return aligned Markdown, with text to the left and numbers to the right."""
        columns = []
        for name, *values in zip(self.header, *self.rows, strict=True):
            cells = [number(value) for value in values]
            width = max(3, len(name), *map(len, cells))
            text = any(isinstance(value, str) for value in values)
            side = ":".ljust(width, "-") if text else ":".rjust(width, "-")
            aligned = [cell.ljust(width) if text else cell.rjust(width) for cell in (name, *cells)]
            columns.append([aligned[0], side, *aligned[1:]])
        return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


def number(value: str | float | None) -> str:
    """Format a number for a table.

    A float gets at least three significant digits and no exponent. A float without a fraction
    becomes a whole number, and None becomes a dash. Other values stay as they are.
    """
    if value is None or isinstance(value, str | int):
        return "-" if value is None else str(value)
    size = abs(value)
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    digits = 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 else 4
    return f"{value:.{digits}f}"


def tables(report: Record) -> list[Table]:
    """Return the tables of a report that have rows."""
    by_section: dict[str, list[Record]] = {"summary": report["summary"]}
    for record in report["records"]:
        by_section.setdefault(record["section"], []).extend(_rows(record))
    for section in {"coder", "logits"} & set(by_section):
        by_section[section].sort(key=lambda r: (r["codebook"], r["tokens"], r["images"]))
    made = []
    for section, (title, described) in TABLES.items():
        columns = [column.partition(" = ") for column in described.split(" | ")]
        rows = [
            [r[key] if key else VALUES.get(name, itemgetter(name))(r) for name, _, key in columns]
            for r in by_section.get(section, [])
        ]
        if rows:
            made.append(Table(title, [name for name, *_ in columns], rows))
    return made


def _rows(record: Record) -> list[Record]:
    """Return the table rows of a record."""
    if record["section"] == "cold":
        steps = {k.removesuffix("_s"): v for k, v in record.items() if k != "section"}
        return [{"step": name.replace("_", " "), "s": seconds} for name, seconds in steps.items()]
    return [record] if record.get("kind") != "missing" else []


def page(report: Record) -> str:
    """Return a description of the machine, followed by the tables of a report."""
    where, others = report["environment"], dict(report.get("peers") or {})
    if "triton" in where:  # on a GPU
        others = {"triton": where["triton"], "CUDA kernels": where["cuda_kernels"]}
    versions = [f"{k} {v}" for k, v in others.items() if k not in ("python", "numpy", "torch")]
    parts = [
        f"percov2 {where['percov2']} on {where['processor']} ({where['cores']} cores, "
        f"{where['instruction_set']}, threads {where['threads']}, load {number(where['load'])}), "
        f"torch {where['torch']}, {', '.join([*versions, where['date']])}"
    ]
    for record in report["records"]:
        if record["section"] == "bandwidth":
            peak, copy = (number(record[k] / 1e9) for k in ("peak_bytes_per_s", "copy_bytes_per_s"))
            parts.append(
                f"{record['card']}: peak {peak} GB/s, from {record['peak_from']}; a copy within "
                f"the device reaches {copy} GB/s."
            )
        elif record.get("kind") == "missing":
            parts.append(f"Not measured: {record['why']}.")
    parts += [f"### {table.title}\n\n{table.markdown()}" for table in tables(report)]
    return "\n\n".join(parts) + "\n"
