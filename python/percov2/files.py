"""Output files: what may be replaced, and atomic writing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from percov2.container.bitstream import is_file
from percov2.images import open_lazily
from percov2.stored_files import check_regular, one_line

__all__ = [
    "SUFFIX",
    "check_kind",
    "check_outputs",
    "encoded_picture",
    "is_stream",
    "open_atomically",
    "picture_format",
    "read_arrays",
    "same_file",
    "write_bytes",
    "write_image",
]

SUFFIX = ".pcv2"
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {"compress_level": 1}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"lossless": True}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
    ".bmp": ("BMP", {}),
    ".ppm": ("PPM", {}),
}
"""File ending -> Pillow's name of the format, and options for saving with little or no loss."""


def picture_format(path: Path | str) -> tuple[str, dict[str, Any]]:
    """Return Pillow's format and the saving options for the ending of a file name.

    Devices and pipes with other names take PNG.

    Raises:
        ValueError: an unknown ending.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS and is_stream(Path(path)):
        suffix = ".png"
    if suffix not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ValueError(f"no picture format for the ending {suffix!r}; use one of {known}")
    return _FORMATS[suffix]


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise ValueError if an output would overwrite an input or another output.

    Also raises if its folder does not exist. The message names the output.
    """
    taken = {same_file(path): f"the input {path}" for path in inputs}
    for output in outputs:
        if not output.parent.is_dir():
            raise ValueError(f"cannot write {output}: there is no folder {output.parent}")
        if output.is_dir():
            raise ValueError(f"cannot write {output}: it is a folder")
        if (place := same_file(output)) in taken:
            raise ValueError(f"cannot write {output}: it is the same file as {taken[place]}")
        taken[place] = f"the output {output}"


def same_file(path: Path | str) -> tuple[int, int] | str:
    """Return what two names of one file share: device and inode, or the path of a new file."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return os.path.realpath(path)


def check_kind(path: Path, compressed: bool) -> None:
    """Raise ValueError unless a result may have this name and replace what is there.

    A compressed file has the ending ``.pcv2``, a restored picture that of a picture format. An
    existing file is replaced only if it is empty or of the same kind. Devices and pipes accept
    both under any name.

    Args:
        path: where the result goes.
        compressed: True for a compressed file, False for a picture.
    """
    if is_stream(path):
        return
    if compressed and path.suffix.lower() != SUFFIX:
        raise ValueError(f"the name of a compressed file must end in {SUFFIX}")
    if not compressed:
        picture_format(path)
    if not path.is_file() or path.stat().st_size == 0:
        return
    with open(path, "rb") as stream:
        if compressed and not is_file(stream.read(2)):
            raise ValueError(f"it exists and is no {SUFFIX} file, so it is not replaced")
        if not compressed and not _holds_picture(stream):
            raise ValueError("it exists and is no picture, so it is not replaced")


_DESCRIPTOR = re.compile(r"/dev/(stdout|stderr|fd/(\d+))|/proc/self/fd/(\d+)")


def _descriptor(path: Path | str) -> int | None:
    """Return the open file that a name such as ``/dev/stdout`` stands for, or None."""
    found = _DESCRIPTOR.fullmatch(os.path.abspath(path))
    if found is None:
        return None
    named = {"stdout": 1, "stderr": 2}.get(found[1])
    return named or int(found[2] or found[3])


def is_stream(path: Path) -> bool:
    """Return True for devices and pipes, and for names of open files such as ``/dev/stdout``."""
    special = path.exists() and not path.is_file() and not path.is_dir()
    return special or _descriptor(path) is not None


def _write_stream(path: Path, data: bytes) -> None:
    """Write to a device, a pipe or an open file, at its present offset."""
    number = _descriptor(path)
    if number == 1 and sys.stdout is None:  # the number may belong to another file by now
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), str(path))
    try:
        stream = open(path, "wb") if number is None else os.fdopen(os.dup(number), "wb")  # noqa: SIM115
        with stream:
            stream.write(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _holds_picture(stream: Any) -> bool:
    try:
        open_lazily(stream)
    except Exception:  # decoders raise errors of many types for other files
        return False
    return True


def read_arrays(
    path: Path, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, NDArray[Any]]:
    """Return arrays of an ``.npz`` file by name; ValueError if it is damaged or none.

    Other arrays than those of ``wanted`` names are not read.
    """
    check_regular(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged or no .npz file: it is no zip archive")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if wanted(name)}
    except MemoryError:
        reason = "its arrays do not fit in memory"
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        # numpy's advice is to load pickled objects, which may run any code.
        reason = "it holds objects, not numbers" if "pickle" in str(error) else one_line(error)
    raise ValueError(f"{path} is damaged or no .npz file: {reason}")


def write_image(image: Image.Image, path: Path | str) -> None:
    """Write a picture atomically, in the format of the name's ending; ValueError without one."""
    write_bytes(path, encoded_picture(image, path))


def encoded_picture(image: Image.Image, path: Path | str) -> bytes:
    """Return a picture file in the format of the name's ending; ValueError without one."""
    name, options = picture_format(path)
    encoded = io.BytesIO()
    image.save(encoded, format=name, **options)
    return encoded.getvalue()


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file atomically: write a file without a name, then give it the name.

    Where the file system has no such files, and to replace a file, a neighbour is renamed. Writes
    the target of a symbolic link, and keeps the permissions of a replaced file. Devices, pipes and
    files that cannot be replaced, such as mounted ones, are written directly. Raises OSError that
    names ``path`` if the file cannot be written. Nothing else is left behind, except by a process
    that is killed between two calls, and the next one removes that.
    """
    if is_stream(Path(path)):
        _write_stream(Path(path), data)
        return
    with open_atomically(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def open_atomically(path: Path | str) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name when it is closed without an exception.

    ``write_bytes`` explains how, and also writes streams. An OSError of the file names ``path``;
    other errors of the ``with`` block pass unchanged.
    """
    target = Path(os.path.realpath(path))
    with _as_errors_of(path):
        neighbour = _neighbour(target)
    try:
        with _as_errors_of(path):
            place = _open_unnamed(target.parent)
            stream: BinaryIO
            if place is None:
                stream = io.BufferedWriter(_NamedFile(neighbour, "xb", path))
            else:
                stream = io.BufferedRandom(_NamedFile(place, "w+b", path))
        with stream:
            yield stream
            with _as_errors_of(path):
                stream.flush()
                if place is not None and _named(stream, target, neighbour):
                    return
        with _as_errors_of(path):
            _replace(neighbour, target)
    finally:
        with contextlib.suppress(OSError):
            neighbour.unlink(missing_ok=True)


class _NamedFile(io.FileIO):
    """A file whose errors of writing have the name of the output."""

    def __init__(self, place: Path | int, mode: str, name: Path | str) -> None:
        super().__init__(place, mode)
        self._output = name

    def write(self, data: Any, /) -> Any:
        """Write bytes, as FileIO."""
        with _as_errors_of(self._output):
            return super().write(data)


@contextlib.contextmanager
def _as_errors_of(path: Path | str) -> Iterator[None]:
    """Give every OSError the name of an output."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _replace(neighbour: Path, target: Path) -> None:
    """Give a file the name of another one, with its permissions."""
    if target.exists():
        shutil.copymode(target, neighbour)
    try:
        os.replace(neighbour, target)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        shutil.copyfile(neighbour, target)


def _open_unnamed(folder: Path) -> int | None:
    """Open a file without a name, of which a process that is killed leaves no part.

    None: not Linux, or a file system without such files.
    """
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    except (AttributeError, OSError):
        return None


def _named(stream: BinaryIO, target: Path, neighbour: Path) -> bool:
    """Name a file without a name ``target``; return False if its name is ``neighbour``."""
    for name in (target, neighbour):
        try:
            os.link(f"/proc/self/fd/{stream.fileno()}", name, follow_symlinks=True)
        except FileExistsError:
            continue
        except OSError:  # without /proc
            stream.seek(0)
            with open(neighbour, "xb") as copy:
                shutil.copyfileobj(stream, copy)
            return False
        return name == target
    raise FileExistsError(errno.EEXIST, "a temporary name is taken", str(neighbour))


_OLD_SECONDS = 60


def _neighbour(target: Path) -> Path:
    """Return a free name beside a file: always the same, so that no killed process leaves two.

    While another process uses it, the name is random.
    """
    name = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    usual = target.with_name(f".{name}.part")  # fits where any name fits
    with contextlib.suppress(FileNotFoundError):
        if time.time() - usual.lstat().st_mtime <= _OLD_SECONDS:
            return target.with_name(f".{secrets.token_hex(8)}.part")
        usual.unlink()
    return usual
