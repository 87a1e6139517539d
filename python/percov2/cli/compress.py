"""``percov2 compress``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from percov2.cli.faults import about, say
from percov2.cli.models import add_captioner, add_model, check_choices, chosen_captioner, open_codec
from percov2.cli.options import add_command, add_options, options_of
from percov2.container import bitstream
from percov2.options import EncodeOptions

__all__ = ["add_parser", "compress"]


def add_parser(commands: Any) -> None:
    """Add ``compress`` to the commands."""
    added = add_command(commands, "compress", compress, "Compress a photo into a .pcv2 file.")
    added.add_argument("input", type=Path, metavar="IN", help="photo to compress, an image file")
    added.add_argument("output", type=Path, metavar="OUT.pcv2", help=".pcv2 file to write")
    add_model(added)
    add_options(added, EncodeOptions)
    add_captioner(added)


def compress(arguments: argparse.Namespace) -> None:
    """Run ``percov2 compress``."""
    from percov2.files import check_kind, check_outputs, write_bytes
    from percov2.images import read_image

    with about("compress"):
        check_outputs([arguments.output], [arguments.input])
        options = options_of(EncodeOptions, arguments)
    with about(arguments.output):
        check_kind(arguments.output, compressed=True)
    check_choices(arguments, options)
    with about(arguments.input):
        image = read_image(arguments.input, options.max_pixels)
    captioner = chosen_captioner(arguments)
    codec = open_codec(arguments)
    with about(arguments.input):
        (caption,) = captioner([image])
        data = codec.compress(image, options, caption=caption)
    with about(arguments.output):
        write_bytes(arguments.output, data)
    header = bitstream.read(data, options.max_pixels).header
    bpp = 8 * len(data) / (header.height * header.width)
    say(
        f"{arguments.output}: {len(data)} bytes, {bpp:.4f} bpp "
        f"({header.width}x{header.height}, {codec.config.rates[header.rate].name})"
    )
