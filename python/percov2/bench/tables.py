"""A report as tables: plain text for a terminal, Markdown for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
_TEXT = {"", "coder", "given", "what", "schedule", "step"}
_TEXT |= {"kernel", "case", "warps per SM", "limited by", "layers and head", "after them"}
"""Names of columns that hold text."""


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns and the cells; the first column is text."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def number(value: float | None) -> str:
    """Three significant digits, without an exponent; a dash for None."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    digits = 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 else 4
    return f"{value:.{digits}f}"


def tables(report: Record) -> list[Table]:
    """The tables of a report, empty ones left out."""
    records = report["records"]
    by_section: dict[str, list[Record]] = {}
    for record in records:
        by_section.setdefault(record["section"], []).append(record)
    made = [
        summary_table(report["summary"]),
        _coders("Coder only (million symbols per second)", by_section.get("coder", [])),
        _coders("From logits (million symbols per second)", by_section.get("logits", [])),
        _overhead(by_section.get("overhead", [])),
        _long(by_section.get("long", [])),
        _model(by_section.get("model", [])),
        _attention(by_section.get("attention", [])),
        _memory(by_section.get("memory", [])),
        _cold(by_section.get("cold", [])),
    ]
    return [table for table in made if table.rows]


def summary_table(lines: list[Record]) -> Table:
    """Name, value and goal of each line of a summary."""
    rows = [
        (
            line["name"],
            number(line["value"]),
            f"{'>=' if line['at_least'] else '<='} {number(line['goal'])}",
            "yes" if line["met"] else "no",
        )
        for line in lines
    ]
    return Table("Summary", ("", "value", "goal", "met"), rows)


def _coders(title: str, records: list[Record]) -> Table:
    header = ("coder", "given", "V", "images x tokens", "encode", "decode")
    rows = [
        (
            r["coder"],
            r["given"],
            str(r["codebook"]),
            f"{r['images']} x {r['tokens']}",
            number(r["encode"]["msym_per_s"]),
            number(r["decode"]["msym_per_s"]),
        )
        for r in sorted(records, key=lambda r: (r["codebook"], r["tokens"], r["images"]))
    ]
    return Table(title, header, rows)


def _overhead(records: list[Record]) -> Table:
    header = (
        "coder",
        "V",
        "images x tokens",
        "ideal, B",
        "written, B",
        "check, B",
        "above, B",
        "± error",
        "above, %",
    )
    rows = [
        (
            r["coder"],
            str(r["codebook"]),
            f"{r['images']} x {r['tokens']}",
            number(r["ideal_bytes_per_image"]),
            number(r["bytes_per_image"]),
            str(r["check_bytes"]),
            number(r["above_ideal"]),
            number(r["above_ideal_error"]),
            number(100 * r["above_ideal"] / r["ideal_bytes_per_image"]),
        )
        for r in records
    ]
    return Table("Bytes per image above the ideal, beyond the check", header, rows)


def _long(records: list[Record]) -> Table:
    header = ("symbols", "V", "prob_bits", "bytes", "above intervals, %", "above ideal, %")
    rows = [
        (
            str(r["symbols"]),
            str(r["codebook"]),
            str(r["prob_bits"]),
            str(r["bytes"]),
            number(r["percent_above_intervals"]),
            number(r["percent_above_ideal"]),
        )
        for r in records
    ]
    return Table("Long streams", header, rows)


def _model(records: list[Record]) -> Table:
    header = ("what", "schedule", "tokens", "images", "threads", "ms per image")
    rows = [
        (
            r["what"],
            r["schedule"],
            f"{r['grid']}x{r['grid']}",
            str(r["images"]),
            str(r["threads"]),
            number(r["ms_per_image"]),
        )
        for r in records
    ]
    return Table("Whole entropy model", header, rows)


def _attention(records: list[Record]) -> Table:
    header = ("coder", "schedule", "tokens", "images", "entries x keys", "ms per image")
    rows = [
        (
            r["coder"],
            r["schedule"],
            f"{r['grid']}x{r['grid']}",
            str(r["images"]),
            f"{r['entries']} x {r['keys']}",
            number(r["ms_per_image"]),
        )
        for r in records
    ]
    return Table("Attention of one layer, one thread", header, rows)


def _memory(records: list[Record]) -> Table:
    header = ("what", "tokens", "images", "peak, MB", "of that for the batch, MB")
    rows = [
        (
            r["what"],
            f"{r['grid']}x{r['grid']}",
            str(r["images"]),
            number(r["peak_mb"]),
            number(r["extra_mb"]),
        )
        for r in records
    ]
    return Table("Peak memory of the process", header, rows)


def _cold(records: list[Record]) -> Table:
    rows = [
        (name.removesuffix("_s").replace("_", " "), number(seconds * 1e3))
        for record in records
        for name, seconds in record.items()
        if name != "section"
    ]
    return Table("A fresh process", ("step", "ms"), rows)


def heading(report: Record) -> str:
    """One line about where the figures come from."""
    where = report["environment"]
    peers = report["peers"]
    beside = ""
    if peers is not None:
        names = ("constriction", "torchac", "compressai")
        beside = "; " + ", ".join(f"{name} {peers[name]}" for name in names)
    return (
        f"percov2 {where['percov2']} on {where['processor']} ({where['cores']} cores, "
        f"{where['instruction_set']}, load {where['load']:.1f}), torch {where['torch']}, "
        f"{where['date']}{beside}"
    )


def as_text(report: Record) -> str:
    """The tables for a terminal."""
    return text_of(heading(report), tables(report))


def as_markdown(report: Record) -> str:
    """The tables for a page."""
    return markdown_of(heading(report), tables(report))


def text_of(first: str, made: Sequence[Table]) -> str:
    """Tables below a first paragraph, for a terminal."""
    parts = [first]
    for table in made:
        cells = [table.header, *table.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(table.header))]
        lines = [
            "  ".join(
                cell.ljust(width) if _is_text(table, i) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        parts.append("\n".join([table.title, "-" * len(table.title), *lines]))
    return "\n\n".join(parts) + "\n"


def markdown_of(first: str, made: Sequence[Table]) -> str:
    """Tables below a first paragraph, for a page."""
    parts = [first]
    for table in made:
        sides = [":--" if _is_text(table, i) else "--:" for i in range(len(table.header))]
        lines = ["| " + " | ".join(row) + " |" for row in (table.header, tuple(sides), *table.rows)]
        parts.append("\n".join([f"### {table.title}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _is_text(table: Table, column: int) -> bool:
    return table.header[column] in _TEXT
