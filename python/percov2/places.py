"""Files by name for the command line: paths, URLs and standard streams."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from percov2.extras import require

__all__ = ["PIPE", "exists", "is_local", "is_url", "listed", "read", "write"]

PIPE = "-"
"""Name of standard input and standard output."""


def is_url(name: str) -> bool:
    """Return True for a URL such as ``s3://bucket/photo.jpg``.

    >>> is_url("s3://bucket/photo.jpg"), is_url("photos/a.jpg")
    (True, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name) is not None


def is_local(name: str) -> bool:
    """Return True for a path, False for a URL or a standard stream."""
    return name != PIPE and not is_url(name)


def read(name: str, limit: int) -> bytes:
    """Return at most ``limit`` bytes and one more.

    Raises:
        OSError: the file cannot be read.
        MissingExtra: a URL, and fsspec is not installed.
    """
    if name == PIPE:
        return sys.stdin.buffer.read(limit + 1)
    if is_url(name):
        system, path = _file_system(name)
        with system.open(path, "rb") as stream:
            data: bytes = stream.read(limit + 1)
        return data
    with open(name, "rb") as stream:
        return stream.read(limit + 1)


def write(name: str, data: bytes) -> None:
    """Write a whole file: a path atomically, with its folder; standard output without buffering.

    Raises:
        OSError: the file cannot be written.
        MissingExtra: a URL, and fsspec is not installed.
    """
    if name == PIPE:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    elif is_url(name):
        system, path = _file_system(name)
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        system.pipe_file(path, data)
    else:
        from percov2.files import write_bytes

        write_bytes(name, data)


def exists(name: str) -> bool:
    """Return True if there is a file that is not empty. Errors are those of ``read``."""
    if name == PIPE:
        return False
    if is_url(name):
        system, path = _file_system(name)
        return bool(system.isfile(path)) and system.size(path) != 0
    return Path(name).is_file() and Path(name).stat().st_size > 0


def listed(url: str, deep: bool) -> list[tuple[str, str]] | None:
    """Return the files of a URL that ends in "/" or is a folder, or None for another URL.

    A file is (its URL, its path below the URL); hidden files are left out.
    """
    system, path = _file_system(url)
    if not url.endswith("/") and not system.isdir(path):
        return None
    root = path.rstrip("/")
    found = []
    for place in sorted(system.find(path, maxdepth=None if deep else 1)):
        below = place[len(root) :].lstrip("/")
        if not any(part.startswith(".") for part in below.split("/")):
            found.append((system.unstrip_protocol(place), below))
    return found


def _file_system(url: str) -> tuple[Any, str]:
    require("remote", f"{url.partition('://')[0]}://", "fsspec")
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # the protocol needs a package of its own
        raise OSError(f"{url}: {error}") from error
    return system, path
