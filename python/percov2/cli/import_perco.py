"""``percov2 import-perco``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from percov2.cli.faults import about, show
from percov2.cli.options import add_command

__all__ = ["add_parser", "import_perco"]


def add_parser(commands: Any) -> None:
    """Add ``import-perco`` to the commands."""
    help_ = "Make a model folder from published PerCo (SD) weights."
    added = add_command(
        commands, "import-perco", import_perco, help_, ("torch", "torch", "diffusers")
    )
    help_ = "folder of one PerCo (SD) checkpoint or of several"
    added.add_argument("folder", type=Path, metavar="FOLDER", help=help_)
    added.add_argument("out", type=Path, metavar="OUT", help="model folder to write")
    help_ = "folder or hub id of Stable Diffusion 2.1 (default: the one named in the checkpoint)"
    added.add_argument("--base", help=help_)


def import_perco(arguments: argparse.Namespace) -> None:
    """Run ``percov2 import-perco``."""
    from percov2.training import import_perco as importer

    with about("import-perco"):
        found = importer.import_perco(arguments.folder, arguments.out, arguments.base)
    for checkpoint in found:
        show(f"{checkpoint.rate.name}: {checkpoint.folder}")
    show(f"{arguments.out}: use this model with --model perco:{arguments.out}")
