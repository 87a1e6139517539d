"""``percov2 compress``."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from percov2.cli.faults import about, say
from percov2.cli.models import add_captioner, add_model, check_choices, chosen_captioner, open_codec
from percov2.cli.operands import Plan, Task, add_many, check_target, plan_of, shown
from percov2.cli.options import add_command, add_options, options_of
from percov2.container import bitstream
from percov2.options import EncodeOptions
from percov2.places import is_local, read, write

if TYPE_CHECKING:
    from PIL import Image

    from percov2.batching import Outcome

__all__ = ["add_parser", "compress"]

_MOST_BYTES = 1 << 30
"""Longest picture file of a URL or pipe."""


def add_parser(commands: Any) -> None:
    """Add ``compress`` to the commands."""
    added = add_command(commands, "compress", compress, "Compress photos into .pcv2 files.")
    add_many(added, "photo", "OUT.pcv2")
    add_model(added)
    add_options(added, EncodeOptions)
    add_captioner(added)


def compress(arguments: argparse.Namespace) -> int | None:
    """Run ``percov2 compress``."""
    from percov2.images import ENDINGS

    with about("compress"):
        options = options_of(EncodeOptions, arguments)
    if arguments.engine:
        from percov2.cli.datasets import recode

        check_choices(arguments, options)
        return recode(arguments, options)
    with about("compress"):
        planned = plan_of(arguments, ENDINGS, compressing=True)
    check_choices(arguments, options)
    if planned.several:
        return _compress_many(arguments, options, planned)
    (task,) = planned.tasks
    with about(task.source):
        image = _picture(task.source, options)
    captioner = chosen_captioner(arguments)
    codec = open_codec(arguments)
    with about(task.source):
        (caption,) = captioner([image])
        data = codec.compress(image, options, caption=caption)
    with about(shown(task.target)):
        write(task.target, data)
    facts = _facts(data, options)
    rate = codec.config.rates[bitstream.read(data, options.max_pixels).header.rate].name
    say(
        f"{shown(task.target)}: {len(data)} bytes, {facts['bpp']:.4f} bpp "
        f"({facts['width']}x{facts['height']}, {rate})"
    )
    return None


def _compress_many(arguments: argparse.Namespace, options: EncodeOptions, planned: Plan) -> int:
    from percov2.cli.many import run_many

    captioner = chosen_captioner(arguments)
    codec = open_codec(arguments)

    def load(task: Task) -> Image.Image:
        check_target(planned, task)
        return _picture(task.source, options)

    def start(tasks: Sequence[Task]) -> Iterator[Outcome[bytes]]:
        jobs = arguments.jobs
        return codec.compress_many(tasks, options, load=load, caption=captioner, jobs=jobs)

    def finish(task: Task, data: bytes) -> dict[str, Any]:
        write(task.target, data)
        return _facts(data, options)

    return run_many(planned, arguments, start, finish)


def _picture(source: str, options: EncodeOptions) -> Image.Image:
    from percov2.images import decode_image, read_image

    if is_local(source):
        return read_image(source, options.max_pixels)
    data = read(source, _MOST_BYTES)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"the picture is longer than {_MOST_BYTES} bytes")
    return decode_image(io.BytesIO(data), options.max_pixels)


def _facts(data: bytes, options: EncodeOptions) -> dict[str, Any]:
    header = bitstream.read(data, options.max_pixels).header
    size = {"width": header.width, "height": header.height}
    return {"bytes": len(data), "bpp": 8 * len(data) / (header.height * header.width), **size}
