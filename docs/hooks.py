"""Hooks of the documentation site: reference pages that are generated from the package.

A page holds a mark, and the build puts the generated text in its place:

* ``<!-- commands -->``: every command of percov2 with its help, from the parser;
* ``<!-- modules of PACKAGE -->``: the API of each public module of a package.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from percov2.cli.main import build_parser

PYTHON = Path(__file__).resolve().parents[1] / "python"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", command_reference())
    return re.sub(r"<!-- modules of (\S+) -->", lambda mark: module_reference(mark[1]), markdown)


def command_reference() -> str:
    """Return Markdown with a section per command, in the order of ``percov2 --help``."""
    os.environ["COLUMNS"] = "90"  # argparse wraps its help at the terminal's width
    return "\n".join(
        f"## {parser.prog}\n\n```text\n{parser.format_help().rstrip()}\n```\n"
        for parser in commands(build_parser())
    )


def commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return a parser and, depth first, those of its subcommands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += commands(command)
    return found


def module_reference(package: str) -> str:
    """Return the directives that describe each public module of a package."""
    folder = PYTHON.joinpath(*package.split("."))
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return "\n\n".join(f"::: {package}.{name}" for name in names)
