"""``percov2 roundtrip``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from percov2.cli.evaluate import chosen_setting
from percov2.cli.faults import about, say, show
from percov2.cli.models import add_captioner, add_model, check_choices, open_codec
from percov2.cli.options import add_command, add_options, options_of
from percov2.options import DecodeOptions, EncodeOptions

__all__ = ["add_parser", "roundtrip"]


def add_parser(commands: Any) -> None:
    """Add ``roundtrip`` to the commands."""
    added = add_command(commands, "roundtrip", roundtrip, "Compress, restore and measure photos.")
    added.add_argument("inputs", type=Path, nargs="+", metavar="IN", help="photos, as image files")
    help_ = "folder for the .pcv2 files and the restored photos (required)"
    added.add_argument("--out", type=Path, required=True, metavar="DIR", help=help_)
    help_ = "print a JSON list of records (default: print sentences)"
    added.add_argument("--json", action="store_true", help=help_)
    add_model(added)
    add_options(added, EncodeOptions, "max_pixels")
    add_captioner(added)
    add_options(added, DecodeOptions, "max_pixels", "allow_truncated", "allow_sparse")


def roundtrip(arguments: argparse.Namespace) -> None:
    """Run ``percov2 roundtrip``."""
    with about("roundtrip"):
        encode, decode = options_of(EncodeOptions, arguments), options_of(DecodeOptions, arguments)
    check_choices(arguments, encode, decode)
    for path in arguments.inputs:
        with about(path):
            path.stat()
    from percov2.evaluation import report

    with about(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
    with about("roundtrip"):
        stems = report.plan_outputs(arguments.inputs, arguments.out)
    codec = open_codec(arguments)
    setting = chosen_setting(arguments)
    with about(f"model {arguments.model}"):
        report.warm_up(codec, setting)
    records, notes = [], []
    for path, stem in zip(arguments.inputs, stems, strict=True):
        with about(path):
            trip = report.round_trip(codec, path, setting)
        with about(arguments.out):
            report.write_round_trip(trip, arguments.out, stem)
        records.append(trip.record)
        notes += trip.notes
        if not arguments.json:
            show(report.sentence(trip.record))
    if arguments.json:
        print(json.dumps(records, indent=2))
    for note in sorted(set(notes)):
        (say if arguments.json else show)(f"percov2: note: {note}")
