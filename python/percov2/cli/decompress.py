"""``percov2 decompress``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from percov2.cli.faults import about, say
from percov2.cli.info import read_file
from percov2.cli.models import add_model, check_choices, open_codec
from percov2.cli.options import add_command, add_options, options_of
from percov2.container import bitstream
from percov2.options import DecodeOptions

__all__ = ["add_parser", "decompress"]


def add_parser(commands: Any) -> None:
    """Add ``decompress`` to the commands."""
    added = add_command(commands, "decompress", decompress, "Restore the photo of a .pcv2 file.")
    added.add_argument("input", type=Path, metavar="IN.pcv2", help=".pcv2 file to restore")
    added.add_argument("output", type=Path, metavar="OUT.png", help="image file to write")
    add_model(added)
    add_options(added, DecodeOptions)


def decompress(arguments: argparse.Namespace) -> None:
    """Run ``percov2 decompress``."""
    from percov2.files import check_kind, check_outputs, write_image

    with about("decompress"):
        check_outputs([arguments.output], [arguments.input])
    with about(arguments.output):
        check_kind(arguments.output, compressed=False)
    options = options_of(DecodeOptions, arguments)
    check_choices(arguments, decode=options)
    with about(arguments.input):
        data = read_file(arguments.input)
        bitstream.read(data, options.max_pixels)  # refuses a wrong file before torch is loaded
    codec = open_codec(arguments)
    with about(arguments.input):
        decoded = codec.decode([data], options)
        (image,) = codec.paint(decoded, options)
    with about(arguments.output):
        write_image(image, arguments.output)
    sent, total = decoded[0].stages, decoded[0].stage_count
    drawn = f", {sent} of {total} stages from the file, the others drawn" if sent < total else ""
    say(f"{arguments.output}: {image.width}x{image.height}{drawn}")
