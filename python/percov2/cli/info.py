"""``percov2 info``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from percov2.cli.faults import Fault, about, printable, say
from percov2.cli.models import add_model, check_choices, chosen_flags, open_codec
from percov2.cli.options import add_command, add_options
from percov2.container import bitstream
from percov2.options import DecodeOptions
from percov2.places import read

if TYPE_CHECKING:
    from percov2.codec import Codec
    from percov2.container.bitstream import ParsedFile

__all__ = ["add_parser", "info", "read_file"]

MAX_FILE_BYTES = 1 << 26
"""Upper bound on the length of a ``.pcv2`` file within the largest pixel limit."""
_UNUSED = ("realism", "steps", "guidance", "seed", "allow_truncated")


def add_parser(commands: Any) -> None:
    """Add ``info`` to the commands."""
    added = add_command(commands, "info", info, "Describe .pcv2 files.")
    help_ = ".pcv2 file to describe, a URL, or - for standard input"
    added.add_argument("inputs", nargs="+", metavar="FILE", help=help_)
    help_ = "print a JSON object, or a list of them for several files (default: lines of text)"
    added.add_argument("--json", action="store_true", help=help_)
    help_ = "decode the tokens, refuse a damaged file, print their SHA-256 (default: header only)"
    added.add_argument("--verify", action="store_true", help=help_)
    add_model(added)
    add_options(added, DecodeOptions, *_UNUSED)


def read_file(name: str) -> bytes:
    """Return the bytes of a path, URL or pipe; ValueError if too long for a ``.pcv2`` file."""
    data = read(name, MAX_FILE_BYTES)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"not a .pcv2 file: it is longer than {MAX_FILE_BYTES} bytes")
    return data


def info(arguments: argparse.Namespace) -> int | None:
    """Run ``percov2 info``."""
    codec = None
    if arguments.verify:
        check_choices(arguments)
    elif given := [*chosen_flags(arguments), *["--allow-sparse"] * arguments.allow_sparse]:
        raise Fault(f"only --verify reads {', '.join(given)}")
    records, faults = [], []
    for name in arguments.inputs:
        try:
            with about(name):
                data = read_file(name)
                parsed = bitstream.read(data, arguments.max_pixels)
                record = _describe(name, data, parsed)
            if arguments.verify:
                codec = codec or open_codec(arguments)
                with about(name):
                    record |= _verified(codec, data, arguments)
        except Fault as fault:
            faults.append(fault)
            if len(arguments.inputs) == 1:
                raise
            say(f"percov2: {fault}")
            continue
        records.append(record)
        if not arguments.json:
            _print_info(record)
    if arguments.json:
        print(json.dumps(records[0] if len(arguments.inputs) == 1 else records, indent=2))
    return (1 if records else 2) if faults else 0


def _verified(codec: Codec, data: bytes, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the facts of a file whose tokens are decoded."""
    import hashlib

    limits = {"max_pixels": arguments.max_pixels, "allow_sparse": arguments.allow_sparse}
    (decoded,) = codec.decode([data], **limits)
    return {
        "model": codec.config.name,
        "rate": decoded.rate.name,
        "caption": decoded.caption,
        "bytes": _parts(data, decoded.bits),
        "sha256": hashlib.sha256(decoded.tokens.astype("<i4").tobytes()).hexdigest(),
    }


def _describe(name: str, data: bytes, parsed: ParsedFile) -> dict[str, Any]:
    """Return the facts of a file that need no decoding of its tokens."""
    from percov2.container.captions import CAPTION_CODECS, decode_caption
    from percov2.entropy.schedule import SCHEDULES
    from percov2.models.config import embedded_rate

    header, model_id = parsed.header, f"{parsed.header.model_id:04x}"
    model, rate = embedded_rate(header.model_id) or (None, None)
    unread = header.caption_codec == bitstream.CAPTION_MODEL  # needs the model: --verify
    return {
        "file": name,
        "width": header.width,
        "height": header.height,
        "model_id": model_id,
        "model": model,
        "rate": rate,
        "rate_index": header.rate,
        "schedule": SCHEDULES[header.schedule],
        "stages_sent": header.stages_sent or "all",
        "draw_seed": header.seed if header.stages_sent else None,
        "caption_codec": CAPTION_CODECS[header.caption_codec],
        "caption": None if unread else decode_caption(header.caption_codec, header.caption),
        "bpp": 8 * len(data) / (header.height * header.width),
        "bytes": _parts(data, parsed.bits),
    }


def _parts(data: bytes, bits: dict[str, float]) -> dict[str, float]:
    """Return the bytes of each part of a file; an unread caption counts as tokens."""
    parts = {name: value / 8 for name, value in bits.items()}
    return {
        "total": len(data),
        "header": parts["header"],
        "caption": parts["caption"],
        # A damaged file may be shorter than its header claims; --verify refuses it.
        "tokens": max(0.0, len(data) - sum(parts.values())),
        "check": parts["check"],
    }


def _print_info(record: dict[str, Any]) -> None:
    parts = record["bytes"]
    model = record["model"] or "not an embedded model"
    caption = f"{record['caption']!r} ({record['caption_codec']})" if record["caption"] else "none"
    if record["caption"] is None:
        caption = "coded by the caption model, among the tokens; --verify decodes it"
    lines = {
        "image": f"{record['width']}x{record['height']}",
        "model": f"{record['model_id']} ({model})",
        "rate": record["rate"] or f"number {record['rate_index']}",
        "schedule": f"{record['schedule']}, stages sent: {record['stages_sent']}"
        + (f", draw seed {record['draw_seed']}" if record["draw_seed"] else ""),
        "caption": caption,
        "size": f"{parts['total']} bytes, {record['bpp']:.4f} bpp",
        "of that": f"header {parts['header']:.2f} (with {bitstream.PREFIX_BYTES} plain), check "
        f"{parts['check']:.0f}, caption {parts['caption']:.2f}, tokens {parts['tokens']:.2f}",
    }
    if "sha256" in record:
        lines["tokens"] = f"valid, sha256 {record['sha256']}"
    print(printable(record["file"]))
    for name, value in lines.items():
        print(f"  {name:9}{printable(value)}")
