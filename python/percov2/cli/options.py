"""Parsers of the commands, flags made from the library's options, and parsers of numbers."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from percov2.options import DecodeOptions, EncodeOptions, Options

__all__ = [
    "DEFAULT_MODEL",
    "add_command",
    "add_flag",
    "add_options",
    "model_choices",
    "number",
    "options_of",
]

DEFAULT_MODEL = "tiny"


def add_command(
    commands: Any, name: str, run: Any, help_: str, needs: tuple[str, ...] = ()
) -> argparse.ArgumentParser:
    """Add a command that calls ``run`` with its arguments, among them its ``parser``.

    ``needs`` are an extra of percov2 and the modules of that extra without which nothing works.
    """
    added: argparse.ArgumentParser = commands.add_parser(name, help=help_, description=help_)
    added.set_defaults(run=run, parser=added, needs=needs)
    return added


def add_flag(
    parser: Any, name: str, help_: str, kind: Any = str, default: Any = None, **more: Any
) -> None:
    """Add a flag; its help ends with the default if there is one, which is none for ""."""
    if default is not None:
        help_ += f" (default: {'none' if default == '' else default})"
    parser.add_argument(name, help=help_, type=kind, default=default, **more)


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Return a parser of one number from ``low`` to ``high``, both included."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(low - 1)
        if not low <= value <= high:  # also false for nan
            raise argparse.ArgumentTypeError(f"must be {low} to {high}, not {text}")
        return value

    return parse


def add_options(
    parser: argparse.ArgumentParser, kind: type[EncodeOptions] | type[DecodeOptions], *left_out: str
) -> None:
    """Add a flag for every field of the options, except for those left out."""
    shown = [one for one in dataclasses.fields(kind) if one.name not in left_out]
    choices = model_choices()
    either: Any = parser
    if any(one.name == "stages" for one in shown):
        either = parser.add_mutually_exclusive_group()
    for one in shown:
        help_, low, high = (one.metadata[key] for key in ("help", "low", "high"))
        settings: dict[str, Any] = {"default": one.default, "help": choices.get(one.name, help_)}
        if one.type == "bool":
            settings["action"] = "store_true"
        elif low is not None:
            settings["type"] = number(int if "int" in str(one.type) else float, low, high)
        group = either if one.name in ("target_bytes", "stages") else parser
        group.add_argument(f"--{one.name.replace('_', '-')}", **settings)


def model_choices() -> dict[str, str]:
    """Return the help of options that depend on the model, with the default model's choices."""
    from percov2.entropy.schedule import SCHEDULES
    from percov2.models.config import EMBEDDED, ModelConfig

    # Not of a folder of this name, which only --model may read.
    config = ModelConfig.load(EMBEDDED / DEFAULT_MODEL)
    rates = ", ".join(rate.name for rate in config.rates)
    return {
        "rate": f"rate of the model: for {DEFAULT_MODEL}, {rates} (default: the model's; "
        f"{DEFAULT_MODEL}'s is {config.default_rate})",
        "schedule": f"entropy schedule: {', '.join(SCHEDULES)} (default: the model's; "
        f"{DEFAULT_MODEL}'s is {config.default_schedule})",
    }


def options_of(kind: type[Options], arguments: argparse.Namespace) -> Options:
    """Return the options of a command line; a field without a flag has its default."""
    names = [one.name for one in dataclasses.fields(kind) if hasattr(arguments, one.name)]
    return kind(**{name: getattr(arguments, name) for name in names})
