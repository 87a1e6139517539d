"""WebDataset shards: tar files whose members of one key are a sample."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MOST_BYTES", "Sample", "samples_of", "write_sample"]

MOST_BYTES = 1 << 28
"""Largest member of a shard that is read."""


@dataclass
class Sample:
    """A sample of a shard.

    Attributes:
        key: its name, without ending.
        members: the bytes by ending ("jpg", "txt", "seg.png"), as written, in order.
        too_large: the name and length of a member that was not read, "" for none.
    """

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    too_large: str = ""


def samples_of(tar: tarfile.TarFile) -> Iterator[Sample]:
    """Yield the samples of a tar file, which may be a stream.

    The names in a shard are only keys: nothing is written to them. WebDataset's own reader would
    take a shard's path for a URL or a command. A member with a name that begins with "__" belongs
    to no sample, as in WebDataset.

    Raises:
        tarfile.TarError, EOFError, OSError, zlib.error: the file is damaged.
    """
    sample: Sample | None = None
    for member in tar:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, ending = name.partition(".")
        if not member.isfile() or not dot or name.startswith("__"):
            continue
        key = folder + slash + stem
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key)
        if member.size > MOST_BYTES:
            sample.too_large = f"{member.name} has {member.size} bytes"
            continue
        content = tar.extractfile(member)
        sample.members[ending] = content.read() if content else b""
    if sample is not None:
        yield sample


def write_sample(tar: tarfile.TarFile, key: str, members: dict[str, Any]) -> None:
    """Add the members of a sample, with the same metadata in every run."""
    for ending, data in members.items():
        entry = tarfile.TarInfo(f"{key}.{ending}")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
