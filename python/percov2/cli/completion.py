"""``percov2 completion``: scripts that complete commands, options, their values and files.

The scripts are made from the parser. Those of an installed percov2 are three short files, which run
this command when a shell completes ``percov2`` for the first time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from percov2.cli.options import DEFAULT_MODEL, add_command

__all__ = ["SHELLS", "add_parser", "completion", "script", "subparsers"]

_FOLDERS = ("DIR", "FOLDER")
_FILES = ("FILE", "FILE.jsonl", "IN", "JSON", "OUT", "PHOTO", "PYTHON")
"""Placeholders of values that are paths."""
_OF_FILES = ("percov2 decompress", "percov2 info")
"""Commands whose operands are ``.pcv2`` files."""


class _Value(NamedTuple):
    """The values of an option or operand: words, and files ("", "all", "folders" or "pcv2")."""

    words: tuple[str, ...] = ()
    files: str = ""


class _Option(NamedTuple):
    flags: Sequence[str]
    help: str
    name: str
    value: _Value | None
    repeats: bool


class _Command(NamedTuple):
    """A command: its words, help, options, subcommands with their help, and operand."""

    path: str
    options: list[_Option]
    commands: dict[str, str]
    operand: _Value | None


def add_parser(commands: Any) -> None:
    """Add ``completion`` to the commands."""
    help_ = "Print a script that makes a shell complete percov2."
    added = add_command(commands, "completion", completion, help_)
    added.add_argument("shell", choices=list(SHELLS), help="shell that reads the script")


def completion(arguments: argparse.Namespace) -> None:
    """Run ``percov2 completion``."""
    print(script(arguments.root, arguments.shell), end="")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script of a shell of ``SHELLS`` for a parser with subparsers."""
    return SHELLS[shell](list(_described(parser)))


def subparsers(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Return the subcommands of a parser with their help, by name, in order."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {one.dest: one.help or "" for one in action._choices_actions}
            for name, one in action.choices.items():
                found[name] = helps.get(name, ""), one
    return found


def _described(parser: argparse.ArgumentParser) -> Iterator[_Command]:
    """Yield a command and, depth first, its subcommands."""
    options, operand = [], None
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        value = None if action.nargs == 0 else _value_of(action, parser.prog)
        if action.option_strings:
            name = str(action.metavar or action.dest)
            repeats = isinstance(action, argparse._AppendAction)
            options.append(
                _Option(action.option_strings, _plain(action.help), name, value, repeats)
            )
        elif operand is None:
            operand = value
    below = subparsers(parser)
    yield _Command(parser.prog, options, {name: _plain(below[name][0]) for name in below}, operand)
    for _, one in below.values():
        yield from _described(one)


def _plain(help_: str | None) -> str:
    return " ".join((help_ or "").replace("%%", "%").split())


def _value_of(action: argparse.Action, prog: str) -> _Value:
    if action.choices is not None:
        return _Value(tuple(map(str, action.choices)))
    if action.option_strings and (known := _known_values().get(action.option_strings[-1])):
        return known
    placeholder = str(action.metavar or "")
    if placeholder.endswith(_FOLDERS):
        return _Value(files="folders")
    if not action.option_strings and prog in _OF_FILES:
        return _Value(files="pcv2")
    is_path = action.type is Path or placeholder in _FILES
    return _Value(files="all" if is_path else "")


def _known_values() -> dict[str, _Value]:
    """Return the values of options that the parser takes as any text."""
    from percov2.entropy.schedule import SCHEDULES
    from percov2.models.config import EMBEDDED, ModelConfig

    rates = ModelConfig.load(EMBEDDED / DEFAULT_MODEL).rates
    return {
        "--device": _Value(("cpu", "cuda")),
        "--model": _Value((DEFAULT_MODEL,), "folders"),
        "--rate": _Value(tuple(rate.name for rate in rates)),
        "--schedule": _Value(tuple(SCHEDULES)),
    }


# bash --------------------------------------------------------------------------------------------

_BASH_FILES = {
    "": "",
    "all": "compopt -o default",
    "folders": "compopt -o filenames -o plusdirs",
    "pcv2": "compopt -o filenames -o plusdirs; "
    """mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -f -X '!*.pcv2' -- "$cur")""",
}


def _bash(commands: list[_Command]) -> str:
    paths = "|".join(quote(one.path) for one in commands[1:])
    values, options, operands = [], [], []
    for one in commands:
        plain = [flag for option in one.options for flag in option.flags]
        options.append(f"      {quote(one.path)}) _percov2_words {quote(' '.join(plain))} ;;")
        for option in one.options:
            if option.value is not None:
                cases = "|".join(quote(f"{one.path} {flag}") for flag in option.flags)
                values.append(f"    {cases}) {_bash_value(option.value)} return ;;")
        operand = _Value(tuple(one.commands)) if one.commands else one.operand
        if operand is not None:
            operands.append(f"      {quote(one.path)}) {_bash_value(operand)} ;;")
    lines = [
        "# bash completion of percov2, printed by `percov2 completion bash`",
        "",
        "_percov2_words() {",
        '  mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur")',
        "}",
        "",
        "_percov2() {",
        "  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} path=percov2 word",
        "  COMPREPLY=()",
        "  # bash makes words of --flag=value at the sign",
        "  if [[ $cur == = ]]; then cur=",
        "  elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi",
        '  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        '    case "$path $word" in',
        f'      {paths}) path+=" $word" ;;',
        "    esac",
        "  done",
        '  case "$path $prev" in',
        *values,
        "  esac",
        "  if [[ $cur == -* ]]; then",
        "    case $path in",
        *options,
        "    esac",
        "  else",
        "    case $path in",
        *operands,
        "    esac",
        "  fi",
        "}",
        "",
        "complete -F _percov2 percov2",
    ]
    return "\n".join(lines) + "\n"


def _bash_value(value: _Value) -> str:
    words = f"_percov2_words {quote(' '.join(value.words))}" if value.words else ""
    parts = [part for part in (words, _BASH_FILES[value.files]) if part]
    return "".join(f"{part}; " for part in parts).rstrip()


# zsh ---------------------------------------------------------------------------------------------

_ZSH_FILES = {"": "", "all": "_files", "folders": "_files -/", "pcv2": '_files -g "*.pcv2"'}


def _zsh(commands: list[_Command]) -> str:
    lines = ["#compdef percov2", "# printed by `percov2 completion zsh`", ""]
    for one in commands:
        specs = [spec for option in one.options for spec in _zsh_option(option)]
        if one.operand is not None:
            specs.append(f"*:file:{_zsh_action(one.operand)}")
        if one.commands:
            below = " ".join(f'{name}\\:"{_zsh_text(text)}"' for name, text in one.commands.items())
            specs += [f"1:command:(({below}))", "*:::argument:->below"]
        lines += [f"{_function(one.path)}() {{"]
        if one.commands:
            lines += ["  local curcontext=$curcontext context state line", "  typeset -A opt_args"]
        lines += ["  _arguments -s -S -C \\", *(f"    {quote(spec)} \\" for spec in specs)]
        lines[-1] = lines[-1].removesuffix(" \\")
        if one.commands:
            lines += ["  [[ $state == below ]] || return"]
            lines += ['  words=($line[1] "${words[@]}")', "  (( CURRENT += 1 ))"]
            lines += ['  curcontext="${curcontext%:*:*}:percov2-$line[1]:"', "  case $line[1] in"]
            lines += [f"    {name}) {_function(f'{one.path} {name}')} ;;" for name in one.commands]
            lines += ["  esac"]
        lines += ["}", ""]
    lines += ["# loaded by compinit, or read at the start of a shell"]
    lines += ['if [[ $funcstack[1] == _percov2 ]]; then _percov2 "$@"']
    lines += ["else compdef _percov2 percov2; fi"]
    return "\n".join(lines) + "\n"


def _function(path: str) -> str:
    return "_" + path.replace(" ", "_").replace("-", "_")


def _zsh_option(option: _Option) -> Iterator[str]:
    for flag in option.flags:
        repeats = "*" if option.repeats else ""
        text = f"[{_zsh_text(option.help)}]"
        if option.value is None:
            yield f"{repeats}{flag}{text}"
        else:
            joint = "=" if flag.startswith("--") else "+"
            name = _zsh_text(option.name)
            yield f"{repeats}{flag}{joint}{text}:{name}:{_zsh_action(option.value)}"


def _zsh_action(value: _Value) -> str:
    if value.words and value.files:
        return f"{{compadd -- {' '.join(value.words)}; {_ZSH_FILES[value.files]}}}"
    return f"({' '.join(value.words)})" if value.words else _ZSH_FILES[value.files] or " "


def _zsh_text(text: str) -> str:
    for sign in ("\\", "[", "]", ":", '"', "`", "$"):
        text = text.replace(sign, "\\" + sign)
    return text


# fish --------------------------------------------------------------------------------------------

_FISH_FILES = {
    "": "",
    "all": "",
    "folders": "(__fish_complete_directories)",
    "pcv2": "(__fish_complete_suffix .pcv2)",
}


def _fish(commands: list[_Command]) -> str:
    paths = " ".join(_fish_quote(one.path) for one in commands[1:])
    lines = [
        "# fish completion of percov2, printed by `percov2 completion fish`",
        "",
        "function __fish_percov2_at",
        "    set -l path percov2",
        "    for word in (commandline -opc)[2..]",
        f'        contains -- "$path $word" {paths}; and set path "$path $word"',
        "    end",
        '    test "$path" = "$argv"',
        "end",
        "",
        "complete -c percov2 -f",
    ]
    for one in commands:
        here = f"complete -c percov2 -n {_fish_quote(f'__fish_percov2_at {one.path}')}"
        for name, text in one.commands.items():
            lines.append(f"{here} -a {name} -d {_fish_quote(text)}")
        if one.operand is not None:
            lines.append(f"{here} {_fish_value(one.operand, '-f', '-F')}")
        for option in one.options:
            flags = (
                f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                for flag in option.flags
            )
            value = "" if option.value is None else f" {_fish_value(option.value, '-x', '-r -F')}"
            lines.append(f"{here} {' '.join(flags)}{value} -d {_fish_quote(option.help)}")
    return "\n".join(lines) + "\n"


def _fish_value(value: _Value, words_only: str, with_files: str) -> str:
    """Return the arguments of ``complete`` for a value, with switches for its kind."""
    words = " ".join(filter(None, [*value.words, _FISH_FILES[value.files]]))
    switch = with_files if value.files == "all" else words_only
    return f"{switch} -a {_fish_quote(words)}" if words else switch


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
"""Shell -> function that writes its script."""
