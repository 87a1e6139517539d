"""``percov2 man``: the manual page in roff, made from the parser."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator
from typing import Any

from percov2.cli.completion import subparsers
from percov2.cli.options import add_command

__all__ = ["add_parser", "man", "page"]

_STATUS = {
    "0": "Everything was done.",
    "1": "Some of several inputs failed, or a self-test of doctor did.",
    "2": "Nothing was done. The line on standard error says why.",
    "130": "The user pressed Ctrl-C.",
}
_EXAMPLES = {
    "Compress a photo, and restore it:": "percov2 compress photo.jpg photo.pcv2\n"
    "percov2 decompress photo.pcv2 restored.png",
    "Compress a folder with its sub-folders:": "percov2 compress -r photos -o small",
    "Compress a photo into at most 300 bytes:": "percov2 compress photo.jpg --target-bytes 300",
}


def add_parser(commands: Any) -> None:
    """Add ``man`` to the commands."""
    add_command(commands, "man", man, "Print the manual page in roff, for man -l.")


def man(arguments: argparse.Namespace) -> None:
    """Run ``percov2 man``."""
    print(page(arguments.root), end="")


def page(parser: argparse.ArgumentParser) -> str:
    """Return the manual page of a parser with subparsers, in the macros of man(7)."""
    text = _text(parser.description)
    lines = [
        f".TH {parser.prog.upper()} 1 2026-12-01 {parser.prog} {_quoted('User commands')}",
        *(".SH NAME", rf"{parser.prog} \- {text[0].lower()}{text[1:].removesuffix('.')}"),
        *(".SH SYNOPSIS", f".B {parser.prog}", r".I COMMAND", r"[\fIoption\fR ...]"),
        *(".SH DESCRIPTION", text),
        "The embedded model needs neither a GPU nor a network connection.",
        "Restored photos contain invented detail.",
        *_options(parser),
        ".SH COMMANDS",
        *_commands(parser),
        ".SH EXIT STATUS",
    ]
    for status, meaning in _STATUS.items():
        lines += [".TP", f".B {status}", _text(meaning)]
    lines += [".SH EXAMPLES"]
    for i, (meaning, code) in enumerate(_EXAMPLES.items()):
        lines += [*([".PP"] if i else []), _text(meaning), ".PP", ".RS", ".nf"]
        lines += [*map(_text, code.split("\n")), ".fi", ".RE"]
    lines += [".SH SEE ALSO", "https://arxiv.org/abs/2503.09368"]
    return "\n".join(_wrapped(line) for line in lines) + "\n"


def _wrapped(line: str) -> str:
    """Return a line of text as lines of at most 79 characters, and a macro as it is."""
    if line.startswith((".", "https:")) or len(line) < 80:
        return line
    parts = textwrap.wrap(line, 77, break_long_words=False, break_on_hyphens=False)
    return "\n".join(rf"\&{part}" if part.startswith((".", "'")) else part for part in parts)


def _commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    for help_, one in subparsers(parser).values():
        operands = " ".join(
            rf"\fI{_text(str(action.metavar or action.dest))}\fR"
            for action in one._actions
            if not action.option_strings
        )
        yield f".SS {_quoted(rf'{_text(one.prog)} {operands}'.rstrip())}"
        yield _text(help_)
        if below := subparsers(one):
            yield rf"\fB{_text(one.prog)}\fR \fINAME\fR \fB\-\-help\fR lists the options:"
            for name, (what, deeper) in below.items():
                names = ", ".join(subparsers(deeper))
                yield from (
                    ".TP",
                    f".B {_text(name)}",
                    _text(f"{what} ({names})" if names else what),
                )
            continue
        for action in one._actions:
            if not action.option_strings:
                name = _text(str(action.metavar or action.dest))
                yield from (".TP", f".I {_quoted(name)}", _text(action.help))
        yield from _options(one, "")


def _options(parser: argparse.ArgumentParser, title: str = ".SH OPTIONS") -> Iterator[str]:
    if title:
        yield title
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            value = ""
            if action.nargs != 0:
                placeholder = action.metavar or action.dest.upper()
                if action.choices is not None:
                    placeholder = "|".join(map(str, action.choices))
                value = rf" \fI{_text(str(placeholder))}\fR"
            flags = ", ".join(rf"\fB{_text(flag)}\fR" for flag in action.option_strings)
            yield from (".TP", f"{flags}{value}", _text(action.help))


def _text(text: str | None) -> str:
    r"""Return a text as a line of roff: \e for a backslash, and no macro at its begin."""
    line = " ".join((text or "").replace("%%", "%").split())
    line = line.replace("\\", r"\e").replace("-", r"\-").replace("×", r"\(mu")
    return rf"\&{line}" if line.startswith((".", "'")) else line


def _quoted(text: str) -> str:
    return '"' + text.replace('"', r"\(dq") + '"'
