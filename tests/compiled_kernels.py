"""Triton kernels without a GPU: interpreted, or compiled ahead of time (percov2.bench)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPABILITIES = (80, 90, 100)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def compare_on(device: str, script: str) -> None:
    """Run a script of this folder that compares kernels with their oracles, in its own process.

    On "cpu" with interpreted kernels (triton must learn that before it is imported), or on a card.
    """
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), device],
        env={**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "agreed"
