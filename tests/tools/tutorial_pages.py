"""Runs the code blocks of a page as its reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"^```(sh|console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALL = re.compile(r"^(?:python3 -m venv|pip install) .*\n", re.MULTILINE)
OUTPUT = re.compile(r"print\(.*\)  # (.*)$", re.MULTILINE)


def scripts(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield a script for bash per block of a page, and the lines that the page says it prints.

    The blocks of Python are one program, which runs last. Lines that install packages are left
    out. A ``...`` stands for any text. Commands of a ``console`` block may fail.
    """
    before = ""
    for block in BLOCK.finditer(text):
        language, code = block[1], block[2]
        if language == "sh":
            yield "set -e\n" + INSTALL.sub("", code), []
        elif language == "python":
            before += code
        else:
            lines = code.splitlines()
            commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            yield (
                "\n".join([*commands, "true"]),
                [line for line in lines if not line.startswith("$ ")],
            )
    if before:
        yield f"python - <<'PYTHON'\n{before}PYTHON\n", OUTPUT.findall(before)


def run_page(page: Path, folder: Path, **variables: str) -> None:
    """Run the blocks of a page in an empty folder, and require what the page says they print.

    ``variables`` are variables of the environment that the page offers to its readers.

    Raises:
        AssertionError: a block fails, or a line of the page is not printed.
    """
    programs = folder.parent / f"{folder.name}_bin"
    programs.mkdir()
    for name, module in (("python", ""), ("percov2", "-m percov2")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | variables
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": paths}
    for script, expected in scripts(page.read_text(encoding="utf-8")):
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}"
        for line in expected:
            pattern = re.escape(line.strip()).replace(re.escape("..."), ".*")
            assert re.search(pattern, done.stdout), f"{script}\nprints no {line!r}:\n{done.stdout}"
