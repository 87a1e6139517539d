"""The command line: ``percov2 compress|decompress|info|roundtrip|eval|train|import-perco|bench``.

Nothing heavy is imported before a command needs it: ``info`` answers without torch. What can be
known to be wrong without a model is said before one is loaded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from percov2 import bitstream, cli_eval
from percov2.cli_faults import about, report_faults
from percov2.cli_model import (
    add_captioner,
    add_import,
    add_model,
    chosen_captioner,
    import_perco,
    open_codec,
)
from percov2.cli_options import add_options, options_of
from percov2.cli_version import VersionAction
from percov2.options import DecodeOptions, EncodeOptions

if TYPE_CHECKING:
    from percov2.bitstream import ParsedFile

MAX_FILE_BYTES = 1 << 26
"""No image within the largest pixel limit needs a longer ``.pcv2`` file."""
_PAINTING = ("realism", "steps", "guidance", "seed")
"""Options that ``info`` has no use for."""
EMBEDDED = Path(__file__).parent / "pretrained"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status (0, 2 for an expected error, 130 for Ctrl-C)."""

    def work() -> None:
        arguments = build_parser().parse_args(argv)
        arguments.run(arguments)

    return report_faults(work)


# Parser ------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``run``, a function of the parsed arguments."""
    from percov2.bench import command as bench

    parser = _Parser(prog="percov2", description="Photographs in a few hundred bytes.")
    parser.add_argument("--version", action=VersionAction, nargs=0, help="say what is installed")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], None], help_: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help_, description=help_)
        added.set_defaults(run=run)
        return added

    added = command("compress", compress, "Compress a picture into a .pcv2 file.")
    added.add_argument("input", type=Path, metavar="IN")
    added.add_argument("output", type=Path, metavar="OUT.pcv2")
    add_model(added)
    add_options(added, EncodeOptions)
    add_captioner(added)

    added = command("decompress", decompress, "Restore the picture of a .pcv2 file.")
    added.add_argument("input", type=Path, metavar="IN.pcv2")
    added.add_argument("output", type=Path, metavar="OUT.png")
    add_model(added)
    add_options(added, DecodeOptions)

    added = command("info", info, "Say what a .pcv2 file holds.")
    added.add_argument("input", type=Path, metavar="FILE")
    added.add_argument("--json", action="store_true", help="print one JSON object")
    added.add_argument(
        "--verify", action="store_true", help="decode the tokens and print their SHA-256"
    )
    add_model(added)
    add_options(added, DecodeOptions, *_PAINTING, "allow_truncated")

    added = command("roundtrip", roundtrip, "Compress, restore and measure pictures.")
    added.add_argument("inputs", type=Path, nargs="+", metavar="IN")
    added.add_argument("--out", type=Path, required=True, metavar="DIR")
    added.add_argument("--json", action="store_true", help="print a JSON list of records")
    add_model(added)
    add_options(added, EncodeOptions, "max_pixels")
    add_captioner(added)
    add_options(added, DecodeOptions, "max_pixels", "allow_truncated")

    cli_eval.add_parser(commands)
    _add_train(commands)
    added = command("import-perco", import_perco, "Make a model of published PerCo (SD) weights.")
    add_import(added)
    bench.add_parser(commands)
    return parser


# Compress, decompress, info ----------------------------------------------------------------------


def _read_file(path: Path) -> bytes:
    with open(path, "rb") as stream:
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"not a .pcv2 file: it is longer than {MAX_FILE_BYTES} bytes")
    return data


def compress(arguments: argparse.Namespace) -> None:
    """``percov2 compress``."""
    from percov2.images import check_outputs, read_image, write_bytes

    with about("compress"):
        check_outputs([arguments.output], [arguments.input])
        options = options_of(EncodeOptions, arguments)
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
    print(
        f"{arguments.output}: {len(data)} bytes, {bpp:.4f} bpp "
        f"({header.width}x{header.height}, {codec.config.rates[header.rate].name})"
    )


def decompress(arguments: argparse.Namespace) -> None:
    """``percov2 decompress``."""
    from percov2.images import check_outputs, picture_format, write_image

    with about("decompress"):
        check_outputs([arguments.output], [arguments.input])
    with about(arguments.output):
        picture_format(arguments.output)
    options = options_of(DecodeOptions, arguments)
    with about(arguments.input):
        data = _read_file(arguments.input)
        bitstream.read(data, options.max_pixels)  # a wrong file is known before torch is loaded
    codec = open_codec(arguments)
    with about(arguments.input):
        decoded = codec.decode([data], options)
        (image,) = codec.paint(decoded, options)
    with about(arguments.output):
        write_image(image, arguments.output)
    drawn = ""
    total = decoded[0].stage_count
    if decoded[0].stages < total:
        drawn = f", tokens of {decoded[0].stages} of {total} stages, the others drawn"
    print(f"{arguments.output}: {image.width}x{image.height}{drawn}")


def info(arguments: argparse.Namespace) -> None:
    """``percov2 info``."""
    with about(arguments.input):
        data = _read_file(arguments.input)
        parsed = bitstream.read(data, arguments.max_pixels)
        record = _describe(arguments.input, data, parsed)
    if arguments.verify:
        codec = open_codec(arguments)
        with about(arguments.input):
            (decoded,) = codec.decode([data], max_pixels=arguments.max_pixels)
        import hashlib

        record["model"], record["rate"] = codec.config.name, decoded.rate.name
        record["caption"], record["bytes"] = decoded.caption, _parts(data, decoded.bits)
        record["sha256"] = hashlib.sha256(decoded.tokens.astype("<i4").tobytes()).hexdigest()
    if arguments.json:
        print(json.dumps(record, indent=2))
    else:
        _print_info(record)


def _describe(path: Path, data: bytes, parsed: ParsedFile) -> dict[str, Any]:
    """What a file says about itself, without decoding its tokens."""
    from percov2.caption import CAPTION_CODECS, decode_caption
    from percov2.entropy.schedule import SCHEDULES

    header = parsed.header
    model, rate = _embedded_model(header.model_id)
    unread = header.caption_codec == bitstream.CAPTION_MODEL  # this takes the model: --verify
    return {
        "file": str(path),
        "width": header.width,
        "height": header.height,
        "model_id": f"{header.model_id:04x}",
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
    """The bytes of a file by what they hold; a caption that was not read counts as tokens."""
    parts = {name: value / 8 for name, value in bits.items()}
    return {
        "total": len(data),
        "header": parts["header"],
        "caption": parts["caption"],
        # A damaged file may be shorter than its own header costs; --verify refuses it.
        "tokens": max(0.0, len(data) - sum(parts.values())),
        "check": parts["check"],
    }


def _embedded_model(model_id: int) -> tuple[str | None, str | None]:
    """Names of embedded model and rate whose ``model_id`` file says so; else (None, None).

    Such a file has a line per rate: its id in hexadecimal, a space, its name.
    """
    for path in sorted(EMBEDDED.glob("*/model_id")):
        for line in path.read_text(encoding="utf-8").splitlines():
            known, _, rate = line.partition(" ")
            if known == f"{model_id:04x}":
                config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
                return config["name"], rate
    return None, None


def _quoted(record: dict[str, Any]) -> str:
    if record["caption"] is None:
        return "by the caption model, among the tokens; --verify reads it"
    return f"{record['caption']!r} ({record['caption_codec']})" if record["caption"] else "none"


def _print_info(record: dict[str, Any]) -> None:
    parts = record["bytes"]
    model = record["model"] or "not an embedded one"
    lines = {
        "image": f"{record['width']}x{record['height']}",
        "model": f"{record['model_id']} ({model})",
        "rate": record["rate"] or f"number {record['rate_index']}",
        "schedule": f"{record['schedule']}, stages sent: {record['stages_sent']}"
        + (f", draw seed {record['draw_seed']}" if record["draw_seed"] else ""),
        "caption": _quoted(record),
        "size": f"{parts['total']} bytes, {record['bpp']:.4f} bpp",
        "of that": f"header {parts['header']:.2f} (with {bitstream.PREFIX_BYTES} plain), check "
        f"{parts['check']:.0f}, caption {parts['caption']:.2f}, tokens {parts['tokens']:.2f}",
    }
    if "sha256" in record:
        lines["tokens"] = f"valid, sha256 {record['sha256']}"
    print(record["file"])
    for name, value in lines.items():
        print(f"  {name:9}{value}")


# Roundtrip, eval ---------------------------------------------------------------------------------


def roundtrip(arguments: argparse.Namespace) -> None:
    """``percov2 roundtrip``."""
    from percov2.evaluation import report

    with about(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
    with about("roundtrip"):
        stems = report.plan_outputs(arguments.inputs, arguments.out)
    codec = open_codec(arguments)
    setting = cli_eval.chosen_setting(arguments)
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
            print(report.sentence(trip.record))
    if arguments.json:
        print(json.dumps(records, indent=2))
    for note in sorted(set(notes)):
        print(f"percov2: note: {note}", file=sys.stderr if arguments.json else sys.stdout)


# Train -------------------------------------------------------------------------------------------


def _add_train(commands: Any) -> None:
    from percov2.training import phases

    train_parser = commands.add_parser("train", help="Train a model, phase by phase.")
    added = train_parser.add_subparsers(dest="phase", required=True, metavar="PHASE")
    for phase, (text, options) in phases.PHASES.items():
        phase_parser = added.add_parser(phase, help=text, description=text)
        phase_parser.set_defaults(run=train)
        for option in options:
            phase_parser.add_argument("--" + option.replace("_", "-"), **phases.OPTIONS[option])


def train(arguments: argparse.Namespace) -> None:
    """``percov2 train PHASE``."""
    from percov2.training import loop, phases

    _, options = phases.PHASES[arguments.phase]
    module, name = phases.home(arguments.phase)
    with about(f"train {arguments.phase}"):
        getattr(importlib.import_module(module), name)(
            **{option: getattr(arguments, option) for option in options}
        )
    loop.leave_processes()


if __name__ == "__main__":
    sys.exit(main())
