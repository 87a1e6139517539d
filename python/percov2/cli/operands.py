"""Operands of ``compress`` and ``decompress``: files, folders, patterns, URLs and pipes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from percov2.cli.faults import about
from percov2.cli.options import number
from percov2.places import PIPE, Found, exists, is_local, members

__all__ = ["Plan", "Task", "add_many", "check_target", "is_done", "plan_of", "shown"]


def add_many(parser: argparse.ArgumentParser, what: str, example: str) -> None:
    """Add the operands and flags of a command for several inputs.

    Args:
        parser: the command's parser.
        what: one input.
        example: name of one output.
    """
    help_ = (
        f"{what}, folder, pattern, URL, or - for standard input; in IN {example} or IN -, the "
        "second one is the output"
    )
    parser.add_argument("inputs", nargs="+", metavar="IN", help=help_)
    help_ = "file for one result, folder for several, or - for standard output (default: beside IN)"
    parser.add_argument("-o", "--output", metavar="OUT", help=help_)
    help_ = "take files from sub-folders, too (default: only from the folders given)"
    parser.add_argument("-r", "--recursive", action="store_true", help=help_)
    help_ = "leave out inputs whose output exists (default: write it again)"
    parser.add_argument("--skip-existing", action="store_true", help=help_)
    help_ = "inputs in work at the same time, if there are several (default: all cores)"
    parser.add_argument("--jobs", type=number(int, 1, 1024), metavar="N", help=help_)
    help_ = "write a JSON object per input to this file (default: none)"
    parser.add_argument("--report", type=Path, metavar="FILE.jsonl", help=help_)

    group = parser.add_argument_group("data sets")
    help_ = (
        "recode .tar shards, .parquet tables and folders into the folder of -o, and skip what a "
        "record there says is finished; ray uses a cluster (default: take single files)"
    )
    group.add_argument("--engine", choices=["local", "ray"], help=help_)
    help_ = "address of a Ray cluster (default: the one of the environment, or this machine)"
    group.add_argument("--address", help=help_)
    help_ = "pictures per call of the networks (default: 1 on the CPU, 32 on a GPU)"
    group.add_argument("--batch-size", type=number(int, 1, 1024), metavar="N", help=help_)
    help_ = "column of the pictures or files of a table (default: image or pcv2)"
    group.add_argument("--column", metavar="NAME", help=help_)


class Task(NamedTuple):
    """One input and where its result goes: paths, URLs, or "-" for standard input and output."""

    source: str
    target: str


class Plan(NamedTuple):
    """What a command line asks for.

    Attributes:
        tasks: a task per input, in order.
        faults: (input, message) of inputs that have no task.
        ignored: number of files of folders that have another ending.
        several: True if the operands may stand for more than one input.
        into_folder: True if the outputs go into a folder that is made if it is missing.
        derived: True if the names of the outputs are derived from those of the inputs.
        compressing: True if results are compressed files, False if they are pictures.
    """

    tasks: list[Task]
    faults: list[tuple[str, str]]
    ignored: int
    several: bool
    into_folder: bool
    derived: bool
    compressing: bool


def plan_of(arguments: argparse.Namespace, endings: Collection[str], compressing: bool) -> Plan:
    """Return what a command line with the flags of ``add_many`` asks for.

    Args:
        arguments: the command line.
        endings: endings of the files that are taken from folders, in lower case.
        compressing: True if results are compressed files, False if they are pictures.

    Raises:
        ValueError: the output cannot hold the results, or it would replace an input.
    """
    operands, output = arguments.inputs, arguments.output
    if output is None and len(operands) == 2 and _names_output(operands[1], compressing):
        *operands, output = operands
    planned = _plan(operands, output, endings, compressing, arguments.recursive, arguments.report)
    if not planned.several:
        for _, message in planned.faults:
            raise ValueError(message)
        for flag in ("skip_existing", "report", "jobs"):
            if getattr(arguments, flag) not in (None, False):
                return planned._replace(several=True)
        check_target(planned, planned.tasks[0])
    return planned


_ENDINGS = {True: ".pcv2", False: ".png"}


def _names_output(operand: str, compressing: bool) -> bool:
    """Return True if a second operand is an output: by its ending, or as a stream."""
    if operand == PIPE:
        return True
    if not is_local(operand) or os.path.isdir(operand):
        return False
    from percov2.files import is_stream

    if is_stream(Path(operand)):
        return os.path.realpath(operand) != os.path.realpath("/dev/stdin")
    ending = _ending(operand)
    return (ending == ".pcv2") == compressing


def check_target(planned: Plan, task: Task) -> None:
    """Check that a task's result may be written, and make its folder if that is planned.

    A picture beside its compressed file is replaced only if the command line names it, because it
    may be the original.

    Raises:
        ValueError: as ``percov2.files.check_kind``, a folder, a name in no folder, or a picture
            that must not be replaced.
        OSError: the folder cannot be made.
    """
    target, compressed = task.target, planned.compressing
    if target == PIPE:
        return
    from percov2.files import check_kind, check_outputs, picture_format

    original = planned.derived and not compressed and _beside(task) and exists(target)
    if original:
        raise ValueError(f"{target} exists and may be the original; name another output with -o")
    if not is_local(target):
        if compressed and _ending(target) != ".pcv2":
            raise ValueError(f"cannot write {target}: its name must end in .pcv2")
        if not compressed:
            picture_format(target)
        return
    path = Path(target)
    if planned.into_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    check_outputs([path], [])
    try:
        check_kind(path, compressed)
    except ValueError as error:
        raise ValueError(f"{target}: {error}") from error


def is_done(task: Task, compressing: bool) -> bool:
    """Return True if a task's output exists and is of the right kind, so that it may be left out.

    ``check_target`` refuses a file of another kind.
    """
    with about(task.target):
        if not exists(task.target):
            return False
    if not is_local(task.target):
        return True
    from percov2.files import check_kind

    try:
        check_kind(Path(task.target), compressing)
    except (ValueError, OSError):
        return False
    return True


def _beside(task: Task) -> bool:
    """Return True if input and output share a folder, also where the output is a link to it."""
    if not is_local(task.source) or not is_local(task.target):
        return task.source.rpartition("/")[0] == task.target.rpartition("/")[0]
    folders = (os.path.dirname(path) for path in (task.target, os.path.realpath(task.target)))
    return _place(os.path.dirname(task.source) or ".") in {_place(one or ".") for one in folders}


def shown(target: str) -> str:
    """Return a name for messages."""
    return "standard output" if target == PIPE else target


def _plan(
    operands: Sequence[str],
    output: str | None,
    endings: Collection[str],
    compressing: bool,
    deep: bool,
    report: Path | None,
) -> Plan:
    """Return the tasks of operands; ``deep`` for sub-folders.

    Raises:
        ValueError: an output must be a folder but is none, or the report is an input or output.
    """
    found: list[Found] = []
    faults: list[tuple[str, str]] = []
    ignored, several = 0, len(operands) > 1
    for operand in operands:
        several_found = members(operand, deep)
        if several_found is None:
            found.append(Found(operand, os.path.basename(operand)))
            continue
        fitting = [one for one in several_found if _ending(one.name) in endings]
        if not fitting:
            faults.append((operand, f"no file there ends in {', '.join(sorted(endings))}"))
        ignored, several = ignored + len(several_found) - len(fitting), True
        found += fitting
    folder = _is_folder(output, several)
    tasks: list[Task] = []
    taken = {_place(one.name): f"the same file as the input {one.name}" for one in found}
    for one in found:
        target = _target(one, output, folder, _ENDINGS[compressing])
        other = taken.get(_place(target)) if target != PIPE else None
        if other:
            faults.append((one.name, f"cannot write {target}: it is {other}"))
            continue
        taken[_place(target)] = f"the output for {one.name}"
        tasks.append(Task(one.name, target))
    if report is not None and (other := taken.get(_place(str(report)))):
        raise ValueError(f"cannot write the report {report}: it is {other}")
    derived = output is None or folder
    return Plan(tasks, faults, ignored, several, folder, derived, compressing)


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _is_folder(output: str | None, several: bool) -> bool:
    """Return True if results go into a folder; ValueError if an output cannot be one but must."""
    if output is None:
        return False
    if output != PIPE and (output.endswith(("/", os.sep)) or os.path.isdir(output)):
        return True
    if several and (output == PIPE or os.path.lexists(output) or _ending(output)):
        raise ValueError(f"-o {output} is no folder, but there are several inputs; end it with /")
    return several


def _target(one: Found, output: str | None, folder: bool, ending: str) -> str:
    if output is None:
        return PIPE if one.name == PIPE else os.path.splitext(one.name)[0] + ending
    if not folder:
        return output
    name = "stdin" if one.name == PIPE else os.path.splitext(one.below)[0]
    return (output if output.endswith("/") else output + "/") + name + ending


def _place(name: str) -> object:
    """Return what two names of the same file share."""
    from percov2.files import same_file

    return same_file(name) if is_local(name) else name
