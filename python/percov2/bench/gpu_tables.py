"""A report of ``percov2 bench gpu`` as tables."""

from __future__ import annotations

from typing import Any

from percov2.bench.gpu_predict import MISSING, PREDICTION
from percov2.bench.tables import Table, markdown_of, number, summary_table, text_of

Record = dict[str, Any]


def tables(report: Record) -> list[Table]:
    """The tables of a report, empty ones left out."""
    by_section: dict[str, list[Record]] = {}
    for record in report["records"]:
        by_section.setdefault(record["section"], []).append(record)
    kernels = by_section.get("kernels", [])
    made = [
        summary_table(report["summary"]),
        _measured(by_section.get("measured", [])),
        _paths(by_section.get("paths", [])),
        _launches(by_section.get("launches", [])),
        _whole(by_section.get("whole", [])),
        *(
            _predictions(card, [r for r in kernels if r["card"] == card])
            for card in dict.fromkeys(r["card"] for r in kernels)
        ),
    ]
    return [table for table in made if table.rows]


def _predictions(card: str, records: list[Record]) -> Table:
    header = (
        "kernel",
        "case",
        "registers",
        "shared, B",
        "spilled, B",
        "warps per SM",
        "MB",
        "predicted, µs",
        "Msym/s",
        "limited by",
    )
    rows = [_missing(r, len(header)) if r["kind"] == MISSING else _predicted(r) for r in records]
    title = f"PREDICTION for {card}: compiled, counted and derived, nothing is measured"
    return Table(title, header, rows)


def _predicted(r: Record) -> tuple[str, ...]:
    return (
        r["kernel"],
        r["case"],
        str(r["registers"]),
        str(r["shared_bytes"]),
        str(r["stack_bytes"]),
        f"{r['resident_warps']}, {r['resident_limit']}",
        number(r["bytes"] / 1e6),
        number(r["predicted_s"] * 1e6),
        number(r["predicted_msym_per_s"]),
        r["predicted_limit"],
    )


def _missing(r: Record, columns: int) -> tuple[str, ...]:
    return (r["kernel"], r["case"], *["-"] * (columns - 3), f"not known: {r['why']}")


def _measured(records: list[Record]) -> Table:
    header = (
        "kernel",
        "case",
        "launches",
        "µs",
        "Msym/s",
        "GB/s",
        "predicted, µs",
        "limited by",
        "CPU engine, Msym/s",
        "unfused torch, Msym/s",
    )
    rows = [
        (
            r["kernel"],
            r["case"],
            str(r["launches"]),
            number(r["gpu"]["median_s"] * 1e6),
            number(r["gpu"]["msym_per_s"]),
            f"{number(r['bytes_per_s'] / 1e9)} ({number(100 * r['share_of_peak'])} %)",
            number(None if r["predicted_s"] is None else r["predicted_s"] * 1e6),
            r["predicted_limit"] or "-",
            number(r["cpu"] and r["cpu"]["msym_per_s"]),
            number(r["unfused"] and r["unfused"]["msym_per_s"]),
        )
        for r in records
        if r["kind"] != MISSING
    ]
    return Table("Measured, after every result was compared with the CPU's", header, rows)


def _paths(records: list[Record]) -> Table:
    header = ("what", "case", "coder", "Msym/s", "ms", "launches", "copies to and from the host")
    rows = [
        (
            r["what"],
            r["case"],
            r["who"],
            number(r["wall"]["msym_per_s"]),
            number(r["wall"]["median_s"] * 1e3),
            *(
                ("-", "-")
                if r["launches"] is None
                else (
                    str(r["launches"]["kernels"]),
                    f"{r['launches']['to_host']}, {r['launches']['to_device']}",
                )
            ),
        )
        for r in records
    ]
    return Table("Whole coding, random weights, wall time", header, rows)


def _launches(records: list[Record]) -> Table:
    header = ("case", "layers and head", "after them", "copies to the host")
    rows = [
        (
            f"{r['images']} x {r['tokens']} tokens, V = {r['codebook']}",
            ", ".join(f"{count} {name}" for name, count in r["layers_and_head"].items()),
            ", ".join(r["after_transformer"]),
            str(r["to_host"]),
        )
        for r in records
    ]
    return Table("Launches of encoding a batch, by the code", header, rows)


def _whole(records: list[Record]) -> Table:
    header = ("case", "predicted, ms", "Msym/s", "attention, %", "linear, %", "after them, %")
    rows = []
    for r in records:
        parts = r["parts_s"]
        linear = sum(parts[name] for name in ("q", "kv", "out", "up", "down", "head"))
        after = sum(parts[name] for name in ("symbol_intervals", "encode_kernel", "pack_kernel"))
        shares = (parts["attention"], linear, after)
        rows.append(
            (
                f"{r['card']}: {r['images']} x {r['tokens']} tokens, V = {r['codebook']}",
                number(r["predicted_s"] * 1e3),
                number(r["predicted_msym_per_s"]),
                *(number(100 * share / r["predicted_s"]) for share in shares),
            )
        )
    return Table("PREDICTION for encoding a batch: the sum of its launches", header, rows)


def heading(report: Record) -> str:
    """Paragraphs about where the figures come from."""
    where = report["environment"]
    triton = f"triton {where['triton']}" if where["triton"] else "no triton"
    kernels = "with" if where["cuda_kernels"] else "without"
    versions = (
        f"percov2 {where['percov2']} ({kernels} CUDA kernels), torch {where['torch']}, {triton}, "
        f"{where['date']}"
    )
    if report["kind"] == PREDICTION:
        return (
            f"{versions}\n\nPREDICTION: no CUDA device was found, so nothing here is measured. "
            "docs/gpu.md says how to measure on one."
        )
    lines = [f"{versions}; {where['processor']}, {where['threads']} threads"]
    for record in report["records"]:
        if record["section"] == "bandwidth":
            peak, copy = (number(record[k] / 1e9) for k in ("peak_bytes_per_s", "copy_bytes_per_s"))
            lines.append(
                f"{record['card']}: {peak} GB/s by {record['peak_from']}, of which shares are "
                f"taken; a copy within the device has {copy} GB/s."
            )
        elif record["section"] == "measured" and record["kind"] == MISSING:
            lines.append(f"Not measured: {record['why']}.")
    return "\n\n".join(lines)


def as_text(report: Record) -> str:
    """The tables for a terminal."""
    return text_of(heading(report), tables(report))


def as_markdown(report: Record) -> str:
    """The tables for a page; kernels as code, because templates look like HTML."""
    made = tables(report)
    for i, table in enumerate(made):
        if table.header[0] == "kernel":
            rows = [(f"`{row[0]}`", *row[1:]) for row in table.rows]
            made[i] = Table(table.title, table.header, rows)
    return markdown_of(heading(report), made)
