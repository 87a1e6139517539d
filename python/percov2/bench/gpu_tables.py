"""A report of ``percov2 bench gpu`` as tables."""

from __future__ import annotations

from typing import Any

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
        _launches(by_section.get("launches", [])),
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
    rows = [_missing(r, len(header)) if r["kind"] == "missing" else _predicted(r) for r in records]
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


def _launches(records: list[Record]) -> Table:
    header = ("case", "kernel", "launches")
    rows = [
        (f"{r['images']} x {r['tokens']} tokens, V = {r['codebook']}", what, str(count))
        for r in records
        for what, count in (
            *((f"{name} (layers, head)", n) for name, n in r["layers_and_head"].items()),
            *((f"{name} (after them)", n) for name, n in r["after_transformer"].items()),
            ("copies to the host", r["copies_to_host"]),
        )
    ]
    return Table("Launches of encoding a batch", header, rows)


def heading(report: Record) -> str:
    """A paragraph about where the figures come from."""
    where = report["environment"]
    triton = f"triton {where['triton']}" if where["triton"] else "no triton"
    kernels = "with" if where["cuda_kernels"] else "without"
    return (
        f"percov2 {where['percov2']} ({kernels} CUDA kernels), torch {where['torch']}, {triton}, "
        f"{where['date']}\n\nPREDICTION: no CUDA device was found, so nothing here is measured. "
        "docs/gpu.md says how to measure on one."
    )


def as_text(report: Record) -> str:
    """The tables for a terminal."""
    return text_of(heading(report), tables(report))


def as_markdown(report: Record) -> str:
    """The tables for a page."""
    return markdown_of(heading(report), tables(report))
