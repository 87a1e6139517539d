"""Expected errors of the command line: one line on stderr and an exit status."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "Fault",
    "about",
    "in_flags",
    "naming",
    "printable",
    "reason",
    "report_faults",
    "say",
    "show",
]


class Fault(Exception):
    """An expected error, with a message of one line that names the file and the problem."""


@contextmanager
def about(name: object) -> Iterator[None]:
    """Turn ValueError, OSError, ImportError, torch's RuntimeError and a lost run into a Fault.

    The message starts with ``name``. The file of an OSError follows if it is another one.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        raise Fault(f"{name}: {reason(name, error)}") from error


def reason(name: object, error: Exception) -> str:
    """Return the message of an error about ``name`` in one line, with options as flags."""
    text = str(error)
    if isinstance(error, MemoryError):
        text = "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        other = error.filename is not None and str(error.filename) != str(name)
        text = f"{error.filename}: {error.strerror}" if other else error.strerror
    return in_flags(" ".join(text.split()))


_FLAGS = re.compile(
    r"\b(max_pixels|target_bytes|draw_seed|allow_truncated|allow_sparse"
    r"|(?<=needs )stages|(?<=leave )realism)\b"
)


def in_flags(text: str) -> str:
    """Return a message of the library with its options written as flags."""
    return _FLAGS.sub(lambda found: "--" + found.group().replace("_", "-"), text)


def report_faults(work: Callable[[], int | None]) -> int:
    """Run a command and return its exit status.

    It is the command's own, 0 if that is None, 2 for an expected error, 130 for Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The terminal's encoding may lack characters of a caption or file name.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            _show_own_warnings()
            try:
                status = work()
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
    except Fault as fault:
        return _complain(str(fault), 2)
    except MemoryError:
        return _complain("not enough memory", 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except OSError as error:  # about() handles files, so stdout is full or closed
        _drop_stdout()
        return _complain(f"standard output: {error.strerror or error}", 2)
    return status or 0


def printable(text: object) -> str:
    """Return a text with control characters and invisible marks escaped, for a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def show(text: object) -> None:
    """Print a line to standard output, escaped for a terminal."""
    print(printable(text))


def say(text: str) -> None:
    """Print a line to standard error, which never carries data; a closed one is ignored."""
    bars = sys.modules.get("tqdm")
    beside_bars = bars.tqdm.external_write_mode(sys.stderr) if bars else contextlib.nullcontext()
    with contextlib.suppress(OSError, ValueError), beside_bars:
        print(printable(text), file=sys.stderr)


def _complain(text: str, status: int) -> int:
    say(f"percov2: {text}")
    return status


def _drop_stdout() -> None:
    """Discard the rest of stdout, so that Python does not report the error again on exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_current_name: list[Callable[[], str | None]] = []


@contextmanager
def naming(name: Callable[[], str | None]) -> Iterator[None]:
    """Show every warning of percov2, after the name of the input that the warning is about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module=r"percov2\.")
        _current_name.append(name)
        try:
            yield
        finally:
            _current_name.pop()


def _show_own_warnings() -> None:
    """Print each warning of percov2 on one line, also where warnings are errors."""
    warnings.filterwarnings("default", category=UserWarning, module=r"percov2\.")
    default = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if category.__module__.startswith("percov2."):
            name = _current_name[-1]() if _current_name else None
            say(f"percov2: {f'{name}: ' if name else ''}warning: {in_flags(str(message))}")
        else:
            default(message, category, *place, **more)

    warnings.showwarning = show
