"""``percov2 COMMAND``: each command is a module of this package.

A command imports torch and loads a model only after all checks that need neither.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from percov2.cli import (
    bench,
    completion,
    compress,
    decompress,
    demo,
    doctor,
    evaluate,
    import_perco,
    info,
    man,
    roundtrip,
    train,
)
from percov2.cli.faults import about, printable, report_faults
from percov2.cli.version import VersionAction
from percov2.extras import require

__all__ = ["build_parser", "main"]

COMMANDS = (
    compress,
    decompress,
    info,
    roundtrip,
    evaluate,
    train,
    import_perco,
    demo,
    bench,
    doctor,
    completion,
    man,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    It is 0 if everything is done, 1 if some of several inputs failed, 2 for another expected error,
    and 130 for Ctrl-C.
    """

    def work() -> int | None:
        arguments, unknown = build_parser().parse_known_args(argv)
        if unknown:
            arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        if arguments.needs:
            extra, *modules = arguments.needs
            with about(arguments.parser.prog.removeprefix("percov2 ")):
                require(extra, "this command", *modules)
        status: int | None = arguments.run(arguments)
        return status

    return report_faults(work)


class _Parser(argparse.ArgumentParser):
    """A parser that accepts whole flags only, so that a new flag never changes an old command."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, printable(f"{self.prog}: {message}; see {self.prog} --help") + "\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, which set ``run`` to a function of the arguments.

    The arguments hold the parser itself as ``root``.
    """
    help_ = "Compress photos into a few hundred bytes, and restore them."
    parser = _Parser(prog="percov2", description=help_)
    help_ = "print the version and exit"
    parser.add_argument("-V", "--version", action=VersionAction, nargs=0, help=help_)
    parser.set_defaults(root=parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
