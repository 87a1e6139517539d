"""Files of models and training that are read whole: regular files of a bounded size, and JSON.

Opening a pipe waits for a writer, a device has no end, and a sparse file of a terabyte takes no
room on a disk but all memory when it is read.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["MOST_JSON_BYTES", "check_regular", "one_line", "read_json", "read_regular"]

MOST_JSON_BYTES = 1 << 24


def check_regular(path: Path, most_bytes: int | None = None) -> None:
    """Raise ValueError unless there is a regular file, or a link to one, of at most so many bytes.

    Raises:
        OSError: the folder may not be searched, or the name is too long.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing") from None
    if stat.S_ISREG(found.st_mode) and (most_bytes is None or found.st_size <= most_bytes):
        return
    size = "" if most_bytes is None else f" of at most {most_bytes} bytes"
    raise ValueError(f"{path} is no regular file{size}")


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Return the content of a regular file; errors are those of ``check_regular``."""
    check_regular(path, most_bytes)
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """Return the content of a JSON file in UTF-8.

    Raises:
        ValueError: as for ``read_regular``, no JSON, too deep, or a name twice in one object.
        OSError: the file cannot be read.
    """
    data = read_regular(path, MOST_JSON_BYTES)
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; which of two values under one name counts depends on the reader."""
    values = dict(pairs)
    if len(values) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} occurs twice in one object")
    return values


def one_line(error: object) -> str:
    """Return the message of an error of another library on one line, or the name of its type."""
    return " ".join(str(error).split()) or type(error).__name__
