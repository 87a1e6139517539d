"""Units of a data set: a shard, a table, or some files; each is recoded as a whole.

A record in the folder ``manifest`` of the destination says that a shard or table is begun, then
that it is finished. A run that was killed at any moment goes on with units that are not finished.
An output without a record is not ours and is never replaced. Loose files are written one by one,
and those that exist are finished.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from percov2.datasets.shards import SHARDS
from percov2.files import same_file
from percov2.places import Found, exists, is_local, members, open_for_writing, read

__all__ = ["TABLES", "Plan", "Unit", "finished_record", "plan_units", "store_record"]

TABLES = (".parquet",)
_FILES_PER_UNIT = 256
_MOST_RECORD_BYTES = 1 << 26


class Unit(NamedTuple):
    """A part of a data set.

    Attributes:
        kind: "shard", "table" or "files".
        sources: (name, path below its operand) of the files; one for a shard or table.
        target: the output of a shard or table; the folder of the outputs of files.
        record: the record's place; "" for files.
    """

    kind: str
    sources: list[Found]
    target: str
    record: str


class Plan(NamedTuple):
    """The units of a run, and (input, message) of inputs without one."""

    units: list[Unit]
    faults: list[tuple[str, str]]


def plan_units(
    operands: Sequence[str], destination: str, endings: Sequence[str], deep: bool
) -> Plan:
    """Return the units of files, folders, patterns and URLs.

    Args:
        operands: shards (``.tar``, also compressed), tables (``.parquet``), and folders of these or
            of files.
        destination: folder of the outputs, a path or a URL.
        endings: endings of loose files, in lower case.
        deep: take files from sub-folders, too.
    """
    root = destination.rstrip("/") + "/"
    units: list[Unit] = []
    faults: list[tuple[str, str]] = []
    targets: dict[str, str] = {}
    inputs: set[object] = set()
    for operand in operands:
        found = members(operand, deep)
        if found is None:
            found = [Found(operand, operand.rpartition("/")[2])]
        inputs |= {_place(one.name) for one in found}
        loose = []
        for one in found:
            if not one.below.lower().endswith(tuple(endings)):
                continue
            stem = one.below.rpartition(".")[0]
            if stem in targets:
                faults.append((one.name, f"its output would be that of {targets[stem]}"))
                continue
            targets[stem] = one.name
            loose.append(one)
        groups = [loose[i : i + _FILES_PER_UNIT] for i in range(0, len(loose), _FILES_PER_UNIT)]
        units += [Unit("files", group, root, "") for group in groups]
        whole = [one for one in found if one.below.lower().endswith(SHARDS + TABLES)]
        for one in whole:
            kind = "table" if one.below.lower().endswith(TABLES) else "shard"
            below = _output_name(one.below)
            if below in targets:
                faults.append((one.name, f"its output {below} is also that of {targets[below]}"))
                continue
            targets[below] = one.name
            units.append(Unit(kind, [one], root + below, f"{root}manifest/{below}.json"))
        if not whole and not any(one.below.lower().endswith(tuple(endings)) for one in found):
            faults.append((operand, f"no file there ends in {', '.join(SHARDS + TABLES)}"))
    sound = [unit for unit in units if unit.kind == "files" or _place(unit.target) not in inputs]
    for unit in units:
        if unit not in sound:
            name = unit.sources[0].name
            faults.append((name, f"its output {unit.target} is an input; use another folder"))
    return Plan(sound, faults)


def _place(name: str) -> object:
    """Return what two names of one file share."""
    return same_file(name) if is_local(name) else name


def _output_name(below: str) -> str:
    """Return the name of an output: shards are written without compression."""
    for ending in SHARDS:
        if below.lower().endswith(ending):
            return below[: -len(ending)] + ".tar"
    return below


def finished_record(unit: Unit, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of a finished unit; None for a unit that is not finished.

    Raises:
        ValueError: the unit was finished with other settings, its record is damaged, or its output
            exists without a record.
    """
    if not unit.record or not exists(unit.target):
        return None
    if not exists(unit.record):
        raise ValueError(f"{unit.target} exists, and no run wrote it; use another folder")
    try:
        record = json.loads(read(unit.record, _MOST_RECORD_BYTES))
        before = record["settings"]
        record["pictures"], record["bytes"], record["faults"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{unit.record} is damaged; delete it and {unit.target} to recode the unit"
        ) from error
    differing = sorted(key for key in settings if before.get(key) != settings[key])
    if record.get("begun"):
        return None
    if differing:
        key = differing[0]
        raise ValueError(
            f"{unit.target} was made with {key} {before.get(key)!r}, not {settings[key]!r}; use "
            "another folder"
        )
    return dict(record)


def store_record(unit: Unit, record: dict[str, Any]) -> None:
    """Write the record of a begun or finished unit."""
    with open_for_writing(unit.record) as stream:
        stream.write(json.dumps(record, indent=1).encode())
