"""``percov2 import-perco``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from percov2.cli.faults import about


def add_parser(commands: Any) -> None:
    """Add ``import-perco`` to the commands."""
    help_ = "Make a model of published PerCo (SD) weights."
    added = commands.add_parser("import-perco", help=help_, description=help_)
    added.set_defaults(run=import_perco)
    added.add_argument("folder", type=Path, metavar="FOLDER", help="of checkpoints, or one of them")
    added.add_argument("out", type=Path, metavar="OUT", help="model folder to make")
    added.add_argument(
        "--base", help="folder or hub id of Stable Diffusion 2.1 (default: in the checkpoint)"
    )


def import_perco(arguments: argparse.Namespace) -> None:
    """``percov2 import-perco``."""
    from percov2.training import import_perco as importer

    with about("import-perco"):
        found = importer.import_perco(arguments.folder, arguments.out, arguments.base)
    for checkpoint in found:
        print(f"{checkpoint.rate.name}: {checkpoint.folder}")
    print(f"{arguments.out}: use it with --model perco:{arguments.out}")
