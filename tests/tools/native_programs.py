"""Programs of tests/native, built once and run."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[1] / "native"


def tools(*names: str, required: str | None = None) -> None:
    """Skip where a tool is missing; fail instead if the variable ``required`` is set."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing and required and os.environ.get(required):
        pytest.fail(f"{required} is set, but there is no {' and no '.join(missing)}")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def build(request: pytest.FixtureRequest, folder: str, target: str, *options: str) -> Path:
    """The program ``target``, built in a folder that later runs of pytest find again."""
    where = request.config.cache.mkdir(folder)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    with (where / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's workers share the folder
        for command in (
            ["cmake", "-S", str(NATIVE), "-B", str(where), *generator, *options],
            ["cmake", "--build", str(where), "--target", target, "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return where / target


def run(*command: str | Path) -> str:
    """What a program prints; its failure is the test's."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    print(done.stdout)
    return done.stdout
