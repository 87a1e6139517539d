"""Expected errors of the command line: one line on stderr and an exit status, no traceback."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


class Fault(Exception):
    """An expected error: one line that names a file and what is wrong with it."""


@contextmanager
def about(name: object) -> Iterator[None]:
    """Turn ValueError, OSError and RuntimeError (torch's kind of fault) into a Fault.

    Its line begins with ``name``, and with the file of an OSError where that is another one.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            other = error.filename is not None and str(error.filename) != str(name)
            text = f"{error.filename}: {error.strerror}" if other else error.strerror
        raise Fault(f"{name}: {in_flags(' '.join(text.split()))}") from error


_FLAGS = re.compile(r"\b(max_pixels|target_bytes|draw_seed|allow_truncated)\b")


def in_flags(text: str) -> str:
    """Return a message of the library with options named as on the command line."""
    return _FLAGS.sub(lambda found: "--" + found.group().replace("_", "-"), text)


def report_faults(work: Callable[[], None]) -> int:
    """Do the work of a command line.

    Returns:
        The exit status: 0, 2 for an expected error, 130 for Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A caption or file name that the terminal's encoding lacks is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            _show_own_warnings()
            try:
                work()
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
    except Fault as fault:
        return _complain(str(fault), 2)
    except MemoryError:
        return _complain("not enough memory", 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except OSError as error:  # files are named by about(); what remains is a full or closed stdout
        _drop_stdout()
        return _complain(f"standard output: {error.strerror or error}", 2)
    return 0


def _complain(text: str, status: int) -> int:
    with contextlib.suppress(OSError):  # nobody listens
        print(f"percov2: {text}", file=sys.stderr)
    return status


def _drop_stdout() -> None:
    """Send the rest of stdout nowhere, or Python would complain about it once more on exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_own_warnings() -> None:
    """Print percov2's warnings as one line each; others as Python does."""
    default = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.startswith("percov2."):
            print(f"percov2: warning: {in_flags(str(message))}", file=sys.stderr)
        else:
            default(message, category, filename, lineno, file, line)

    warnings.showwarning = show
