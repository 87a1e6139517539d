"""``percov2 bench``: its options, and what becomes of a report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from percov2.cli.faults import about

SECTIONS = ("coder", "logits", "overhead", "model", "attention", "cold")
PEERS = Path(".peers/bin/python")
ENTROPY_MODEL = Path(__file__).parent.parent / "pretrained" / "tiny" / "r031" / "entropy"


def add_parser(commands: Any) -> None:
    """Add ``bench`` to the commands of the command line."""
    benches = commands.add_parser("bench", help="Measure the parts of percov2.")
    added = benches.add_subparsers(dest="bench", required=True, metavar="WHAT")
    what = "Measure the entropy engine, also beside other coders."
    quick = "few and small cases, seconds only"
    parser = _add_bench(added, "entropy", bench_entropy, what, quick)
    help_ = f"some of {','.join(SECTIONS)}"
    parser.add_argument("--only", type=_sections, default=SECTIONS, metavar="SECTIONS", help=help_)
    help_ = f"also time the coders that benchmarks/peers.sh installs ({PEERS})"
    parser.add_argument("--peers", type=Path, nargs="?", const=PEERS, metavar="PYTHON", help=help_)
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write PNGs (needs matplotlib)")
    help_ = "folder of an integer entropy model (default: that of tiny, r031)"
    parser.add_argument(
        "--entropy-model", type=Path, default=ENTROPY_MODEL, metavar="DIR", help=help_
    )
    help_ = "scalar, avx2, ... (default: the best one)"
    parser.add_argument("--instruction-set", metavar="NAME", help=help_)
    what = "Compare the GPU kernels with the CPU engine on a card, and measure them."
    _add_bench(added, "gpu", bench_gpu, what, "short measurements")


def _add_bench(added: Any, name: str, run: Any, what: str, quick: str) -> argparse.ArgumentParser:
    """Add a benchmark with the options that all have."""
    parser = added.add_parser(name, help=what, description=what)
    parser.set_defaults(run=run)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    return parser


def _sections(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if not names or not set(names) <= set(SECTIONS):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(SECTIONS)}, not {text}")
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


def _write(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Write what --json and --markdown ask for, and print the tables."""
    from percov2.bench.report import page

    tables = page(report)
    texts = {arguments.json: json.dumps(report, indent=2) + "\n", arguments.markdown: tables}
    for path, text in texts.items():
        if path is not None:
            with about(path):
                path.write_text(text, encoding="utf-8")
    print(tables, end="")


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raise ValueError for a file that could not be written after minutes of measuring."""
    for path in (arguments.json, arguments.markdown):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"cannot write {path}: it is a folder, or its folder does not exist")
