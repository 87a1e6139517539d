"""``percov2 bench``: its options, and the output of its reports."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from percov2.cli.faults import about
from percov2.cli.models import add_model, check_choices, open_codec
from percov2.cli.options import add_command, number

__all__ = ["SECTIONS", "add_parser"]

SECTIONS = ("coder", "logits", "overhead", "model", "attention", "cold")
PEERS = Path(".peers/bin/python")
ENTROPY_MODEL = Path(__file__).parent.parent / "pretrained" / "tiny" / "r031" / "entropy"


def add_parser(commands: Any) -> None:
    """Add ``bench`` to the commands."""
    benches = commands.add_parser("bench", help="Measure the parts of percov2.")
    added = benches.add_subparsers(dest="bench", required=True, metavar="BENCHMARK")
    help_ = "Measure the entropy engine, alone or beside other coders."
    parser = add_command(added, "entropy", bench_entropy, help_, ("torch", "torch"))
    _add_outputs(parser, "run few and small cases, for a few seconds (default: run all)")
    help_ = f"comma-separated sections to run (default: {','.join(SECTIONS)})"
    parser.add_argument("--only", type=_sections, default=SECTIONS, metavar="SECTIONS", help=help_)
    help_ = (
        "also time the coders installed by benchmarks/peers.sh; PYTHON is the interpreter of their "
        f"environment ({PEERS} if omitted; default: time percov2 alone)"
    )
    parser.add_argument("--peers", type=Path, nargs="?", const=PEERS, metavar="PYTHON", help=help_)
    help_ = "folder for plots as PNG files; needs matplotlib (default: no plots)"
    parser.add_argument("--plots", type=Path, metavar="DIR", help=help_)
    help_ = "folder of an integer entropy model (default: rate r031 of tiny)"
    parser.add_argument(
        "--entropy-model", type=Path, default=ENTROPY_MODEL, metavar="DIR", help=help_
    )
    help_ = "instruction set of the CPU engine, e.g. scalar or avx2 (default: the fastest)"
    parser.add_argument("--instruction-set", metavar="NAME", help=help_)
    help_ = "Measure the GPU kernels and compare their results with the CPU engine."
    parser = add_command(added, "gpu", bench_gpu, help_, ("torch", "torch"))
    _add_outputs(parser, "repeat each measurement less often (default: measure for minutes)")
    help_ = "Measure pictures per second, by phase and in all."
    parser = add_command(added, "codec", bench_codec, help_, ("torch", "torch"))
    help_ = "picture files to measure with (default: 24 synthetic photos of one size, 24 of mixed)"
    parser.add_argument("photos", type=Path, nargs="*", metavar="PHOTO", help=help_)
    _add_outputs(parser, "measure three small pictures (default: 48)")
    help_ = "pictures in work at the same time (default: all cores)"
    parser.add_argument("--jobs", type=number(int, 1, 1024), metavar="N", help=help_)
    add_model(parser)


def _add_outputs(parser: argparse.ArgumentParser, quick: str) -> None:
    parser.add_argument("--quick", action="store_true", help=quick)
    help_ = "JSON file for all figures (default: none)"
    parser.add_argument("--json", type=Path, metavar="FILE", help=help_)
    help_ = "Markdown file for the printed tables (default: none)"
    parser.add_argument("--markdown", type=Path, metavar="FILE", help=help_)


def _sections(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if not names or not set(names) <= set(SECTIONS):
        raise argparse.ArgumentTypeError(f"must be from {','.join(SECTIONS)}, not {text}")
    return names


def bench_entropy(arguments: argparse.Namespace) -> None:
    """Run ``percov2 bench entropy``."""
    with about("bench entropy"):
        _check_outputs(arguments)
        from percov2.bench import entropy, plots
        from percov2.bench.peers import Peers
        from percov2.entropy import rans

        peers = None if arguments.peers is None else Peers(arguments.peers)
        if arguments.plots is not None:
            plots.require_matplotlib()
        if arguments.instruction_set is not None:
            rans.use_instruction_set(arguments.instruction_set)
        plan = entropy.QUICK_PLAN if arguments.quick else entropy.FULL_PLAN
        report = entropy.run(plan, arguments.only, arguments.entropy_model, peers)
    _write(arguments, report)
    if arguments.plots is not None:
        with about(arguments.plots):
            plots.write_plots(report, arguments.plots)


def bench_gpu(arguments: argparse.Namespace) -> None:
    """Run ``percov2 bench gpu``."""
    with about("bench gpu"):
        _check_outputs(arguments)
        from percov2.bench import gpu

        report = gpu.run(gpu.QUICK_PLAN if arguments.quick else gpu.FULL_PLAN, gpu.find())
    _write(arguments, report)


def bench_codec(arguments: argparse.Namespace) -> None:
    """Run ``percov2 bench codec``."""
    check_choices(arguments)
    with about("bench codec"):
        _check_outputs(arguments)
        from percov2.bench import codec as bench
        from percov2.models.backbone import available_cores

        sets = bench.photos_of(bench.QUICK_PLAN if arguments.quick else bench.FULL_PLAN)
    if arguments.photos:
        sets = {"given": []}
        for path in arguments.photos:
            with about(path):
                sets["given"].append(path.read_bytes())
    codec = open_codec(arguments)
    with about("bench codec"):
        report = bench.run(codec, sets, arguments.jobs or available_cores())
    _write(arguments, report)


def _write(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print the tables, and write the files of --json and --markdown."""
    from percov2.bench.report import page

    tables = page(report)
    texts = {arguments.json: json.dumps(report, indent=2) + "\n", arguments.markdown: tables}
    for path, text in texts.items():
        if path is not None:
            with about(path):
                path.write_text(text, encoding="utf-8")
    print(tables, end="")


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raise ValueError, before minutes of measuring, for a file that cannot be written."""
    for path in (arguments.json, arguments.markdown):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"cannot write {path}: it is a folder, or its folder does not exist")
