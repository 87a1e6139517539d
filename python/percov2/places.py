"""Files by name for the command line: paths, URLs and standard streams."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from percov2.extras import require

__all__ = [
    "PIPE",
    "Found",
    "exists",
    "is_local",
    "is_url",
    "members",
    "open_for_reading",
    "open_for_writing",
    "read",
    "write",
]

PIPE = "-"
"""Name of standard input and standard output."""


class Found(NamedTuple):
    """A file, and its path below the operand that it was found with."""

    name: str
    below: str


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


@contextmanager
def open_for_reading(name: str) -> Iterator[Any]:
    """Open a path or URL as a stream of bytes; errors are those of ``read``."""
    if is_url(name):
        system, path = _file_system(name)
        with system.open(path, "rb") as stream:
            yield stream
    else:
        with open(name, "rb") as stream:
            yield stream


@contextmanager
def open_for_writing(name: str) -> Iterator[Any]:
    """Open a path or URL for writing, and make its folder.

    The file has its name only when it is closed without an exception, so that a process that is
    killed leaves no half of it under this name.
    """
    if not is_url(name):
        from percov2.files import open_atomically

        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with open_atomically(name) as stream:
            yield stream
        return
    system, path = _file_system(name)
    system.makedirs(path.rpartition("/")[0], exist_ok=True)
    with system.transaction:  # an exception discards the file
        stream = system.open(path, "wb")
        yield stream
        stream.close()


def exists(name: str) -> bool:
    """Return True if there is a file that is not empty. Errors are those of ``read``."""
    if name == PIPE:
        return False
    if is_url(name):
        system, path = _file_system(name)
        return bool(system.isfile(path)) and system.size(path) != 0
    return Path(name).is_file() and Path(name).stat().st_size > 0


def members(operand: str, deep: bool) -> list[Found] | None:
    """Return the files of a folder or pattern; None for an operand that is one input."""
    if operand == PIPE:
        return None
    if is_url(operand):
        return _files_of_url(operand, deep)
    if os.path.isdir(operand):
        return _files_below(operand, deep)
    if os.path.lexists(operand) or not glob.has_magic(operand):
        return None
    fixed = operand[: min(operand.find(c) for c in "*?[" if c in operand)]
    start = os.path.dirname(fixed)
    matches = sorted(glob.glob(operand, recursive=True))
    return [Found(one, os.path.relpath(one, start or ".")) for one in matches if not _hidden(one)]


def _files_below(folder: str, deep: bool) -> list[Found]:
    """Return the files of a folder in the order of their names, without hidden ones."""
    found: list[Found] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if deep and not _hidden(name))
        for name in sorted(names):
            if not _hidden(name):
                path = os.path.join(place, name)
                found.append(Found(path, os.path.relpath(path, folder)))
    return found


def _hidden(path: str) -> bool:
    return os.path.basename(path).startswith(".")


def _files_of_url(url: str, deep: bool) -> list[Found] | None:
    """Return the files of a URL that ends in "/" or is a folder, or None for another URL."""
    system, path = _file_system(url)
    if not url.endswith("/") and not system.isdir(path):
        return None
    root = path.rstrip("/")
    found = []
    for place in sorted(system.find(path, maxdepth=None if deep else 1)):
        below = place[len(root) :].lstrip("/")
        if not any(part.startswith(".") for part in below.split("/")):
            found.append(Found(system.unstrip_protocol(place), below))
    return found


def _file_system(url: str) -> tuple[Any, str]:
    require("remote", f"{url.partition('://')[0]}://", "fsspec")
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # the protocol needs a package of its own
        raise OSError(f"{url}: {error}") from error
    return system, path
