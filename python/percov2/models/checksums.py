"""The checksums of a model folder, so that damaged or mixed-up files never paint wrong pictures.

``checksums.sha256`` has the format of the command sha256sum. It is written last, by
``percov2 train export``; a folder without it is not checked.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from percov2.stored_files import check_regular, read_regular

__all__ = ["CHECKSUMS", "Checksums", "write_checksums"]

CHECKSUMS = "checksums.sha256"
_EDITABLE = ("README.md", "config.json", "model_id", CHECKSUMS)
"""Files of the model folder itself that have no checksum: people edit them, or they have their own
check."""


_MOST_LIST_BYTES = 1 << 24
_MOST_BYTES = 1 << 36
"""Largest file that is read for its checksum."""


def _sha256(path: Path) -> str:
    check_regular(path, _MOST_BYTES)
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Write the checksums of all networks and graphs of a model folder."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    lines = [
        f"{_sha256(folder / file)}  {file.as_posix()}\n"
        for file in files
        if str(file) not in _EDITABLE
    ]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


class Checksums:
    """The checksums of a model folder; ValueError for a list that is damaged or no regular file."""

    def __init__(self, folder: Path) -> None:
        self._folder, path = folder, folder / CHECKSUMS
        self._known: dict[str, str] = {}
        if not os.path.lexists(path):
            return
        content = read_regular(path, _MOST_LIST_BYTES)
        try:
            for line in content.decode("utf-8").splitlines():
                checksum, name = line.split("  ", 1)
                self._known[name] = checksum
        except ValueError as error:
            raise ValueError(f"{path} does not consist of checksums and names: {error}") from error

    def checked(self, component: str) -> Path:
        """Return a component's folder; ValueError unless its files have their checksums."""
        for name, checksum in self._known.items():
            if name.rpartition("/")[0] != component:
                continue
            path = self._folder / name
            if not path.is_file() or _sha256(path) != checksum:
                raise ValueError(
                    f"{path} is missing or has changed since {CHECKSUMS} of the model folder was "
                    "written; copy or download the folder again"
                )
        return self._folder / component
