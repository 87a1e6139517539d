"""``percov2 decompress``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from percov2.cli.faults import about, say
from percov2.cli.info import read_file
from percov2.cli.models import add_model, check_choices, open_codec
from percov2.cli.operands import Plan, Task, add_many, check_target, plan_of, shown
from percov2.cli.options import add_command, add_options, options_of
from percov2.container import bitstream
from percov2.options import DecodeOptions
from percov2.places import PIPE, write

if TYPE_CHECKING:
    from PIL import Image

    from percov2.batching import Outcome

__all__ = ["add_parser", "decompress"]


def add_parser(commands: Any) -> None:
    """Add ``decompress`` to the commands."""
    added = add_command(commands, "decompress", decompress, "Restore the photos of .pcv2 files.")
    add_many(added, ".pcv2 file", "OUT.png")
    add_model(added)
    add_options(added, DecodeOptions)


def decompress(arguments: argparse.Namespace) -> int | None:
    """Run ``percov2 decompress``."""
    from percov2.files import SUFFIX

    options = options_of(DecodeOptions, arguments)
    if arguments.engine:
        from percov2.cli.datasets import recode

        check_choices(arguments, decode=options)
        return recode(arguments, options)
    with about("decompress"):
        planned = plan_of(arguments, [SUFFIX], compressing=False)
    check_choices(arguments, decode=options)
    if planned.several:
        return _decompress_many(arguments, options, planned)
    (task,) = planned.tasks
    with about(task.source):
        data = read_file(task.source)
        bitstream.read(data, options.max_pixels)  # refuses a wrong file before torch is loaded
    codec = open_codec(arguments)
    with about(task.source):
        decoded = codec.decode([data], options)
        (image,) = codec.paint(decoded, options)
    with about(shown(task.target)):
        _store(task, image)
    sent, total = decoded[0].stages, decoded[0].stage_count
    drawn = f", {sent} of {total} stages from the file, the others drawn" if sent < total else ""
    say(f"{shown(task.target)}: {image.width}x{image.height}{drawn}")
    return None


def _decompress_many(arguments: argparse.Namespace, options: DecodeOptions, planned: Plan) -> int:
    from percov2.cli.many import run_many

    codec = open_codec(arguments)

    def load(task: Task) -> bytes:
        check_target(planned, task)
        return read_file(task.source)

    def start(tasks: Sequence[Task]) -> Iterator[Outcome[Image.Image]]:
        return codec.decompress_many(tasks, options, load=load, jobs=arguments.jobs)

    def finish(task: Task, image: Image.Image) -> dict[str, Any]:
        size = _store(task, image)
        return {"bytes": size, "width": image.width, "height": image.height}

    return run_many(planned, arguments, start, finish)


def _store(task: Task, image: Image.Image) -> int:
    """Write a picture in the format of its name, PNG for none; return the number of bytes."""
    from percov2.files import encoded_picture

    data = encoded_picture(image, "restored.png" if task.target == PIPE else task.target)
    write(task.target, data)
    return len(data)
