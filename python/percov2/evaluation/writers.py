"""The tables and JSON files of reports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from percov2.files import write_bytes

__all__ = ["cell", "markdown_table", "write_json"]


def cell(form: str, value: float | None) -> str:
    """Return a formatted value, or a dash if it is None."""
    return "–" if value is None else form.format(value)


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], texts: int | None = None
) -> str:
    """Return a Markdown table.

    If ``texts`` is given, the columns after the first ``texts`` columns are aligned to the right.
    """
    left = len(head) if texts is None else texts
    rule = "|---" * left + "|--:" * (len(head) - left) + "|"
    first, *lines = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, rule, *lines])


def write_json(path: Path, record: Any) -> None:
    """Write a record atomically as JSON with an indent of two spaces and a final line break."""
    write_bytes(path, (json.dumps(record, indent=2) + "\n").encode())
