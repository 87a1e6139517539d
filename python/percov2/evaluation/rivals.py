"""Other systems as rivals: an external command, or a folder of pictures with a table of sizes.

A rival codes a picture at its own number of bytes. Classical codecs, which can be asked for a
number of bytes, are in ``baselines``.
"""

from __future__ import annotations

import csv
import math
import os
import shlex
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image

from percov2.evaluation.baselines import BASELINES, Attempt
from percov2.evaluation.setting import digest
from percov2.files import write_image
from percov2.images import read_image, to_rgb

__all__ = ["Command", "Folder", "Rival", "RivalError", "check_names", "parse_rivals"]

SIZES = "bpp.csv"
"""The table of sizes in a folder of a rival."""
_IN, _BITS, _OUT, _POINT = "{in}", "{bits}", "{out}", "{q}"
_QUOTED = 600
"""Number of characters of a failing command's error text that are quoted."""


class RivalError(RuntimeError):
    """The error of a rival that failed on a picture. The message names the rival and the file."""


@dataclass(frozen=True)
class Command:
    """A rival that is an external command, which runs once per picture and without a shell.

    Attributes:
        system: the name of the system.
        words: the command. It contains the placeholders {in}, {bits} and {out}.
        limit: the longest time that it may take for one picture, in seconds.
        point: the operating point of the system, or "".
    """

    system: str
    words: tuple[str, ...]
    limit: float = 600.0
    point: str = ""

    kind = "command"

    @property
    def name(self) -> str:
        """Return the name in reports: system and operating point."""
        return f"{self.system} {self.point}".strip()

    @property
    def source(self) -> str:
        """Return the command as text."""
        text = shlex.join(self.words)
        for mark in (_IN, _BITS, _OUT):
            text = text.replace(f"'{mark}'", mark)
        return text

    def check(self, paths: Sequence[Path]) -> None:
        """Do nothing: a command shows only when it runs whether it works."""

    def state(self, paths: Sequence[Path]) -> str:
        """Return "": what a command runs may change without being noticed."""
        return ""

    def restore(self, original: Image.Image, path: Path) -> tuple[Attempt, float | None]:
        """Code and restore a picture. Return the attempt and the time in seconds.

        ``path`` names the picture in messages. Raises RivalError if the command fails, exceeds its
        time, or does not write both files.
        """
        about = f"{self.name} on {path.name}"
        with tempfile.TemporaryDirectory(prefix="percov2-") as place:
            names = {_IN: "original.png", _BITS: "picture.bits", _OUT: "restored.png"}
            files = {mark: Path(place) / name for mark, name in names.items()}
            write_image(original, files[_IN])
            words = [_filled(word, files) for word in self.words]
            started = time.perf_counter()
            with tempfile.TemporaryFile() as errors:
                self._run(words, about, errors)
            seconds = time.perf_counter() - started
            bits = files[_BITS]
            if not bits.is_file() or bits.stat().st_size == 0:
                raise RivalError(f"{about}: the command wrote nothing to {_BITS} ({bits.name})")
            if not files[_OUT].is_file():
                raise RivalError(f"{about}: the command did not write {_OUT} ({files[_OUT].name})")
            restored = _restored(files[_OUT], original.size, about)
            return Attempt(restored, bits.stat().st_size), seconds

    def _run(self, words: list[str], about: str, errors: IO[bytes]) -> None:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            raise RivalError(f"{about}: {words[0]}: {error.strerror}") from error
        try:
            status = process.wait(self.limit)
        except subprocess.TimeoutExpired:
            raise RivalError(f"{about}: the command took more than {self.limit:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
                process.wait()
        if status:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4 * _QUOTED))
            text = errors.read().decode(errors="replace").strip()[-_QUOTED:]
            said = f": {text}" if text else " and wrote nothing to stderr"
            raise RivalError(f"{about}: the command ended with status {status}{said}")


@dataclass(frozen=True)
class Folder:
    """A rival whose restored pictures are in a folder, as STEM.png, with their sizes in bpp.csv.

    The table has the columns "name" (STEM, or the file name of the original) and either "bytes"
    or "bpp". A number of bits per pixel is rounded to whole bytes.
    """

    system: str
    folder: Path
    point: str = ""

    kind = "folder"

    @property
    def name(self) -> str:
        """Return the name in reports: system and operating point."""
        return f"{self.system} {self.point}".strip()

    @property
    def source(self) -> str:
        """Return the name of the folder."""
        return self.folder.name

    def check(self, paths: Sequence[Path]) -> None:
        """Raise an error unless the folder has a restored picture and a size for every path."""
        for path in paths:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the evaluation gives them
                original = Image.fromarray(to_rgb(read_image(path)))
            self.restore(original, path)

    def state(self, paths: Sequence[Path]) -> str:
        """Return a digest of the table and of the restored pictures of all paths."""
        files = [self.folder / SIZES, *(self.folder / f"{path.stem}.png" for path in paths)]
        return digest(*(file.read_bytes() for file in files))

    def restore(self, original: Image.Image, path: Path) -> tuple[Attempt, float | None]:
        """Return the attempt for the picture of ``path``, and no time.

        Raises ValueError if the table is wrong or has no row for the picture, and RivalError if the
        restored picture is missing or wrong.
        """
        size = self._size(path, original.width * original.height)
        restored = self.folder / f"{path.stem}.png"
        if not restored.is_file():
            raise RivalError(f"{self.name}: {restored} is missing")
        return Attempt(_restored(restored, original.size, str(restored)), size), None

    def _size(self, path: Path, pixels: int) -> int:
        sizes = self._sizes()
        found = sizes.get(path.name) or sizes.get(path.stem)
        if found is None:
            raise ValueError(f"{self.folder / SIZES}: no row for {path.stem}")
        unit, value = found
        return max(1, round(value if unit == "bytes" else value * pixels / 8))

    def _sizes(self) -> dict[str, tuple[str, float]]:
        path = self.folder / SIZES
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.reader(stream))
        head = [word.strip() for word in rows[0]] if rows else []
        if head not in (["name", "bytes"], ["name", "bpp"]):
            raise ValueError(f"{path}: the first line must be name,bytes or name,bpp")
        sizes: dict[str, tuple[str, float]] = {}
        for number, row in enumerate(rows[1:], 2):
            if not row:
                continue
            try:
                name, value = row[0].strip(), float(row[1])
            except (IndexError, ValueError):
                value = math.nan
            whole = head[1] == "bpp" or value == round(value) if math.isfinite(value) else False
            if len(row) != 2 or not whole or value <= 0:
                raise ValueError(
                    f"{path}, line {number}: {','.join(row)!r} is not {','.join(head)}"
                )
            if name in sizes:
                raise ValueError(f"{path}, line {number}: {name} has two rows")
            sizes[name] = head[1], value
        return sizes


Rival = Command | Folder


def parse_rivals(text: str, limit: float = 600.0) -> list[Rival]:
    """Return the rivals of a text like NAME=COMMAND, NAME=FOLDER or NAME:Q1,Q2=COMMAND.

    A command contains the placeholders {in} (the original, PNG), {bits} (the file to write, whose
    size counts) and {out} (the restored picture to write, PNG). There is one rival for each
    operating point Q1, Q2, …, with {q} replaced by the point. ``limit`` is the time limit of a
    command in seconds per picture.

    Raises ValueError for any other text.

    >>> [rival.name for rival in parse_rivals("x:1,2=x -q {q} {in} {bits} {out}")]
    ['x 1', 'x 2']
    """
    named, _, value = text.partition("=")
    name, colon, points = (part.strip() for part in named.partition(":"))
    if not name or not value.strip():
        raise ValueError(f"{text!r} is not NAME=COMMAND, NAME:Q1,Q2=COMMAND or NAME=FOLDER")
    if "|" in named or not named.isprintable():
        raise ValueError(f"the name {named!r} must be printable and without |")
    marked = _POINT in value
    each = [point.strip() for point in points.split(",")] if colon else [""]
    if colon and (not all(each) or len(set(each)) < len(each)):
        raise ValueError(f"{named!r} needs different operating points, like {name}:1,2")
    if marked != bool(colon):
        missing = f"points in the name, like {name}:1,2=…" if marked else f"{_POINT} in the command"
        raise ValueError(f"the rival {name!r} needs {missing}")
    return [_rival(name, value.strip(), point, limit) for point in each]


def check_names(rivals: Sequence[Rival]) -> None:
    """Raise ValueError if two rivals have one name, or a rival that of a baseline or of percov2."""
    names = [rival.name for rival in rivals]
    for rival in rivals:
        own = rival.system == "original" or rival.system.split()[0] == "percov2"
        if own or rival.system in BASELINES or names.count(rival.name) > 1:
            raise ValueError(f"the name {rival.name!r} is used twice; rename the rival")


def _rival(name: str, value: str, point: str, limit: float) -> Rival:
    folder = Path(value.replace(_POINT, point))
    if folder.is_dir():
        return Folder(name, folder, point)
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise ValueError(f"the command of the rival {name!r} is not complete: {error}") from None
    absent = [mark for mark in (_IN, _BITS, _OUT) if not any(mark in word for word in words)]
    if absent:
        raise ValueError(
            f"{value!r} is neither a folder nor a command with {_IN}, {_BITS} and {_OUT}"
        )
    return Command(name, tuple(word.replace(_POINT, point) for word in words), limit, point)


def _filled(word: str, files: dict[str, Path]) -> str:
    for mark, path in files.items():
        word = word.replace(mark, str(path))
    return word


def _restored(path: Path, size: tuple[int, int], about: str) -> Image.Image:
    """Read a restored picture of the given (width, height), or raise RivalError."""
    try:
        restored = Image.fromarray(to_rgb(read_image(path)))
    except ValueError as error:
        raise RivalError(f"{about}: {error}") from error
    if restored.size != size:
        raise RivalError(f"{about}: {_unlike(restored.size, size)}")
    return restored


def _unlike(found: tuple[int, int], expected: tuple[int, int]) -> str:
    return f"the restored picture has {found[0]}x{found[1]} pixels, not {expected[0]}x{expected[1]}"
