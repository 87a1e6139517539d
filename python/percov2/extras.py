"""Optional dependencies: the extras of the distribution, and the error where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["MissingExtra", "require"]


class MissingExtra(ImportError):
    """A part of percov2 whose extra is not installed; the message names the extra."""


def require(extra: str, purpose: str, *modules: str) -> None:
    """Raise MissingExtra unless all modules are installed, without importing one.

    Args:
        extra: the extra of percov2 that installs the modules.
        purpose: what needs them, as the beginning of a sentence.
        modules: top-level modules.

    >>> require("eval", "a report", "sys")
    >>> require("eval", "a report", "no_such_module")
    Traceback (most recent call last):
    ...
    percov2.extras.MissingExtra: a report needs no_such_module: pip install 'percov2[eval]'
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        raise MissingExtra(f"{purpose} needs {names}: pip install 'percov2[{extra}]'")
