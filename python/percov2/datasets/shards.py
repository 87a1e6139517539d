"""WebDataset shards: tar files whose members of one key are a sample."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from percov2.stored_files import check_regular, one_line

__all__ = ["DAMAGE", "MOST_BYTES", "PLAIN", "SHARDS", "Checked", "Sample", "members_of"]
__all__ += ["open_shard", "reason_of", "samples_of", "shards_in", "write_sample"]

PLAIN = (".tar",)
SHARDS = (*PLAIN, ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
"""Endings of the names of shards, in any case."""
DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error)
"""Errors of reading a damaged shard."""
_TARFILE: Any = tarfile
"""The module with the kinds of HeaderError, which its type hints leave out."""
MOST_BYTES = 1 << 28
"""Largest member of a shard that is read."""


@dataclass
class Sample:
    """A sample of a shard.

    Attributes:
        key: its name, without ending.
        members: the bytes by ending ("jpg", "txt", "seg.png"), as written, in order.
        too_large: the name and length of a member that was not read, "" for none.
        repeated: the name that two members share, "" for none.
        others: names of members with endings that were not asked for.
    """

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    too_large: str = ""
    repeated: str = ""
    others: list[str] = field(default_factory=list)


class Checked(tarfile.TarInfo):
    """Headers of members for ``tarfile.open(tarinfo=…)``.

    tarfile itself takes a damaged header for the end of the file, and ignores what follows the end.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Checked:
        """Return the next header.

        Raises:
            tarfile.ReadError: it is damaged, or something follows the end.
        """
        try:
            return super().fromtarfile(tar)
        except (_TARFILE.InvalidHeaderError, _TARFILE.TruncatedHeaderError) as error:
            raise tarfile.ReadError(f"a header is damaged ({error})") from error
        except _TARFILE.EOFHeaderError:
            assert tar.fileobj is not None
            while rest := tar.fileobj.read(1 << 16):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("more follows after the end of the tar file") from None
            raise


def shards_in(folder: Path, endings: tuple[str, ...] = SHARDS) -> tuple[list[Path], list[str]]:
    """Return the shards of a folder by name, and the names of its other files.

    Hidden files do not count.

    Raises:
        ValueError: the folder has no shard, or there is no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a folder of WebDataset shards")
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    shards = [path for path in paths if path.name.lower().endswith(endings)]
    if not shards:
        raise ValueError(f"{folder} contains no shards ({', '.join(endings)})")
    return shards, [path.name for path in paths if path not in set(shards) and not path.is_dir()]


def open_shard(path: Path, compressed: bool = True) -> tarfile.TarFile:
    """Open a shard for reading.

    Raises:
        ValueError: the path is no regular file.
        tarfile.TarError, EOFError, OSError, zlib.error: the file is damaged, or it is compressed
            and must not be.
    """
    check_regular(path)
    return tarfile.open(path, "r:*" if compressed else "r:", tarinfo=Checked)


def reason_of(shard: Path, error: Exception) -> str:
    """Return why a shard cannot be read, in one line."""
    # tarfile lists what each kind of compression says.
    return one_line(error).partition(":")[0] if shard.stat().st_size else "it is empty"


def members_of(tar: tarfile.TarFile) -> Iterator[tuple[str, Iterator[tuple[str, tarfile.TarInfo]]]]:
    """Yield the key of every sample of a tar file, and its members by ending, in order.

    The names in a shard are only keys: nothing is written to them. WebDataset's own reader would
    take a shard's path for a URL or a command. A member with a name that begins with "__" belongs
    to no sample, as in WebDataset, and the members of a sample follow each other.

    Raises:
        tarfile.TarError, EOFError, OSError, zlib.error: the file is damaged.
    """

    def named() -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, dot, ending = name.partition(".")
            if member.isfile() and dot and not name.startswith("__"):
                yield folder + slash + stem, ending, member

    for key, members in groupby(named(), lambda one: one[0]):
        yield key, ((ending, member) for _, ending, member in members)


def samples_of(tar: tarfile.TarFile, endings: Collection[str] | None = None) -> Iterator[Sample]:
    """Yield the samples of a tar file, which may be a stream; errors as for ``members_of``.

    Only members with ``endings``, in lower case, are read; None for all.
    """
    for key, members in members_of(tar):
        sample = Sample(key)
        for ending, member in members:
            if endings is not None and ending.lower() not in endings:
                sample.others.append(member.name)
                continue
            if ending in sample.members:
                sample.repeated = member.name
            if member.size > MOST_BYTES:
                sample.too_large = f"{member.name} has {member.size} bytes"
                continue
            content = tar.extractfile(member)
            sample.members[ending] = content.read() if content else b""
        yield sample


def write_sample(tar: tarfile.TarFile, key: str, members: dict[str, Any]) -> None:
    """Add the members of a sample, with the same metadata in every run."""
    for ending, data in members.items():
        entry = tarfile.TarInfo(f"{key}.{ending}")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
